"""How a job finds the jobs that vote with it."""

import json
from typing import Any

import jax

from signax._core.checks import check_number
from signax.elastic.credentials import is_loopback, split_address
from signax.elastic.exchange import Exchange
from signax.elastic.sharded import ShardedConnection


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

    While the server does not answer, votes wait, and after five seconds Python's logger
    `signax.elastic` says so.

    Args:
      address: the server that `python -m signax.elastic serve` runs, HOST:PORT.
      slot: the number of this worker, from 0, another one for each job.
      token: the slot's token, if the server asks for tokens.
      credentials: `grpc.ssl_channel_credentials(...)`, if the server has TLS.
      insecure: whether everything may travel in plain text beyond this machine.
      give_up: the seconds without an answer from the server after which an update raises an error.
        A server that is restarted in time costs a pause.

    Returns:
      The exchange, for the argument `exchange=` of :func:`signax.lion` and other optimisers. It is
      a context manager: :meth:`signax.elastic.Exchange.close` ends it.

    Raises:
      ValueError: `address` is no HOST:PORT, `address` is not on this machine and there are no
        `credentials`, `slot` or `give_up` is out of range, or the job has several processes.
      TypeError: `slot` is not a whole number, or `give_up` not a number.
      VoteServerError: the server refuses, or does not answer.

    Examples:
      >>> import optax, signax, signax.elastic
      >>> exchange = signax.elastic.connect("127.0.0.1:7443", slot=0)  # doctest: +SKIP
      >>> tx = signax.lion(3e-4, exchange=exchange)  # doctest: +SKIP

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
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
    if jax.process_count() > 1:
        raise ValueError(
            f"this job has {jax.process_count()} processes, and a job that votes through a server "
            "has one, with any number of devices: start each process as a job of its own, without "
            "jax.distributed.initialize"
        )
    connection = ShardedConnection(address, slot, token, credentials, give_up, insecure=insecure)
    try:
        num_workers = json.loads(connection.status().tobytes())["num_workers"]
        if not 0 <= slot < num_workers:
            raise ValueError(f"slot={slot} must be from 0 to {num_workers - 1}, as the server says")
    except BaseException:
        connection.close()
        raise
    return Exchange(connection, slot, num_workers)
