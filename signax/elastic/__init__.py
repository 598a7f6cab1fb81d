"""Votes between independent JAX jobs, through a vote server that outlives each of them.

A job calls :func:`connect`; `python -m signax.elastic serve` is the server. Both need grpcio, which
the extra `signax[elastic]` installs. The rest of signax never imports this package.
"""

try:
    import grpc as _grpc
except ImportError as error:
    raise ImportError(
        "signax.elastic needs grpcio, which is not installed: pip install 'signax[elastic]'"
    ) from error

from signax.elastic.connect import connect
from signax.elastic.connection import VoteServerError
from signax.elastic.exchange import Exchange

__all__ = ["Exchange", "VoteServerError", "connect"]

del _grpc
