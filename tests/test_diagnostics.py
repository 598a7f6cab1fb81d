"""Densities against closed forms; bytes against hand counts and against compiled programs."""

import contextlib
import math
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import signax
from signax import diagnostics
from signax._wire.words import part_words, sealed_words

with contextlib.suppress(RuntimeError):  # the backend is up already, with conftest's devices
    jax.config.update("jax_num_cpu_devices", 8)

# --- density ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("nonzero", "size"), [(1, 1), (1, 7), (3, 8), (300, 1000), (64, 64)])
def test_density_of_equal_magnitudes_is_their_share(dtype, nonzero, size):
    with jax.enable_x64(True):
        signs = jnp.where(jnp.arange(size) % 2 == 0, 2.5, -2.5)
        leaf = jnp.where(jnp.arange(size) < nonzero, signs, 0.0).astype(dtype)
        found = diagnostics.density(leaf)
    assert found.shape == ()
    assert found.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    np.testing.assert_allclose(found, nonzero / size, rtol=1e-6)


def test_density_of_a_ramp():
    # Magnitudes 1..d: (d (d+1) / 2)^2 / (d d (d+1) (2d+1) / 6) = 3 (d+1) / (2 (2d+1)).
    leaf = jnp.arange(1.0, 101.0).reshape(4, 25)
    np.testing.assert_allclose(diagnostics.density(leaf), 3 * 101 / (2 * 201), rtol=1e-6)


