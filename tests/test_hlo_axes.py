"""Mesh axes that collectives cross, in compiled programs and in HLO text written by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import signax
from signax import diagnostics

BOX = AbstractMesh((2, 2, 2), ("a", "b", "c"))


def make_mesh(sizes, names, kind=AxisType.Auto, order=None):
    devices = np.array(jax.devices()[: math.prod(sizes)])
    devices = devices if order is None else devices[np.array(order)]
    return Mesh(devices.reshape(sizes), names, axis_types=(kind,) * len(sizes))


def sharded(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def compile_mapped(body, mesh, **options):
    """Compile `body` for blocks f32[16, 16]."""
    spec = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False, **options
    )
    return jax.jit(mapped).lower(sharded(mesh, (16 * mesh.size, 16), mesh.axis_names)).compile()


def axes_of(compiled, mesh):
    return [record.axes for record in diagnostics.collectives(compiled, mesh=mesh)]


def subsets(names):
    return [c for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


# --- compiled programs ---------------------------------------------------------------------------


def each_collective(axes):
    def body(x):
        size = lax.axis_size(axes)
        ring = [(i, (i + 1) % size) for i in range(size)]
        parts = [
            lax.psum(x, axes),
            lax.all_gather(x, axes, tiled=True),
            lax.all_to_all(x, axes, 0, 0, tiled=True),
            lax.psum_scatter(x, axes, tiled=True),
            lax.ppermute(x, axes, ring),
        ]
        return jnp.concatenate(parts)

    return body


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (2, 2, 2)])
def test_names_the_axes_of_each_collective(sizes, kind):
    mesh = make_mesh(sizes, ("a", "b", "c")[: len(sizes)], kind)
    for axes in subsets(mesh.axis_names):
        found = diagnostics.collectives(compile_mapped(each_collective(axes), mesh), mesh=mesh)
        assert sorted(record.operation for record in found) == [
            "all-gather",
            "all-reduce",
            "all-to-all",
            "collective-permute",
            "reduce-scatter",
        ]
        assert {record.axes for record in found} == {axes}


def test_without_a_mesh_axes_are_unknown():
    mesh = make_mesh((2, 2), ("a", "b"))
    compiled = compile_mapped(lambda x: lax.psum(x, "a"), mesh)
    assert [record.axes for record in diagnostics.collectives(compiled)] == [None]


def test_an_axis_of_one_device_is_never_crossed():
    mesh = make_mesh((2, 1, 2), ("a", "b", "c"))
    assert axes_of(compile_mapped(lambda x: lax.psum(x, ("a", "b")), mesh), mesh) == [("a",)]
    assert axes_of(compile_mapped(lambda x: lax.psum(x, "b"), mesh), mesh) == []


def test_groups_along_part_of_an_axis_cross_this_axis():
    mesh = make_mesh((2, 4), ("a", "b"))
    halves = [[0, 1], [2, 3]]
    compiled = compile_mapped(lambda x: lax.psum(x, "b", axis_index_groups=halves), mesh)
    assert axes_of(compiled, mesh) == [("b",)]


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ([(0, 1)], ("c",)),
        ([(0, 2), (1, 3)], ("b",)),
        ([(0, 1), (4, 6)], ("b", "c")),
        ([(3, 4)], ("a", "b", "c")),
        ([(0, 0), (5, 1)], ("a",)),
        ([(i, i ^ 1) for i in range(8)], ("c",)),
        ([(i, (i + 1) % 8) for i in range(8)], ("a", "b", "c")),
    ],
)
def test_a_permute_crosses_the_axes_along_which_a_pair_differs(pairs, axes):
    mesh = make_mesh((2, 2, 2), BOX.axis_names)
    compiled = compile_mapped(lambda x: lax.ppermute(x, mesh.axis_names, pairs), mesh)
    assert axes_of(compiled, mesh) == [axes]


def test_names_axes_of_collectives_that_xla_inserts():
    mesh = make_mesh((2, 4), ("data", "model"))

    def step(x, w):
        return (x @ w).sum(0)  # the sum runs over "data", the product over "model"

    compiled = (
        jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
        .lower(sharded(mesh, (16, 64), "data", "model"), sharded(mesh, (64, 32), "model"))
        .compile()
    )
    found = diagnostics.collectives(compiled, mesh=mesh)
    assert {axis for record in found for axis in record.axes or ()} == {"data", "model"}
    product = (
        jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, PartitionSpec("data")))
        .lower(sharded(mesh, (16, 64), "data", "model"), sharded(mesh, (64, 32), "model"))
        .compile()
    )
    assert set(axes_of(product, mesh)) == {("model",)}


def test_names_axes_of_a_permute_that_xla_inserts():
    mesh = make_mesh((2, 4), ("a", "b"))
    moved = NamedSharding(mesh, PartitionSpec(("b", "a")))
    compiled = (
        jax.jit(lambda x: x * 2, out_shardings=moved)
        .lower(sharded(mesh, (64,), ("a", "b")))
        .compile()
    )
    [record] = diagnostics.collectives(compiled, mesh=mesh)
    # Block 4 a + b moves to the device at 2 b + a, which differs along both axes for block 1.
    assert (record.operation, record.axes) == ("collective-permute", ("a", "b"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_names_axes_in_nested_maps(kind):
    mesh = make_mesh((2, 2, 2), ("data", "fsdp", "model"), kind)

    def inner(x):
        return lax.all_gather(lax.psum(x, "model"), "fsdp", tiled=True)

    def outer(x):
        rows = jax.shard_map(
            inner,
            in_specs=PartitionSpec("fsdp", "model"),
            out_specs=PartitionSpec(),
            axis_names={"fsdp", "model"},
            check_vma=False,
        )(x)
        return lax.ppermute(rows, "data", [(0, 1), (1, 0)])

    mapped = jax.shard_map(
        outer,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )
    compiled = jax.jit(mapped).lower(sharded(mesh, (32, 16), ("data", "fsdp"), "model")).compile()
    found = {r.operation: r.axes for r in diagnostics.collectives(compiled, mesh=mesh)}
    assert found == {
        "all-reduce": ("model",),
        "all-gather": ("fsdp",),
        "collective-permute": ("data",),
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_vote_on_sharded_leaves_sends_its_words_over_the_workers_axis(kind):
    mesh = make_mesh((2, 2), ("data", "model"), kind)
    tx = signax.DataParallel(
        signax.signum(1e-3, axis_name="data"), mesh, param_specs=PartitionSpec(None, "model")
    )
    params = sharded(mesh, (512, 256), None, "model")
    rows = sharded(mesh, (2, 512, 256), "data", None, "model")
    compiled = jax.jit(tx.update).lower(rows, tx.abstract_state(params), params).compile()
    block = jax.ShapeDtypeStruct((512, 128), "float32")
    sent = diagnostics.collective_bytes(compiled, mesh=mesh, crossing="data")
    assert sent == pytest.approx(diagnostics.wire_bytes(block, 2), rel=0.05)
    # Devices of a worker agree on whether the worker takes part, and on its header.
    assert diagnostics.collective_bytes(compiled, mesh=mesh, crossing="model") < 16
    assert {len(record.axes) for record in diagnostics.collectives(compiled, mesh=mesh)} == {1}


# --- the order of devices ------------------------------------------------------------------------

ORDER = [3, 1, 0, 2, 7, 6, 5, 4]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_partitions_are_numbered_in_the_order_of_the_mesh(kind):
    mesh = make_mesh((2, 4), ("a", "b"), kind, order=ORDER)
    for axis in mesh.axis_names:
        compiled = compile_mapped(lambda x, axis=axis: lax.psum(x, axis), mesh)
        assert axes_of(compiled, mesh) == [(axis,)]
        assert axes_of(compiled.as_text(), mesh) == [(axis,)]


@pytest.mark.parametrize("axis", ["a", "b"])
def test_a_mesh_with_the_same_devices_in_another_order_is_matched_by_devices(axis):
    compiled = compile_mapped(
        lambda x: lax.psum(x, axis), make_mesh((2, 4), ("a", "b"), order=ORDER)
    )
    groups = np.array(ORDER).reshape(2, 4)
    groups = groups.T if axis == "a" else groups
    expected = tuple(
        name
        for name, digit in zip("abc", (4, 2, 1), strict=True)
        if any(len({device // digit % 2 for device in group}) > 1 for group in groups)
    )
    assert axes_of(compiled, make_mesh((2, 2, 2), BOX.axis_names)) == [expected]


def test_a_mesh_of_another_shape_shows_its_own_axes():
    compiled = compile_mapped(lambda x: lax.psum(x, "a"), make_mesh((2, 4), ("a", "b")))
    assert axes_of(compiled, make_mesh((4, 2), ("host", "chip"))) == [("host",)]
    assert axes_of(compiled, AbstractMesh((4, 2), ("host", "chip"))) == [("host",)]


def test_reads_the_order_from_results_if_arguments_have_none():
    mesh = make_mesh((2, 4), ("a", "b"), order=ORDER)

    def make():
        return jax.shard_map(
            lambda: lax.ppermute(lax.axis_index(("a", "b"))[None], "b", [(0, 1)]),
            mesh=mesh,
            in_specs=(),
            out_specs=PartitionSpec(("a", "b")),
        )()

    compiled = jax.jit(make).lower().compile()
    # Devices 3 and 1, 7 and 6 are neighbours on this mesh.
    assert axes_of(compiled, mesh) == [("b",)]
    assert axes_of(compiled, make_mesh((2, 2, 2), BOX.axis_names)) == [("b", "c")]


def test_rejects_a_mesh_of_another_number_of_devices():
    compiled = compile_mapped(lambda x: lax.psum(x, "a"), make_mesh((2, 4), ("a", "b")))
    small = make_mesh((2, 2), ("a", "b"))
    message = r"mesh has 4 devices \(a=2, b=2\), but the program runs on 8\. Pass the mesh"
    for program in compiled, compiled.as_text():
        with pytest.raises(ValueError, match=message):
            diagnostics.collectives(program, mesh=small)
    with pytest.raises(ValueError, match=r"mesh has 16 devices .* but the program runs on 8"):
        diagnostics.collectives(compiled, mesh=AbstractMesh((16,), ("a",)))
    alone = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
    with pytest.raises(ValueError, match=r"mesh has 4 devices .* but the program runs on 1"):
        diagnostics.collective_bytes(alone, mesh=small)


def test_rejects_a_mesh_of_other_devices():
    compiled = compile_mapped(lambda x: lax.psum(x, "a"), make_mesh((2, 2), ("a", "b")))
    others = Mesh(np.array(jax.devices()[2:6]).reshape(2, 2), ("a", "b"))
    with pytest.raises(ValueError, match=r"mesh lacks devices of the program, such as .*0"):
        diagnostics.collectives(compiled, mesh=others)


def test_rejects_what_is_no_mesh():
    compiled = compile_mapped(lambda x: lax.psum(x, "a"), make_mesh((2,), ("a",)))
    with pytest.raises(TypeError, match=r"mesh='a' is not a jax\.sharding\.Mesh"):
        diagnostics.collectives(compiled, mesh="a")
    with pytest.raises(TypeError, match=r"mesh=2 is not a jax\.sharding\.Mesh"):
        diagnostics.collective_bytes(compiled, mesh=2, crossing="a")


# --- text written by hand ------------------------------------------------------------------------


def program_of(*lines, header="num_partitions=8", before=""):
    """A module with a parameter %p: f32[6], followed by `lines`."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule jit_step, is_scheduled=true, {header}\n\n{before}\n"
        "ENTRY %main.0 (p: f32[6]) -> f32[6] {\n"
        f"  %p = f32[6]{{0}} parameter(0)\n{body}\n}}\n"
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "bc"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "a"),
        ("{{0,2},{1,3},{4,6},{5,7}}", "b"),
        ("{{0,1},{2,3},{4,5},{6,7}}", "c"),
        ("{{0,3},{1,2},{4,7},{5,6}}", "bc"),
        ("{{0,1,2,3},{4,5}}", "bc"),
        ("{{0},{1,5},{2},{3}}", "a"),
        ("{{0,2,5,7},{1,3,4,6}}", "abc"),
        ("{}", "abc"),
        ("[1,8]<=[8]", "abc"),
        ("[2,4]<=[8]", "bc"),
        ("[4,2]<=[8]", "c"),
        ("[4,2]<=[2,4]T(1,0)", "a"),
        ("[2,4]<=[4,2]T(1,0)", "ab"),
        ("[4,2]<=[4,2]T(1,0)", "b"),
        ("[4,2]<=[2,2,2]T(2,0,1)", "b"),
        ("[2,4]<=[2,2,2]T(1,0,2)", "ac"),
        ("mesh['p'=2,'q'=4] {'p'}", "a"),
        ("mesh['p'=2,'q'=4] {'q'}", "bc"),
        ("mesh['p'=2,'q'=4] {'p','q'}", "abc"),
        ("mesh['c'=2,'b'=2,'a'=2] {'a','c'}", "ac"),
        ("mesh['p'=8] {'p':(1)2}", "a"),
        ("mesh['p'=8] {'p':(2)2}", "b"),
        ("mesh['p'=8] {'p':(4)2}", "c"),
        ("mesh['p'=8] {'p':(2)4}", "bc"),
        ("mesh['p'=8] {'p':(4)2,'p':(1)2}", "ac"),
        ("mesh['p'=2,'q'=4], device_ids=([4,2]T(1,0)) {'p'}", "c"),
        ("mesh['p'=2,'q'=4], device_ids=([4,2]T(1,0)) {'q'}", "ab"),
        ("mesh['my axis'=2,'q'=4] {'my axis'}", "a"),
        ("mesh['a:b'=2,'a,b'=4] {'a,b'}", "bc"),
        ("mesh['a=b'=8] {'a=b':(2)2}", "b"),
        ("mesh['p'=2,'q'=2,'r'=2], device_ids=(0,2,1,3,4,6,5,7) {'r'}", "b"),
        ("mesh['p'=4,'q'=2, device_ids=([0,2,1,3,4,6,5,7])] {'q'}", "b"),
    ],
)
def test_reads_axes_from_every_notation_of_groups(groups, axes):
    line = f"ROOT %r = f32[6] all-reduce(%p), replica_groups={groups}, use_global_device_ids=true"
    [record] = diagnostics.collectives(program_of(line + ", channel_id=1"), mesh=BOX)
    assert record.axes == tuple(axes)


