"""The kernel's announcements at full speed: see .ci/ebpf. Prints what it measures, and fails when something is wrong."""

import collections
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

BINARY = sys.argv[1]
WORK = tempfile.mkdtemp()
PORT = 7007
# What is not announced shows when everybody is held against the table: within so many seconds (docs/ebpf.md).
AUDIT = 25
# How many steps there are in a life: as many at most went unheard for each loss that is counted.
STEPS = 6
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def fail(what):
    sys.exit(f"ebpf: {what}")


def start(*arguments, name):
    log = open(f"{WORK}/{name}.log", "wb")
    out = open(f"{WORK}/{name}.out", "wb")
    return subprocess.Popen([BINARY, "--log.format", "json", *arguments], stdout=out, stderr=log)


def lines(name):
    with open(f"{WORK}/{name}.log", encoding="utf-8") as log:
        return [json.loads(line) for line in log if line.startswith("{")]


def metrics(web):
    page = urllib.request.urlopen(f"http://{web}/metrics", timeout=30).read().decode()
    found = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def scrape(web):
    """A scrape, from the question to the last byte of the answer, in seconds: no more is read of it than where it ends."""
    with socket.create_connection(web) as connection:
        began = time.monotonic()
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := connection.recv(1 << 20):
            answer += part
        took = time.monotonic() - began
    if not answer.startswith(b"HTTP/1.1 200 "):
        fail(f"a scrape was answered: {answer[:200]}")
    return took


def until(what, condition, patience=60):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            found = condition()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(0.05)
    fail(f"waited {patience} s for {what}")


def total(found, name, **labels):
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(v for series, v in found.items() if series.split("{")[0] == name and all(w in series for w in wanted))


def lost(found):
    return total(found, "echoscope_observer_lost_events_total", observer="ebpf", what="tracepoint")


def a_hundred_thousand():
    """Both ends of 100,000 lives, and what the client did: equal, or what is missing is counted."""
    web, count = "127.0.0.1:9901", 100_000
    listen = ["--web.listen-address", web, "server", "--observer", "ebpf", "--listen", f"127.0.0.1:{PORT}"]
    server = start("--log.level", "warn", *listen, name="server")
    until("the server", lambda: metrics(web))
    began = time.monotonic()
    other = "127.0.0.1:9902"
    client = start(
        "--log.level", "warn", "--web.listen-address", other, "client", f"127.0.0.1:{PORT}", "--observer", "ebpf",
        "--count", str(count), "--connections", "32", "--rate", "max", "--messages", "1", "--output", "json",
        name="client",
    )
    last = {}

    def ended():
        try:
            last.update(metrics(other))
        except OSError:
            pass
        return client.poll() is not None

    until("100,000 lives", ended, 120)
    took = time.monotonic() - began
    if client.returncode != 0:
        fail(f"the client ended with {client.returncode}")
    summary = json.load(open(f"{WORK}/client.out"))
    arrows = [("listen", "syn_recv"), ("syn_recv", "established"), ("established", "close_wait"),
              ("close_wait", "last_ack"), ("last_ack", "close")]

    def walked():
        found = metrics(web)
        return [int(total(found, "echoscope_tcp_transitions_total", role="server", evidence="tracepoint",
                          **{"from": a, "to": b})) for a, b in arrows]

    # Whoever is not told of to the end was lost, and that is counted.
    until("every life, or a loss", lambda: all(n == count for n in walked()) or lost(metrics(web)), AUDIT)
    now, missing = walked(), lost(metrics(web))
    print(f"ebpf: {count} lives in {took:.1f} s ({count / took:.0f} a second); the server's end walked {now}; "
          f"{missing:.0f} events lost at the server, {lost(last):.0f} at the client")
    inferred = total(metrics(web), "echoscope_tcp_transitions_total", role="server", evidence="inferred")
    # The listener's own end is inferred, and it has not come yet.
    if any(n > count or count - n > STEPS * missing for n in now) or (inferred and not missing):
        fail(f"{inferred} steps inferred, {missing} events lost, and the server's end walked {now}")
    client_end = summary["client_states"]
    # The last scrape was before the last comparison with the table.
    lost_there = max(lost(last), sum(line.get("connections", 0) for line in lines("client")))
    print(f"ebpf: the client's end entered {client_end}")
    for state in ("SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"):
        if not count - STEPS * lost_there <= client_end[state] <= count:
            fail(f"the client's end entered {state} {client_end[state]} times")
    server.send_signal(signal.SIGTERM)
    server.wait()


