"""Links of a known rate between processes of one machine, made of Linux network namespaces.

    worker 0              bridge              worker 1
    [ link0 ]----[ port0 | switch | port1 ]----[ link0 ]
          R ->            R ->

Each worker has its own network namespace. A veth pair joins it to a bridge in another namespace, so
nothing touches the host's network. A token bucket (`tc ... tbf`) at the worker's end limits the
traffic that the worker sends to the rate R. A token bucket at the bridge's end limits the traffic
that the worker receives. Together they make a full-duplex link into a switch without a limit. Links
and bridge disappear with the namespaces.

Delays and losses are the kernel's, by `netem`. Where the kernel has none, a pair of tap devices can
take the place of each veth pair, and forwarder.py delays and loses the packets between them.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

# The longest time that a packet waits in a queue before it is dropped: 6 MB at 1 Gbit/s.
LATENCY = "50ms"

# From linux/if_tun.h: how to make a tap device, whose file carries bare Ethernet frames.
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


class Links(NamedTuple):
    """The links that join some hosts: workers, and perhaps a server behind them.

    Attributes:
      kind: `"namespaces"`, `"taps"` or `"loopback"`.
      addresses: the IP address of each host.
      interface: the network interface that carries the exchange, in every worker.
      coordinator: address and port at which worker 0 gathers the others.
      prefixes: the words before each worker's command.
      burst_bytes: bytes that pass an idle link at once before its rate holds; 0 without a rate.
      bridge: the namespace of the bridge.
    """

    kind: str
    addresses: Sequence[str]
    interface: str
    coordinator: str
    prefixes: Sequence[Sequence[str]]
    burst_bytes: int
    bridge: str = ""

    def plug(self, worker: int) -> None:
        """Join a worker's link to the switch."""
        run("ip", "-n", self.bridge, "link", "set", "dev", f"port{worker}", "master", "switch")

    def unplug(self, worker: int) -> None:
        """Cut a worker off. Packets are lost silently: the worker's link stays up."""
        run("ip", "-n", self.bridge, "link", "set", "dev", f"port{worker}", "nomaster")


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


def has_netem() -> bool:
    """Whether the kernel can delay and lose packets by itself."""
    name = f"signax-{os.getpid()}-probe"
    run("ip", "netns", "add", name)
    try:
        netem = ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem"]
        return subprocess.run(netem, capture_output=True).returncode == 0
    finally:
        run("ip", "netns", "delete", name)


@contextlib.contextmanager
def namespaces(
    workers: int, rate: str, delay: str, loss: float = 0.0, *, taps: bool = False
) -> Iterator[Links]:
    """Join workers by links of a rate, in namespaces that last as long as the context.

    Args:
      workers: the number of workers.
      rate: the rate of each link in each direction: `"1gbit"`, or `"unlimited"`.
      delay: the delay from each worker to the switch. `"2ms"` makes a round trip of 4 ms. A delay
        above 0 needs a kernel with `netem`, or taps.
      loss: the probability that a packet from a worker is lost. It needs the same.
      taps: whether a program forwards all packets between tap devices.

    Yields:
      The links.

    Raises:
      OSError: `ip` or `tc` failed.
    """
    bridge, *names = [f"signax-{os.getpid()}-{name}" for name in ("bridge", *range(workers))]
    addresses = [f"10.0.0.{worker + 1}" for worker in range(workers)]
    files: list[tuple[int, int]] = []
    forwarder: subprocess.Popen | None = None
    try:
        run("ip", "netns", "add", bridge)
        run("ip", "-n", bridge, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", bridge, "link", "set", "dev", "switch", "up")
        for worker, (name, address) in enumerate(zip(names, addresses, strict=True)):
            run("ip", "netns", "add", name)
            if taps:
                files.append((make_tap("link0", name), make_tap(f"port{worker}", bridge)))
            else:
                make_veth(name, bridge, f"port{worker}")
            connect(name, address, bridge, f"port{worker}")
            netem = (0.0, 0.0) if taps else (milliseconds(delay), loss)
            limit(name, bridge, f"port{worker}", rate, *netem)
        if taps:
            forwarder = forward(files, milliseconds(delay) / 1e3, loss)
        prefixes = [enter(name, address) for name, address in zip(names, addresses, strict=True)]
        yield Links(
            "taps" if taps else "namespaces",
            addresses,
            "link0",
            f"{addresses[0]}:29500",
            prefixes,
            burst_bytes(rate),
            bridge,
        )
    finally:
        if forwarder:
            forwarder.kill()
            forwarder.wait()
        for file in (file for pair in files for file in pair):
            os.close(file)
        for name in (bridge, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def loopback(workers: int) -> Iterator[Links]:
    """Join workers by the host's loopback interface, which has no rate limit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    addresses = ["127.0.0.1"] * workers
    yield Links("loopback", addresses, "lo", f"127.0.0.1:{free_port}", [[]] * workers, 0)


def make_veth(name: str, bridge: str, port: str) -> None:
    """Make a link between a worker's namespace and the bridge's, of two devices of the kernel."""
    peer = ["peer", "name", "link0", "netns", name]
    run("ip", "-n", bridge, "link", "add", port, "type", "veth", *peer)


def make_tap(device: str, name: str) -> int:
    """Make a tap device in a namespace, and return its file, which keeps it alive."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    made = f"signax{file}"  # until it is in its namespace
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", made.encode(), IFF_TAP | IFF_NO_PI))
    run("ip", "link", "set", "dev", made, "netns", name, "name", device)
    return file


def forward(files: Sequence[tuple[int, int]], delay: float, loss: float) -> subprocess.Popen:
    """Start to carry packets between pairs of taps."""
    hosts, ports = zip(*files, strict=True)
    task = {"hosts": hosts, "ports": ports, "delay": delay, "loss": loss, "seed": 0}
    program = str(Path(__file__).with_name("forwarder.py"))
    command = [sys.executable, program, json.dumps(task)]
    return subprocess.Popen(command, pass_fds=(*hosts, *ports), start_new_session=True)


def connect(name: str, address: str, bridge: str, port: str) -> None:
    """Join a worker's link to a port of the bridge."""
    run("ip", "-n", bridge, "link", "set", "dev", port, "master", "switch", "up")
    run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
    run("ip", "-n", name, "link", "set", "dev", "link0", "up")
    run("ip", "-n", name, "link", "set", "dev", "lo", "up")


def limit(name: str, bridge: str, port: str, rate: str, delay: float, loss: float) -> None:
    """Limit a link in both directions. Delay, in milliseconds, and lose what the worker sends."""
    parent = ["root"]
    if delay or loss:
        netem = ["root", "handle", "1:", "netem", "delay", f"{delay}ms"]
        netem += ["loss", f"{100 * loss}%", "limit", "100000"]
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
