"""The compose file as a user starts it, checked from outside. Called by .ci/containers, which finds engine and images.

Grafana is left out: what it would ask Prometheus, this asks.
"""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

PROJECT = f"echoscope-ci-{os.getpid()}"
IMAGE = f"echoscope:ci-{os.getpid()}"
# Beside whatever stack runs on this machine, and below the ports that connect(2) chooses from.
PORTS = {"ECHO_PORT": "27007", "SERVER_WEB_PORT": "29907", "CLIENT_WEB_PORT": "29908", "WATCH_WEB_PORT": "29917", "EBPF_WEB_PORT": "29927", "PROMETHEUS_PORT": "29090", "GRAFANA_PORT": "23000"}
ENV = os.environ | PORTS | {"ECHOSCOPE_IMAGE": IMAGE, "COMPOSE_PROJECT_NAME": PROJECT}
PROMETHEUS = f"http://127.0.0.1:{PORTS['PROMETHEUS_PORT']}"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
CORE = ["server", "client", "watch", "prometheus"]
# Each profile: its services, which alerts it must fire at which instance within how many seconds, and which figures of
# which instances turn red.
TROUBLE = {
    "leak": (["leaky", "leaked"], [("EchoscopeCloseWaitLeak", "leaky:9907", 300)], ("leaky:9907", ["CLOSE_WAIT", "Oldest CLOSE_WAIT", "Alerts firing"])),
    "churn": (
        ["churned", "churn"],
        # Without ports an echo fails too.
        [("EchoscopeLocalPortsWillRunOut", "churn:9907", 90), ("EchoscopeLocalPortsExhausted", "churn:9907", 180), ("EchoscopeEchoFailing", "churn:9907", 180)],
        ("churn:9907", ["Local ports used", "Alerts firing"]),
    ),
    "flaky": (
        ["flaky"],
        [("EchoscopeEchoFailing", "flaky:9907", 150), ("EchoscopeConnectionsReset", "server:9907", 180)],
        ("flaky:9907", ["Success", "Alerts firing"]),
    ),
}
# Every profile.
PROFILES = [*TROUBLE, "ebpf"]
RESOLVED_WITHIN = 300


def say(*words):
    print(f"containers: {time.strftime('%H:%M:%S')}", *words, flush=True)


def fail(*words):
    raise SystemExit("containers: " + " ".join(str(w) for w in words))