def test_density_of_gaussian_noise():
    # The estimate's standard deviation is about .6 / sqrt(d) = .0015; the bound is six of them.
    leaf = jax.random.normal(jax.random.key(0), (400, 400))
    assert abs(float(diagnostics.density(leaf)) - 2 / math.pi) < 0.009


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("peak", [1.2e-38, 1e-30, 1.0, 1e20, 3.4e38])
def test_density_does_not_depend_on_scale(peak, jit):
    density = jax.jit(diagnostics.density) if jit else diagnostics.density
    leaf = jnp.asarray(np.array([1.0, -1.0, 1.0, 1.0]) * peak, jnp.float32)
    np.testing.assert_allclose(density(leaf), 1.0, rtol=1e-6)
    mixed = jnp.asarray(np.array([1.0, 0.0, 0.0, 0.0, 0.0]) * peak, jnp.float32)
    np.testing.assert_allclose(density(mixed), 0.2, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_density_is_exactly_invariant_under_powers_of_two(exponent):
    leaf = jax.random.normal(jax.random.key(1), (1000,))
    expected = diagnostics.density(leaf)
    np.testing.assert_allclose(diagnostics.density(leaf * 2.0**exponent), expected, rtol=1e-6)


@pytest.mark.parametrize("peak", [3e-308, 1e-200, 1e200, 1.7e308])
def test_density_of_extreme_doubles(peak):
    with jax.enable_x64(True):
        leaf = jnp.asarray(np.array([peak, -peak, 0.0, 0.0]))
        assert leaf.dtype == jnp.float64
        np.testing.assert_allclose(jax.jit(diagnostics.density)(leaf), 0.5, rtol=1e-14)


def test_density_of_nothing_is_one():
    tree = {"zeros": jnp.zeros((3, 2)), "empty": jnp.zeros((0, 4)), "scalar": jnp.float32(-3)}
    assert jax.tree.map(float, diagnostics.density(tree)) == dict.fromkeys(tree, 1.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_density_shows_what_is_not_finite(bad):
    found = diagnostics.density({"bad": jnp.array([1.0, bad, 0.0]), "good": jnp.ones(3)})
    assert math.isnan(found["bad"])
    assert found["good"] == 1.0


def test_density_keeps_structure_under_jit():
    tree = {"a": (jnp.ones(3), None), "b": [jnp.array([[2.0, 0.0]])]}
    eager, jitted = diagnostics.density(tree), jax.jit(diagnostics.density)(tree)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(tree)
    assert jax.tree.leaves(eager) == jax.tree.leaves(jitted) == [1.0, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_density_stays_between_its_bounds(seed):
    # Nearly equal and nearly one-hot leaves, where rounding could step over the bounds.
    noise = jax.random.uniform(jax.random.key(seed), (2, 33), minval=0.9999999, maxval=1.0)
    flat, spike = noise[0], noise[1].at[1:].multiply(1e-9)
    assert 1 / 33 <= diagnostics.density(spike) < 1 / 33 + 1e-6
    assert 1 - 1e-6 < diagnostics.density(flat) <= 1


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_only_floating_leaves_are_compressed(dtype):
    tree = {"w": jnp.ones(3), "b": jnp.ones(3, dtype)}
    with pytest.raises(TypeError, match=rf"tree\['b'\] has dtype {dtype}"):
        diagnostics.density(tree)
    with pytest.raises(TypeError, match=rf"tree\['b'\] has dtype {dtype}"):
        diagnostics.wire_bytes(tree, 8)


# --- wire_bytes ------------------------------------------------------------------------------


def _shapes(*sizes, dtype="float32"):
    return [jax.ShapeDtypeStruct((size,), dtype) for size in sizes]


def _longhand_vote_bytes(sizes, num_workers, planes):
    small = sum(size + size % 2 for size in sizes if size < 2**14)  # packed together
    large = [size for size in sizes if size >= 2**14]
    words = sum(len(range(0, size, 32)) for size in [small, *large])
    if words == 0 or num_workers == 1:
        return 0
    per_plane = next(q for q in range(words + 1) if q * num_workers >= words)
    if (num_workers - 1) * planes * words * (num_workers - 2) // num_workers <= 2**13:
        part = next(p for p in range(128, 10**9, 128) if p >= 1 + planes * words)
        return 4 * part * (num_workers - 1)  # the whole message, handed on to each other worker
    if per_plane >= 2**14:
        per_plane = next(q for q in range(0, 10**9, 128) if q >= per_plane)
    part = next(p for p in range(128, 10**9, 128) if p >= 1 + planes * per_plane)
    sent = 0
    for _ in range(num_workers - 1):  # one part to, and one result towards, each other worker
        sent += 4 * part + 4 * part
    return sent


@pytest.mark.parametrize(("scheme", "planes"), [("vote", 1), ("abstain", 2)])
@pytest.mark.parametrize("num_workers", range(1, 10))
@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (1, 1, 0, 33),
        (32 * 127 * 8,),
        (32 * 127 * 8 + 1,),
        (32 * 127 * 4,),
        (32 * 64 * 6, 1),
        (100_000, 31, 10),
        (5_000_000, 31, 10),
    ],
)
def test_vote_bytes_longhand(sizes, num_workers, scheme, planes):
    found = diagnostics.wire_bytes(_shapes(*sizes), num_workers, scheme=scheme)
    assert found == _longhand_vote_bytes(sizes, num_workers, planes)


@pytest.mark.parametrize(("payload", "expected"), [(1, 128), (127, 128), (128, 256), (255, 256)])
def test_part_words_at_their_boundaries(payload, expected):
    assert sealed_words(payload) == expected


def test_large_shares_are_whole_rows_of_words():
    assert part_words(8 * (2**14 - 1), 8) == 2**14 - 1
    assert part_words(8 * 2**14 + 1, 8) == 2**14 + 128


def test_mean_bytes_follow_each_leaf_dtype():
    tree = [*_shapes(1000), *_shapes(10, dtype="bfloat16"), *_shapes(0), None]
    assert diagnostics.wire_bytes(tree, 8, scheme="mean") == 2 * 7 * 4020 // 8
    assert diagnostics.wire_bytes(tree, 1, scheme="mean") == 0
    # 2 (2/3) 4 = 5.33 bytes are not a whole number.
    assert diagnostics.wire_bytes(_shapes(1), 3, scheme="mean") == 6


@pytest.mark.parametrize("scheme", ["vote", "abstain", "mean"])
def test_wire_bytes_of_arrays_and_of_their_shapes(scheme):
    tree = {"w": jnp.ones((33, 5)), "b": jnp.float32(1), "h": jnp.ones(7, jnp.bfloat16)}
    shapes = jax.eval_shape(lambda arrays: arrays, tree)
    sent = diagnostics.wire_bytes(tree, 4, scheme=scheme)
    assert sent == diagnostics.wire_bytes(shapes, 4, scheme=scheme) > 0


def test_one_bit_is_a_31st_of_the_mean():
    tree = _shapes(9_900_000, 99_000, 999, 1)
    size = 10_000_000
    assert diagnostics.wire_bytes(tree, 8) <= 1.02 * 2 * 7 / 8 * size / 8
    assert 31 * diagnostics.wire_bytes(tree, 8) <= diagnostics.wire_bytes(tree, 8, scheme="mean")


def test_wire_bytes_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="scheme='sum'"):
        diagnostics.wire_bytes(_shapes(3), 8, scheme="sum")
    for num_workers in (0, -2):
        with pytest.raises(ValueError, match=f"num_workers={num_workers} must be"):
            diagnostics.wire_bytes(_shapes(3), num_workers)


