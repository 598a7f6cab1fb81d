"""Costs of a step on TPU pods and H100s, read from programs compiled for these devices.

`make test-accelerators` runs these tests in an environment with the compilers.
"""

import accelerators
import pytest
from accelerators import (
    TARGETS,
    TREES,
    feedback_program,
    muon_program,
    num_parameters,
    product_operations,
    sgd_program,
    train_program,
    vote_program,
)
from schedules import schedule

pytestmark = pytest.mark.accelerator

if not accelerators.REQUESTED:
    pytest.skip("make test-accelerators runs these", allow_module_level=True)

SLICES, CHIPS = TARGETS["v5e-4x16"].axes.values()
WORDS = {"u32", "s32"}


def packed_bytes(tree):
    """The bytes of one bit for each parameter."""
    return num_parameters(tree) / 8


def sent(records):
    return sum(record.bytes_sent * record.count for record in records)


def apart(program):
    """The collectives between slices, and the collectives inside a slice."""
    assert program.num_partitions == CHIPS
    crossing = [r for r in program.collectives if r.operation.startswith("megascale-")]
    staying = [record for record in program.collectives if record not in crossing]
    assert all("slice" in record.axes for record in crossing)
    assert {record.axes for record in staying} == {("chip",)}
    return crossing, staying


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("target", TARGETS)
def test_only_packed_words_are_sent(target, tree):
    found = vote_program(target, tree).collectives
    assert found
    assert {record.dtype for record in found} <= WORDS


# If latency costs more than bytes, XLA replaces the all-gather of the result by an all-reduce of
# parts padded with zeros, which sends twice the bytes.
@pytest.mark.parametrize(
    ("target", "tree", "way_back"),
    [
        ("v5e-8", "leaf", "all-gather"),
        ("v5e-8", "gpt2", "all-gather"),
        ("v5e-256", "leaf", "all-reduce"),
        ("v5e-256", "gpt2", "all-reduce"),
        ("v5p-512", "leaf", "all-reduce"),
        ("v5p-512", "gpt2", "all-reduce"),
        ("h100-8", "leaf", "all-gather"),
        ("h100-8", "gpt2", "all-gather"),
    ],
)
def test_one_bit_is_sent_each_way(target, tree, way_back):
    [workers] = TARGETS[target].axes.values()
    found = vote_program(target, tree).collectives
    assert sorted(record.operation for record in found) == [way_back, "all-to-all"]
    one_way = (workers - 1) / workers * packed_bytes(tree)
    ways = {"all-gather": 2, "all-reduce": 3}[way_back]
    assert sent(found) == pytest.approx(ways * one_way, rel=0.05)


@pytest.mark.parametrize("tree", TREES)
def test_chips_of_a_slice_split_the_exchange_between_slices(tree):
    crossing, staying = apart(vote_program("v5e-4x16", tree))
    kinds = sorted(record.operation for record in crossing)
    assert kinds == ["megascale-all-gather", "megascale-all-to-all"]
    share = packed_bytes(tree) / CHIPS
    assert sent(crossing) == pytest.approx(2 * (SLICES - 1) / SLICES * share, rel=0.05)
    assert [record.operation for record in staying] == ["all-gather"]
    assert sent(staying) == pytest.approx((CHIPS - 1) * share, rel=0.05)


def test_gradients_are_summed_inside_a_slice_and_voted_between_slices():
    width = 2048
    weights = 8 * width**2
    crossing, staying = apart(train_program("v5e-4x16", width))
    summed = sum(record.elements for record in staying if record.is_floating)
    assert summed == pytest.approx(weights, rel=0.01)
    # Only the sum and number of losses cross between slices, padded to a row of lanes.
    assert sum(record.elements for record in crossing if record.is_floating) <= 128
    votes = [record for record in crossing if not record.is_floating]
    assert {record.dtype for record in votes} <= WORDS
    expected = 2 * (SLICES - 1) / SLICES * weights / 8 / CHIPS
    assert sent(votes) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("tree", "share"), [("leaf", 0.10), ("gpt2", 0.30)])
@pytest.mark.parametrize("target", TARGETS)
def test_temporary_memory_is_a_small_share_of_the_gradient(target, tree, share):
    temporary = vote_program(target, tree).temporary_bytes
    assert temporary < share * 4 * num_parameters(tree)


