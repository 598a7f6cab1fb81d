"""The transports on words, without arrays around them."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from workers import AXIS, MAPS, on_workers

from signax._wire import words as wire
from signax._wire.exchange import send
from signax._wire.signs import Majority, Rules
from signax._wire.types import Context, Leaves, Route, Worker
from signax._wire.words import LANES, LARGE_PART

MANY = st.integers(1, 10**9)
WORKERS = st.integers(1, 4096)


@given(words=MANY, num_workers=WORKERS)
def test_shares_hold_every_word_and_large_ones_are_whole_rows(words, num_workers):
    share = wire.part_words(words, num_workers)
    least = -(-words // num_workers)
    if least < LARGE_PART:
        assert share == least
    else:
        assert share % LANES == 0
        assert least <= share < least + LANES


@given(words=MANY, num_workers=WORKERS, planes=st.integers(1, 2))
def test_a_part_holds_its_share_and_no_more_than_it_must(words, num_workers, planes):
    share = wire.part_words(words, num_workers)
    part = wire.sealed_words(planes * share)
    assert part % LANES == 0
    assert 1 + planes * share <= part < 1 + planes * share + LANES


@given(up=MANY, down=MANY, num_workers=st.integers(1, 64))
def test_a_gather_is_chosen_unless_it_sends_many_more_words(up, down, num_workers):
    gathered = (num_workers - 1) * up
    packed = (num_workers - 1) * (up + down) / num_workers
    chosen = wire.choose_transport(up, down, num_workers)
    if gathered - packed <= wire.GATHER_WORDS:
        assert chosen == "gather"
    elif gathered - packed >= wire.GATHER_WORDS + 1:
        assert chosen == "packed"


@pytest.mark.parametrize(
    ("num_workers", "name"),
    [(1, "int8"), (127, "int8"), (128, "int16"), (32767, "int16"), (32768, "int32")],
)
def test_sums_are_as_wide_as_the_workers_are_many(num_workers, name):
    assert wire.sum_dtype(num_workers) == jnp.dtype(name)
    assert np.iinfo(name).max >= num_workers


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("share", [1, 63, 64, 65, 127, 128, 129, 256])
def test_what_was_sealed_is_unsealed(share, planes):
    rows = np.random.default_rng(share).integers(1, 2**32, (planes, 3, share), dtype=np.uint32)
    sealed = wire.seal(list(jnp.asarray(rows)), jnp.uint32(7))
    assert sealed.shape == (3, wire.sealed_words(planes * share) // LANES, LANES)
    found, headers = wire.unseal(sealed, [share] * planes)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(headers, [7, 7, 7])


@pytest.mark.parametrize("share", [64, 127, 128])
def test_who_is_out_sends_zeros(share):
    sealed = wire.seal([jnp.ones((2, share), jnp.uint32)], jnp.uint32(0))
    assert not np.any(sealed)


def test_a_header_holds_the_worker_and_its_coins_or_zero():
    bit, yes = (jnp.uint32(0), jnp.uint32(1)), jnp.bool_(True)
    headers = [
        int(wire.make_header(jnp.uint32(worker), coin, tie, yes))
        for worker in range(5)
        for coin in bit
        for tie in bit
    ]
    assert headers == list(range(4, 24))
    assert [int(wire.worker_of(header)) for header in headers] == [n // 4 for n in range(20)]
    assert wire.make_header(jnp.uint32(4), bit[1], bit[1], jnp.bool_(False)) == 0


def send_by(transport):
    """One worker's exchange: its planes and what its header says."""

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
def test_the_majority_of_every_bit_is_decided(kind, planes, transport):
    num_workers, words = 4, 517
    rng = np.random.default_rng(planes)
    bits = rng.random((num_workers, planes, 32 * words)) < 0.5
    message = jnp.asarray([[references.packed(plane) for plane in row] for row in bits])
    exchange = on_workers(kind, send_by(transport), num_workers)
    for out in range(num_workers + 1):
        takes_part, tie = np.arange(num_workers) >= out, out % 2
        coins = rng.integers(0, 2, num_workers)
        decided, voters, dead = exchange(
            message,
            jnp.arange(num_workers, dtype=jnp.uint32),
            jnp.asarray(coins, jnp.uint32),
            jnp.full(num_workers, tie, jnp.uint32),
            jnp.asarray(takes_part),
        )
        counts = bits[takes_part].sum(axis=0)
        assert voters == num_workers - out
        # A dithered zero's bit is 1 if its worker's coin is 0.
        assert dead == (voters > 0 and 2 * np.sum(coins[takes_part] == 0) + tie > voters)
        if planes == 2:
            expected = [counts[0] > counts[1], counts[1] > counts[0]]
        elif voters:
            expected = [2 * counts[0] + tie > voters]
        else:
            continue  # nobody looks at these bits
        for plane, wanted in zip(decided, expected, strict=True):
            np.testing.assert_array_equal(references.unpacked(plane), wanted)


@pytest.mark.parametrize("words", [2 * LARGE_PART - 2, 2 * LARGE_PART, 2 * LARGE_PART + 1])
def test_transports_agree_around_the_size_from_which_shares_are_rounded(words):
    message = np.random.default_rng(words).integers(0, 2**32, (2, 1, words), dtype=np.uint32)
    ones = jnp.ones(2, jnp.uint32)
    others = jnp.arange(2, dtype=jnp.uint32), ones, ones, jnp.ones(2, jnp.bool_)
    for transport in ("packed", "gather"):
        (decided,), voters, _ = on_workers("vmap", send_by(transport), 2)(
            jnp.asarray(message), *others
        )
        assert voters == 2
        np.testing.assert_array_equal(decided, message[0, 0] | message[1, 0])  # ties are set
