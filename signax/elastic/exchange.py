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
from signax.elastic.connection import Connection, VoteServerError
from signax.elastic.fingerprint import find_fingerprint
from signax.elastic.plan import Exchange as PlannedVote
from signax.elastic.plan import Plan
from signax.elastic.protocol import Decision, Joined
from signax.elastic.refusals import Reason
from signax.elastic.tree_bytes import tree_from_bytes, tree_to_bytes

BATCH = 16  # replayed steps that may be on their way to the device
Decided = tuple[Decision, memoryview]


class Exchange(Remote):
    """The exchange of this job with the vote server. :func:`signax.elastic.connect` makes one.

    Pass it to :func:`signax.majority_vote`, :func:`signax.sign_sgd`, :func:`signax.signum`,
    :func:`signax.lion` or :func:`signax.muon` as `exchange=`. The update then sends this worker's
    ballot to the server from within the compiled step, and waits for the decision. The session with
    the server begins with the first vote.

    An exchange belongs to one optimiser, and carries one vote for each update. If the server
    refuses a ballot or stays away, the step raises `jax.errors.JaxRuntimeError`, whose text ends in
    the :class:`signax.elastic.VoteServerError`.

    Attributes:
      num_workers: the number of workers, those that are away included.
      index: the number of this worker, from 0.
      step: the number of votes in the history of the parameters, after :meth:`catch_up`.

    Examples:
      >>> with signax.elastic.connect("127.0.0.1:7443", slot=0) as exchange:  # doctest: +SKIP
      ...     tx = signax.lion(3e-4, exchange=exchange)
      ...     state = tx.init(params)
      ...     params, state = exchange.catch_up(tx, params, state)
      ...     while exchange.step < 10_000:
      ...         params, state = train_step(params, state, batch_of(exchange.step))
      ...         params, state = exchange.catch_up(tx, params, state)

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """

    def __init__(self, connection: Connection, index: int, num_workers: int):
        self.index, self.num_workers, self.step = index, num_workers, 0
        self._connection = connection
        self._form: VoteFormat | None = None
        self._plan: Plan | None = None  # from the first call of `catch_up`
        self._is_planning = False
        self._next: int | None = None  # the first undecided step, as far as known
        self._ask_at = 0.0  # when others may have gone on without this worker
        self._deadline = 0.0
        self._missed: dict[int, Decided] = {}  # for the replay, whose votes take them
        self._wants_snapshot = False
        self._replay: tuple[Any, Any] = None, None  # an optimiser, and its step

    def __repr__(self) -> str:
        return f"Exchange(worker {self.index} of {self.num_workers})"

    def vote(self, sealed: jax.Array, step: jax.Array, form: VoteFormat) -> jax.Array:
        """Send a sealed message at a step, and return the sealed decision; for the optimisers."""
        if jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                "inside jax.shard_map every device would vote, and a job has one vote: call the "
                "update outside of it, on whole arrays, which may be sharded over axes of type Auto"
            )
        if self._form not in (None, form):
            raise ValueError(
                f"this exchange votes on {_describe(self._form)}, and cannot vote on "
                f"{_describe(form)} too: an exchange carries one vote for each update, and "
                "gradients have the shapes and dtypes of the parameters"
            )
        if self._plan is None and not self._is_planning:
            raise ValueError(
                "this exchange does not know the optimiser yet: call exchange.catch_up(tx, params, "
                "state) before the first update, and before every other one"
            )
        self._form = form
        shape = sealed_words(form.down * form.words) // LANES, LANES
        reply = jax.ShapeDtypeStruct(shape, jnp.uint32)
        if self.replays:
            return io_callback(self._take_missed, reply, step)
        return io_callback(self._vote, reply, sealed, step)

    def catch_up(
        self, tx: optax.GradientTransformation, params: optax.Params, state: Any
    ) -> tuple[Any, Any]:
        """Apply the decisions that this worker has missed. Call it before every step.

        It does nothing unless the worker has just started, its last ballot came too late, or the
        deadline has passed since its last decision. Missed decisions come from the server's log.
        Each is applied by `tx.update` with gradients of NaN, which count for nothing: votes exclude
        them, and momenta stay as they are. So parameters, schedules and decay become what the other
        workers have. If these are in the middle of a step that takes longer than the deadline, this
        method waits for their next decision, so that this worker begins a step with them.

        If the log does not reach back to the state, parameters and state come from a snapshot,
        which another worker uploads in this method. They hold that worker's momentum, and this
        worker goes on from it.

        The arrays that are passed in stay valid.

        Args:
          tx: the optimiser, with this exchange in it.
          params: the parameters, floating-point arrays.
          state: the state of the optimiser.

        Returns:
          The parameters, and the state.

        Raises:
          ValueError: the state has no vote in it, or several; the parameters have no coordinates;
            or an update of `tx` with gradients of NaN does not take exactly one vote.
          VoteServerError: the server refuses, or stays away.

        Examples:
          >>> params, state = exchange.catch_up(tx, params, state)  # doctest: +SKIP
        """
        self.step = _step_of(state)
        if self._next is None or time.monotonic() > self._ask_at:
            if self._plan is None:
                self._plan = self._make_plan(tx, params, state)
            if self._join().first > self.step:
                params, state = self._take_snapshot(params, state)
        if self._wants_snapshot:
            self._wants_snapshot = False
            self._connection.put_snapshot(self.step, tree_to_bytes((params, state)))
        while self._next is not None and self.step < self._next:
            try:
                return self._replay_missed(tx, params, state)
            except VoteServerError as error:  # the log has moved on in the meantime
                if error.reason != Reason.TOO_OLD:
                    raise
                params, state = self._take_snapshot(params, state)
        return params, state

    def close(self) -> None:
        """Leave. The other workers do not wait for this one any more.

        Examples:
          >>> exchange.close()  # doctest: +SKIP
        """
        self._connection.close()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _make_plan(self, tx: Any, params: Any, state: Any) -> Plan:
        """What the server must know of the updates. Tracing one tells the format of its vote."""
        self._is_planning = True
        try:
            fingerprint = find_fingerprint(tx, params, state)
        finally:
            self._is_planning = False
        form = self._form
        if form is None:
            raise ValueError("the parameters have no coordinates, so there is nothing to vote on")
        versions = {"jax": jax.__version__, "signax": signax.__version__}
        facts = {**versions, "update": fingerprint, **form._asdict()}
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        planned = PlannedVote((form.words,) * form.up, form.zeros, form.ties)
        return Plan(digest, self.num_workers, (planned,))

    def _join(self) -> Joined:
        """Begin a session, and hear how far the others are."""
        assert self._plan is not None  # nobody votes before
        joined = self._connection.join(self._plan)
        self._deadline = joined.deadline
        self._hear(joined.sequence)
        return joined

    def _take_snapshot(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Parameters and state of another worker."""
        snapshot, payload = self._connection.get_snapshot(self.step)
        self.step = snapshot.step
        return tree_from_bytes(payload, (params, state))

    def _replay_missed(self, tx: Any, params: Any, state: Any) -> tuple[Any, Any]:
        """Apply the decisions of the log."""
        if self._replay[0] is not tx:
            self._replay = tx, jax.jit(_make_replay(tx), donate_argnums=(0, 1))
        replay = self._replay[1]
        self._missed.clear()
        before = params, state
        params, state = jax.tree.map(jnp.copy, before)  # which the replay overwrites
        self.replays = True
        try:
            for decision, words in self._connection.follow(self.step):
                self._missed[decision.sequence] = decision, words
                params, state = replay(params, state)
                self.step = decision.sequence + 1
                if decision.sequence % BATCH == 0:
                    jax.block_until_ready(params)
        finally:
            self.replays = False
        if _step_of(state) != self.step:
            raise ValueError(
                f"the replay of decision {self.step - 1} led to step {_step_of(state)}: an update "
                "with gradients of NaN must vote once, so wrap the optimiser in nothing that skips "
                "or collects updates, such as optax.apply_if_finite or optax.MultiSteps"
            )
        self._next = self.step
        return jax.block_until_ready(_repair((params, state), before))

    def _hear(self, sequence: int | None) -> None:
        """Remember the first undecided step, if it is known, and when this was news."""
        self._next, self._ask_at = sequence, time.monotonic() + self._deadline

    def _vote(self, sealed: Any, step: Any) -> np.ndarray:
        """What the compiled step calls: send a ballot, and return the sealed decision."""
        decided = self._missed.pop(int(step), None)  # of a replay by a jitted `tx.update`
        if decided is None:
            decided = self._send(int(step), np.ascontiguousarray(sealed, "<u4").reshape(-1))
        return self._seal(*decided)

    def _take_missed(self, step: Any) -> np.ndarray:
        """What the compiled replay calls: return the sealed decision of the log."""
        return self._seal(*self._missed.pop(int(step)))

    def _seal(self, decision: Decision, words: memoryview) -> np.ndarray:
        """A decision as the compiled program reads it."""
        form = self._form
        assert form is not None
        reply = np.zeros(sealed_words(form.down * form.words), np.uint32)
        planes = np.frombuffer(words, "<u4")
        reply[: planes.size], reply[planes.size] = planes, decision.header
        return reply.reshape(-1, LANES)

    def _send(self, sequence: int, message: np.ndarray) -> Decided:
        if self._next is None:
            self._join()
        form = self._form
        assert form is not None
        known = self._next or 0
        participates = bool(message[form.up * form.words])
        bits = memoryview(message if participates else message[:0]).cast("B")
        decided = self._connection.vote(sequence, participates, bits)
        decision = decided[0]
        # The slot may be present by a ballot of an earlier job.
        is_late = sequence < known or self.index not in decision.present
        # Of a late ballot only the log knows how many decisions have followed.
        self._hear(None if is_late else sequence + 1)
        self._wants_snapshot |= decision.wants_snapshot
        return decided


def _make_replay(tx: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step without a gradient of its own."""

    def replay(params: Any, state: Any) -> tuple[Any, Any]:
        nothing = jax.tree.map(lambda param: jnp.full_like(param, jnp.nan), params)
        updates, state = tx.update(nothing, state, params)
        return optax.apply_updates(params, updates), state

    return replay


def _repair(after: Any, before: Any) -> Any:
    """Put leaves back that gradients of NaN went into, such as a momentum that holds nothing."""
    leaves, structure = jax.tree.flatten(after)
    olds = jax.tree.leaves(before)
    are_broken = jax.device_get(_find_new_nans(leaves, olds))
    pairs = zip(leaves, olds, are_broken, strict=True)
    return structure.unflatten([old if is_broken else leaf for leaf, old, is_broken in pairs])


@jax.jit
def _find_new_nans(leaves: list[Any], olds: list[Any]) -> list[Any]:
    def has_nan(leaf: Any) -> Any:
        is_inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.isnan(leaf).any() if is_inexact else jnp.zeros([], jnp.bool_)

    return [has_nan(leaf) & ~has_nan(old) for leaf, old in zip(leaves, olds, strict=True)]


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


def _describe(form: VoteFormat | None) -> str:
    assert form is not None
    leaves = [f"{dtype}{[*shape]}" for shape, dtype in form.leaves]
    shown = ", ".join(leaves if len(leaves) <= 5 else [*leaves[:4], "..."])
    return f"{len(leaves)} leaves ({shown}) with zeros={form.zeros!r}"
