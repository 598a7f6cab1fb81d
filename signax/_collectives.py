"""The collectives: votes of the workers that lie along a mapped axis."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from signax import _packing
from signax._agreement import LEAST_VOTERS, add_up, compare_sums
from signax._ballots import (
    DitherMemory,
    Rules,
    Ties,
    WithOpinions,
    Zeros,
    all_finite,
    next_dither_memory,
    take_part,
    toss,
)
from signax._blocks import find_blocks, locally
from signax._checks import check_axis_name, check_floating, check_mode
from signax._exchange import (
    TRANSPORTS,
    Settle,
    Transport,
    decide,
    decide_and_compare,
    decide_and_compare_opinions,
    make_header,
    send,
    send_in_parts,
    send_summed,
    sum_dtype,
    tally,
    worker_of,
)
from signax._numerics import power_below, wide_dtype
from signax._specs import axis_names, explicit_axes, varies


def pvote(
    tree: Any,
    axis_name: Hashable,
    *,
    step: jax.Array | int | None = None,
    zeros: Zeros = "dither",
    ties: Ties = "dither",
    active: jax.Array | bool | None = None,
    transport: Transport = "auto",
    split_over: Hashable | None = None,
) -> Any:
    r"""Decides the sign of every coordinate by majority vote, one bit each way.

    With :math:`b_i \in \{+1, -1, 0\}` the sign of worker i's value on a coordinate and S the
    workers that take part,

    .. math:: v = \operatorname{sign} \sum_{i \in S} b_i

    with zero ballots and ties settled as `zeros` and `ties` say. It is shaped like
    :func:`jax.lax.psum` and runs under `jax.shard_map`, `jax.pmap` and `jax.vmap(axis_name=...)`,
    in one `all_to_all` and one `all_gather` of packed 32-bit words for the whole tree. The result
    is the same on every worker, which the types of `jax.shard_map` show.

    Args:
      tree: this worker's values; any pytree of floating-point arrays of any shape. Under
        `jax.shard_map` with `check_vma=True` every leaf must vary over the axis. NaN is no ballot,
        and a worker with a NaN or an infinity anywhere in its tree is out.
      axis_name: the mapped axis along which the workers lie, or a tuple of axes. Leaves that vary
        over different further axes of a `shard_map` want a call each, since JAX types one exchange
        as a whole.
      step: int32[], counts steps from 0 and is the same on every worker. It drives the dither, and
        may be left out only where nothing is dithered.
      zeros: `"dither"` turns a zero ballot into +-1 so that it cancels over workers and steps;
        `"abstain"` lets it count for nothing, at two bits each way; `"plus"` makes it +1. Dithered
        zeros of all workers stay within one step if the same workers vote in both steps of each
        pair (0 and 1, 2 and 3, ...), and walk at random otherwise; :func:`signax.majority_vote`
        remembers such walks and moves back.
      ties: `"dither"` settles a tie by a coin that every worker tosses alike, `"plus"` by +1, which
        drifts. With `zeros="abstain"` a tie is 0 whatever `ties` says.
      active: bool[], whether this worker takes part; by default it does.
      transport: how votes travel; the result is the same bit for bit. `"packed"` sends 2 (M-1)/M
        d/8 bytes per worker in two collectives, `"gather"` (M-1) d/8 in one, and `"int8"` sums
        ballots in an all-reduce of integers that are wide enough for M, 2 (M-1)/M d bytes or more.
        `"auto"` takes `"gather"` for two workers and for small trees, else `"packed"`.
      split_over: an axis along which devices hold the same values, such as the chips of a slice
        after a mean. Each then votes on its own part, and the parts are gathered along this axis,
        so that the links between workers carry each bit once. Not for `"int8"`.

    Returns:
      A tree like `tree`, of +1 and -1 in each leaf's dtype; with `zeros="abstain"` of 0 too. If no
      worker takes part, every coordinate is 0.

    Raises:
      NameError: `axis_name` or `split_over` is not bound.
      TypeError: a leaf is not real floating-point, or `axis_name`, `step` or `active` is of the
        wrong kind.
      ValueError: a mode is unknown, `step` is missing, or a leaf does not vary over the axis, or
        does over `split_over`.

    Examples:
      >>> import jax, jax.numpy as jnp, signax
      >>> gradients = jnp.array([[-1.0, 3.0, 2.0], [-4.0, -1.0, 1.0], [0.5, -2.0, 7.0]])
      >>> vote = lambda g: signax.pvote(g, "workers", step=0)
      >>> print(jax.vmap(vote, axis_name="workers")(gradients)[0])
      [-1. -1.  1.]

    References:
      Bernstein et al., `signSGD with Majority Vote is Communication Efficient and Fault Tolerant
      <https://arxiv.org/abs/1810.05291>`_, 2019
    """
    options = VoteOptions(axis_name, Rules(zeros, ties), transport, split_over)
    check_vote_options(options)
    return vote(tree, options, step=step, active=active, name="tree").updates


class VoteOptions(NamedTuple):
    """The options of a vote, checked by `check_vote_options`."""

    axis_name: Hashable
    rules: Rules
    transport: Transport
    split_over: Hashable | None
    mean: bool = False  # of the ballots, not their majority
    agreement: bool = False  # whether to measure how far each worker agrees with the others

    @property
    def sends_opinions(self) -> bool:
        """Whether a second bit has to tell opinions from dithered zeros."""
        return self.agreement and self.rules.planes == 1


def check_vote_options(options: VoteOptions) -> None:
    """Refuses options that no vote has."""
    check_axis_name(options.axis_name)
    check_mode("zeros", options.rules.zeros, ("dither", "abstain", "plus"))
    check_mode("ties", options.rules.ties, ("dither", "plus"))
    check_mode("transport", options.transport, TRANSPORTS)
    if not isinstance(options.agreement, bool):
        raise TypeError(f"agreement={options.agreement!r} must be True or False")
    if options.split_over is None:
        return
    if isinstance(options.split_over, (tuple, list, set)):
        raise TypeError(f"split_over={options.split_over!r} must name one axis, such as 'chip'")
    if options.split_over in axis_names(options.axis_name):
        raise ValueError(
            f"split_over={options.split_over!r} is an axis of the workers, "
            f"axis_name={options.axis_name!r}: it must be one along which devices hold the same"
        )
    if options.transport == "int8":
        raise ValueError(
            f"transport='int8' cannot be split over {options.split_over!r}: it sends no packed "
            "words; use 'packed' or 'gather'"
        )


def check_votable(
    tree: Any, axis_name: Hashable, split_over: Hashable | None = None, name: str = "updates"
) -> None:
    """Refuses leaves that are not floating-point, or that are known to be equal on all workers."""
    check_floating(tree, name)
    if not varies(worker_index(axis_name), axis_name):
        return  # vmap, pmap and check_vma=False type everything as invariant
    for path, leaf in jax.tree.leaves_with_path(tree):
        place = f"{name}{jax.tree_util.keystr(path)}"
        for axis in axis_names(axis_name):
            if leaf.size and not varies(leaf, axis):
                raise ValueError(
                    f"{place} does not vary over axis {axis!r}, so there is nothing to decide. In "
                    "jax.shard_map the gradient with respect to replicated parameters is already "
                    "summed over the workers: take it with respect to "
                    f"jax.lax.pcast(params, {axis!r}, to='varying'), or use "
                    "signax.DataParallel.value_and_grad. Freeze leaves after the vote, not before."
                )
        if split_over is not None and leaf.size and varies(leaf, split_over):
            raise ValueError(
                f"{place} varies over split_over={split_over!r}, along which devices must hold the "
                f"same: average it first, jax.lax.pmean({name}, {split_over!r})"
            )


def check_enough_workers(options: VoteOptions) -> None:
    """Refuses to compare a worker with a clear majority of others where there cannot be one."""
    if not options.agreement:
        return
    worker_index(options.axis_name)  # refuses an axis that is not bound
    if lax.axis_size(options.axis_name) < LEAST_VOTERS:
        raise ValueError(
            f"agreement=True compares each worker with a clear majority of the others, which takes "
            f"{LEAST_VOTERS} workers; {options.axis_name!r} has "
            f"{lax.axis_size(options.axis_name)}: leave it out"
        )


def worker_index(axis_name: Hashable) -> jax.Array:
    """This worker's index along the axis: i32[]."""
    try:
        return lax.axis_index(axis_name)
    except NameError:
        raise NameError(
            f"axis_name={axis_name!r} is not bound here: bind it with signax.DataParallel(tx, mesh,"
            f" {axis_name!r}), jax.shard_map over a mesh that has it, "
            f"jax.pmap(axis_name={axis_name!r}) or jax.vmap(axis_name={axis_name!r})"
        ) from None


