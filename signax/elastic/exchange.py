"""The exchange of a job with the jobs that vote with it, as the optimisers use it."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback

import signax
from signax._core.remote import Remote, VoteFormat
from signax._wire.words import LANES, sealed_words
from signax._workers.vote_state import MajorityVoteState
from signax.elastic.connection import Connection
from signax.elastic.plan import Exchange as PlannedVote
from signax.elastic.plan import Plan
from signax.elastic.protocol import Decision

BATCH = 16  # replayed steps that may be on their way to the device
Decided = tuple[Decision, memoryview]


class Exchange(Remote):
    """The exchange of this job with the vote server. :func:`signax.elastic.connect` makes one.

    Pass it to :func:`signax.majority_vote`, :func:`signax.sign_sgd`, :func:`signax.signum`,
    :func:`signax.lion` or :func:`signax.muon` as `exchange=`. The update then sends this worker's
    ballot to the server from within the compiled step, and waits for the decision. The session with
    the server begins with the first vote. An exchange carries one vote for each update.

    Attributes:
      num_workers: the number of workers, those that are away included.
      index: the number of this worker, from 0.
      step: the number of votes in the history of the parameters, after :meth:`catch_up`.
    """

    def __init__(self, connection: Connection, index: int, num_workers: int):
        self.index, self.num_workers, self.step = index, num_workers, 0
        self._connection = connection
        self._form: VoteFormat | None = None
        self._plan: Plan | None = None
        self._next: int | None = None  # the first undecided step, as far as known
        self._ask_at = 0.0  # when others may have gone on without this worker
        self._deadline = 0.0
        self._missed: dict[int, Decided] = {}
        self._wants_snapshot = False
        self._replay: tuple[Any, Callable[..., Any]] = (None, _no_replay)

    def __repr__(self) -> str:
        return f"Exchange(worker {self.index} of {self.num_workers})"

    def vote(self, sealed: jax.Array, step: jax.Array, form: VoteFormat) -> jax.Array:
        """Send a sealed message at a step, and return the sealed decision; for the optimisers."""
        if self._form not in (None, form):
            raise ValueError(
                f"this exchange votes on {_describe(self._form)}, and cannot vote on "
                f"{_describe(form)} too: an exchange carries one vote for each update"
            )
        self._form = form
        shape = sealed_words(form.down * form.words) // LANES, LANES
        return io_callback(self._vote, jax.ShapeDtypeStruct(shape, jnp.uint32), sealed, step)

    def catch_up(
        self, tx: optax.GradientTransformation, params: optax.Params, state: Any
    ) -> tuple[Any, Any]:
        """Apply the decisions that this worker has missed. Call it before every step.

        It does nothing unless the worker has started anew, its last ballot came too late, or the
        deadline has passed since. Missed decisions come from the server's log. Each is applied by
        `tx.update` with gradients of NaN, which count for nothing: votes exclude them, and momenta
        stay as they are. So parameters, schedules and decay become what the other workers have,
        bit for bit.

        If the log does not reach back to the state, parameters and state come from a snapshot,
        which another worker uploads in this method. They hold that worker's momentum, and this
        worker goes on from it.

        Args:
          tx: the optimiser, with this exchange in it.
          params: the parameters.
          state: the state of the optimiser.

        Returns:
          The parameters, and the state.

        Raises:
          ValueError: the state has no vote in it, or several.
          VoteServerError: the server refuses, or stays away.
        """
        step = _step_of(state)
        if self._next is None or time.monotonic() > self._ask_at:
            step, params, state = self._start(tx, step, params, state)
        if self._wants_snapshot:
            self._wants_snapshot = False
            self._connection.put_snapshot(step, _to_bytes((params, state)))
        self.step = step
        if self._next is None or step >= self._next:
            return params, state
        if self._replay[0] is not tx:
            self._replay = tx, jax.jit(_make_replay(tx))
        replay = self._replay[1]
        for decision, words in self._connection.follow(step):
            self._missed[decision.sequence] = decision, words
            params, state = replay(params, state)
            self.step = self._next = decision.sequence + 1
            if decision.sequence % BATCH == 0:
                jax.block_until_ready(params)
        return jax.block_until_ready((params, state))

    def close(self) -> None:
        """Leave. The other workers do not wait for this one any more."""
        self._connection.close()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, tx: Any, step: int, params: Any, state: Any) -> tuple[int, Any, Any]:
        """Begin a session, and take a snapshot if the log does not reach back to the step."""
        if self._form is None:  # tracing the update tells the format of its vote
            jax.eval_shape(tx.update, params, state, params)
        joined = self._join()
        if step < joined.first:
            snapshot, payload = self._connection.get_snapshot(joined.first)
            params, state = _from_bytes(payload, (params, state))
            step = snapshot.step
        return step, params, state

    def _join(self) -> Any:
        assert self._form is not None
        form = self._form
        planned = PlannedVote((form.words,) * form.up, form.zeros, form.ties)
        plan = Plan(_digest_of(form), self.num_workers, (planned,))
        joined = self._connection.join(plan)
        self._deadline = joined.deadline
        self._hear(joined.sequence)
        return joined

    def _hear(self, sequence: int | None) -> None:
        """Remember the first undecided step, if it is known, and when this was news."""
        self._next, self._ask_at = sequence, time.monotonic() + self._deadline

    def _vote(self, sealed: Any, step: Any) -> np.ndarray:
        """What the compiled step calls: send a ballot, and return the sealed decision."""
        sequence, form = int(step), self._form
        assert form is not None
        decided = self._missed.pop(sequence, None)
        if decided is None:
            decided = self._send(sequence, np.ascontiguousarray(sealed, "<u4").reshape(-1), form)
        decision, words = decided
        reply = np.zeros(sealed_words(form.down * form.words), np.uint32)
        planes = np.frombuffer(words, "<u4")
        reply[: planes.size], reply[planes.size] = planes, decision.header
        return reply.reshape(-1, LANES)

    def _send(self, sequence: int, message: np.ndarray, form: VoteFormat) -> Decided:
        if self._next is None:
            self._join()
        participates = bool(message[form.up * form.words])
        bits = memoryview(message if participates else message[:0]).cast("B")
        decided = self._connection.vote(sequence, participates, bits)
        decision = decided[0]
        is_late = self.index not in decision.present
        # Of a late ballot only the log knows how many decisions have followed.
        self._hear(None if is_late else sequence + 1)
        self._wants_snapshot |= decision.wants_snapshot
        return decided


def _no_replay(*_: Any) -> Any:
    raise AssertionError("a replay begins with its optimiser")


def _make_replay(tx: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step without a gradient of its own."""

    def replay(params: Any, state: Any) -> tuple[Any, Any]:
        nothing = jax.tree.map(lambda param: jnp.full_like(param, jnp.nan), params)
        updates, state = tx.update(nothing, state, params)
        return optax.apply_updates(params, updates), state

    return replay


