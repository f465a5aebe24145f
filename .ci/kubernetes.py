"""Checks the manifests without a cluster. Called by .ci/kubernetes.

Usage: kubernetes.py DIRECTORY PROGRAM; a PROGRAM that is /dev/null is none.

Each kustomization is built by what follows of kustomize here (and by kubectl, where there is one, which must come to the
same), and what comes out is validated, not only what was written.
"""

import copy
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import yaml

# The first where native sidecars are on by default, and the newest that the package has.
VERSIONS = ["1.29", "1.37"]
IMAGE = "echoscope"
LAST_SCRAPE = 15
# Where the eBPF observer is granted what it needs, to whom, and that it is no more than this.
GRANTED_IN, GRANTED_TO = "ebpf", "Deployment/echoscope-server"
GRANTED = {"runAsNonRoot": False, "runAsUser": 0, "runAsGroup": 0, "capabilities": {"drop": ["ALL"], "add": ["BPF", "PERFMON"]}}
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
MONITOR_KEYS = {"selector", "podMetricsEndpoints", "namespaceSelector", "jobLabel", "podTargetLabels"}
ENDPOINT_KEYS = {"port", "interval", "scrapeTimeout", "path", "scheme", "relabelings", "metricRelabelings", "honorLabels"}
RELABEL_KEYS = {"sourceLabels", "separator", "targetLabel", "regex", "modulus", "replacement", "action"}
KUSTOMIZATIONS = {
    "Kustomization": ("kustomize.config.k8s.io/v1beta1", {"resources", "components", "images", "patches"}),
    "Component": ("kustomize.config.k8s.io/v1alpha1", {"resources", "images", "patches"}),
}

faults = []


def say(*words):
    print("kubernetes:", *words, flush=True)


def fault(*words):
    faults.append(" ".join(str(word) for word in words))
    print("kubernetes: FAULT:", faults[-1], file=sys.stderr, flush=True)


def read(path):
    with open(path, encoding="utf-8") as opened:
        return [document for document in yaml.safe_load_all(opened) if document]


def named(resource):
    return f"{resource.get('kind')}/{resource.get('metadata', {}).get('name')}"


def seconds(text):
    found = re.fullmatch(r"(\d+)(ms|s|m|h)", text)
    if not found:
        fault(f"{text!r} is no duration that this check knows")
        return 0
    return int(found[1]) * UNITS[found[2]]


# --- as much of kustomize as is used here