class Worker(NamedTuple):
    """What a vote must know of a worker beside its values.

    Attributes:
      index: u32[], its place among the workers.
      coin: u32[] in {0, 1}, for its zero ballots.
      tie: u32[] in {0, 1}, the bit that settles ties, the same for all.
    """

    index: jax.Array
    coin: jax.Array
    tie: jax.Array


def find_worker(
    axis_name: Hashable,
    rules: Rules,
    step: jax.Array | int | None,
    memory: DitherMemory | None = None,
) -> Worker:
    """This worker at this step, with what its dither remembers of the steps before."""
    if step is None:
        if rules.zeros == "dither" or (rules.zeros == "plus" and rules.ties == "dither"):
            dithered = "zeros" if rules.zeros == "dither" else "ties"
            raise ValueError(
                f"step=None, but {dithered}='dither' needs it: pass the number of the step, the "
                "same on every worker"
            )
        step = 0
    if np.shape(step) or not jnp.issubdtype(getattr(step, "dtype", type(step)), jnp.integer):
        raise TypeError(f"step={step!r} must be one integer")
    number = jnp.asarray(np.uint32(step % 2**32) if isinstance(step, int) else step)
    index = worker_index(axis_name).astype(jnp.uint32)
    coins = toss(number, index, lax.axis_size(axis_name), memory)
    return Worker(index, coins.zero, rules.tie(coins.tie))


