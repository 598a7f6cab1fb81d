"""Collectives of compiled programs, and of HLO text of other platforms written by hand."""

import math
from textwrap import dedent

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import signax
from signax import diagnostics


def _shapes(*sizes, dtype="float32"):
    return [jax.ShapeDtypeStruct((size,), dtype) for size in sizes]


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
def test_reads_each_collective_on_eight_devices(body, operation, sent, dtype, hlo, width):
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
def test_reads_groups_along_axes_of_a_mesh(axis, group):
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


def test_counts_all_operands_of_a_collective():
    def body(tree):
        return lax.psum(tree, "data"), lax.all_gather(tree["w"] > 0, "data", tiled=True)

    compiled = _compile(body, {"w": jnp.ones((64, 4)), "b": jnp.ones((8, 3))})
    assert diagnostics.collective_bytes(compiled) == 2 * 7 * (32 + 3) * 4 // 8 + 7 * 32


@pytest.mark.parametrize("sizes", [(1,), (50_000, 33, 0), (2_000_000,)])
@pytest.mark.parametrize("scheme", ["vote", "abstain"])
def test_a_compiled_vote_sends_the_bytes_of_the_formula(sizes, scheme):
    zeros = {"vote": "dither", "abstain": "abstain"}[scheme]
    compiled = _compile(
        lambda rows: signax.pvote(rows, "data", step=0, zeros=zeros),
        [jnp.ones((8, size)) for size in sizes],
    )
    expected = diagnostics.wire_bytes(_shapes(*sizes), 8, scheme=scheme)
    assert diagnostics.collective_bytes(compiled) == expected


def test_loops_multiply_their_collectives():
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


def test_an_unknown_trip_count_must_be_given():
    def body(x):
        return lax.while_loop(
            lambda y: lax.psum(y.sum(), "data") < 1e9,
            lambda y: lax.ppermute(y, "data", _RING) * 2,
            x,
        )

    compiled = _compile(body, jnp.ones((8, 16)))
    with pytest.raises(ValueError, match="unknown trip count"):
        diagnostics.collective_bytes(compiled)
    # Ten iterations and eleven tests of the condition, each an all-reduce of 2 * 7 * 4 / 8 bytes.
    assert diagnostics.collective_bytes(compiled, unknown_trip_count=10) == 10 * 64 + 11 * 7
    assert diagnostics.collective_bytes(compiled, unknown_trip_count=0) == 7


def test_a_loop_without_collectives_needs_no_trip_count():
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


def test_rejects_a_lowered_program():
    lowered = jax.jit(jnp.sin).lower(jnp.ones(3))
    with pytest.raises(ValueError, match=r"call \.compile\(\)"):
        diagnostics.collective_bytes(lowered)


def _program(*lines, header="num_partitions=8", before=""):
    """A module with parameters %p: f32[64,128] and %q: u32[16], followed by `lines`."""
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
def test_reads_every_notation_of_groups(groups, group_size):
    text = _program(f"ROOT %r = f32[64,128]{{1,0}} all-reduce(%p), {groups}, to_apply=%add")
    record = _only(text)
    assert record.group_size == group_size
    assert record.bytes_sent == math.ceil(2 * (group_size - 1) * _P_BYTES / group_size)


@pytest.mark.parametrize(
    "groups",
    ["replica_groups={{0},{1}}", "replica_groups=[8,1]<=[8]", "replica_groups=mesh['a'=8] {}"],
)
def test_groups_of_one_device_send_nothing(groups):
    assert (
        diagnostics.collectives(_program(f"ROOT %r = f32[64,128] all-reduce(%p), {groups}")) == []
    )


def test_without_groups_every_device_takes_part():
    line = "ROOT %r = f32[64,128] all-gather(%p), replica_groups={}, dimensions={0}"
    assert _only(_program(line, header="replica_count=6")).group_size == 6
    both = line + ", channel_id=1"
    assert _only(_program(both, header="replica_count=3, num_partitions=4")).group_size == 12
    assert diagnostics.collectives(_program(line, header="entry_computation_layout={}")) == []


_F32 = "f32[64,128]{1,0:T(8,128)S(1)}"


_GROUPS = "channel_id=1, replica_groups=mesh['d'=8] {'d'}"


@pytest.mark.parametrize(
    ("start", "operation", "sent"),
    [
        # On TPU: operand and result, or a tuple of operands, followed by flags.
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
        # On GPU, and with the shapes of operands.
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


def test_reads_sends_between_tpu_slices():
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
def test_reads_sizes_of_element_types(shape, size, is_floating):
    record = _only(
        _program(
            f"%x = {shape} custom-call(%p)",
            f"ROOT %r = {shape} collective-broadcast(%x), replica_groups={{{{0,1,2}}}}",
        )
    )
    assert (record.bytes_sent, record.is_floating) == (size, is_floating)


def test_ignores_permutes_to_oneself_and_reads_ragged_exchanges():
    text = _program(
        "%stay = f32[64,128] collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
        "%some = u32[16] collective-permute(%q), source_target_pairs={{0,0},{1,2}}",
        "ROOT %r = f32[64,128] ragged-all-to-all(%p, %p, %q, %q, %q, %q), replica_groups={{0,1}}",
    )
    permute, ragged = diagnostics.collectives(text)
    assert (permute.name, permute.group_size, permute.bytes_sent) == ("some", 2, 64)
    assert (ragged.elements, ragged.bytes_sent) == (64 * 128, _P_BYTES // 2)


def test_reads_the_older_notation_of_conditionals():
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


def test_reads_names_without_percent_signs():
    text = _program("ROOT r = f32[512,128]{1,0} all-gather(p), replica_groups={{0,1}}")
    assert diagnostics.collective_bytes(text.replace("%", "")) == _P_BYTES
