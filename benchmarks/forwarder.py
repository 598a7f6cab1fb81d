"""Delay and lose the packets of namespaces.py, in place of the kernel's netem.

Both ends of a link are tap devices, and this program carries packets from one end to the other. It
is started with the open devices; its only argument is a JSON object:

    hosts    the file of each host's end; these packets are delayed and lost
    ports    the file of each link's other end; these packets go straight to the host
    delay    in seconds
    loss     the probability that a packet is lost
    seed     of the losses
"""

import contextlib
import heapq
import itertools
import json
import os
import random
import select
import sys
import time

PACKET = 1 << 16  # bytes; longer than any packet


def main() -> None:
    """Forward packets until the process is ended."""
    task = json.loads(sys.argv[1])
    draw = random.Random(task["seed"])
    pairs = [*zip(task["hosts"], task["ports"], strict=True)]
    targets = {host: (port, task["delay"], task["loss"]) for host, port in pairs}
    targets |= {port: (host, 0.0, 0.0) for host, port in pairs}
    order = itertools.count()  # of packets that are due at the same time
    waiting: list[tuple[float, int, int, bytes]] = []
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for file in select.select([*targets], [], [], pause)[0]:
            target, delay, loss = targets[file]
            packet = os.read(file, PACKET)
            if draw.random() >= loss:
                due = time.monotonic() + delay
                heapq.heappush(waiting, (due, next(order), target, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # a device that is down loses the packet
                os.write(target, packet)


if __name__ == "__main__":
    main()
