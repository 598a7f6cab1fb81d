"""Buckets: an optimiser that exchanges the leaves of a tree in several messages."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from signax._core.checks import check_transformation
from signax._core.leaves import is_masked
from signax._transforms.participation import NO_EXTRAS, Extras

Buckets = Any  # a tree of integers, or a function from parameters to one


class BucketsState(NamedTuple):
    """The state of :func:`signax.in_buckets`.

    Attributes:
      inner_states: the state of `inner` for each bucket, in which the leaves of other buckets are
        masked.
    """

    inner_states: tuple[Any, ...]


def in_buckets(
    inner: optax.GradientTransformation, buckets: Buckets | Callable[[optax.Params], Buckets]
) -> optax.GradientTransformationExtraArgs:
    r"""Vote, or average, on the leaves of a tree in several messages, the buckets.

    A vote on all leaves in one message has to wait for the last gradient, since a worker whose
    gradient is not finite takes no part. With buckets the message of bucket b waits for the
    gradients of buckets 0 to b alone, and travels while the backward pass goes on: see
    :func:`signax.overlap` and :func:`signax.find_buckets`.

    Updates equal those of `inner` by itself, as long as all workers take part and `inner` treats
    leaves one by one: bit for bit after a vote, a mean of signs or a mean, and up to the rounding
    of scales after the others. Put transformations of the whole tree before, such as a clip by the
    global norm. Random transformations draw other numbers, and the same in each bucket. With
    `weights="agreement"` each bucket has weights of its own, by the agreement on its coordinates.

    A worker takes part in bucket b if it is `active` and its updates of buckets 0 to b are finite.
    It is excluded from the first bucket in which an update is not finite, and from all later
    buckets. Its state, such as a momentum, stays as it was in those buckets. A leaf outside, as of
    another group of `optax.partition`, counts for every bucket. :func:`signax.participation` shows
    the voters of the last bucket, and counts a missed step once.

    Args:
      inner: the transformation of each bucket, with votes or means in it.
      buckets: the number of each leaf's bucket, from 0 on without a gap: a tree of integers like
        the parameters, or a function from parameters to such a tree. Bucket 0 is exchanged first.

    Returns:
      A transformation with a :class:`BucketsState`. It passes extra arguments on.

    Raises:
      TypeError: `inner` is not a transformation; at `init` and at the update, a bucket is not an
        integer.
      ValueError: at `init` and at the update, `buckets` and the tree differ in structure, or a
        bucket is below 0 or has no leaf; at the update, the state has another number of buckets.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> lion = signax.lion(0.5, axis_name="workers", weight_decay=0.0)
      >>> tx = signax.in_buckets(lion, {"first": 1, "last": 0})  # gradients of the last layer first
      >>> params = {"first": jnp.zeros(2), "last": jnp.zeros(2)}
      >>> gradients = jax.tree.map(lambda p: jnp.array([[1.0, -1.0]] * 3), params)
      >>> gradients["first"] = gradients["first"].at[2].set(jnp.nan)
      >>> update = lambda g: tx.update(g, tx.init(params), params)
      >>> updates, state = jax.vmap(update, axis_name="workers")(gradients)
      >>> print(updates["first"][0], updates["last"][0])
      [-0.5  0.5] [-0.5  0.5]
      >>> print(signax.participation(state).voters)
      [2 2 2]

    References:
      Li et al., `PyTorch Distributed: Experiences on Accelerating Data Parallel Training
      <https://arxiv.org/abs/2006.15704>`_, 2020
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    last_number = 0

    def labels_of(tree: Any) -> tuple[Any, int]:
        nonlocal last_number
        if callable(buckets) and not jax.tree.leaves(tree):
            return tree, last_number  # optax.tree.map_params asks for the structure of a state
        labels = buckets(tree) if callable(buckets) else buckets
        last_number = _check_numbers(labels)
        return _labels_like(tree, labels), last_number

    def init_fn(params: optax.Params):
        labels, number = labels_of(params)
        return BucketsState(tuple([inner.init(_take(params, labels, b)) for b in range(number)]))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        signax: Extras = NO_EXTRAS,
        **extra_args: Any,
    ):
        labels, number = labels_of(updates if params is None else params)
        if len(state.inner_states) != number:
            raise ValueError(
                f"the state has {len(state.inner_states)} buckets, and buckets= now has {number}: "
                "pass the buckets with which the state was made"
            )
        result, states = updates, []
        for b, inner_state in enumerate(state.inner_states):
            new_updates, new_state = inner.update(
                _take(updates, labels, b),
                inner_state,
                None if params is None else _take(params, labels, b),
                signax=signax._replace(raw=_up_to(signax.raw, updates, labels, b)),
                **extra_args,
            )
            result = jax.tree.map(_unless_masked, new_updates, result, is_leaf=is_masked)
            states.append(new_state)
        return result, BucketsState(tuple(states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def has_buckets(state: Any) -> bool:
    """Whether a state has a part of `in_buckets`."""
    nodes = jax.tree.leaves(state, is_leaf=_is_buckets_state)
    return any(map(_is_buckets_state, nodes))


def _is_buckets_state(node: Any) -> bool:
    return isinstance(node, BucketsState)


def _check_numbers(labels: Any) -> int:
    """The number of buckets; raises if a label is no bucket, or if a bucket has no leaf."""
    found = {_check_number(path, label) for path, label in jax.tree.leaves_with_path(labels)}
    missing = {*range(len(found))} - found
    if missing:
        raise ValueError(
            f"buckets go up to {max(found)}, but no leaf is in bucket {min(missing)}: number them "
            "from 0 on without a gap"
        )
    return len(found)


def _check_number(path: Any, label: Any) -> int:
    where = f"buckets{jax.tree_util.keystr(path)}={label!r}"
    try:
        number = operator.index(label)  # of a checkpoint it may be an array
    except TypeError:
        number = None
    if number is None or isinstance(label, bool):
        raise TypeError(f"{where} must be the number of a leaf's bucket, an integer")
    if number < 0:
        raise ValueError(f"{where} must be at least 0, the bucket that is exchanged first")
    return number


def _labels_like(tree: Any, labels: Any) -> Any:
    """The bucket of each leaf of a tree, some of which may be masked."""
    if not jax.tree.leaves(tree):
        return tree
    try:
        here = jax.tree.map(
            lambda node, label: node if is_masked(node) else label, tree, labels, is_leaf=is_masked
        )
    except ValueError:
        here = None
    if jax.tree.structure(here) != jax.tree.structure(tree):
        raise ValueError(
            "buckets must be a tree of integers like the parameters, "
            f"{jax.tree.structure(tree)}, but is {jax.tree.structure(labels)}"
        )
    return jax.tree.map(int, here)


def _take(tree: Any, labels: Any, bucket: int) -> Any:
    """The leaves of one bucket; the others are masked."""
    return jax.tree.map(
        lambda label, leaf: leaf if label == bucket else optax.MaskedNode(),
        labels, tree, is_leaf=is_masked,
    )  # fmt: skip


def _up_to(raw: Any, updates: Any, labels: Any, bucket: int) -> Any:
    """What must be finite for a bucket: updates of earlier buckets, and leaves of other votes.

    Updates of earlier buckets count as their own votes see them, so a worker that is excluded from
    a bucket is excluded from the later ones.
    """
    raw = updates if raw is None else raw

    def choose(label: Any, update: Any, raw_update: Any):
        if is_masked(label) or label == bucket:
            return raw_update
        return update if label < bucket else optax.MaskedNode()

    try:
        return jax.tree.map(choose, labels, updates, raw, is_leaf=is_masked)
    except ValueError:
        return raw  # of another structure, as before optax.flatten: all of it must be finite


def _unless_masked(node: Any, other: Any) -> Any:
    return other if is_masked(node) else node