def merged(base, patch, key=None):
    """A strategic merge: maps by key, lists of things with names by name (new ones come first), other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {k: merged(base[k], v, k) if k in base else copy.deepcopy(v) for k, v in patch.items()}
    by = "containerPort" if key == "ports" else "name"
    if isinstance(base, list) and isinstance(patch, list) and all(isinstance(x, dict) and by in x for x in base + patch):
        there = {item[by]: item for item in base}
        new = [copy.deepcopy(item) for item in patch if item[by] not in there]
        changed = {item[by]: merged(there[item[by]], item) for item in patch if item[by] in there}
        return new + [changed.get(item[by], item) for item in base]
    return copy.deepcopy(patch)


def containers(deployment):
    pod = deployment["spec"]["template"]["spec"]
    return [(c, pod) for c in pod.get("initContainers", []) + pod.get("containers", [])]


def is_sidecar(container):
    return container.get("restartPolicy") == "Always"


def existing(directory, kustomization, key, value):
    path = directory / value
    if not path.exists():
        fault(kustomization, key, value, "does not exist")
        return None
    return path


def build(directory, seen, into=()):
    """The resources of a kustomization; a component changes those that it is put `into`."""
    file = directory / "kustomization.yaml"
    seen.add(file.resolve())
    if not file.is_file():
        fault(directory, "has no kustomization.yaml")
        return list(into)
    (wanted,) = read(file)
    known = KUSTOMIZATIONS.get(wanted.get("kind"))
    if not known or wanted.get("apiVersion") != known[0]:
        fault(file, "is no kustomization:", wanted.get("apiVersion"), wanted.get("kind"))
        return list(into)
    for key in wanted.keys() - known[1] - {"apiVersion", "kind"}:
        fault(file, "has a field that this check does not know:", key)
    resources = list(into)
    for entry in wanted.get("resources", []):
        path = existing(directory, file, "resource", entry)
        if path and path.is_dir():
            resources += build(path, seen)
        elif path:
            seen.add(path.resolve())
            resources += read(path)
    for entry in wanted.get("components", []):
        if path := existing(directory, file, "component", entry):
            resources = build(path, seen, resources)
    for entry in wanted.get("patches", []):
        path = existing(directory, file, "patch", entry["path"])
        if not path:
            continue
        seen.add(path.resolve())
        (patch,) = read(path)
        target = entry.get("target") or {"kind": patch["kind"], "name": patch["metadata"]["name"]}
        for key in target.keys() - {"group", "kind", "name"}:
            fault(file, "has a target that this check does not know:", key)

        def hit(resource, target=target):
            return (
                target.get("kind", resource["kind"]) == resource["kind"]
                and target.get("group", "") in ("", resource["apiVersion"].rpartition("/")[0])
                and re.fullmatch(target.get("name", ".*"), resource["metadata"]["name"])
            )

        hits = [resource for resource in resources if hit(resource)]
        if resources and not hits:
            fault(file, "patches nothing:", target)
        # Which one it changes is the target's to say; its own name changes nothing.
        if patch["metadata"].keys() - {"name"}:
            fault(path, "changes metadata, which this check does not know")
        content = {k: v for k, v in patch.items() if k not in ("apiVersion", "kind", "metadata")}
        resources = [merged(resource, content) if hit(resource) else resource for resource in resources]
    for image in wanted.get("images", []):
        if not image.get("newTag") or image["newTag"] == "latest":
            fault(file, "image", image.get("name"), "has no tag of its own")
        used = False
        for container, _ in itertools.chain.from_iterable(containers(r) for r in resources if r["kind"] == "Deployment"):
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image.get('newTag')}"
                used = True
        if not used and (into or wanted["kind"] == "Kustomization"):
            fault(file, "names an image that nothing uses:", image.get("name"))
    return resources


def as_kubectl_builds(directory, resources):
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True)
    if done.returncode:
        fault("kubectl kustomize", directory, "failed:", done.stderr.strip())
        return
    order = lambda docs: sorted((json.dumps(doc, sort_keys=True) for doc in docs))  # noqa: E731
    theirs = [doc for doc in yaml.safe_load_all(done.stdout) if doc]
    if order(theirs) != order(resources):
        fault("kubectl kustomize", directory, "comes to something else than this check")
    else:
        say(f"{directory}: kubectl kustomize builds the same")


# --- what must hold


def validate(where, resource):
    if resource.get("apiVersion", "").startswith("monitoring.coreos.com/"):
        return
    before = len(faults)
    for version in VERSIONS:
        try:
            # Which schema it was, as an older one would be taken in silence.
            taken = kubernetes_validate.validate(resource, version, strict=True)
            if taken != version:
                fault("there is no schema for", version, "but for", taken)
        except kubernetes_validate.ValidationError as error:
            fault(where, named(resource), f"by {version}:", ".".join(map(str, error.path)), error.message)
        except Exception as error:  # pylint: disable=broad-except
            fault(where, named(resource), f"by {version}:", getattr(error, "message", error))
    if len(faults) == before:
        say(f"{where}: {named(resource)}: valid by the schemas of {' and '.join(VERSIONS)}, strict")


def ports_of(deployment):
    return {p["name"]: p["containerPort"] for c, _ in containers(deployment) for p in c.get("ports", []) if "name" in p}


def selects(labels, deployment):
    return bool(labels) and labels.items() <= deployment["spec"]["template"]["metadata"].get("labels", {}).items()


def check_security(where, container, pod, granted):
    """The restricted Pod Security Standard and more, by what the container says or else its pod; or else what is granted."""
    context = pod.get("securityContext", {}) | container.get("securityContext", {})
    who = f"{where} container {container['name']}:"
    wanted = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if is_ours(container):
        wanted["runAsUser"] = 65532
    if granted:
        wanted |= GRANTED
    for key, value in wanted.items():
        if context.get(key) != value:
            fault(who, f"securityContext.{key} is {context.get(key)!r}, not {value!r}")
    if not granted and (not isinstance(context.get("runAsUser"), int) or context["runAsUser"] == 0):
        fault(who, "runAsUser is no number of a user without privileges")
    if context.get("privileged") or any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        fault(who, "has a part of the host")
    for kind in ("requests", "limits"):
        if "memory" not in container.get("resources", {}).get(kind, {}):
            fault(who, f"resources.{kind}.memory is missing")


def is_ours(container):
    return container["image"].partition(":")[0].rpartition("/")[2] == IMAGE


def check_pod(where, deployment):
    granted = where.name == GRANTED_IN and named(deployment) == GRANTED_TO
    where = f"{where} {named(deployment)}"
    if not selects(deployment["spec"]["selector"]["matchLabels"], deployment):
        fault(where, "does not select its own pods")
    seen_names, seen_numbers = set(), set()
    for container, pod in containers(deployment):
        check_security(where, container, pod, granted)
        for port in container.get("ports", []):
            name, number = port.get("name"), port["containerPort"]
            if not name or not re.fullmatch(r"(?=.*[a-z])[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?", name):
                fault(where, f"port {number}: {name!r} is no name for a port")
            if name in seen_names:
                fault(where, f"port name {name!r} is there twice in the pod")
            if number in seen_numbers:
                fault(where, f"port {number} is there twice in the pod")
            seen_names.add(name)
            seen_numbers.add(number)
        if not is_ours(container):
            continue
        who = f"{where} container {container['name']}:"
        probes = {key for key in container if key.endswith("Probe") or key == "lifecycle"}
        if container["args"][0] == "watch":
            if not is_sidecar(container) or container not in pod["initContainers"]:
                fault(who, "is no native sidecar: an init container with restartPolicy Always")
            for key in probes:
                fault(who, f"has a {key}, which can affect its pod")
        else:
            expected = {"readinessProbe": "/-/ready", "livenessProbe": "/-/healthy"}
            for key in probes - expected.keys():
                fault(who, f"has a {key}, which is not needed")
            own = {p["name"] for p in container["ports"]}
            for key, path in expected.items():
                get = container.get(key, {}).get("httpGet", {})
                if get.get("path") != path or get.get("port") not in own:
                    fault(who, f"{key} is {get}, not {path} on a named port of its own")
            if pod.get("enableServiceLinks") is not False:
                fault(where, "enableServiceLinks is not false")
            given = dict(flag.split("=", 1) for flag in container["args"] if flag.startswith("--") and "=" in flag)
            drain = seconds(given.get("--drain-delay", "0s")) + seconds(given.get("--drain-timeout", "10s"))
            grace = pod.get("terminationGracePeriodSeconds", 30)
            if grace <= drain + LAST_SCRAPE:
                fault(where, f"terminationGracePeriodSeconds {grace} is not longer than {drain:g} + {LAST_SCRAPE} s")
    if granted:
        say(f"{where}: user 0 with {' and '.join(GRANTED['capabilities']['add'])} and nothing else")
    say(f"{where}: security context, resources, probes, ports, times: looked at")


def check_service(where, service, deployments):
    selected = [d for d in deployments if selects(service["spec"].get("selector"), d)]
    if not selected:
        fault(where, named(service), "selects no Deployment here")
    for port, deployment in itertools.product(service["spec"]["ports"], selected):
        if port.get("targetPort") not in ports_of(deployment):
            fault(where, named(service), f"targetPort {port.get('targetPort')!r} is no named port of {named(deployment)}")


def check_targets(where, deployment, services):
    """Where the client goes must be a Service here, and a port of it."""
    for container, _ in containers(deployment):
        if is_ours(container) and container["args"][0] == "client":
            targets = [arg for arg in container["args"][1:] if not arg.startswith("-")]
            there = {f"{s['metadata']['name']}:{p['port']}" for s in services for p in s["spec"]["ports"]}
            if not targets or set(targets) - there:
                fault(where, named(deployment), f"connects to {targets}; there is {sorted(there)}")


def check_monitor(where, monitor, deployments):
    """What the operator's schema would, for the fields that are used here; and that it finds something."""
    who = f"{where} {named(monitor)}:"
    if monitor.get("apiVersion") != "monitoring.coreos.com/v1" or monitor.get("kind") != "PodMonitor":
        fault(who, "is no PodMonitor of monitoring.coreos.com/v1:", monitor.get("apiVersion"))
    spec = monitor.get("spec", {})
    for key in spec.keys() - MONITOR_KEYS:
        fault(who, "unknown field", key)
    labels = spec.get("selector", {}).get("matchLabels", {})
    if not labels or set(spec["selector"]) != {"matchLabels"} or not all(isinstance(v, str) for v in labels.values()):
        fault(who, "has no selector.matchLabels of strings")
    selected = [d for d in deployments if selects(labels, d)]
    if not selected:
        fault(who, "selects no Deployment here")
    if not spec.get("podMetricsEndpoints"):
        fault(who, "has no podMetricsEndpoints")
    for endpoint in spec.get("podMetricsEndpoints", []):
        for key in endpoint.keys() - ENDPOINT_KEYS:
            fault(who, "unknown field", key)
        if endpoint.get("interval") != "15s":
            fault(who, f"interval is {endpoint.get('interval')!r}")
        for deployment in selected:
            if endpoint.get("port") not in ports_of(deployment):
                fault(who, f"port {endpoint.get('port')!r} is no named port of {named(deployment)}")
        rules = endpoint.get("relabelings", [])
        for key in {key for rule in rules for key in rule} - RELABEL_KEYS:
            fault(who, "unknown field", key)
        jobs = [rule.get("replacement", "") for rule in rules if rule.get("targetLabel") == "job"]
        if not jobs or not all(job.startswith("echoscope") for job in jobs):
            fault(who, f"the job does not begin with echoscope: {jobs}")
    say(f"{who} fields, selector, port and job: looked at; selects {', '.join(map(named, selected)) or 'nothing'}")
    return selected