@pytest.mark.parametrize(
    ("line", "group_size", "axes"),
    [
        # Without a channel, numbers are replicas. Each partition exchanges by itself.
        ("all-reduce(%p), replica_groups={{0,1}}", 2, ("replica",)),
        ("all-reduce(%p), replica_groups={}", 2, ("replica",)),
        ("all-to-all(%p), replica_groups={{0,1}}", 2, ("replica",)),
        ("collective-permute(%p), source_target_pairs={{0,1}}", 2, ("replica",)),
        # With a channel, reductions and gathers run over all partitions of the replicas.
        ("all-reduce(%p), channel_id=1, replica_groups={{0},{1}}", 4, ("partition",)),
        ("all-gather(%p), channel_id=1, replica_groups={{0,1}}", 8, ("replica", "partition")),
        ("reduce-scatter(%p), channel_id=1, replica_groups={}", 8, ("replica", "partition")),
        # The other collectives then number partitions. Each replica exchanges by itself.
        ("all-to-all(%p), channel_id=1, replica_groups={{0,1},{2,3}}", 2, ("partition",)),
        ("collective-broadcast(%p), channel_id=1, replica_groups={}", 4, ("partition",)),
        ("collective-permute(%p), channel_id=1, source_target_pairs={{0,1}}", 2, ("partition",)),
        # Global numbers count the partitions of all replicas.
        (
            "all-reduce(%p), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, "
            "use_global_device_ids=true",
            2,
            ("replica",),
        ),
        (
            "all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true",
            4,
            ("partition",),
        ),
    ],
)
def test_reads_numbers_of_replicas_and_partitions(line, group_size, axes):
    text = program_of(f"ROOT %r = f32[6] {line}", header="replica_count=2, num_partitions=4")
    mesh = AbstractMesh((2, 4), ("replica", "partition"))
    [record] = diagnostics.collectives(text, mesh=mesh)
    assert (record.group_size, record.axes) == (group_size, axes)


