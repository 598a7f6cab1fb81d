"""Compare MaxText's DiLoCo with and without a vote, on a tiny model and eight simulated devices.

Four slices have two devices each. Parameters are sharded over `fsdp` inside a slice. For each
number H of steps between two exchanges, the program prints the outer parameters' loss on all
slices' data for each seed, and the bytes that a device sends to other slices in one exchange, read
from the compiled step. Then it interrupts a run with a vote, resumes it from MaxText's checkpoint,
and checks that a run without an interruption has the same losses.

    python examples/integrations/maxtext_compare.py
    python examples/integrations/maxtext_compare.py --seeds 1 --periods 8 --outers mean vote
"""

# pyright: reportMissingImports=false

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

slices, devices_per_slice = 4, 2
outers = {
    "mean": "mean in f32",
    "vote": "vote",
    "worker": "scaled signs, a memory in each slice",
    "both": "scaled signs, two memories",
}
# Simulated devices share a few threads. In XLA's default order, all-reduces that wait for other
# devices can occupy every thread, and the program never ends.
xla_flags = f"""
--xla_force_host_platform_device_count={slices * devices_per_slice}
--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0
"""
tiny = f"""
hardware=cpu skip_jax_distributed_system=true dataset_type=synthetic attention=dot_product
dtype=float32 vocab_size=256 max_target_length=32 per_device_batch_size=1 base_emb_dim=64
base_num_query_heads=4 base_num_kv_heads=4 base_mlp_dim=128 base_num_decoder_layers=2 head_dim=16
learning_rate=3e-3 enable_diloco=true num_slices={slices} dcn_diloco_parallelism={slices}
async_checkpointing=false
"""


def run_maxtext(outer, args):
    """Run MaxText in this process, and print the bytes that its step sends between slices."""
    import jax
    import maxtext
    import numpy as np
    import optax
    from jax.experimental import mesh_utils
    from maxtext.trainers.pre_train import train

    import signax

    if outer != "mean":
        import maxtext_vote

        def make_outer(config):
            mean = signax.mean_scaled_signs("diloco", feedback=outer)
            lr, momentum = config.diloco_outer_lr, config.diloco_outer_momentum
            return optax.chain(mean, maxtext_vote.sgd(lr, momentum, nesterov=True))

        if outer != "vote":
            maxtext_vote.make_outer = make_outer

    def make_mesh(inside, between, devices, **_):
        return np.reshape(devices, np.multiply(inside, between))

    programs, compile_step = [], jax.stages.Lowered.compile

    def compile_and_keep(*args, **kwargs):
        programs.append(compile_step(*args, **kwargs))
        return programs[-1]

    mesh_utils.create_hybrid_device_mesh = make_mesh  # simulated devices do not know their slice
    jax.stages.Lowered.compile = compile_and_keep
    base = Path(maxtext.__path__[0], "configs", "base.yml")
    train.main([sys.argv[0], str(base), *tiny.split(), *args])
    found = signax.diagnostics.collectives(programs[0])
    between = [c for c in found if c.group_size > devices_per_slice]
    print("bytes between slices:", sum(c.bytes_sent * c.count for c in between))


def train(outer, folder, seed, period, *args):
    """Train in a process of its own; returns the slices' mean loss by step, and the bytes."""
    metrics = Path(folder, "metrics.json")
    metrics.unlink(missing_ok=True)
    args = [f"metrics_file={metrics}", f"base_output_directory={folder}", *args]
    args += [f"init_weights_seed={seed}", f"diloco_sync_period={period}"]
    args += [f"ici_fsdp_parallelism={devices_per_slice}"]
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "DECOUPLE_GCLOUD": "TRUE"}
    command = [sys.executable, __file__, "--child", outer, *args]
    environment = {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    losses = {}
    for line in metrics.read_text().splitlines():
        step = json.loads(line)
        own = [loss for name, loss in step.items() if "loss_island" in name]
        losses[int(step["step"])] = sum(own) / len(own)
    return losses, int(done.stdout.rsplit("bytes between slices:", 1)[1])


def compare(folder, args):
    """Print a row for each H and way to exchange; exit if a vote is worse than it should be."""
    print("| H | exchange of differences | loss of each seed | bytes |\n|---|---|---|---|")
    for period in args.periods:
        mean = None
        for outer in args.outers:
            more = f"steps={args.steps + 1}", "enable_checkpointing=false", "run_name=tiny"
            runs = [train(outer, folder, seed, period, *more) for seed in range(args.seeds)]
            final, sent = [losses[args.steps] for losses, _ in runs], runs[0][1]
            text = " ".join(f"{loss:.3f}" for loss in final)
            print(f"| {period} | {outers[outer]} | {text} | {sent:,} |", flush=True)
            if outer == "mean":
                mean = sum(final), sent
            elif outer == "vote" and mean and (sum(final) > 1.1 * mean[0] or 10 * sent > mean[1]):
                sys.exit("A vote should lose at most 10%, and send at most a tenth.")


def resume(folder):
    """Exit if a resumed run differs from a whole run. It is interrupted between two exchanges."""
    more = "enable_checkpointing=true", "checkpoint_period=10", "learning_rate_schedule_steps=32"
    whole, _ = train("vote", folder, 0, 4, *more, "run_name=whole", "steps=32")
    train("vote", folder, 0, 4, *more, "run_name=parts", "steps=18")
    resumed, _ = train("vote", folder, 0, 4, *more, "run_name=parts", "steps=32")
    if list(resumed) != [*range(18, 32)] or any(whole[i] != resumed[i] for i in resumed):
        sys.exit(f"The resumed run differs: {whole} and {resumed}.")
    print("A run resumed at step 18 has the same 14 losses as a run without an interruption.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=64, help="training steps (default 64)")
    parser.add_argument("--periods", type=int, nargs="*", default=[8, 1], help="H (default 8 1)")
    parser.add_argument("--outers", nargs="*", default=[*outers], choices=outers, help="exchanges")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(folder, args)
        resume(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_maxtext(sys.argv[2], sys.argv[3:])
    else:
        main()
