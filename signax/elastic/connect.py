"""How a job finds the jobs that vote with it."""

import json
from typing import Any

from signax._core.checks import check_number
from signax.elastic.connection import Connection
from signax.elastic.credentials import is_loopback, split_address
from signax.elastic.exchange import Exchange


def connect(
    address: str,
    slot: int,
    *,
    token: str | None = None,
    credentials: Any = None,
    insecure: bool = False,
    give_up: float = 600.0,
) -> Exchange:
    """Connect this job to a vote server.

    Each worker is a JAX job of its own, of one process, on any platform. Jobs may start, end, die
    and come back at any time; the others go on without them.

    Args:
      address: the server that `python -m signax.elastic serve` runs, HOST:PORT.
      slot: the number of this worker, from 0, another one for each job.
      token: the slot's token, if the server asks for tokens.
      credentials: `grpc.ssl_channel_credentials(...)`, if the server has TLS.
      insecure: whether everything may travel in plain text beyond this machine.
      give_up: the seconds after which an update raises an error if the server does not answer. A
        server that is restarted in time costs a pause.

    Returns:
      The exchange, for the argument `exchange=` of :func:`signax.lion` and other optimisers.

    Raises:
      ValueError: `address` is no HOST:PORT, is not on this machine and has no `credentials`, or
        `slot` or `give_up` is out of range.
      TypeError: `slot` is not a whole number, or `give_up` not a number.
      VoteServerError: the server refuses, or does not answer.
    """
    host, _ = split_address(address)
    check_number("give_up", give_up, low=0)
    if type(slot) is not int:
        raise TypeError(f"slot={slot!r} must be a whole number")
    if credentials is None and not (insecure or is_loopback(host)):
        raise ValueError(
            f"address={address!r} is not on this machine, and without credentials ballots travel "
            "in plain text: pass credentials=grpc.ssl_channel_credentials(), or insecure=True if "
            "the network is yours alone"
        )
    connection = Connection(address, slot, token, credentials, give_up)
    num_workers = json.loads(connection.status().tobytes())["num_workers"]
    if not 0 <= slot < num_workers:
        raise ValueError(f"slot={slot} must be from 0 to {num_workers - 1}, as the server says")
    return Exchange(connection, slot, num_workers)