def check_image(where, resources, images):
    for resource in resources:
        for container, _ in containers(resource) if resource["kind"] == "Deployment" else []:
            if is_ours(container) and container["image"] not in images:
                fault(where, named(resource), f"image {container['image']!r}: no kustomization sets that, but {sorted(images)}")
            if not re.search(r":[^/]+$", container["image"]):
                fault(where, named(resource), f"image {container['image']!r} has no tag")


helps = {}


def check_words(where, program, words, variables=()):
    """The flags and variables are ones that this command of the program has."""
    if program == "/dev/null":
        return
    command = words[0]
    if command not in helps:
        done = subprocess.run([program, command, "--help"], capture_output=True, text=True)
        if done.returncode:
            fault(where, f"{program} has no command {command!r}")
        helps[command] = (
            set(re.findall(r"^ {2,8}(?:-\w, )?(--[a-z][a-z.-]*)", done.stdout, re.M)),
            set(re.findall(r"env: ([A-Z_]+)=", done.stdout)),
        )
    flags, known = helps[command]
    given = [word.partition("=")[0] for word in words[1:] if word.startswith("-")]
    for flag in given:
        if flag not in flags:
            fault(where, f"{command} has no flag {flag}")
    for variable in variables:
        if variable not in known:
            fault(where, f"{command} heeds no variable {variable}")
    say(f"{where}: {command}: the program has {', '.join([*given, *variables]) or 'the command'}")


