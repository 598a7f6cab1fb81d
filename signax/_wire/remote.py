"""Votes through a server that is no worker: a message to it, and its decision back.

The server does what `combine` does for the `"gather"` transport, once for all jobs. Words must mean
the same on every platform, since the jobs may run on different ones.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from signax._core.leaves import ShardingGroup
from signax._core.remote import Remote, VoteFormat
from signax._wire.types import Array, Reply, UInt32
from signax._wire.words import seal, unseal


def check_groups(groups: Sequence[ShardingGroup]) -> None:
    """Raise unless all leaves fit into one message."""
    sharded = [group.axes for group in groups if group.axes]
    if sharded:
        raise ValueError(
            f"updates are sharded over the Explicit axes {sharded[0]!r}, and exchange= takes whole "
            "messages: use axes of type Auto within a job"
        )


def ask_remote(
    message: Sequence[UInt32[Array, " words"]],
    header: UInt32[Array, ""],
    codec: Any,
    remote: Remote,
    step: Any,
    leaves: Sequence[Any],
) -> Reply:
    """Send a whole message of some leaves to the server, and return its decision.

    Args:
      message: the planes of the message, u32[words] each.
      header: u32[], the header of the message.
      codec: the codec of a majority vote, whose words are portable.
      remote: the exchange.
      step: the number of the step.
      leaves: arrays with the shapes and dtypes of the updates.

    Returns:
      The planes of the decision, u32[words] each, and its header.
    """
    (words,) = message[0].shape
    up, down = codec.planes(remote.num_workers)
    described = tuple([(leaf.shape, str(leaf.dtype)) for leaf in leaves])
    form = VoteFormat(codec.rules.zeros, codec.rules.ties, words, up, down, described)
    sealed = seal([plane[None] for plane in message], header)[0]
    with jax.named_scope("signax.exchange"):
        decision = remote.vote(sealed, jnp.asarray(step), form)
    decided, headers = unseal(decision[None], [words] * down)
    return Reply([plane[0] for plane in decided], headers[0], [], [])