def _step_of(state: Any) -> int:
    """The number of the step in the only vote of a state."""

    def is_vote(node: Any) -> bool:
        return isinstance(node, MajorityVoteState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_vote) if is_vote(node)]
    if len(found) != 1:
        raise ValueError(
            f"the state has {len(found)} votes in it, and an exchange carries one: pass the state "
            "of the optimiser with exchange= in it"
        )
    return int(found[0].count)


def _digest_of(form: VoteFormat) -> str:
    """The hash of what all jobs must have in common."""
    facts = {"signax": signax.__version__, **form._asdict()}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _describe(form: VoteFormat | None) -> str:
    assert form is not None
    return f"{len(form.leaves)} leaves in {form.words} words with zeros={form.zeros!r}"


def _to_bytes(tree: Any) -> memoryview:
    """The leaves of a tree, one after the other."""
    leaves = jax.device_get(jax.tree.leaves(tree))
    return memoryview(b"".join([np.asarray(leaf).tobytes() for leaf in leaves]))


def _from_bytes(payload: memoryview, like: Any) -> Any:
    """Invert `_to_bytes` for a tree like another one."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.nbytes for leaf in leaves]
    if sum(sizes) != len(payload):
        raise ValueError(
            f"the snapshot has {len(payload)} bytes, and parameters and state have {sum(sizes)}: "
            "all jobs must have the same optimiser"
        )
    found, start = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        array = np.frombuffer(payload[start : start + size], leaf.dtype).reshape(leaf.shape)
        found.append(jax.device_put(array, leaf.sharding))
        start += size
    return structure.unflatten(found)
