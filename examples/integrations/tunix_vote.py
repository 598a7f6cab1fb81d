"""Train a tiny Llama 3 with Tunix's `PeftTrainer` and a vote.

Parameters are sharded over `fsdp`, by the names that the model gives them.

    python examples/integrations/tunix_vote.py
"""

# pyright: reportMissingImports=false

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from report import report
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import signax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
steps = 60
mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2, 1)), ("data", "fsdp", "tp"))
tiny = ModelConfig(
    num_layers=2,
    vocab_size=256,
    embed_dim=64,
    hidden_dim=128,
    num_heads=4,
    head_dim=16,
    num_kv_heads=4,
    rope_theta=10_000,
    norm_eps=1e-5,
)


@nnx.jit
def make_model():
    model = Llama3(tiny, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def make_input(batch):
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


class VotingTrainer(PeftTrainer):
    """A trainer whose step keeps a gradient for each worker."""

    def create_train_step_fn(self):
        def train_step(model, optimizer, batch):
            graph, params, rest = nnx.split(model, nnx.Param, ...)

            def loss_fn(params, batch, rest):
                model = nnx.merge(graph, params, rest)
                return self.loss_fn(model, **self.gen_model_input_fn(batch))

            loss, grads = tx.value_and_grad(loss_fn)(params, batch, rest)
            optimizer.update(model, grads)
            return loss, None, optax.global_norm(grads) / tx.num_workers**0.5

        return train_step

    def _shard_optimizer(self, mesh):
        """Leave the state where `DataParallel.init` has placed it."""


starts = np.random.default_rng(0).integers(256, size=(16, 1))
tokens = (starts + 7 * np.arange(32)) % 256
batch = TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))
batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
config = TrainingConfig(eval_every_n_steps=steps, max_steps=steps, data_sharding_axis=("data",))
schedule = optax.cosine_decay_schedule(3e-3, steps)
with mesh:
    model = make_model()
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, nnx.state(model, nnx.Param))
    vote = signax.lion(schedule, axis_name="data")
    tx = signax.DataParallel(vote, mesh, param_specs=specs)
    trainer = VotingTrainer(model, tx, config).with_gen_model_input_fn(make_input)
    trainer.train([batch] * steps)
    trainer.clear_jit_cache()  # the functions that `train` has cached cannot be lowered
    step, evaluate = trainer.jit_train_and_eval_step()
    compiled = step.func.lower(*step.args, batch).compile()
    report(evaluate(batch)[0], compiled, mesh, "data")