def test_one_replica_with_a_channel_means_all_its_partitions():
    line = "ROOT %r = f32[6] all-reduce(%p), channel_id=1, replica_groups={{0}}"
    [record] = diagnostics.collectives(program_of(line), mesh=BOX)
    assert (record.group_size, record.axes) == (8, ("a", "b", "c"))


@pytest.mark.parametrize(
    "lines",
    [
        # TPU
        [
            "%s = (f32[6], f32[6], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
            "channel_id=1, source_target_pairs={{0,2},{2,0},{5,7}}",
            "ROOT %d = f32[6] collective-permute-done(%s)",
        ],
        [
            "%s = ((f32[6]), f32[6], u32[]{:S(2)}) all-to-all-start(%p), channel_id=1, "
            "replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}",
            "ROOT %d = f32[6] all-to-all-done(%s)",
        ],
        # GPU
        [
            "%s = (f32[6], f32[12]) all-gather-start(%p), channel_id=1, "
            "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, use_global_device_ids=true",
            "ROOT %d = f32[12] all-gather-done(%s)",
        ],
        [
            "%s = f32[6] all-reduce-start(f32[6] %p), channel_id=1, "
            "replica_groups=[4,2]<=[2,2,2]T(0,2,1), use_global_device_ids=true, to_apply=%add",
            "ROOT %d = f32[6] all-reduce-done(%s)",
        ],
        [
            "%t = token[] after-all()",
            "%s = (f32[6], u32[], token[]) send(%p, %t), channel_id=1, frontend_attributes={"
            '_xla_send_recv_pipeline="0",_xla_send_recv_source_target_pairs={{0,2},{5,7}}}',
            "ROOT %d = token[] send-done(%s), channel_id=1",
        ],
        [
            "%t = token[] after-all()",
            "%s = (f32[6], u32[], token[]) send(%p, %t), channel_id=1, frontend_attributes={"
            '_xla_send_recv_source_target_pairs="{{0,2}, {7,5}}"}',
            "ROOT %d = token[] send-done(%s), channel_id=1",
        ],
    ],
)
def test_reads_axes_of_asynchronous_forms(lines):
    assert axes_of(program_of(*lines), BOX) == [("b",)]