def agreement():
    """One pair told by the observer without privilege, and beside it by the kernel's word: the same lives?"""
    web = "127.0.0.1:9903"
    watch = start("--log.level", "debug", "--web.listen-address", web, "watch", "--observer", "ebpf", "--port",
                  str(PORT), "--remote-port", str(PORT), name="watch")
    until("the watch", lambda: metrics(web))
    pair = start("--web.listen-address", "none", "pair", "--observer", "sock_diag", "--listen", f"127.0.0.1:{PORT}",
                 "--count", "10000", "--connections", "16", "--rate", "max", "--messages", "1", name="pair")
    if pair.wait(120) != 0:
        fail("the pair failed")
    until("every end", lambda: total(metrics(web), "echoscope_sockets_ended_total", port=PORT) >= 20_000)
    # Who is last is told with the next reading.
    time.sleep(2)
    watch.send_signal(signal.SIGTERM)
    watch.wait()
    lives = {}
    for name in ("watch", "pair"):
        told = collections.defaultdict(list)
        for line in lines(name):
            if line["message"] == "state" and not line["local"].endswith(":0"):
                told[line["role"], line["conn"]].append(line)
        lives[name] = told
    kinds, contradictions, compared, unheard = collections.Counter(), [], 0, 0
    for key, steps in lives["pair"].items():
        truth = lives["watch"].get(key)
        if steps[0]["to"] == "LISTEN" or steps[0]["from"] == "LISTEN" and steps[0]["to"] == "CLOSED":
            continue
        if truth is None:
            contradictions.append((key, "is not announced"))
            continue
        compared += 1
        walked = [truth[0]["from"]] + [step["to"] for step in truth]
        at = 0
        for step in steps:
            if step["from"] == "TIME_WAIT":
                continue
            kinds[step["evidence"]] += 1
            if at == len(walked) - 1 and walked[at] == step["from"]:
                unheard += 1
                break
            if at >= len(walked) or walked[at] != step["from"]:
                contradictions.append((key, f"{step['from']} → {step['to']}", walked))
                break
            if step.get("via"):
                kinds["way unknown"] += 1
                rest = walked[at + 1:]
                if step["to"] not in rest:
                    contradictions.append((key, f"{step['from']} … {step['to']}", walked))
                    break
                at += 1 + rest.index(step["to"])
            else:
                at += 1
                if at >= len(walked) or walked[at] != step["to"]:
                    contradictions.append((key, f"{step['from']} → {step['to']}", walked))
                    break
    steps = sum(n for kind, n in kinds.items() if kind != "way unknown")
    shares = ", ".join(f"{kind} {100 * n / steps:.1f} %" for kind, n in kinds.most_common())
    print(f"ebpf: {compared} lives beside the observer without privilege: {steps} steps of its own ({shares}), "
          f"{len(contradictions)} contradictions, {unheard} not heard to the end")
    if contradictions or compared < 19_900 or unheard:
        fail(f"{contradictions[:3]}")