class Outcome(NamedTuple):
    """What an exchange comes to.

    Attributes:
      updates: everybody's.
      voters: u32[], how many workers took part, the same on every worker.
      takes_part: bool[], whether this worker did.
      finite: bool[], whether its own updates are.
      memory: the dither's memory after the step; `None` if the vote has none.
      agreed: f32[2], on how many coordinates it agrees and disagrees with a clear majority of the
        others, with `agreement`.
    """

    updates: Any
    voters: jax.Array
    takes_part: jax.Array
    finite: jax.Array
    memory: DitherMemory | None = None
    agreed: jax.Array | None = None


def vote(
    tree: Any,
    options: VoteOptions,
    *,
    step: jax.Array | int | None,
    active: jax.Array | bool | None,
    memory: DitherMemory | None = None,
    param_specs: Any = None,
    like: Any = None,
    name: str = "updates",
) -> Outcome:
    """The vote by checked options.

    The signs come in the shapes of the leaves of `like`, if it is given, which may be those of
    `tree` before they were cut into blocks. Without a `memory` the dither depends on `step` alone.
    `name` is what errors call the tree.
    """
    check_votable(tree, options.axis_name, options.split_over, name)
    check_enough_workers(options)
    worker = find_worker(options.axis_name, options.rules, step, memory)
    leaves, structure = jax.tree.flatten(tree)
    like = leaves if like is None else jax.tree.leaves(like)
    blocks = find_blocks(tree, param_specs)

    # In two passes over the blocks: a worker is out if any of them is not finite.
    whole = PartitionSpec()
    copies = 2 if options.sends_opinions else 1
    message_specs = [
        block.specs * copies if options.transport == "int8" else PartitionSpec(block.axes or None)
        for block in blocks
    ]
    messages, finite = [], jnp.bool_(True)
    for block, message_spec in zip(blocks, message_specs, strict=True):
        flag_spec = PartitionSpec(block.axes or None)
        cast = partial(_cast, options=options)
        cast = locally(cast, block.axes, (block.specs, whole), (message_spec, flag_spec))
        message, flags = cast([leaves[n] for n in block.positions], worker.coin)
        messages.append(message)
        finite &= jnp.all(flags)

    takes_part = take_part(finite, active)
    header = make_header(worker.index, worker.coin, worker.tie, takes_part)
    split, place, place_spec = _split_axes(options.split_over)
    voted = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in like]
    voters_and_dead, agreed = jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.float32)
    for block, message, message_spec in zip(blocks, messages, message_specs, strict=True):
        settle = partial(_settle, options=options)
        in_specs = block.specs, message_spec, whole, place_spec
        flag_spec = PartitionSpec(block.axes or None)
        out_specs = block.specs, flag_spec, flag_spec
        settle = locally(settle, (*block.axes, *split), in_specs, out_specs)
        signs, found, counts = settle([like[n] for n in block.positions], message, header, place)
        for position, sign in zip(block.positions, signs, strict=True):
            voted[position] = sign
        # Each block found the same. Older JAX cannot take one of them.
        voters_and_dead = jnp.max(found, axis=0)
        agreed += add_up(counts)
    voters, dead = voters_and_dead
    if memory is not None:
        num_workers = lax.axis_size(options.axis_name)
        memory = next_dither_memory(memory, dead, voters, jnp.asarray(step), num_workers)
    outcome = Outcome(structure.unflatten(voted), voters, takes_part, finite, memory)
    return outcome._replace(agreed=agreed) if options.agreement else outcome


