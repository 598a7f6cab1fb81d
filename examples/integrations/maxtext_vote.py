"""Train with MaxText's DiLoCo: slices vote with one bit per parameter, in each direction.

It takes the command line of `python -m maxtext.trainers.pre_train.train`, and replaces four names
of MaxText 0.2.5. Each device votes on the shards that it holds, and nothing is gathered. MaxText
checkpoints the state of the vote with its own.

    python examples/integrations/maxtext_vote.py base.yml enable_diloco=true ...
"""

# pyright: reportMissingImports=false

import sys

import drjax
import jax
import optax
from flax import nnx
from maxtext.trainers.diloco.utils import spmd_diloco_sync
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils, train_utils

import signax

get_abstract_state, jit_train_step = maxtext_utils.get_abstract_state, train_utils.jit_train_step
sgd = optax.sgd


def make_outer(config):
    """The outer optimiser. A vote has no scale: it gets half the length of H inner steps."""
    step = config.learning_rate * config.diloco_sync_period / 2
    outer = sgd(config.diloco_outer_lr, config.diloco_outer_momentum, nesterov=True)
    return optax.chain(signax.majority_vote("diloco"), optax.scale(step), outer)


def find_params(config, mesh, *args):
    found = get_abstract_state(config, mesh, *args)
    shardings = nnx.split(found[2].model, nnx.Param, ...)[1].to_pure_dict()
    specs = jax.tree.map(lambda s: jax.P() if s.is_fully_replicated else s.spec, shardings)
    tx = signax.DataParallel(make_outer(config), mesh, "diloco", param_specs=specs)
    optax.sgd = lambda *_, **__: tx
    return found


def pin_state(config, model, state, shardings, *args, **kwargs):
    own = jax.tree.map(lambda leaf: leaf.sharding, state.outer_opt_state)
    shardings = shardings.replace(outer_opt_state=own)
    return jit_train_step(config, model, state, shardings, *args, **kwargs)


class Rows:
    """`drjax`, but its mean leaves the slices' rows for the transformation."""

    __getattr__ = staticmethod(lambda name: getattr(drjax, name))
    reduce_mean = staticmethod(lambda rows: rows)


maxtext_utils.get_abstract_state, train_utils.jit_train_step = find_params, pin_state
spmd_diloco_sync.drjax = Rows()

if __name__ == "__main__":
    train.main(sys.argv)