def test_reads_axes_of_wrapped_computations():
    wrapped = """
%wrapped (x: f32[6]) -> f32[6] {
  %x = f32[6]{0} parameter(0)
  ROOT %r = f32[3] reduce-scatter(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
use_global_device_ids=true, to_apply=%add
}
"""
    text = program_of(
        "%s = ((f32[6]), f32[3], s32[]) async-start(%p), calls=%wrapped",
        "ROOT %d = f32[3] async-done(%s), calls=%wrapped",
        before=wrapped,
    )
    assert axes_of(text, BOX) == [("a",)]


def test_a_send_without_pairs_crosses_every_axis():
    text = program_of(
        "%t = token[] after-all()",
        "ROOT %s = (f32[6], u32[], token[]) send(%p, %t), channel_id=9",
    )
    assert axes_of(text, AbstractMesh((2, 1, 4), ("a", "b", "c"))) == [("a", "c")]


def test_rejects_text_with_devices_that_the_program_lacks():
    text = program_of("ROOT %r = f32[6] all-reduce(%p), replica_groups={{0,9}}")
    with pytest.raises(ValueError, match="a collective on device 9, but runs on 8"):
        diagnostics.collectives(text, mesh=BOX)


def expected_axes(groups, shape):
    crossed = set()
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            points = zip(np.unravel_index(one, shape), np.unravel_index(other, shape), strict=True)
            crossed |= {f"x{i}" for i, (here, there) in enumerate(points) if here != there}
    return tuple(f"x{i}" for i in range(len(shape)) if f"x{i}" in crossed)


