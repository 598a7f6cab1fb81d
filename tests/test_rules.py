"""Logical axis rules without the workers' axis, alone and around a model with constraints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.linen import spmd
from jax.sharding import AxisType

import signax

RULES = [("batch", ("data", "fsdp")), ("embed", "fsdp"), ("length", "data"), ("heads", None)]


@pytest.mark.parametrize(
    ("axis_name", "expected"),
    [
        (
            "data",
            (("batch", "fsdp"), ("embed", "fsdp"), ("length", None), ("heads", None)),
        ),
        (("data", "fsdp"), (("batch", None), ("embed", None), ("length", None), ("heads", None))),
        ("slice", (("batch", ("data", "fsdp")), *map(tuple, RULES[1:]))),
    ],
)
def test_removes_the_workers_axis(axis_name, expected):
    assert signax.inner_rules(RULES, axis_name) == expected
    assert signax.inner_rules(signax.inner_rules(RULES, axis_name), axis_name) == expected


def test_rules_may_be_lists_as_configurations_have_them():
    rules = [["batch", ["data", "fsdp"]], ["length", ["data"]], ["embed", ["fsdp", "tensor"]]]
    expected = (("batch", "fsdp"), ("length", None), ("embed", ("fsdp", "tensor")))
    assert signax.inner_rules(rules, "data") == expected


def test_rejects_what_is_no_rule():
    with pytest.raises(TypeError, match="rules has 'batch', but needs pairs"):
        signax.inner_rules(["batch"], "data")
    with pytest.raises(TypeError, match="axis_name"):
        signax.inner_rules(RULES, ())


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = spmd.with_logical_constraint(nn.Dense(8)(x), ("batch", "embed"))
        return nn.Dense(1)(x)


def test_a_model_with_constraints_runs_inside_a_worker():
    devices = jax.devices()[:8]
    axis_types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=axis_types, devices=devices)
    tx = signax.DataParallel(signax.sign_sgd(0.1, axis_name="data"), mesh)
    batch = jnp.ones((16, 4))
    params = Model().init(jax.random.key(0), batch)

    def loss_fn(params, batch):
        with nn.logical_axis_rules(signax.inner_rules(RULES, "data")):
            return jnp.mean(Model().apply(params, batch) ** 2)

    with jax.set_mesh(mesh):
        loss, grads = jax.jit(tx.value_and_grad(loss_fn))(params, batch)
        expected = jax.value_and_grad(lambda p: jnp.mean(Model().apply(p, batch) ** 2))(params)
    assert loss == pytest.approx(float(expected[0]), rel=1e-5)
    assert jax.tree.leaves(grads)[0].shape[0] == 4


def test_a_constraint_over_the_workers_axis_is_an_error_with_a_remedy():
    devices = jax.devices()[:8]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    tx = signax.DataParallel(signax.sign_sgd(0.1, axis_name="data"), mesh)
    batch = jnp.ones((16, 4))
    params = Model().init(jax.random.key(0), batch)

    def loss_fn(params, batch):
        with nn.logical_axis_rules([("batch", "data")]):
            return jnp.mean(Model().apply(params, batch) ** 2)

    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"signax.inner_rules\(rules, 'data'\)"),
    ):
        jax.jit(tx.value_and_grad(loss_fn))(params, batch)