def run(*command, check=True):
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=1200)
    if check and done.returncode:
        fail(*command, "failed:", done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout


def compose(*arguments, profiles=(), check=True):
    return run(*COMPOSE, *(f"--profile={p}" for p in profiles), *arguments, check=check)


def inspect(service):
    # Also one that has ended.
    container = compose("ps", "-a", "-q", service, profiles=PROFILES).strip()
    return json.loads(run("docker", "inspect", container))[0]


def ask(path, **parameters):
    url = f"{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


def await_that(what, seconds, look):
    """Looks again and again until `look` returns nothing to complain of; returns after how many seconds."""
    began = time.monotonic()
    while True:
        try:
            complaint = look()
        except (urllib.error.URLError, http.client.HTTPException, json.JSONDecodeError, ConnectionError, TimeoutError) as error:
            complaint = f"{error}: {error.read().decode()}" if isinstance(error, urllib.error.HTTPError) else error
        took = time.monotonic() - began
        if not complaint:
            return took
        if took > seconds:
            fail(f"waited {seconds} s for {what}:", complaint)
        time.sleep(0.5)


# The image


def image():
    began = time.monotonic()
    compose("build", "server")
    say(f"image built in {time.monotonic() - began:.0f} s")
    about = json.loads(run("docker", "image", "inspect", IMAGE))[0]
    megabytes = about["Size"] / 1e6
    config = about["Config"]
    if megabytes >= 10:
        fail(f"the image has {megabytes:.1f} MB")
    if config["User"] != "65532:65532":
        fail("the image's user is", config["User"])
    if not config["Healthcheck"]:
        fail("the image has no healthcheck")
    labels = [f"org.opencontainers.image.{l}" for l in ("title", "description", "licenses", "version", "revision")]
    if absent := [l for l in labels if not config["Labels"].get(l)]:
        fail("the image lacks labels:", absent)
    if (version := re.findall(r'^version = "(.*)"', pathlib.Path("Cargo.toml").read_text(), re.M)) != [config["Labels"][labels[3]]]:
        fail("the image's version is not", version)
    container = run("docker", "create", IMAGE).strip()
    try:
        files = run("sh", "-c", f"docker export {container} | tar t").split()
    finally:
        run("docker", "rm", container)
    # What the engine itself puts into every container, beside our one file.
    ours = [f for f in files if not re.match(r"(dev|proc|sys|etc)/|\.dockerenv", f)]
    if ours != ["echoscope"]:
        fail("the image holds", ours)
    say(f"image: {megabytes:.1f} MB, one file, user {config['User']}")


def changed_source():
    """Of a source that has changed, only the crate is built: seen by one that cannot be."""
    with tempfile.TemporaryDirectory() as context:
        for name in ("Dockerfile", ".dockerignore", "Cargo.toml", "Cargo.lock"):
            shutil.copy(name, context)
        shutil.copytree("src", f"{context}/src")
        main = pathlib.Path(context, "src/main.rs")
        main.write_text(main.read_text() + 'compile_error!("this has changed");\n')
        base = [f"--build-arg=RUST_IMAGE={ENV['RUST_IMAGE']}"] if ENV.get("RUST_IMAGE") else []
        done = subprocess.run(["docker", "build", "--force-rm", *base, context], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    # It may be coloured.
    built = set(re.findall(r"Compiling(?:\x1b\[[0-9;]*m)* (\S+)", done.stdout))
    if done.returncode == 0 or "this has changed" not in done.stdout or built != {"echoscope"}:
        fail("a change of the source builds", built, done.stdout[-4000:])
    say("a change of the source builds the crate and nothing that it stands on")


# The stack


def healthy(services):
    states = {s: inspect(s)["State"] for s in services}
    return [f"{s}: {state['Status']}, {state['Health']['Status']}" for s, state in states.items() if state["Health"]["Status"] != "healthy"]


def unscraped(instances):
    up = {s["metric"]["instance"] for s in ask("query", query="up == 1")["result"]}
    return sorted(set(instances) - up)


def start():
    began = time.monotonic()
    compose("up", "-d", *CORE)
    await_that("health", 60, lambda: healthy(CORE))
    await_that("the first scrapes", 60, lambda: unscraped(["server:9907", "client:9907", "watch:9917"]))
    took = time.monotonic() - began
    say(f"all healthy and scraped {took:.1f} s after up")
    if took > 30:
        fail(f"all healthy and scraped only after {took:.1f} s")


def hardened(service, **allowed):
    about = inspect(service)
    root = pathlib.Path("/proc") / str(about["State"]["Pid"])
    status = dict(line.split(":\t", 1) for line in (root / "status").read_text().splitlines() if ":\t" in line)
    expected = {
        "Uid": "65532\t65532\t65532\t65532",
        "Gid": "65532\t65532\t65532\t65532",
        "CapEff": "0000000000000000",
        "CapPrm": "0000000000000000",
        "CapBnd": "0000000000000000",
        "NoNewPrivs": "1",
        "Seccomp": "2",
    } | allowed
    found = {key: status[key] for key in expected}
    if found != expected:
        fail(service, "runs with", found)
    mounts = [line.split() for line in (root / "mountinfo").read_text().splitlines()]
    if not any(m[4] == "/" and "ro" in m[5].split(",") for m in mounts):
        fail(service, "can write to its root")
    host = about["HostConfig"]
    descriptors = re.search(r"^Max open files +(\d+) +(\d+)", (root / "limits").read_text(), re.M).groups()
    if not (host["Memory"] and host["NanoCpus"] and host["PidsLimit"]) or descriptors != ("16384", "16384"):
        fail(service, "has not its limits:", host, descriptors)


def published():
    """What is up is published on this machine only."""
    bindings = {s: inspect(s)["HostConfig"]["PortBindings"] or {} for s in CORE}
    if not all(bindings[s] for s in ("server", "client", "prometheus")):
        fail("not published:", bindings)
    if beyond := [(s, b) for s, ports in bindings.items() for at in ports.values() for b in at if b["HostIp"] != "127.0.0.1"]:
        fail("published beyond this machine:", beyond)


# The kernel's own announcements


def page(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def by_the_kernels_word():
    """The profile ebpf: it starts, keeps no capability, and tells whole lives of both ends by tracepoint alone."""
    # Before Docker 23.0 no engine knows the two names, nor does its seccomp profile.
    old = int(run("docker", "version", "--format", "{{.Server.Version}}").split(".")[0]) < 23
    if old:
        ENV.update(CAP_BPF="SYS_ADMIN", CAP_PERFMON="CAP_SYS_ADMIN")
    began = time.monotonic()
    compose("up", "-d", "ebpf", profiles=PROFILES)
    await_that("health of ebpf", 60, lambda: healthy(["ebpf"]))
    port = PORTS["EBPF_WEB_PORT"]
    if 'echoscope_observer_info{observer="ebpf"} 1' not in page(port).splitlines():
        fail("ebpf sees by", re.findall("echoscope_observer_info.*", page(port)), compose("logs", "ebpf", profiles=PROFILES))
    # Both ends of a life, but for the minute of TIME_WAIT.
    steps = {
        "server": ["listen", "syn_recv", "established", "close_wait", "last_ack", "close"],
        "client": ["close", "syn_sent", "established", "fin_wait1", "fin_wait2", "time_wait"],
    }
    arrows = [(role, *arrow) for role, states in steps.items() for arrow in itertools.pairwise(states)]

    def unseen():
        now = page(port)
        series = 'echoscope_tcp_transitions_total{{evidence="{}",from="{}",role="{}",to="{}"}}'
        told = lambda evidence, role, start, end: re.search(re.escape(series.format(evidence, start, role, end)) + " ([0-9]+)", now)  # noqa: E731
        if any(int(found[1]) for arrow in arrows if (found := told("inferred", *arrow))):
            fail("a step was inferred:", re.findall('echoscope_tcp_transitions_total.*inferred.*', now))
        return [arrow for arrow in arrows if not (found := told("tracepoint", *arrow)) or not int(found[1])]

    await_that("whole lives by tracepoint", 30, unseen)
    await_that("its scrape", 60, lambda: unscraped(["ebpf:9907"]))
    # The two are given up; what an old engine needs instead is not. The bounding set is the engine's.
    kept = {"CapEff": f"{1 << 21:016x}", "CapPrm": f"{1 << 21:016x}", "CapBnd": f"{1 << 21:016x}"} if old else {"CapBnd": f"{3 << 38:016x}"}
    hardened("ebpf", Uid="0\t0\t0\t0", Gid="0\t0\t0\t0", **kept)
    say(f"ebpf: {len(arrows)} steps of both ends by tracepoint, none inferred, {'CAP_SYS_ADMIN, as this engine is old' if old else 'no capability kept'} ({time.monotonic() - began:.0f} s)")
    compose("rm", "-s", "-f", "ebpf", profiles=PROFILES)


# The dashboards


def chosen(dashboard):
    """The jobs and instances that the dashboard's own variables offer: "All" is these, not whatever else Prometheus scrapes."""
    values = {}
    for name in ("job", "instance"):
        variable = next(v for v in dashboard["templating"]["list"] if v["name"] == name)
        metric = re.fullmatch(rf"label_values\((.*), {name}\)", variable["query"]["query"])[1]
        series = ask("series", **{"match[]": substituted(metric, values), "start": time.time() - 30})
        offered = sorted({s[name] for s in series})
        values[f"${name}"] = variable.get("allValue") or "|".join(offered)
    return values


def substituted(expr, choice, instance=None):
    values = choice | {"$role": ".*", "$__rate_interval": "20s", "$__range": "5m"} | ({"$instance": instance} if instance else {})
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    if "$" in expr:
        fail("a variable that Grafana would not know:", expr)
    return expr


def dashboards():
    for file in sorted(pathlib.Path("dashboards").glob("*.json")):
        yield file.name, json.loads(file.read_text())


def panels():
    """Every panel, and what its dashboard is about now."""
    for file, dashboard in dashboards():
        choice = chosen(dashboard)
        rows = [p for p in dashboard["panels"] if p["type"] == "row"]
        for panel in dashboard["panels"] + [inner for row in rows for inner in row["panels"]]:
            if panel["type"] != "row":
                yield f"{file}: {panel['title']}", panel, choice


def complaint_of(name, target, choice):
    """What is wrong with the answer to a panel's query, if anything."""
    result = ask("query", query=substituted(target["expr"], choice))["result"]
    if not result:
        return f"{name}: no data: {target['expr']}"
    for series in result:
        if not math.isfinite(float(series["value"][1])):
            return f"{name}: {series}"
        if series["metric"].get("job") not in [None, *choice["$job"].split("|")]:
            return f"{name}: of another job: {series['metric']}"
        for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]):
            if not series["metric"].get(label):
                return f"{name}: legend label {label} is not in {series['metric']}"
    return None


def complaints():
    found = (complaint_of(name, target, choice) for name, panel, choice in panels() for target in panel["targets"])
    return [complaint for complaint in found if complaint]


def every_panel():
    took = await_that("numbers in every panel", 120, lambda: complaints()[:3])
    each = [len(panel["targets"]) for _, panel, _ in panels()]
    say(f"{sum(each)} queries of {len(each)} panels return numbers, their legends' labels exist ({took:.0f} s)")
    for _, dashboard in dashboards():
        choice = chosen(dashboard)
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            series = ask("series", **{"match[]": substituted(metric, choice)})
            if not {s.get(label) for s in series} - {None}:
                fail(f"the variable {variable['name']} has no values")


def figures(instance):
    """Every figure of the dashboards by its title, and the colour that its thresholds give it now, for these instances."""
    for _, panel, choice in panels():
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
        if panel["type"] == "stat" and len(steps) > 1:
            result = ask("query", query=substituted(panel["targets"][0]["expr"], choice, instance))["result"]
            # One that has nothing to show has no colour.
            for value in (float(series["value"][1]) for series in result):
                if math.isfinite(value):
                    yield panel["title"], [s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]


def red(instance=None):
    return {title for title, colour in figures(instance) if colour == "red"}


# The alerts


def firing():
    return {(a["labels"]["alertname"], a["labels"].get("instance")) for a in ask("alerts")["alerts"] if a["state"] == "firing"}


def have_fired(since):
    """Every alert that has fired since then, and where."""
    result = ask("query", query=f'count_over_time(ALERTS{{alertstate="firing"}}[{math.ceil(time.time() - since)}s])')["result"]
    return {(s["metric"]["alertname"], s["metric"].get("instance")) for s in result}


def ahead_of_time(since):
    """The alert that ports will run out fired while there were some, and before the one that says there are none."""
    def first(expr):
        series = ask("query_range", query=expr, start=since, end=time.time(), step=1)["result"]
        return min(float(at) for s in series for at, _ in s["values"])

    warned, gone = (first(f'ALERTS{{alertname="EchoscopeLocalPorts{what}",alertstate="firing"}}') for what in ("WillRunOut", "Exhausted"))
    share = ask("query", query='instance_target:echoscope_local_ports_used:ratio{instance="churn:9907"}', time=warned)["result"]
    if warned >= gone or float(share[0]["value"][1]) >= 0.95:
        fail("LocalPortsWillRunOut is late:", warned, gone, share)
    say(f"LocalPortsWillRunOut fired {gone - warned:.0f} s before LocalPortsExhausted, with {float(share[0]['value'][1]):.0%} of the ports taken")


def trouble(since):
    before = time.time()
    await_that("figures that are not red before the trouble", 60, red)
    services = [s for services, _, _ in TROUBLE.values() for s in services]
    compose("up", "-d", *services, profiles=PROFILES)
    began = time.monotonic()
    expected = [(alert, seconds) for _, alerts, _ in TROUBLE.values() for *alert, seconds in alerts]
    # Mostly it is waited.
    with concurrent.futures.ThreadPoolExecutor() as meanwhile:
        building = meanwhile.submit(changed_source)
        for (alert, instance), seconds in sorted(expected, key=lambda e: e[1]):
            left = max(1.0, began + seconds - time.monotonic())
            await_that(f"{alert} at {instance}", left, lambda: None if (alert, instance) in firing() else f"firing: {firing()}")
            say(f"{alert} fires at {instance}, {time.monotonic() - began:.0f} s after the trouble began")
    building.result()
    for profile, (_, _, (instance, titles)) in TROUBLE.items():
        await_that(f"{profile} to turn the figures of {instance} red", 30, lambda: set(titles) - red(instance))
    say("the dashboards are red:", ", ".join(sorted(red())))
    ahead_of_time(before)
    # The leak's server first: it gives its connections an end, and none has to be reset.
    compose("rm", "-s", "-f", *(s for s in services if s != "leaked"), profiles=PROFILES)
    compose("rm", "-s", "-f", "leaked", profiles=PROFILES)
    took = await_that("all alerts to resolve", RESOLVED_WITHIN, lambda: firing() | red())
    say(f"all resolved, and no figure red, {took:.0f} s after the trouble ended")
    # From the first scrape of all on, while they drained, and when they were gone.
    if unexpected := have_fired(since) - {(alert, instance) for _, alerts, _ in TROUBLE.values() for alert, instance, _ in alerts}:
        fail("alerts that nothing led to:", unexpected)


# The end


def marks(expr, dashboard, since):
    """The moments that Grafana would mark: of the values of an annotation's query those above zero."""
    result = ask("query_range", query=substituted(expr, chosen(dashboard)), start=since, end=time.time(), step=5)["result"]
    return [value for series in result for value in series["values"] if float(value[1]) > 0]


def ended_well(service, verdict):
    code, log = inspect(service)["State"]["ExitCode"], compose("logs", "--tail=40", service)
    if code or verdict not in log:
        fail(service, "ended with", code, log)
    return [json.loads(line[line.index("{") :]) for line in log.splitlines() if verdict in line][-1]


def stop():
    before = time.time()
    compose("stop", "client")
    ended_well("client", "drained: nothing was cut short")
    compose("start", "client")
    await_that("the client's health", 60, lambda: healthy(["client"]))
    await_that("connections to drain", 60, lambda: None if ask("query", query='echoscope_connections_open{instance="server:9907"} > 0')["result"] else "none")
    # The server alone: its connections are open, and their clients know of nothing. The watch lives in its network.
    compose("stop", "watch")
    compose("stop", "server")
    verdict = ended_well("server", "drained: nothing was cut short")
    if not verdict["open"]:
        fail("the server had nothing to drain:", verdict)
    ended_well("watch", "stopping")
    say(f"server, client and watch stopped: exit code 0, {verdict['open']} connections drained in {verdict['seconds']:.2f} s")
    compose("up", "-d", *CORE)
    await_that("health after the restart", 60, lambda: healthy(CORE))

    def unmarked():
        return [
            f"{file}: annotation {a['name']} marks nothing"
            for file, dashboard in dashboards()
            for a in dashboard["annotations"]["list"]
            if "expr" in a and not marks(a["expr"], dashboard, before)
        ]

    await_that("annotations of drain and restart", 60, unmarked)
    say("drain and restart are marked on every dashboard")
    # Others take longer than this to make up their mind.
    if cut := [instance for alert, instance in have_fired(before) if alert == "EchoscopeDrainAborted"]:
        fail("a clean stop passes for one that was cut short:", cut)


def ours():
    """What of this run is there now."""
    kinds = (["ps", "-a"], ["network", "ls"], ["volume", "ls"])
    left = [run("docker", *kind, "-q", "--filter", f"label=com.docker.compose.project={PROJECT}") for kind in kinds]
    return " ".join([*left, run("docker", "image", "ls", "-q", IMAGE)]).split()


def stages():
    """Images without a name that are the stage in which ours is built."""
    unnamed = run("docker", "images", "-q", "--filter", "dangling=true").split()
    about = json.loads(run("docker", "image", "inspect", *unnamed)) if unnamed else []
    return {a["Id"] for a in about if "CARGO_PROFILE_RELEASE_STRIP=debuginfo" in (a["Config"]["Env"] or [])}


@contextlib.contextmanager
def cleaned_up():
    before = stages()
    try:
        yield
    except BaseException:
        print(compose("ps", "-a", profiles=PROFILES, check=False), compose("logs", "--tail=5", profiles=PROFILES, check=False), file=sys.stderr)
        raise
    finally:
        compose("down", "-v", "-t", "5", "--remove-orphans", profiles=PROFILES, check=False)
        run("docker", "image", "rm", IMAGE, check=False)
        # The stage that the image was built in has no name with some builders; its layers stay in the cache otherwise.
        for image in stages() - before:
            run("docker", "image", "rm", image, check=False)
        if left := ours():
            print("containers: left behind:", left, file=sys.stderr)
    if left := ours():
        fail("left behind:", left)
    say("nothing is left behind")


def main():
    # However it ends, what it started ends with it.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(143))
    with cleaned_up():
        compose("config", "-q", profiles=PROFILES)
        if sorted(there := compose("config", "--profiles").split()) != sorted(PROFILES):
            fail("the compose file has the profiles", there, "and here are", PROFILES)
        image()
        since = time.time()
        start()
        for service in ("server", "client", "watch"):
            hardened(service)
        published()
        say("server, client and watch: no root, no capability, no new privileges, seccomp, read-only, limited, on loopback only")
        by_the_kernels_word()
        every_panel()
        trouble(since)
        stop()
    say("passed")


main()
