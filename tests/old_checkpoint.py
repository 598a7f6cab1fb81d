"""The runs behind `checkpoint_0.1.0.zip`: version 0.1.0 saved it after three steps and five."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from workers import auto_mesh

import signax

NUM_WORKERS, SAVED_AT, STOP = 4, 3, 5
AXIS = {"axis_name": "data"}
OPTIMIZERS = {
    "signum": lambda: signax.signum(0.1, weight_decay=0.1, agreement=True, **AXIS),
    "lion": lambda: signax.lion(0.1, zeros="abstain", **AXIS),
    "ef_sign_sgd": lambda: signax.ef_sign_sgd(0.1, 0.9, **AXIS),
    "ssdm": lambda: signax.ssdm(0.1, jax.random.key(3), **AXIS),
    "partition": lambda: optax.partition(
        {
            "vote": signax.signum(0.1, **AXIS),
            "mean": optax.chain(signax.average_updates("data"), optax.adam(0.1)),
        },
        {"weight": "vote", "bias": "mean"},
    ),
}


def data_parallel(name):
    return signax.DataParallel(OPTIMIZERS[name](), auto_mesh({"data": NUM_WORKERS}))


def initial_params():
    return {"weight": jnp.linspace(-1.0, 1.0, 35).reshape(5, 7), "bias": jnp.zeros(3)}


def advance(tx, params, state, first, last):
    """Take steps along gradients that depend on the step alone; a worker misses step 1."""
    update = jax.jit(tx.update)
    for step in range(first, last):
        rng = np.random.default_rng(step)
        rows = jax.tree.map(
            lambda leaf, rng=rng: jnp.asarray(
                rng.integers(-3, 4, (NUM_WORKERS, *leaf.shape)), jnp.float32
            ),
            params,
        )
        active = jnp.arange(NUM_WORKERS) != (2 if step == 1 else -1)
        updates, state = update(rows, state, params, active=active)
        params = optax.apply_updates(params, updates)
    return params, state
