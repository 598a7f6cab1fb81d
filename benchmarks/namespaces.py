"""Links of a known rate between processes of one machine, made of Linux network namespaces.

    worker 0              bridge              worker 1
    [ link0 ]----[ port0 | switch | port1 ]----[ link0 ]
          R ->            R ->

Each worker has its own network namespace. A veth pair joins it to a bridge in another namespace, so
nothing touches the host's network. A token bucket (`tc ... tbf`) at the worker's end limits the
traffic that the worker sends to the rate R. A token bucket at the bridge's end limits the traffic
that the worker receives. Together they make a full-duplex link into a switch without a limit. Links
and bridge disappear with the namespaces.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

# The longest time that a packet waits in a queue before it is dropped: 6 MB at 1 Gbit/s.
LATENCY = "50ms"


class Links(NamedTuple):
    """The links that join some hosts: workers, and perhaps a server behind them.

    Attributes:
      kind: `"namespaces"` or `"loopback"`.
      addresses: the IP address of each host.
      interface: the network interface that carries the exchange, in every worker.
      coordinator: address and port at which worker 0 gathers the others.
      prefixes: the words before each worker's command.
      burst_bytes: bytes that pass an idle link at once before its rate holds; 0 without a rate.
    """

    kind: str
    addresses: Sequence[str]
    interface: str
    coordinator: str
    prefixes: Sequence[Sequence[str]]
    burst_bytes: int


def bits_per_second(rate: str) -> float:
    """Read a rate such as `"100mbit"` or `"1gbit"`. `"unlimited"` is infinite."""
    if rate == "unlimited":
        return float("inf")
    for unit, factor in UNITS.items():
        with contextlib.suppress(ValueError):
            if rate.endswith(unit) and (number := float(rate.removesuffix(unit))) > 0:
                return number * factor
    raise ValueError(f"rate={rate!r} must be a number and one of {[*UNITS]}, or 'unlimited'")


def milliseconds(delay: str) -> float:
    """Read a delay such as `"2ms"`."""
    with contextlib.suppress(ValueError):
        if delay.endswith("ms") and (number := float(delay.removesuffix("ms"))) >= 0:
            return number
    raise ValueError(f"delay={delay!r} must be a number and 'ms'")


def burst_bytes(rate: str) -> int:
    """The size of the token bucket: the bytes that pass an idle link at once.

    A larger bucket favours small messages. But the bucket must last from one timer interrupt to the
    next, and hold a TCP batch of 64 kB with all its headers. In a smaller bucket the kernel cuts
    batches into single packets, and the receivers spend three times the processor time.
    """
    if rate == "unlimited":
        return 0
    return max(72_000, int(bits_per_second(rate) / 8 * 0.25e-3))


def unavailable() -> str | None:
    """The reason why namespaces cannot be made here, or None if they can be made."""
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
    """Join workers by links of a rate, in namespaces that last as long as the context.

    Args:
      workers: the number of workers.
      rate: the rate of each link in each direction: `"1gbit"`, or `"unlimited"`.
      delay: the delay from each worker to the switch. `"2ms"` makes a round trip of 4 ms. A delay
        above 0 needs a kernel with `netem`.

    Yields:
      The links.

    Raises:
      OSError: `ip` or `tc` failed.
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
        yield Links(
            "namespaces", addresses, "link0", f"{addresses[0]}:29500", prefixes, burst_bytes(rate)
        )
    finally:
        for name in (bridge, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def loopback(workers: int) -> Iterator[Links]:
    """Join workers by the host's loopback interface, which has no rate limit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    addresses = ["127.0.0.1"] * workers
    yield Links("loopback", addresses, "lo", f"127.0.0.1:{free_port}", [[]] * workers, 0)


def connect(name: str, address: str, bridge: str, port: str) -> None:
    """Join a worker's namespace to a port of the bridge."""
    peer = ["peer", "name", "link0", "netns", name]
    run("ip", "-n", bridge, "link", "add", port, "type", "veth", *peer)
    run("ip", "-n", bridge, "link", "set", "dev", port, "master", "switch", "up")
    run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
    run("ip", "-n", name, "link", "set", "dev", "link0", "up")
    run("ip", "-n", name, "link", "set", "dev", "lo", "up")


def limit(name: str, bridge: str, port: str, rate: str, delay: str) -> None:
    """Limit a worker's link in both directions, and delay the packets that the worker sends."""
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
    """The words that run a command in a namespace, with the worker's address as the host's name.

    Gloo listens at the address of the host's name, and JAX offers no other choice. An address is a
    name that resolves to itself.
    """
    rename = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", rename, address]


def run(*command: str) -> None:
    """Run a command that must succeed."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        hint = "; without netem in the kernel there is only --delay 0ms"
        hint = hint if "netem" in command else ""
        raise OSError(f"{' '.join(command)}: {finished.stderr.strip()}{hint}")
