"""Exchanges of packed words over an axis, by every transport."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from workers import AXIS, MAPS, on_workers

import signax
from signax._wire import words as wire
from signax._wire.ballots import Rules
from signax._wire.exchange import send, take_part
from signax._wire.signs import Majority
from signax._wire.types import Context, Leaves, Reply, Route, Worker
from signax._wire.words import LARGE_PART, add_up


def send_by(transport):
    """One worker's exchange: the planes of the reply, and the fields of its header."""

    def local(message, worker, coin, tie, takes_part):
        header = wire.make_header(worker, coin, tie, takes_part)
        codec = Majority(Rules("abstain" if len(message) == 2 else "dither", "dither"))
        context = Context(Leaves([], []), Worker(worker, coin, tie), [])
        combine = partial(codec.combine, context=context)
        route = Route(AXIS, transport)
        reply = send(list(message), header, codec, route, combine, jnp.int32(0))
        return reply.planes, reply.header >> 1, reply.header & 1

    return local


@pytest.mark.parametrize("transport", ["packed", "gather"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("kind", MAPS)
def test_an_exchange_decides_the_majority_of_every_bit(kind, planes, transport):
    num_workers, words = 4, 517
    rng = np.random.default_rng(planes)
    bits = rng.random((num_workers, planes, 32 * words)) < 0.5
    message = jnp.asarray([[references.packed(plane) for plane in row] for row in bits])
    exchange = on_workers(kind, send_by(transport), num_workers)
    for absent in range(num_workers + 1):
        takes_part, tie = np.arange(num_workers) >= absent, absent % 2
        coins = rng.integers(0, 2, num_workers)
        decided, voters, dead = exchange(
            message,
            jnp.arange(num_workers, dtype=jnp.uint32),
            jnp.asarray(coins, jnp.uint32),
            jnp.full(num_workers, tie, jnp.uint32),
            jnp.asarray(takes_part),
        )
        counts = bits[takes_part].sum(axis=0)
        assert voters == num_workers - absent
        # A dithered zero's bit is 1 if its worker's coin is 0.
        assert dead == (voters > 0 and 2 * np.sum(coins[takes_part] == 0) + tie > voters)
        if planes == 2:
            expected = [counts[0] > counts[1], counts[1] > counts[0]]
        elif voters:
            expected = [2 * counts[0] + tie > voters]
        else:
            continue  # these bits are not read
        for plane, wanted in zip(decided, expected, strict=True):
            np.testing.assert_array_equal(references.unpacked(plane), wanted)


@pytest.mark.parametrize("words", [2 * LARGE_PART - 2, 2 * LARGE_PART, 2 * LARGE_PART + 1])
def test_transports_agree_around_the_size_of_large_parts(words):
    message = np.random.default_rng(words).integers(0, 2**32, (2, 1, words), dtype=np.uint32)
    ones = jnp.ones(2, jnp.uint32)
    others = jnp.arange(2, dtype=jnp.uint32), ones, ones, jnp.ones(2, jnp.bool_)
    for transport in ("packed", "gather"):
        (decided,), voters, _ = on_workers("vmap", send_by(transport), 2)(
            jnp.asarray(message), *others
        )
        assert voters == 2
        np.testing.assert_array_equal(decided, message[0, 0] | message[1, 0])  # ties are set


@pytest.mark.parametrize("count", [7, 2**31 + 2**20])
def test_counts_of_all_servers_may_exceed_32_bits(count):
    """As of agreement on more than 2^32 coordinates, which no test can hold."""
    num_workers = 4

    def local(message, worker):
        counts = jnp.uint32(count) - worker[None, None, None] + jnp.arange(8).reshape(1, 2, 4)
        reply = Reply([message[:4]], 2 * jnp.uint32(num_workers), [counts.astype(jnp.uint32)], [])
        header = wire.make_header(worker, worker & 1, worker & 0, worker >= 0)
        codec = Majority(Rules("dither", "dither"))
        route = Route(AXIS, "packed")
        found = send([message], header, codec, route, lambda *_: reply, jnp.int32(0))
        return add_up(found.counts[0][:, :, 1])

    message = jnp.ones((num_workers, 16), jnp.uint32)
    found = on_workers("vmap", local, num_workers)(message, jnp.arange(4, dtype=jnp.uint32))
    expected = [sum(count - server + more for server in range(4)) for more in (1, 5)]
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))


def test_counts_of_several_devices_may_exceed_32_bits():
    counts = np.array([[2**32 - 1, 70_000], [2**32 - 2, 3], [5, 2**16]], np.uint32)
    found = jax.jit(add_up)(counts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, counts.astype(np.float64).sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        signax.majority_vote(AXIS, agreement=True),
        signax.mean_scaled_signs(AXIS, num_workers=4, feedback="worker"),
    ],
    ids=["agreement", "scaled signs"],
)
def test_a_second_step_outside_jit_compiles_nothing(tx, caplog):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 40)), jnp.float32)
    update = jax.vmap(tx.update, axis_name=AXIS)
    _, state = update(rows, jax.vmap(tx.init)(rows))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.block_until_ready(update(rows, state))
    assert not [record for record in caplog.records if "XLA compilation" in record.message]


@pytest.mark.parametrize("finite", [False, True])
def test_a_worker_takes_part_if_it_is_finite_and_active(finite):
    finite = jnp.bool_(finite)
    assert take_part(finite, None) == finite
    assert take_part(finite, True) == finite
    assert not take_part(finite, jnp.bool_(False))


def test_rejects_a_flag_that_is_not_a_boolean():
    with pytest.raises(TypeError, match=r"active=1\.0 must be one boolean"):
        take_part(jnp.bool_(True), 1.0)
