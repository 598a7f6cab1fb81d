"""Links of a known rate between processes of one machine, made of Linux network namespaces.

    worker 0              bridge              worker 1
    [ link0 ]----[ port0 | switch | port1 ]----[ link0 ]
          R ->            R ->

Each worker has a network namespace of its own, joined by a veth pair to a bridge in a namespace of
its own, so that nothing touches the host's network. A token bucket (`tc ... tbf`) on the worker's
end limits what it sends to the rate R, and one on the bridge's end what it receives: a full-duplex
link into a switch that has no limit itself. Everything goes away with the namespaces.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

# How long a packet may wait in a queue before it is dropped: a buffer of 6 MB at 1 Gbit/s.
LATENCY = "50ms"


class Links(NamedTuple):
    """How the workers are joined.

    Attributes:
      kind: `"namespaces"` or `"loopback"`.
      interface: the network interface that carries the exchange, in every worker.
      coordinator: address and port at which worker 0 gathers the others.
      prefixes: what goes in front of each worker's command.
      burst_bytes: what an idle link lets through at once before its rate holds; 0 without a rate.
    """

    kind: str
    interface: str
    coordinator: str
    prefixes: Sequence[Sequence[str]]
    burst_bytes: int


def bits_per_second(rate: str) -> float:
    """Reads `"100mbit"` or `"1gbit"`; `"unlimited"` is infinite."""
    if rate == "unlimited":
        return float("inf")
    for unit, factor in UNITS.items():
        with contextlib.suppress(ValueError):
            if rate.endswith(unit) and (number := float(rate.removesuffix(unit))) > 0:
                return number * factor
    raise ValueError(f"rate={rate!r} must be a number and one of {[*UNITS]}, or 'unlimited'")


def milliseconds(delay: str) -> float:
    """Reads `"2ms"`."""
    with contextlib.suppress(ValueError):
        if delay.endswith("ms") and (number := float(delay.removesuffix("ms"))) >= 0:
            return number
    raise ValueError(f"delay={delay!r} must be a number and 'ms'")


def burst_bytes(rate: str) -> int:
    """The size of the token bucket: what an idle link lets through at once.

    Every byte of it is a gift to small messages. But it must last from one timer interrupt to the
    next, and hold one of TCP's batches of 64 kB with all their headers, or the kernel cuts those
    into single packets and the receivers spend three times the processor time.
    """
    if rate == "unlimited":
        return 0
    return max(72_000, int(bits_per_second(rate) / 8 * 0.25e-3))


def unavailable() -> str | None:
    """Why namespaces cannot be made here, or None if they can."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (packages iproute2 and util-linux)"
    name = f"signax-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    run("ip", "netns", "delete", name)
    return None


@contextlib.contextmanager
def namespaces(workers: int, rate: str, delay: str) -> Iterator[Links]:
    """Joins workers by links of a rate, in namespaces that last as long as the context.

    Args:
      workers: how many.
      rate: of each link and direction: `"1gbit"`, or `"unlimited"`.
      delay: from each worker to the switch, so that `"2ms"` makes a round trip of 4 ms. Unless it
        is 0, the kernel must have `netem`.

    Yields:
      The links.

    Raises:
      OSError: `ip` or `tc` refused something.
    """
    bridge, *names = [f"signax-{os.getpid()}-{name}" for name in ("bridge", *range(workers))]
    addresses = [f"10.0.0.{worker + 1}" for worker in range(workers)]
    try:
        run("ip", "netns", "add", bridge)
        run("ip", "-n", bridge, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", bridge, "link", "set", "dev", "switch", "up")
        for worker, (name, address) in enumerate(zip(names, addresses, strict=True)):
            run("ip", "netns", "add", name)
            connect(name, address, bridge, f"port{worker}")
            limit(name, bridge, f"port{worker}", rate, delay)
        prefixes = [enter(name, address) for name, address in zip(names, addresses, strict=True)]
        yield Links("namespaces", "link0", f"{addresses[0]}:29500", prefixes, burst_bytes(rate))
    finally:
        for name in (bridge, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def loopback(workers: int) -> Iterator[Links]:
    """Joins workers by the host's loopback interface, which has no rate."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    yield Links("loopback", "lo", f"127.0.0.1:{free_port}", [[]] * workers, 0)


def connect(name: str, address: str, bridge: str, port: str) -> None:
    """Joins a worker's namespace to a port of the bridge."""
    peer = ["peer", "name", "link0", "netns", name]
    run("ip", "-n", bridge, "link", "add", port, "type", "veth", *peer)
    run("ip", "-n", bridge, "link", "set", "dev", port, "master", "switch", "up")
    run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
    run("ip", "-n", name, "link", "set", "dev", "link0", "up")
    run("ip", "-n", name, "link", "set", "dev", "lo", "up")


def limit(name: str, bridge: str, port: str, rate: str, delay: str) -> None:
    """Gives a worker's link its rate in both directions, and what the worker sends its delay."""
    parent = ["root"]
    if milliseconds(delay) > 0:
        netem = ["root", "handle", "1:", "netem", "delay", delay, "limit", "100000"]
        run("tc", "-n", name, "qdisc", "add", "dev", "link0", *netem)
        parent = ["parent", "1:1"]
    if burst := burst_bytes(rate):
        bucket = ["tbf", "rate", rate, "burst", str(burst), "latency", LATENCY]
        run("tc", "-n", name, "qdisc", "add", "dev", "link0", *parent, *bucket)
        run("tc", "-n", bridge, "qdisc", "add", "dev", port, "root", *bucket)


def enter(name: str, address: str) -> list[str]:
    """What runs a command in a namespace, on a host that is named like its address there.

    Gloo listens where the host's name points to, and JAX does not let one choose. An address is a
    name that points to itself.
    """
    rename = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", rename, address]


def run(*command: str) -> None:
    """Runs a command that must succeed."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        hint = "; without netem in the kernel there is only --delay 0ms"
        hint = hint if "netem" in command else ""
        raise OSError(f"{' '.join(command)}: {finished.stderr.strip()}{hint}")
