"""The fingerprint of an update stands for what follows the vote, and for nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import signax
import signax.elastic.fingerprint as module
from signax._core.remote import Remote
from signax.elastic.fingerprint import find_fingerprint

PARAMS = {"w": jnp.ones((3, 5)), "b": jnp.zeros(2)}


class Traced(Remote):
    """An exchange that is never called."""

    num_workers = 4

    def __init__(self, index):
        self.index = index

    def vote(self, sealed, step, form):
        shape = jax.ShapeDtypeStruct(sealed.shape, sealed.dtype)
        return io_callback(lambda *_: pytest.fail("called"), shape, sealed, step)


def fingerprint(after=None, before=None, index=0, jit=False):
    vote = signax.majority_vote(exchange=Traced(index))
    tx = optax.chain(before or optax.identity(), vote, after or optax.scale(-0.5))
    if jit:
        tx = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    return find_fingerprint(tx, PARAMS, tx.init(PARAMS))


def scale_by(weights):
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, w: u * w, updates, weights),
    )


def test_workers_have_one_fingerprint():
    assert len({fingerprint(index=index) for index in range(4)}) == 1
    assert len({fingerprint(index=index, jit=True) for index in range(4)}) == 1


def test_what_leads_to_the_vote_is_left_out():
    assert fingerprint(before=optax.clip(0.25)) == fingerprint()
    assert fingerprint(before=optax.clip(0.25), jit=True) == fingerprint(jit=True)


@pytest.mark.parametrize("jit", [False, True])
def test_what_follows_the_vote_is_told_apart(jit):
    weights = {"w": np.arange(15.0).reshape(3, 5), "b": np.ones(2)}
    others = weights | {"w": np.arange(15.0)[::-1].reshape(3, 5)}
    schedule = optax.linear_schedule(1.0, 0.0, 1000)
    after = [
        optax.scale(-0.5),
        optax.scale(float(np.nextafter(np.float32(-0.5), np.float32(0)))),
        optax.scale_by_schedule(schedule),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 1001)),
        optax.chain(optax.add_decayed_weights(0.1), optax.scale(-0.5)),
        optax.chain(optax.scale(-0.5), optax.add_decayed_weights(0.1)),
        optax.chain(optax.add_decayed_weights(0.1, {"w": True, "b": False}), optax.scale(-0.5)),
        optax.trace(0.5),
        optax.trace(0.5, nesterov=True),
        scale_by(weights),
        scale_by(others),
    ]
    found = [fingerprint(one, jit=jit) for one in after]
    assert len({*found}) == len(after)
    assert found == [fingerprint(one, jit=jit) for one in after]


@jax.custom_vjp
def halve(value):
    return value / 2


halve.defvjp(lambda value: (halve(value), None), lambda _, cotangent: (cotangent / 2,))


def add_noise(value):
    return value + jax.random.normal(jax.random.key(0), value.shape)


@pytest.mark.parametrize("function", [add_noise, halve, jax.nn.silu])
def test_no_address_in_memory_is_hashed(monkeypatch, function):
    hashed = []

    class Hashlib:
        @staticmethod
        def sha256(data):
            hashed.append(data)
            return hashlib.sha256(data)

    monkeypatch.setattr(module, "hashlib", Hashlib)
    fingerprint(optax.stateless(lambda updates, _: jax.tree.map(function, updates)))
    assert any(b"float32" in data for data in hashed)
    assert not [data for data in hashed if b" at 0x" in data]


def test_typed_keys_that_an_update_captures_are_told_apart():
    def noise(seed):
        key = jax.random.key(seed)
        return optax.stateless(
            lambda updates, _: jax.tree.map(lambda u: u + jax.random.normal(key, u.shape), updates)
        )

    assert fingerprint(noise(0)) == fingerprint(noise(0)) != fingerprint(noise(1))


def test_a_number_in_the_state_is_left_out():
    def inject(size):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=size)

    assert fingerprint(inject(0.5)) == fingerprint(inject(0.25))
