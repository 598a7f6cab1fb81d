"""The states of votes, and what a vote's dither remembers from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from signax._transforms.participation import Participation
from signax._wire.ballots import DitherMemory
from signax._workers.agreement import Reputation

NEVER = 2**31 - 1


def next_dither_memory(
    before: DitherMemory, dead: jax.Array, voters: jax.Array, step: jax.Array, num_workers: int
) -> DitherMemory:
    """The dither's memory after a step.

    Args:
      before: the memory before the step.
      dead: u32[] in {0, 1}, whether dead coordinates of even index moved up or down.
      voters: u32[], the number of workers that took part. Nothing moves without any.
      step: int32[], the number of the step.
      num_workers: M.
    """
    moved = jnp.where(voters > 0, 2 * dead.astype(jnp.int32) - 1, 0)
    pair = jnp.where(voters < num_workers, step // 2, jnp.int32(NEVER))
    return DitherMemory(before.drift + moved, jnp.minimum(before.first_missed, pair))


class MajorityVoteState(NamedTuple):
    """State of `majority_vote`.

    Attributes:
      count: int32[], the steps taken, the same on every worker; it drives the dither.
      participation: a :class:`signax.Participation`.
      agreement: this worker's :class:`signax.Agreement`; `None` unless asked for.
      dither: a :class:`signax.DitherMemory`; `None` unless zeros and ties are dithered.
    """

    count: jax.typing.ArrayLike
    participation: Participation
    agreement: Any = None
    dither: Any = None


class WeightedVoteState(NamedTuple):
    """State of `majority_vote` with `weights="agreement"`.

    Attributes:
      count: see :class:`signax.MajorityVoteState`.
      participation: see :class:`signax.MajorityVoteState`.
      agreement: see :class:`signax.MajorityVoteState`.
      dither: see :class:`signax.MajorityVoteState`.
      reputation: a :class:`signax.Reputation`.
    """

    count: jax.typing.ArrayLike
    participation: Participation
    agreement: Any
    dither: Any
    reputation: Reputation


VoteState = MajorityVoteState | WeightedVoteState