def _cast(
    leaves: Sequence[jax.Array], coin: jax.Array, options: VoteOptions
) -> tuple[Any, jax.Array]:
    """A worker's ballots as they are sent, and whether all values are finite: bool[1]."""
    rules = options.rules
    if options.transport != "int8":
        ballots = WithOpinions(rules) if options.sends_opinions else rules
        message, finite = _packing.pack(leaves, ballots, coin)
        return message, finite[None]
    dtype = sum_dtype(lax.axis_size(options.axis_name))

    def numbers(rules):
        for leaf in leaves:
            plus, *minus = rules(leaf, _packing.odd(leaf.shape), coin)
            against = minus[0] if minus else ~plus
            yield plus.astype(dtype) - against.astype(dtype)

    ballots = [*numbers(rules)]
    if options.sends_opinions:
        ballots += numbers(Rules("abstain", rules.ties))
    return ballots, all_finite(leaves)[None]


def _settle(
    leaves: Sequence[jax.Array],
    message: Any,
    header: jax.Array,
    place: jax.Array,
    options: VoteOptions,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """What the workers decide like each leaf, whose values are not used: signs, or their means.

    Of the devices of `split_over`, this is the one at `place`, i32[1]. Also how many voted and what
    came of dithered zeros alone, u32[1, 2], and how far this worker agrees with the others,
    u32[1, 2].
    """
    if options.transport == "int8":
        outcomes, voters, dead, agreed = _settle_sums(message, header, len(leaves), options)
    else:
        outcomes, voters, dead, agreed = _settle_words(leaves, message, header, place, options)
    if options.mean:
        finish = partial(_mean_ballot, voters=voters)
    else:
        finish = partial(_signs, voters=voters, rules=options.rules)
    settled = [finish(outcome, leaf) for outcome, leaf in zip(outcomes, leaves, strict=True)]
    return settled, jnp.stack([voters, dead])[None], agreed[None]


def _settle_sums(
    numbers: Sequence[jax.Array], header: jax.Array, count: int, options: VoteOptions
) -> tuple[list[Any], jax.Array, jax.Array, jax.Array]:
    """For each leaf the sum of the ballots, or the bits of what is decided; and the rest.

    The first `count` numbers are the ballots on the leaves, and the last ones the opinions.
    """
    sums = send_summed(numbers, header, options.axis_name)
    totals, agreed = sums.totals[:count], jnp.zeros(2, jnp.uint32)
    if options.agreement:
        agreed = compare_sums(numbers[-count:], sums.totals[-count:])
    if options.mean:
        outcomes = totals
    elif options.rules.planes == 2:
        outcomes = [[total > 0, total < 0] for total in totals]
    else:
        outcomes = [[(total > 0) | ((total == 0) & (sums.tie == 1))] for total in totals]
    return outcomes, sums.voters, sums.dead, agreed


def _settle_words(
    leaves: Sequence[jax.Array],
    message: Sequence[jax.Array],
    header: jax.Array,
    place: jax.Array,
    options: VoteOptions,
) -> tuple[list[Any], jax.Array, jax.Array, jax.Array]:
    """The same from packed words."""
    rules, split_over = options.rules, options.split_over
    exchange = send if split_over is None else partial(send_in_parts, split_over, place[0])
    settle, planes_down = _counting(options)
    settled = exchange(message, header, options.axis_name, options.transport, settle, planes_down)
    agreed = jnp.zeros(2, jnp.uint32)
    if settled.agreed is not None:
        # An excluded worker reads the counts of another one, and nobody uses them.
        agreed = settled.agreed[:, worker_of(header)]
    bits = _packing.unpack(settled.planes, leaves)
    if options.mean:
        bits = [rules.total(digits, settled.voters) for digits in bits]
    return bits, settled.voters, settled.dead, agreed


def _counting(options: VoteOptions) -> tuple[Settle, int]:
    """The function that counts what comes up, and the number of planes that it sends down."""
    planes = options.rules.planes
    if options.mean:
        return tally, planes * lax.axis_size(options.axis_name).bit_length()
    if not options.agreement:
        return decide, planes
    return (decide_and_compare_opinions if options.sends_opinions else decide_and_compare), planes


def _mean_ballot(total: jax.Array, leaf: jax.Array, voters: jax.Array) -> jax.Array:
    """The mean of the voters' ballots, with one rounding to the leaf's dtype."""
    wide = wide_dtype(leaf.dtype)
    return (total.astype(wide) / jnp.maximum(voters, 1).astype(wide)).astype(leaf.dtype)


def _signs(
    bits: Sequence[jax.Array], leaf: jax.Array, voters: jax.Array, rules: Rules
) -> jax.Array:
    return rules.signs(bits, _packing.odd(leaf.shape), voters, leaf.dtype)


def _split_axes(
    split_over: Hashable | None,
) -> tuple[tuple[Hashable, ...], jax.Array, PartitionSpec]:
    """The axis that has yet to be mapped, if any; a device's place along it, i32[1], and its spec.

    The place is an argument since older versions of JAX cannot ask for it in a nested shard_map.
    """
    if split_over is None:
        return (), jnp.zeros(1, jnp.int32), PartitionSpec()
    try:
        return (), lax.axis_index(split_over)[None], PartitionSpec()
    except NameError:
        pass
    mesh = jax.sharding.get_abstract_mesh()
    if split_over not in mesh.axis_names:
        raise NameError(
            f"split_over={split_over!r} is neither a mapped axis here nor one of the mesh: name "
            "the axis along which devices hold the same values"
        )
    spec = PartitionSpec(split_over)
    places = jnp.arange(mesh.shape[split_over], dtype=jnp.int32)
    if split_over in explicit_axes(mesh):
        places = jax.sharding.reshard(places, spec)
    return (split_over,), places, spec


def mean_active(tree: Any, axis_name: Hashable, active: jax.Array) -> tuple[Any, jax.Array]:
    """The mean over the workers that are active, and their number, u32[].

    It is accumulated in at least f32, and 0 if none is.
    """
    leaves, structure = jax.tree.flatten(tree)
    wide = [leaf.astype(wide_dtype(leaf.dtype)) for leaf in leaves]
    # Not a product: an infinity times zero is NaN.
    share = power_below(lax.axis_size(axis_name))
    counted = [jnp.where(active, leaf * share, 0) for leaf in wide]
    sums, voters = lax.psum((counted, active.astype(jnp.float32)), axis_name)
    divisor = jnp.maximum(voters, 1) * share
    means = [total / divisor.astype(total.dtype) for total in sums]
    means = [mean.astype(leaf.dtype) for mean, leaf in zip(means, leaves, strict=True)]
    return structure.unflatten(means), voters.astype(jnp.uint32)