# --- exchange_seconds ------------------------------------------------------------------------


def test_an_exchange_takes_what_its_parts_take():
    tree, machine = _shapes(10_000_000), {"latency": 1e-3, "memory_bandwidth": 1e10}
    vote = diagnostics.exchange_seconds(tree, 8, link_rate=1e9, **machine)
    assert vote == pytest.approx(8 * 2_200_576 / 1e9 + 2 * 1e-3 + 4e7 / 1e10)
    abstain = diagnostics.exchange_seconds(tree, 8, scheme="abstain", link_rate=1e9, **machine)
    two_bits = diagnostics.wire_bytes(tree, 8, scheme="abstain")
    assert abstain == pytest.approx(8 * two_bits / 1e9 + 2 * 1e-3 + 4e7 / 1e10)
    mean = diagnostics.exchange_seconds(tree, 8, scheme="mean", link_rate=1e9, **machine)
    assert mean == pytest.approx(8 * 70e6 / 1e9 + 1e-3)
    gathered = diagnostics.exchange_seconds(tree, 2, link_rate=1e9, **machine)  # in one collective
    assert gathered == pytest.approx(8 * 1_250_304 / 1e9 + 1e-3 + 4e7 / 1e10, rel=1e-3)


def test_bandwidth_and_latency_are_free_unless_given():
    tree = _shapes(1_000_000, dtype="bfloat16")
    for scheme in ("vote", "mean"):
        sent = diagnostics.wire_bytes(tree, 8, scheme=scheme)
        seconds = diagnostics.exchange_seconds(tree, 8, scheme=scheme, link_rate=2.0)
        assert seconds == 4.0 * sent


@pytest.mark.parametrize(("sizes", "num_workers"), [((100,), 1), ((), 8), ((0,), 8)])
@pytest.mark.parametrize("scheme", ["vote", "abstain", "mean"])
def test_nothing_to_exchange_takes_no_time(sizes, num_workers, scheme):
    seconds = diagnostics.exchange_seconds(
        _shapes(*sizes), num_workers, scheme=scheme, link_rate=1e9, latency=1.0
    )
    assert seconds == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"link_rate": 0.0},
        {"link_rate": -1.0},
        {"link_rate": float("nan")},
        {"latency": -1e-6},
        {"memory_bandwidth": 0.0},
    ],
)
def test_a_machine_that_cannot_be_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        diagnostics.exchange_seconds(_shapes(10), 8, **{"link_rate": 1e9, **wrong})


# --- collectives of compiled programs --------------------------------------------------------

_RING = [(i, (i + 1) % 8) for i in range(8)]


def _compile(body, *args, shape=(8,), names=("data",)):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    spec = PartitionSpec(names)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(*args).compile()


def _only(compiled, **options):
    [record] = diagnostics.collectives(compiled, **options)
    return record


# Every device holds 64 rows of 128 elements.
_BLOCK = 64 * 128