def check_compose(path, like, program):
    """The sidecar is as hardened as everything else, and adds nothing of its own to the network."""
    (document,), (other,) = read(path), read(like)
    if set(document) != {"services"}:
        fault(path, "has more than services at its top:", sorted(document))
    ours = document["services"]["echoscope"]
    for key, value in other["x-echoscope"].items():
        # Where its image comes from, and how many closed connections it follows, are no hardening.
        if key not in ("image", "pull_policy", "environment", "stop_grace_period") and ours.get(key) != value:
            fault(path, f"{key} is {ours.get(key)!r}, not {value!r} as in {like}")
    owner = ours.get("network_mode", "").removeprefix("service:")
    if owner not in document["services"] or owner == "echoscope":
        fault(path, "network_mode names no other service:", ours.get("network_mode"))
        return
    if ours.get("ports"):
        fault(path, "publishes ports where it cannot")
    published = document["services"][owner].get("ports", [])
    if not any(port.endswith(":9907") for port in published):
        fault(path, owner, "does not publish the watch's port")
    for port in published:
        if not isinstance(port, str) or not port.startswith("127.0.0.1:"):
            fault(path, "publishes", port, "on more than loopback")
    check_words(path, program, ours["command"])
    say(f"{path}: hardened as in {like}, network of {owner}, ports on loopback: looked at")