def ninety_thousand():
    """A scrape of 90,000 sockets, by the kernel's counts and by its table."""
    port, held = 7070, []

    def serve(listener, count):
        for _ in range(count):
            connection = listener.accept()[0]
            connection.recv(1)
            connection.close()

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(1000)
    processes = {
        observer: (start("--web.listen-address", f"127.0.0.1:{web}", "client", f"127.0.0.2:{port}", "--observer",
                         observer, "--rate", "0.0003", "--connections", "1", "--retries", "0", name=observer), web)
        for observer, web in (("ebpf", 9911), ("sock_diag", 9912))
    }
    for _, web in processes.values():
        until("an observer", lambda web=web: metrics(f"127.0.0.1:{web}"))
    for address in range(20):
        server = threading.Thread(target=serve, args=(listener, 4_500))
        server.start()
        for _ in range(4_500):
            client = socket.socket()
            client.bind((f"127.0.0.{10 + address}", 0))
            client.connect(("127.0.0.1", port))
            client.shutdown(socket.SHUT_WR)
            client.recv(1)
            client.close()
        server.join()
    held.append(listener)
    spent = {}
    for observer, (process, web) in processes.items():
        name = f"127.0.0.1:{web}"

        def reading(name=name, observer=observer):
            found = metrics(name)
            of = lambda what: found[f'echoscope_observer_duration_seconds_{what}{{observer="{observer}",what="census"}}']
            waiting = total(found, "echoscope_tcp_sockets", role="client", state="time_wait")
            return of("sum"), of("count"), waiting

        before = reading()
        for _ in range(10):
            time.sleep(0.6)
            after = reading()
        spent[observer] = 1000 * (after[0] - before[0]) / (after[1] - before[1])
        whole = []
        for _ in range(9):
            # Longer than the census may be reused for.
            time.sleep(0.6)
            whole.append(1000 * scrape(("127.0.0.1", web)))
        whole = statistics.median(whole)
        rss = re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{process.pid}/status").read()).group(1)
        print(f"ebpf: {observer}: {after[2]:.0f} sockets in TIME_WAIT, a reading in {spent[observer]:.2f} ms, "
              f"a whole scrape in {whole:.2f} ms, RSS {rss} KiB")
        if after[2] < 60_000:
            fail("the sockets went too soon")
    # A hundred times and more apart, on whatever machine.
    if spent["ebpf"] * 5 > spent["sock_diag"]:
        fail("the kernel's counts are no cheaper than its table")
    for process, _ in processes.values():
        process.send_signal(signal.SIGKILL)
        process.wait()


def others():
    """What an event of another network namespace costs: the programs' own time, as the kernel counts it."""
    setting = "/proc/sys/kernel/bpf_stats_enabled"
    observer = start("--web.listen-address", "127.0.0.1:9920", "client", "127.0.0.2:7080", "--observer", "ebpf", "--rate",
                     "0.0003", "--connections", "1", "--retries", "0", name="others")
    until("an observer", lambda: metrics("127.0.0.1:9920"))

    def programs():
        found = {}
        for entry in os.listdir(f"/proc/{observer.pid}/fdinfo"):
            try:
                info = open(f"/proc/{observer.pid}/fdinfo/{entry}").read()
            except OSError:
                continue
            fields = dict(line.split(":\t", 1) for line in info.splitlines() if ":\t" in line)
            if "run_cnt" in fields and "prog_tag" in fields and "link_id" not in fields:
                found[fields["prog_id"]] = (int(fields["run_time_ns"]), int(fields["run_cnt"]))
        return found

    with open(setting, "w") as file:
        file.write("1")
    try:
        before = programs()
        subprocess.run(["unshare", "--net", "sh", "-c",
                        f"ip link set lo up; exec {BINARY} --log.level warn --web.listen-address none pair --observer "
                        "sock_diag --listen 127.0.0.1:7081 --count 20000 --rate max --messages 1"],
                       check=True, stdout=subprocess.DEVNULL)
        after = programs()
    finally:
        with open(setting, "w") as file:
            file.write("0")
    costs = []
    for program, (spent, runs) in after.items():
        runs -= before[program][1]
        if runs:
            costs.append(((spent - before[program][0]) / runs, runs))
    told = ", ".join(f"{cost:.0f} ns ({runs} runs)" for cost, runs in sorted(costs, reverse=True))
    print(f"ebpf: an event of another namespace costs {told}; the kernel's own clock is in it")
    observer.kill()
    observer.wait()


subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
for part in (a_hundred_thousand, agreement, ninety_thousand, others):
    if len(sys.argv) < 3 or part.__name__ in sys.argv[2:]:
        part()
print("ebpf: passed")
