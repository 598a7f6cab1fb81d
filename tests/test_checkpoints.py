"""Training that is saved with Orbax and restored, also with another number of workers."""

import pathlib
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import old_checkpoint
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from workers import auto_mesh

import signax

KEY = jax.random.key(7)
OPTIMIZERS = {
    "signum": lambda: signax.signum(1e-3, axis_name="data"),
    "ef_sign_sgd": lambda: signax.ef_sign_sgd(0.05, 0.9, axis_name="data"),
    "ssdm": lambda: signax.ssdm(0.05, KEY, axis_name="data"),
    "MultiSteps": lambda: optax.MultiSteps(signax.lion(1e-3, axis_name="data"), 3),
    "partition": lambda: optax.partition(
        {
            "vote": signax.signum(1e-3, axis_name="data"),
            "mean": optax.chain(signax.average_updates("data"), optax.adam(1e-3)),
        },
        {"hidden": "vote", "out": "vote", "bias": "mean"},
    ),
}
_images, _labels = load_digits(return_X_y=True)
IMAGES, LABELS = (_images / 16).astype(np.float32), _labels.astype(np.int32)


def initial_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": 0.1 * jax.random.normal(first, (64, 48)),
        "out": 0.1 * jax.random.normal(second, (48, 10)),
        "bias": jnp.zeros(48),
    }


def loss_fn(params, batch):
    images, labels = batch
    hidden = jax.nn.relu(images @ params["hidden"] + params["bias"])
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], labels)
    return jnp.mean(losses)


def data_parallel(name, num_workers):
    return signax.DataParallel(OPTIMIZERS[name](), auto_mesh({"data": num_workers}))


def train(tx, params, state, first, last):
    step, losses = tx.train_step(loss_fn), []
    params, state = jax.tree.map(jnp.copy, (params, state))  # a step donates them
    for number in range(first, last):
        chosen = np.random.default_rng(number).integers(len(IMAGES), size=144)
        params, state, loss = step(params, state, (IMAGES[chosen], LABELS[chosen]))
        losses.append(float(loss))
    return params, state, losses


def save(folder, params, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", {"params": params, "state": state})


def restore(folder, tx, num_workers=None):
    whole = NamedSharding(tx.mesh, PartitionSpec())
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(initial_params),
    )
    state = tx.abstract_state(params, num_workers)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder / "checkpoint", {"params": params, "state": state})
    return found["params"], found["state"]


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, wanted = jax.random.key_data(leaf), jax.random.key_data(wanted)
        np.testing.assert_array_equal(leaf, wanted, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_equals_the_uninterrupted_run_bit_for_bit(name, tmp_path):
    tx = data_parallel(name, 8)
    params = initial_params()
    params, state, _ = train(tx, params, tx.init(params), 0, 5)
    save(tmp_path, params, state)
    expected = train(tx, params, state, 5, 10)

    tx = data_parallel(name, 8)
    found = restore(tmp_path, tx)
    assert_equal(found, (params, state))
    assert_equal(train(tx, *found, 5, 10)[:2], expected[:2])


def test_restoring_with_another_number_of_workers_needs_resize(tmp_path):
    tx, other = data_parallel("ef_sign_sgd", 8), data_parallel("ef_sign_sgd", 4)
    params = initial_params()
    state = tx.init(params)
    save(tmp_path, params, state)
    params, found = restore(tmp_path, other, 8)
    with pytest.raises(ValueError, match=r"rows for 8 workers, but there are 4.*resize"):
        other.train_step(loss_fn)(params, found, (IMAGES[:8], LABELS[:8]))
    assert_equal(other.resize(found, params), other.resize(state, params))


@pytest.mark.parametrize("name", ["signum", "ef_sign_sgd"])
@pytest.mark.parametrize("num_workers", [4, 16])
def test_training_continues_with_another_number_of_workers_without_a_jump_in_loss(
    name, num_workers, tmp_path
):
    tx = data_parallel(name, 8)
    params = initial_params()
    params, state, before = train(tx, params, tx.init(params), 0, 60)
    save(tmp_path, params, state)

    other = data_parallel(name, num_workers)
    params, state = restore(tmp_path, other, 8)
    _, _, after = train(other, params, other.resize(state, params), 60, 80)
    # Every step draws another batch, so means of ten losses vary by about a tenth.
    assert np.mean(after[:10]) < 1.1 * np.mean(before[-10:])
    assert np.mean(after[10:]) < np.mean(before[-10:])


@pytest.fixture(scope="module")
def old_checkpoints(tmp_path_factory):
    """The checkpoints of version 0.1.0."""
    folder = tmp_path_factory.mktemp("checkpoints")
    archive = pathlib.Path(__file__).parent / "checkpoint_0.1.0.zip"
    zipfile.ZipFile(archive).extractall(folder)
    like = {}
    for name in old_checkpoint.OPTIMIZERS:
        tx = old_checkpoint.data_parallel(name)
        whole = NamedSharding(tx.mesh, PartitionSpec())
        params = jax.device_put(old_checkpoint.initial_params(), whole)
        like[name] = {"params": params, "state": tx.abstract_state(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        return [checkpointer.restore(folder / name, like) for name in ("saved", "expected")]


@pytest.mark.parametrize("name", old_checkpoint.OPTIMIZERS)
def test_a_run_of_version_0_1_0_goes_on(name, old_checkpoints):
    saved, expected = (checkpoint[name] for checkpoint in old_checkpoints)
    tx = old_checkpoint.data_parallel(name)
    first, last = old_checkpoint.SAVED_AT, old_checkpoint.STOP
    params, state = old_checkpoint.advance(tx, saved["params"], saved["state"], first, last)
    found = {"params": params, "state": state}
    # Programs of other versions of XLA may round otherwise.
    chex.assert_trees_all_close(*map(numbers, (found, expected)), rtol=1e-5, atol=1e-6)


def numbers(tree):
    """A tree with the numbers in its keys."""

    def number(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(number, tree)