def main():
    root, program = pathlib.Path(sys.argv[1]), sys.argv[2]
    manifests = root / "kubernetes"
    seen, monitored, roots, images = set(), 0, 0, set()
    files = sorted(manifests.rglob("*.yaml"))
    kustomizations = [file for file in files if file.name == "kustomization.yaml"]
    for file in kustomizations:
        for image in read(file)[0].get("images", []):
            if image.get("name") != IMAGE:
                fault(file, f"image {image.get('name')!r} is not {IMAGE!r}")
            images.add(f"{image.get('newName', image.get('name'))}:{image.get('newTag')}")
    if len(images) != 1:
        fault("kustomizations set different images:", sorted(images))
    for file in kustomizations:
        if read(file)[0].get("kind") == "Component":
            continue
        where = file.parent
        roots += 1
        resources = build(where, seen)
        if shutil.which("kubectl"):
            as_kubectl_builds(where, resources)
        deployments = [r for r in resources if r["kind"] == "Deployment"]
        services = [r for r in resources if r["kind"] == "Service"]
        check_image(where, resources, images)
        for resource in resources:
            validate(where, resource)
        for deployment in deployments:
            check_pod(where, deployment)
            check_targets(where, deployment, services)
            for container, _ in containers(deployment):
                if is_ours(container):
                    variables = [variable["name"] for variable in container.get("env", [])]
                    check_words(f"{where} {named(deployment)}", program, container["args"], variables)
        for service in services:
            check_service(where, service, deployments)
        found = []
        for resource in resources:
            if resource["kind"] not in ("Deployment", "Service", "PodMonitor"):
                fault(where, named(resource), "is of a kind that this check does not know")
            if resource["kind"] == "PodMonitor":
                found += map(named, check_monitor(where, resource, deployments))
        for deployment in deployments:
            ours = any(is_ours(container) for container, _ in containers(deployment))
            if ours and found.count(named(deployment)) != 1:
                fault(where, named(deployment), f"is selected by {found.count(named(deployment))} PodMonitors, not one")
            monitored += ours
    for file in files:
        if file.resolve() not in seen:
            fault(file, "is part of no kustomization that was built")
    # Else all of the above would hold of nothing.
    if roots < 3 or monitored < 5:
        fault(f"only {roots} kustomizations with {monitored} Deployments that are ours: there were 3 and 5")
    if not (manifests / GRANTED_IN / "kustomization.yaml").is_file():
        fault(manifests / GRANTED_IN, "is not there")
    check_compose(root / "compose" / "sidecar.yml", pathlib.Path("docker-compose.yml"), program)
    if program == "/dev/null":
        say("no program given: flags were not looked at")
    if faults:
        sys.exit(f"kubernetes: {len(faults)} faults")
    say("passed")


main()