SHAPES = st.sampled_from([(16,), (4, 4), (2, 8), (8, 1, 2), (2, 2, 4), (2, 2, 2, 2), (3, 4), (5,)])


@given(shape=SHAPES, cuts=st.lists(st.integers(1, 15)), random=st.randoms())
def test_explicit_groups_cross_axes_along_which_two_members_differ(shape, cuts, random):
    numbers = list(range(math.prod(shape)))
    random.shuffle(numbers)
    edges = [0, *sorted({cut for cut in cuts if cut < len(numbers)}), len(numbers)]
    groups = [numbers[i:j] for i, j in itertools.pairwise(edges)]
    text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    line = f"ROOT %r = f32[6] all-to-all(%p), channel_id=1, replica_groups={text}"
    module = program_of(line, header=f"num_partitions={len(numbers)}")
    mesh = AbstractMesh(shape, tuple(f"x{i}" for i in range(len(shape))))
    expected = expected_axes(groups, shape)
    assert axes_of(module, mesh) == ([expected] if expected else [])


@given(
    shape=SHAPES,
    dimensions=st.permutations([2, 2, 3, 4]),
    order=st.permutations(range(4)),
    group_size=st.sampled_from([2, 3, 4, 6, 12]),
)
def test_iota_groups_are_a_transposed_range(shape, dimensions, order, group_size):
    shape = (3, *shape) if math.prod(shape) == 16 else (48,)
    groups = np.arange(48).reshape(dimensions).transpose(order).reshape(-1, group_size)
    dims, perm = (",".join(map(str, numbers)) for numbers in (dimensions, order))
    line = (
        f"ROOT %r = f32[6] all-reduce(%p), channel_id=1, use_global_device_ids=true, "
        f"replica_groups=[{48 // group_size},{group_size}]<=[{dims}]T({perm})"
    )
    mesh = AbstractMesh(shape, tuple(f"x{i}" for i in range(len(shape))))
    module = program_of(line, header="num_partitions=48")
    assert axes_of(module, mesh) == [expected_axes(groups.tolist(), shape)]


