"""Collectives in flight: schedules as the compilers for GPUs and TPUs write them."""

import jax
import jax.numpy as jnp
import pytest

from signax import diagnostics

HEAD = "HloModule step, is_scheduled=true, num_partitions=8\n"
BACKWARD = 'metadata={op_name="jit(step)/transpose(jvp(Layer))/dot_general"}'
FORWARD = 'metadata={op_name="jit(step)/jvp(Layer)/dot_general"}'
GROUP = "replica_groups=[1,8]<=[8]"

GPU = f"""{HEAD}
%gemm_computation (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8] parameter(0)
  %b = f32[8,8] parameter(1)
  ROOT %product = f32[8,8] dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%scale_computation (c: f32[8,8]) -> f32[8,8] {{
  %c = f32[8,8] parameter(0)
  ROOT %scaled = f32[8,8] multiply(%c, %c)
}}

ENTRY %main (x: f32[8,8], w: u32[8,128]) -> f32[8,8] {{
  %x = f32[8,8] parameter(0)
  %w = u32[8,128] parameter(1)
  %early = ((u32[8,128]), u32[8,128]) all-to-all-start(%w), {GROUP}, dimensions={{0}}
  %forward = f32[8,8] custom-call(%x, %x), custom_call_target="__cublas$gemm", {FORWARD}
  %first = f32[8,8] custom-call(%x, %forward), custom_call_target="__cublas$gemm", {BACKWARD}
  %second = f32[8,8] fusion(%first, %x), kind=kCustom, calls=%gemm_computation, {BACKWARD}
  %early.done = u32[8,128] all-to-all-done(%early)
  %late = ((u32[8,128]), u32[8,128]) all-to-all-start(%early.done), {GROUP}, dimensions={{0}}
  %scale = f32[8,8] fusion(%second), kind=kLoop, calls=%scale_computation, {BACKWARD}
  %late.done = u32[8,128] all-to-all-done(%late)
  %third = f32[8,8] fusion(%scale, %x), kind=kCustom, calls=%gemm_computation, {BACKWARD}
  ROOT %sum = f32[8,8] all-reduce(%third), {GROUP}, to_apply=%add
}}
"""

# A TPU passes an overlapped all-gather on from fusion to fusion, and prints it in each.
TPU = f"""{HEAD}
%start_computation (p: u32[1,128]) -> (u32[1,128], u32[8,128], u32[]) {{
  %p = u32[1,128] parameter(0)
  %all-gather.1 = u32[8,128] all-gather(%p), {GROUP}, dimensions={{0}}
  ROOT %begun = (u32[1,128], u32[8,128], u32[]) custom-call(%p), custom_call_target="Start"
}}

%async_collective_fusion.1 (p.1: u32[1,128], g: f32[8,8]) -> (f32[8,8], u32[]) {{
  %p.1 = u32[1,128] parameter(0)
  %g = f32[8,8] parameter(1)
  %all-gather.2 = u32[8,128] all-gather(%p.1), {GROUP}, dimensions={{0}}
  %product = f32[8,8] convolution(%g, %g), dim_labels=bf_io->bf
  ROOT %both = (f32[8,8], u32[]) custom-call(%product), custom_call_target="Step"
}}

%done_computation (p.2: u32[1,128], s: u32[]) -> u32[8,128] {{
  %p.2 = u32[1,128] parameter(0)
  %s = u32[] parameter(1)
  %all-gather.3 = u32[8,128] all-gather(%p.2), {GROUP}, dimensions={{0}}
  ROOT %end = u32[8,128] custom-call(%s), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (w: u32[1,128], x: f32[8,8]) -> u32[8,128] {{
  %w = u32[1,128] parameter(0)
  %x = f32[8,8] parameter(1)
  %async-collective-start = (u32[1,128], u32[8,128], u32[]) fusion(%w), calls=%start_computation
  %sent = u32[1,128] get-tuple-element(%async-collective-start), index=0
  %f = (f32[8,8], u32[]) fusion(%sent, %x), calls=%async_collective_fusion.1, {BACKWARD}
  %flag = u32[] get-tuple-element(%f), index=1
  %async-collective-done = u32[8,128] fusion(%sent, %flag), calls=%done_computation
  %after = f32[8,8] convolution(%x, %x), dim_labels=bf_io->bf, {BACKWARD}
  ROOT %gathered = u32[8,128] all-gather(%w), {GROUP}, dimensions={{0}}
}}
"""

