"""Train a small network by majority vote on a Ray cluster, with Ray Train's JaxTrainer.

On this machine, with two processes on CPUs:

    pip install 'ray[train]>=2.60'
    python examples/launch/ray_train.py --cpu

On a Ray cluster of four hosts, with one process for each host, from the repository's root:

    export RAY_API_SERVER_ADDRESS=http://head-node:8265
    ray job submit --working-dir . -- python examples/launch/ray_train.py --processes 4 --gpus 8

Ray starts the processes. In each of them JaxTrainer calls jax.distributed.initialize(), and then
`train`. There jax.devices() lists the devices of all processes, and every device is a worker of the
vote. `train` imports JAX, and this file does not: the submitting process needs no accelerator.

Change: `train`, and the resources in `main`. For TPUs, pass use_tpu=True with a topology and an
accelerator_type to ScalingConfig and JaxConfig(use_tpu=True). To continue after a failure, save
checkpoints as examples/multihost.py does, and pass ray.train.FailureConfig to RunConfig. The hosts
need JAX, signax and scikit-learn.

The data are scikit-learn's 1,797 handwritten digits of 8x8 pixels, part of its package.
"""

import argparse

import ray.train  # pyright: ignore[reportMissingImports]
from ray.train.v2.jax import JaxConfig, JaxTrainer  # pyright: ignore[reportMissingImports]


def train(config):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from sklearn.datasets import load_digits

    import signax

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    replicated = jax.NamedSharding(mesh, jax.P())
    split = jax.NamedSharding(mesh, jax.P("data"))
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)

    def init(key):
        first, second = jax.random.split(key)
        params = {
            "hidden": jax.random.normal(first, (64, 128)) / 8,
            "output": jax.random.normal(second, (128, 10)) / 12,
        }
        return params, tx.init(params)

    def loss_fn(params, batch):
        images, labels = batch
        logits = jax.nn.relu(images @ params["hidden"]) @ params["output"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    schedule = optax.cosine_decay_schedule(1e-3, config["steps"])
    tx = signax.DataParallel(signax.signum(schedule, axis_name="data"), mesh)
    key = jax.random.key(0)
    shardings = replicated, tx.state_shardings(jax.eval_shape(init, key)[0])
    params, state = jax.jit(init, out_shardings=shardings)(key)
    step = tx.train_step(loss_fn)
    loss = jnp.inf
    for number in range(config["steps"]):
        chosen = np.random.default_rng(number).integers(len(images), size=config["batch_size"])
        own = np.split(chosen, jax.process_count())[jax.process_index()]
        batch = images[own], labels[own]
        batch = tuple(jax.make_array_from_process_local_data(split, leaf) for leaf in batch)
        params, state, loss = step(params, state, batch)
        jax.block_until_ready(loss)  # simulated devices may not run many steps ahead
        if (number + 1) % 50 == 0:
            ray.train.report({"step": number + 1, "loss": float(loss)})  # in every process
    return {"loss": float(loss), "workers": jax.device_count()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="of the run (default 2)")
    add("--gpus", type=int, default=1, help="of each process (default 1)")
    add("--cpu", action="store_true", help="train on CPUs, one device for each process")
    add("--steps", type=int, default=400, help="(default 400)")
    add("--batch-size", type=int, default=128, help="images per step, all workers' (default 128)")
    args = parser.parse_args()

    resources = {"CPU": 1} if args.cpu else {"CPU": 1, "GPU": args.gpus}
    platform = "cpu" if args.cpu else "cuda"
    trainer = JaxTrainer(
        train,
        train_loop_config={"steps": args.steps, "batch_size": args.batch_size},
        # Without use_gpu Ray would not connect the processes. JAX_PLATFORMS chooses the devices.
        jax_config=JaxConfig(use_gpu=True),
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.processes, use_gpu=not args.cpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            worker_runtime_env={"env_vars": {"JAX_PLATFORMS": platform}}
        ),
    )
    found = trainer.fit().return_value  # of the first process
    print(f"{args.steps} steps, {found['workers']} workers: loss {found['loss']:.3f}")


if __name__ == "__main__":
    main()