# XLA has no cost model for an absent GPU.
@pytest.mark.parametrize("target", [each for each in TARGETS if each != "h100-8"])
def test_memory_traffic_is_near_that_of_sgd_with_momentum(target):
    voted = vote_program(target, "leaf").bytes_accessed
    momentum = sgd_program(target, "leaf").bytes_accessed
    assert voted < 1.5 * momentum


# The server's memory takes an eighth of the gradient, and the worker's memory a whole gradient.
@pytest.mark.parametrize(
    ("target", "tree"), [("v5e-8", "leaf"), ("v5e-8", "gpt2"), ("h100-8", "leaf")]
)
def test_error_feedback_sends_one_bit_each_way_with_little_temporary_memory(target, tree):
    program = feedback_program(target, tree)
    operations = sorted(record.operation for record in program.collectives)
    assert operations == ["all-gather", "all-to-all"]
    assert {record.dtype for record in program.collectives} <= WORDS
    [workers] = TARGETS[target].axes.values()
    one_way = (workers - 1) / workers * packed_bytes(tree)
    assert sent(program.collectives) == pytest.approx(2 * one_way, rel=0.02)
    assert program.temporary_bytes < 1.5 * 4 * num_parameters(tree)


def test_error_feedback_has_less_than_four_times_the_memory_traffic_of_sgd():
    found = feedback_program("v5e-8", "leaf").bytes_accessed
    assert found < 4 * sgd_program("v5e-8", "leaf").bytes_accessed


# Compiling Muon takes a minute, so these tests share a TPU's program and a GPU's.
MUON_TARGETS = ["v5e-8", "h100-8"]


@pytest.mark.parametrize("target", MUON_TARGETS)
def test_muon_sends_the_packed_words_of_signum(target):
    def messages(program):
        return sorted((r.operation, r.dtype, r.bytes_sent, r.count) for r in program.collectives)

    found = muon_program(target, "gpt2")
    assert messages(found) == messages(vote_program(target, "gpt2"))
    assert {record.dtype for record in found.collectives} <= WORDS
    assert sent(found.collectives) == 27_259_904


# Polar factors wait for the vote in stacks of two thirds of the gradient, and the momenta of one
# shape form a stack of a quarter. The H100 takes 1.26 gradients, and the TPU 1.50.
@pytest.mark.parametrize("target", MUON_TARGETS)
def test_temporary_memory_of_muon_is_below_1_75_gradients(target):
    temporary = muon_program(target, "gpt2").temporary_bytes
    assert temporary < 1.75 * 4 * num_parameters("gpt2")


# With X of m rows and n columns (m <= n), each of five iterations computes A = X X^T in 2 m^2 n
# operations, A A in 2 m^3, and (b A + c A A) X in 2 m^2 n. Compilers may cut these products into
# pieces, but the number of operations stays the same. A vote of signum or Lion has no products.
@pytest.mark.parametrize("target", MUON_TARGETS)
def test_muon_computes_the_products_of_five_iterations(target):
    matrices = [shape for name, shape in TREES["gpt2"].items() if name.endswith("kernel")]
    sides = [(min(shape), max(shape)) for shape in matrices]
    expected = sum(5 * (4 * m**2 * n + 2 * m**3) for m, n in sides)
    assert product_operations(muon_program(target, "gpt2")) == expected
    assert product_operations(vote_program(target, "gpt2")) == 0
    tokens = 16_384  # in a worker's batch, as in docs/performance.md, which says 13%
    training_step = 6 * num_parameters("gpt2") * tokens
    assert expected / training_step == pytest.approx(0.13, abs=0.005)


@pytest.mark.parametrize("target", ["v5e-8", "h100-8"])
def test_buckets_are_in_flight_while_the_backward_pass_goes_on(target):
    """Embeddings are 15% of GPT-2 medium, and their gradients end the backward pass."""
    one, buckets = (schedule(target, "gpt2-medium", "vote", number) for number in (1, 12))
    assert one["share_in_flight"] == 0
    assert buckets["share_in_flight"] >= 0.75
    assert buckets["bytes_sent"] <= 1.05 * one["bytes_sent"]
    assert buckets["temporary_bytes"] <= 1.05 * one["temporary_bytes"]