@pytest.mark.parametrize(
    ("body", "operation", "sent"),
    [
        (lambda x: lax.psum(x, "data"), "all-reduce", 2 * 7 * _BLOCK // 8),
        (lambda x: lax.all_gather(x, "data", tiled=True), "all-gather", 7 * _BLOCK),
        (lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all", 7 * _BLOCK // 8),
        (lambda x: lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", 7 * _BLOCK // 8),
        (lambda x: lax.ppermute(x, "data", _RING), "collective-permute", _BLOCK),
    ],
)
@pytest.mark.parametrize(("dtype", "hlo", "width"), [("float32", "f32", 4), ("uint8", "u8", 1)])
def test_each_collective_on_eight_devices(body, operation, sent, dtype, hlo, width):
    compiled = _compile(body, jnp.ones((512, 128), dtype))
    record = _only(compiled)
    assert (record.operation, record.dtype, record.elements) == (operation, hlo, _BLOCK)
    assert (record.group_size, record.count) == (8, 1)
    assert record.bytes_sent == sent * width
    assert record.is_floating == (hlo == "f32")
    assert diagnostics.collective_bytes(compiled) == sent * width
    assert diagnostics.collective_bytes(compiled.as_text()) == sent * width


@pytest.mark.parametrize(
    ("axis", "group"), [("data", 4), ("model", 2), (("data", "model"), 8), (("model", "data"), 8)]
)
def test_groups_along_the_axes_of_a_mesh(axis, group):
    compiled = _compile(
        lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True),
        jnp.ones((512, 16)),
        shape=(4, 2),
        names=("data", "model"),
    )
    record = _only(compiled)
    assert record.group_size == group
    assert record.bytes_sent == 64 * 16 * 4 * (group - 1) // group


def test_an_axis_of_one_device_sends_nothing():
    compiled = _compile(
        lambda x: lax.psum(x, "model"), jnp.ones((64, 4)), shape=(8, 1), names=("data", "model")
    )
    assert diagnostics.collectives(compiled) == []


def test_one_psum_of_two_leaves_and_one_of_pred():
    def body(tree):
        return lax.psum(tree, "data"), lax.all_gather(tree["w"] > 0, "data", tiled=True)

    compiled = _compile(body, {"w": jnp.ones((64, 4)), "b": jnp.ones((8, 3))})
    assert diagnostics.collective_bytes(compiled) == 2 * 7 * (32 + 3) * 4 // 8 + 7 * 32


@pytest.mark.parametrize("sizes", [(1,), (50_000, 33, 0), (2_000_000,)])
@pytest.mark.parametrize("scheme", ["vote", "abstain"])
def test_formula_and_compiled_exchange_agree(sizes, scheme):
    zeros = {"vote": "dither", "abstain": "abstain"}[scheme]
    compiled = _compile(
        lambda rows: signax.pvote(rows, "data", step=0, zeros=zeros),
        [jnp.ones((8, size)) for size in sizes],
    )
    expected = diagnostics.wire_bytes(_shapes(*sizes), 8, scheme=scheme)
    assert diagnostics.collective_bytes(compiled) == expected


def test_loops_multiply():
    def inner(carry, _):
        return lax.ppermute(carry, "data", _RING) * 2, None

    def outer(carry, _):
        carry, _ = lax.scan(inner, carry, None, length=3)
        return lax.psum(carry, "data"), None

    compiled = _compile(lambda x: lax.scan(outer, x, None, length=5)[0], jnp.ones((8, 16)))
    found = {record.operation: record for record in diagnostics.collectives(compiled)}
    assert found["collective-permute"].count == 15
    assert found["all-reduce"].count == 5
    assert diagnostics.collective_bytes(compiled) == 15 * 64 + 5 * 112


def test_a_loop_without_a_trip_count():
    def body(x):
        return lax.while_loop(
            lambda y: lax.psum(y.sum(), "data") < 1e9,
            lambda y: lax.ppermute(y, "data", _RING) * 2,
            x,
        )

    compiled = _compile(body, jnp.ones((8, 16)))
    with pytest.raises(ValueError, match="unknown trip count"):
        diagnostics.collective_bytes(compiled)
    # Ten turns, and eleven tests of the condition: one f32 all-reduce of 2 * 7 * 4 / 8 bytes each.
    assert diagnostics.collective_bytes(compiled, unknown_trip_count=10) == 10 * 64 + 11 * 7
    assert diagnostics.collective_bytes(compiled, unknown_trip_count=0) == 7


def test_a_silent_loop_needs_no_trip_count():
    def body(x):
        return lax.psum(lax.while_loop(lambda y: y.sum() < 1e9, lambda y: y * 2, x), "data")

    assert diagnostics.collective_bytes(_compile(body, jnp.ones((8, 16)))) == 112


@pytest.mark.parametrize("expensive_first", [False, True])
def test_a_conditional_counts_its_most_expensive_branch(expensive_first):
    def gather(x):
        return lax.all_gather(x, "data").sum(0) * 2

    def permute(x):
        return lax.ppermute(x, "data", _RING)

    def body(x, choice):
        branches = (gather, permute) if expensive_first else (permute, gather)
        return lax.cond(choice[0] > 0, *branches, x)

    compiled = _compile(body, jnp.ones((8, 16)), jnp.ones(8))
    count = {r.operation: r.count for r in diagnostics.collectives(compiled)}
    assert count == {"all-gather": 1, "collective-permute": 0}
    assert diagnostics.collective_bytes(compiled) == 7 * 64


def test_a_lowered_program_is_refused():
    lowered = jax.jit(jnp.sin).lower(jnp.ones(3))
    with pytest.raises(ValueError, match=r"call \.compile\(\)"):
        diagnostics.collective_bytes(lowered)


# --- HLO of other platforms, written by hand -------------------------------------------------


def _program(*lines, header="num_partitions=8", before=""):
    """A module whose entry has parameters %p: f32[64,128] and %q: u32[16], and then `lines`."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule jit_step, is_scheduled=true, {header}\n\n{dedent(before)}\n"
        "ENTRY %main.0 (p: f32[64,128], q: u32[16]) -> f32[64,128] {\n"
        "  %p = f32[64,128]{1,0:T(8,128)S(1)} parameter(0)\n"
        '  %q = u32[16]{0:T(128)} parameter(1), metadata={op_name="batch = (x, y)"}\n'
        f"{body}\n}}\n"
    )


_P_BYTES = 64 * 128 * 4


@pytest.mark.parametrize(
    ("groups", "group_size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups={{0,1,2,3},{4,5}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1), use_global_device_ids=true", 2),
        ("replica_groups={}", 8),
        ("channel_id=1", 8),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=4,'b'=2, device_ids=([1,0,3,2,5,4,7,6])] {'b'}", 2),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", 2),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("replica_groups=mesh['a'=8,'b'=3] {'a':(1)2,'b'}", 6),
    ],
)
def test_notations_of_groups(groups, group_size):
    text = _program(f"ROOT %r = f32[64,128]{{1,0}} all-reduce(%p), {groups}, to_apply=%add")
    record = _only(text)
    assert record.group_size == group_size
    assert record.bytes_sent == math.ceil(2 * (group_size - 1) * _P_BYTES / group_size)


@pytest.mark.parametrize(
    "groups",
    ["replica_groups={{0},{1}}", "replica_groups=[8,1]<=[8]", "replica_groups=mesh['a'=8] {}"],
)
def test_groups_of_one_are_left_out(groups):
    assert (
        diagnostics.collectives(_program(f"ROOT %r = f32[64,128] all-reduce(%p), {groups}")) == []
    )


def test_no_groups_means_every_device_of_the_module():
    line = "ROOT %r = f32[64,128] all-gather(%p), replica_groups={}, dimensions={0}"
    assert _only(_program(line, header="replica_count=6")).group_size == 6
    assert _only(_program(line, header="replica_count=3, num_partitions=4")).group_size == 12
    assert diagnostics.collectives(_program(line, header="entry_computation_layout={}")) == []


_F32 = "f32[64,128]{1,0:T(8,128)S(1)}"
_GROUPS = "channel_id=1, replica_groups=mesh['d'=8] {'d'}"


@pytest.mark.parametrize(
    ("start", "operation", "sent"),
    [
        # On TPU: operand and result, or a tuple of operands, with flags behind.
        (
            f"({_F32}, {_F32}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            _P_BYTES,
        ),
        (
            f"(({_F32}), {_F32}, u32[]{{:S(2)}}) all-to-all-start(%p), {_GROUPS}, dimensions={{0}}",
            "all-to-all",
            7 * _P_BYTES // 8,
        ),
        (
            "(f32[64,128], f32[512,128]) all-gather-start(%p), replica_groups=[1,8]<=[8]",
            "all-gather",
            7 * _P_BYTES,
        ),
        # On GPU, and with shapes beside the operands.
        (
            f"((f32[64,128]{{1,0}}), f32[8,128]{{1,0}}) reduce-scatter-start(%p), {_GROUPS}",
            "reduce-scatter",
            7 * _P_BYTES // 8,
        ),
        (
            f"{_F32} all-reduce-start({_F32} %p), {_GROUPS}, to_apply=%add",
            "all-reduce",
            2 * 7 * _P_BYTES // 8,
        ),
    ],
)
def test_asynchronous_forms_count_once(start, operation, sent):
    text = _program(
        f"%op-start.3 = {start}",
        f"%op-update.3 = f32[64,128]{{1,0}} {operation}-update(%op-start.3)",
        f"ROOT %op-done.3 = f32[64,128]{{1,0}} {operation}-done(%op-update.3)",
    )
    record = _only(text)
    assert (record.name, record.operation, record.count) == ("op-start.3", operation, 1)
    assert (record.dtype, record.elements, record.bytes_sent) == ("f32", 64 * 128, sent)


def test_wrapped_computations_count_at_their_start():
    wrapped = """
        %wrapped (x: u32[16]) -> u32[16] {
          %x = u32[16]{0} parameter(0)
          ROOT %a2a = u32[16]{0} all-to-all(u32[16]{0} %x), replica_groups={{0,1,2,3}}
        }, execution_thread="side"
    """
    started = "((u32[16]{0}), u32[16]{0}, s32[])"
    text = _program(
        f'%s = {started} async-start(%q), async_execution_thread="side", calls=%wrapped',
        f"%u = {started} async-update({started} %s), calls=%wrapped",
        f"%d = u32[16]{{0}} async-done({started} %u), calls=%wrapped",
        "%once = u32[16]{0} call(%d), to_apply=%wrapped",
        "ROOT %twice = u32[16]{0} custom-call(%once), called_computations={%wrapped}",
        before=wrapped,
    )
    assert [(r.name, r.bytes_sent) for r in diagnostics.collectives(text)] == [("a2a", 48)] * 3


def test_a_tpu_collective_overlapped_with_computation_counts_once():
    gather = "f32[512,128]{1,0:T(8,128)} all-gather(%x), channel_id=5, replica_groups={}"
    stages = f"""
        %fused_computation.1 (x: f32[64,128]) -> (f32[64,128], u32[]) {{
          %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)
          %g.1 = {gather}
          ROOT %c.1 = (f32[], u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
        }}

        %async_collective_fusion.2 (x: f32[64,128]) -> f32[512,128] {{
          %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)
          ROOT %g.2 = {gather}
        }}

        %fused_computation.3 (x: f32[64,128]) -> f32[512,128] {{
          %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)
          %g.3 = {gather}
          ROOT %c.3 = f32[512,128] custom-call(%x, %g.3), custom_call_target="AsyncCollectiveDone"
        }}
    """
    text = _program(
        "%start = (f32[64,128], u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%fused_computation.1",
        "%beside = f32[512,128] fusion(%p), kind=kCustom, calls=%async_collective_fusion.2",
        "ROOT %done = f32[512,128] fusion(%p), kind=kCustom, calls=%fused_computation.3",
        before=stages,
    )
    assert _only(text).name == "g.1"
    assert diagnostics.collective_bytes(text) == 7 * _P_BYTES


def test_sends_between_tpu_slices():
    def send(name, kind, target):
        return (
            f"%{name} = (f32[64,128], u32[]{{:S(2)}}, token[]) send(%p, %tok), channel_id=2, "
            'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_'
            f'megascale_runtime",_xla_megascale_target={target},'
            f'_xla_megascale_transfer_type="{kind}"}}'
        )

    text = _program(
        "%tok = token[] after-all()",
        send("r", "ALL_REDUCE", '"{1,2,3,4}x{0:7}"'),
        send("g", "ALL_GATHER", '"{1,2}x{0:7}"'),
        send("x", "ALL_TO_ALL", "{{100000,100001,200000,200001}}"),
        send("o", "ONE_TO_ONE", "{{100007->200000},{200007->100000}}"),
        "%io = (f32[64,128], u32[], token[]) send(%p, %tok), channel_id=9, is_host_transfer=true",
        "%peer = (f32[64,128], u32[], token[]) send(%p, %tok), channel_id=9",
        "ROOT %d = token[] send-done(%o), channel_id=2, is_host_transfer=true",
    )
    found = [(r.operation, r.group_size, r.bytes_sent) for r in diagnostics.collectives(text)]
    assert found == [
        ("megascale-all-reduce", 4, 2 * 3 * _P_BYTES // 4),
        ("megascale-all-gather", 2, _P_BYTES),
        ("megascale-all-to-all", 4, 3 * _P_BYTES // 4),
        ("megascale-one-to-one", 2, _P_BYTES),
        ("send", 2, _P_BYTES),
    ]


def test_an_exchange_of_several_dtypes_has_a_record_for_each():
    text = _program(
        "%s = f32[]{:T(128)} constant(1)",
        "ROOT %r = (f32[64,128], u32[16], /*index=2*/f32[]) all-reduce(%p, %q, /*index=2*/%s), "
        "replica_groups={{0,1}}, to_apply=%add",
    )
    floats, words = diagnostics.collectives(text)
    assert (floats.dtype, floats.elements, floats.is_floating) == ("f32", 64 * 128 + 1, True)
    assert (words.dtype, words.elements, words.is_floating) == ("u32", 16, False)
    assert (floats.bytes_sent, words.bytes_sent) == (_P_BYTES + 4, 64)


@pytest.mark.parametrize(
    ("shape", "size", "is_floating"),
    [
        ("pred[24]{0}", 24, False),
        ("s4[24]{0:E(4)}", 12, False),
        ("u4[25]{0:T(128)E(4)}", 13, False),
        ("s4[24]{0}", 24, False),
        ("u2[24]{0:E(2)}", 6, False),
        ("s8[2,3,4]{2,1,0}", 24, False),
        ("u64[3]{0}", 24, False),
        ("f8e4m3fn[24]{0}", 24, True),
        ("f8e5m2[24]{0}", 24, True),
        ("bf16[24]{0:T(256)(128)(2,1)}", 48, True),
        ("f16[]", 2, True),
        ("f64[24]{0}", 192, True),
        ("c64[24]{0}", 192, True),
        ("f32[<=6]{0}", 24, True),
        ("f32[0,4]{1,0}", 0, True),
    ],
)
def test_sizes_of_element_types(shape, size, is_floating):
    record = _only(
        _program(
            f"%x = {shape} custom-call(%p)",
            f"ROOT %r = {shape} collective-broadcast(%x), replica_groups={{{{0,1,2}}}}",
        )
    )
    assert (record.bytes_sent, record.is_floating) == (size, is_floating)


def test_permutes_to_oneself_and_ragged_exchanges():
    text = _program(
        "%stay = f32[64,128] collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
        "%some = u32[16] collective-permute(%q), source_target_pairs={{0,0},{1,2}}",
        "ROOT %r = f32[64,128] ragged-all-to-all(%p, %p, %q, %q, %q, %q), replica_groups={{0,1}}",
    )
    permute, ragged = diagnostics.collectives(text)
    assert (permute.name, permute.group_size, permute.bytes_sent) == ("some", 2, 64)
    assert (ragged.elements, ragged.bytes_sent) == (64 * 128, _P_BYTES // 2)


def test_the_older_notation_of_conditionals():
    branches = """
        %yes (x: f32[64,128]) -> f32[64,128] {
          %x = f32[64,128]{1,0} parameter(0)
          ROOT %a = f32[64,128]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
        }

        %no (y: f32[64,128]) -> f32[64,128] {
          ROOT %y = f32[64,128]{1,0} parameter(0)
        }
    """
    text = _program(
        "ROOT %c = f32[64,128] conditional(%b, %p, %p), true_computation=%yes, "
        "false_computation=%no",
        before=branches,
    )
    assert diagnostics.collective_bytes(text) == _P_BYTES


def test_names_without_percent_signs():
    text = _program("ROOT r = f32[512,128]{1,0} all-gather(p), replica_groups={{0,1}}")
    assert diagnostics.collective_bytes(text.replace("%", "")) == _P_BYTES