# Two slices of 4 chips. Transfers between slices are a send, and transfers inside a collective.
GATHER = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"'
HOST = f"is_host_transfer=true, frontend_attributes={{{GATHER}}}"
SLICES = f"""HloModule step, is_scheduled=true, num_partitions=4
ENTRY %main (x: f32[8,8], w: u32[1,128]) -> f32[8,8] {{
  %x = f32[8,8] parameter(0)
  %w = u32[1,128] parameter(1)
  %token = token[] after-all()
  %send = (u32[1,128], u32[], token[]) send(%w, %token), {HOST}
  %recv = (u32[2,128], u32[], token[]) recv(%token), {HOST}
  %first = f32[8,8] convolution(%x, %x), dim_labels=bf_io->bf, {BACKWARD}
  %sum = f32[8,8] all-reduce(%first), replica_groups=[1,4]<=[4], to_apply=%add
  %send-done = token[] send-done(%send), is_host_transfer=true
  %recv-done = (u32[2,128], token[]) recv-done(%recv), is_host_transfer=true
  ROOT %second = f32[8,8] convolution(%sum, %x), dim_labels=bf_io->bf, {BACKWARD}
}}
"""


def test_counts_kernels_of_the_backward_pass_beside_a_collective():
    early, late, total = diagnostics.in_flight(GPU)
    assert (early.operation, early.bytes_sent) == ("all-to-all", 7 * 128 * 4)
    assert (early.beside, early.after) == (2, 3)  # not the product of the forward pass
    assert (late.beside, late.after) == (1, 1)  # the multiplication of numbers is no product
    assert (total.operation, total.beside, total.after) == ("all-reduce", 0, 0)


def test_follows_an_overlapped_collective_of_a_tpu_through_its_fusions():
    first, last = diagnostics.in_flight(TPU)
    assert (first.name, first.operation) == ("async-collective-start", "all-gather")
    assert (first.bytes_sent, first.beside, first.after) == (7 * 128 * 4, 1, 2)
    assert (last.name, last.beside, last.after) == ("gathered", 0, 0)


def test_a_transfer_between_slices_is_in_flight_from_send_to_done():
    send, total = diagnostics.in_flight(SLICES)
    assert (send.name, send.operation, send.bytes_sent) == ("send", "megascale-all-gather", 512)
    assert (send.beside, send.after) == (1, 2)
    assert (total.operation, total.beside, total.after) == ("all-reduce", 0, 1)


LOOPS = f"""HloModule step, is_scheduled=true, num_partitions=8
%body (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %in_loop = f32[8] all-reduce(%p), {GROUP}, to_apply=%add
}}

%condition (q: f32[8]) -> pred[] {{
  %q = f32[8] parameter(0)
  ROOT %true = pred[] constant(true)
}}

%branch (r: f32[8]) -> f32[8] {{
  %r = f32[8] parameter(0)
  ROOT %in_branch = f32[8] all-reduce(%r), {GROUP}, to_apply=%add
}}

ENTRY %main (x: f32[8], flag: pred[]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %flag = pred[] parameter(1)
  %loop = f32[8] while(%x), condition=%condition, body=%body
  %choice = f32[8] conditional(%flag, %loop, %loop), branch_computations={{%branch, %branch}}
  ROOT %outside = f32[8] all-reduce(%choice), {GROUP}, to_apply=%add
}}
"""


def test_collectives_in_loops_and_conditions_are_left_out():
    assert [one.name for one in diagnostics.in_flight(LOOPS)] == ["outside"]


def test_collectives_may_be_chosen_by_the_axes_that_they_cross():
    mesh = jax.sharding.AbstractMesh((2, 4), ("slice", "chip"))
    send, total = diagnostics.in_flight(SLICES)
    for crossing, expected in [
        ("slice", [send]),
        ("chip", [total]),
        (("slice", "chip"), [send, total]),
    ]:
        found = diagnostics.in_flight(SLICES, mesh=mesh, crossing=crossing)
        assert found == expected
        sizes = diagnostics.collective_bytes(SLICES, mesh=mesh, crossing=crossing)
        assert sum(one.bytes_sent for one in found) == sizes
    assert diagnostics.in_flight(SLICES, mesh=mesh) == [send, total]


def test_rejects_an_axis_that_the_mesh_does_not_have():
    mesh = jax.sharding.AbstractMesh((2, 4), ("slice", "chip"))
    with pytest.raises(ValueError, match="crossing='host' names 'host', which is no axis of mesh"):
        diagnostics.in_flight(SLICES, mesh=mesh, crossing="host")
    with pytest.raises(ValueError, match="crossing='slice' needs a mesh"):
        diagnostics.in_flight(SLICES, crossing="slice")
    with pytest.raises(ValueError, match="mesh has 8 devices"):
        diagnostics.in_flight(GPU.replace("num_partitions=8", "num_partitions=4"), mesh=mesh)


def test_a_program_without_collectives_has_none_in_flight():
    compiled = jax.jit(jnp.sin).lower(jnp.ones(8)).compile()
    assert diagnostics.in_flight(compiled) == []


def test_rejects_a_program_that_is_no_schedule():
    with pytest.raises(ValueError, match="not a schedule: compile for a TPU or a GPU"):
        diagnostics.in_flight(GPU.replace("is_scheduled=true, ", ""))
    with pytest.raises(ValueError, match="must be a compiled program or its HLO text"):
        diagnostics.in_flight("nothing")