# --- programs of several TPU slices --------------------------------------------------------------


class Chip:
    """As much of a TPU device as a mesh needs. Chips are numbered as libtpu numbers them."""

    platform, device_kind, process_index = "tpu", "fake", 0

    def __init__(self, slice_index, index):
        self.slice_index, self.id = slice_index, 100_000 * (slice_index + 1) + index


def chips(slices=2, size=8):
    return np.array([[Chip(s, i) for i in range(size)] for s in range(slices)])


def between(kind, target):
    return (
        "%s = (f32[6], u32[]{:S(2)}, token[]) send(%p, %t), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    )


def sliced(*lines):
    return program_of("%t = token[] after-all()", *lines)


# The targets and groups in these tests are from programs that libtpu 0.0.50 compiled.
SLICES = [
    ("ALL_REDUCE", '"{1,2}x{0:7}"', "s"),
    ("ALL_GATHER", '"{1,2}x{0:7}"', "s"),
    (
        "ALL_TO_ALL",
        "{{100000,100001,100002,100003,200000,200001,200002,200003},"
        "{100004,100005,100006,100007,200004,200005,200006,200007}}",
        "sb",
    ),
    (
        "ONE_TO_ONE",
        "{{100004->200000},{200004->100000},{100005->200001},{200005->100001}}",
        "sa",
    ),
    ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", "s"),
]


@pytest.mark.parametrize(("kind", "target", "axes"), SLICES)
def test_reads_axes_of_transfers_between_slices(kind, target, axes):
    text = sliced(between(kind, target))
    real = Mesh(chips().reshape(2, 2, 4), ("s", "a", "b"))
    for mesh in real, real.abstract_mesh:
        assert axes_of(text, mesh) == [tuple(axes)]
    # An axis of slices may lie anywhere in a mesh.
    inner = Mesh(chips().T.reshape(2, 4, 2), ("a", "b", "s"))
    assert axes_of(text, inner) == [tuple(sorted(axes))]


def test_collectives_inside_slices_number_partitions_from_zero_in_each_slice():
    text = sliced(
        "%x = f32[12] all-gather(%p), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, "
        "dimensions={0}, use_global_device_ids=true",
        "%y = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,1},{1,0},{4,5},{5,4}}",
        between("ALL_REDUCE", '"{1,2}x{0:7}"'),
    )
    outer = Mesh(chips().reshape(2, 2, 4), ("s", "a", "b"))
    inner = Mesh(chips().T.reshape(2, 4, 2), ("a", "b", "s"))
    for mesh in outer, outer.abstract_mesh, inner:
        assert axes_of(text, mesh) == [("a",), ("b",), ("s",)]


def test_transfers_between_slices_number_devices_as_libtpu_does():
    # The mesh shuffles the chips of each slice: partition 0 is chip 3 of its slice.
    mesh = Mesh(chips()[:, ORDER].reshape(2, 2, 4), ("s", "a", "b"))
    target = (
        "{{100007->200003},{200007->100003},{100006->200001},{200006->100001},"
        "{100005->200000},{200005->100000},{100004->200002},{200004->100002}}"
    )
    inside = (
        "%x = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,4},{1,5},{2,6},{3,7}}"
    )
    text = sliced(inside, between("ONE_TO_ONE", target))
    assert axes_of(text, mesh) == [("a",), ("s", "a")]


def test_tells_groups_of_slices_apart():
    def pairs(*slices):
        groups = [f"{{{100000 * s + i},{100000 * t + i}}}" for s, t in slices for i in range(8)]
        return "{" + ",".join(groups) + "}"

    text = sliced(
        between("ALL_REDUCE", pairs((1, 3), (2, 4))),
        between("ALL_GATHER", pairs((1, 2), (3, 4))).replace("%s =", "%u ="),
    )
    mesh = Mesh(chips(4).reshape(2, 2, 8), ("x", "y", "a"))
    assert axes_of(text, mesh) == [("x",), ("y",)]
    assert axes_of(text, mesh.abstract_mesh) == [("x",), ("y",)]


def test_transfers_between_parts_of_slices_number_devices_of_whole_slices():
    mesh = Mesh(chips()[:, 4:].reshape(2, 2, 2), ("s", "a", "b"))
    text = sliced(between("ALL_TO_ALL", "{{100004,200004},{100005,200005}}"))
    assert axes_of(text.replace("num_partitions=8", "num_partitions=4"), mesh) == [("s",)]


def test_devices_with_other_numbers_are_found_by_slice():
    devices = chips(3, 4)
    for number, device in zip([1, 3, 0, 2, 5, 7, 4, 6, 9, 11, 8, 10], devices.flat, strict=True):
        device.id = number
    # The first chips of a slice in the order of their numbers are at (1, 0) and (0, 0) of a x b.
    text = sliced(between("ALL_TO_ALL", "{{100000,100001},{300000,300001}}"))
    mesh = Mesh(devices.reshape(3, 2, 2), ("s", "a", "b"))
    assert axes_of(text.replace("num_partitions=8", "num_partitions=4"), mesh) == [("a",)]


def test_a_mesh_of_slices_in_another_order_is_matched_by_devices():
    devices = chips()

    class Compiled:
        input_shardings = NamedSharding(Mesh(devices, ("s", "a")), PartitionSpec("s"))
        output_shardings = None

        def as_text(self):
            return sliced(
                "%x = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%p), channel_id=1, "
                "source_target_pairs={{0,1},{1,0}}",
                between("ONE_TO_ONE", "{{100000->200001},{200001->100000}}"),
            )

    # Partitions 0 and 1 are at (0, 2) and (0, 1) of a x b.
    mesh = Mesh(devices[:, ORDER].T.reshape(2, 4, 2), ("a", "b", "s"))
    assert axes_of(Compiled(), mesh) == [("b",), ("b", "s")]


@pytest.mark.parametrize("target", ["{{900000,900001}}", "{}"])
def test_a_transfer_to_unknown_devices_crosses_every_axis(target):
    mesh = Mesh(chips().reshape(2, 8, 1), ("s", "a", "one"))
    assert axes_of(sliced(between("ALL_TO_ALL", target)), mesh) == [("s", "a")]


def test_rejects_text_of_one_slice_for_a_mesh_of_slices_if_nothing_leaves_the_slice():
    mesh = Mesh(chips().reshape(2, 8), ("s", "a"))
    text = program_of("ROOT %r = f32[6] all-reduce(%p), replica_groups={}")
    with pytest.raises(ValueError, match=r"mesh has 16 devices .*, but the program runs on 8"):
        diagnostics.collectives(text, mesh=mesh)
    third = Mesh(chips(3, 4).reshape(3, 4), ("s", "a"))
    with pytest.raises(ValueError, match=r"mesh has 12 devices .*, but the program runs on 8"):
        diagnostics.collectives(sliced(between("ALL_REDUCE", '"{1,2}x{0:7}"')), mesh=third)


# --- bytes over axes -----------------------------------------------------------------------------


def test_sums_bytes_that_cross_given_axes():
    mesh = make_mesh((2, 4), ("a", "b"))

    def body(x):
        whole = lax.psum(x[:1], ("a", "b"))  # 2 * 7/8 * 64 bytes
        return jnp.concatenate(
            [
                lax.psum(x, "a"),  # 2 * 1/2 * 1024 bytes
                lax.all_gather(x, "b", tiled=True),  # 3 * 1024 bytes
                whole,
            ]
        )

    compiled = compile_mapped(body, mesh)

    def sent(crossing):
        return diagnostics.collective_bytes(compiled, mesh=mesh, crossing=crossing)

    assert sent("a") == 1024 + 112
    assert sent("b") == 3072 + 112
    assert sent(("a", "b")) == sent(("b", "a")) == sent(None) == 1024 + 3072 + 112
    assert sent(("a",)) == sent("a")
    assert sent(()) == 0
    assert diagnostics.collective_bytes(compiled) == 1024 + 3072 + 112


def test_a_conditional_counts_the_branch_with_most_bytes_over_the_axes():
    mesh = make_mesh((2, 4), ("a", "b"))

    def body(x):
        gather = lambda x: lax.all_gather(x, "b").sum(0)  # noqa: E731
        swap = lambda x: lax.ppermute(x, "a", [(0, 1), (1, 0)])  # noqa: E731
        return lax.cond(lax.axis_index("b") > 7, gather, swap, x)

    compiled = compile_mapped(body, mesh)
    assert diagnostics.collective_bytes(compiled, mesh=mesh) == 3 * 1024
    assert diagnostics.collective_bytes(compiled, mesh=mesh, crossing="b") == 3 * 1024
    assert diagnostics.collective_bytes(compiled, mesh=mesh, crossing="a") == 1024
    [most] = [r for r in diagnostics.collectives(compiled, mesh=mesh) if r.count]
    assert most.axes == ("b",)


def test_only_loops_that_cross_the_axes_need_a_trip_count():
    mesh = make_mesh((2, 4), ("a", "b"))

    def body(x):
        ring = [(i, (i + 1) % 4) for i in range(4)]
        x = lax.while_loop(lambda y: y.sum() < 1e9, lambda y: lax.ppermute(y, "b", ring) * 2, x)
        return lax.psum(x, "a")

    compiled = compile_mapped(body, mesh)
    assert diagnostics.collective_bytes(compiled, mesh=mesh, crossing="a") == 1024
    with pytest.raises(ValueError, match="unknown trip count"):
        diagnostics.collective_bytes(compiled, mesh=mesh, crossing="b")
    sent = diagnostics.collective_bytes(compiled, mesh=mesh, crossing="b", unknown_trip_count=3)
    assert sent == 3 * 1024


def test_rejects_axes_without_a_mesh_and_axes_that_the_mesh_lacks():
    text = program_of("ROOT %r = f32[6] all-reduce(%p), replica_groups={}")
    with pytest.raises(ValueError, match=r"crossing='a' needs a mesh.*mesh="):
        diagnostics.collective_bytes(text, crossing="a")
    with pytest.raises(ValueError, match=r"names 'data', which is no axis of mesh.*'a', 'b', 'c'"):
        diagnostics.collective_bytes(text, mesh=BOX, crossing=("a", "data"))
