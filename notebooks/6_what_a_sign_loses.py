# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a sign loses
#
# A vote on polar factors trains a transformer to a lower loss than AdamW does, and a vote on
# momenta to a higher loss. One might think that a polar factor's entries are alike in size, so that
# their signs lose nothing. They are not: they are spread like Gaussian numbers, and a sign with one
# scale keeps 62% of their energy, against 48% of a gradient's. What counts is the spectrum. A vote
# on gradients follows a few directions of a matrix, like the gradients themselves. A vote on polar
# factors follows more of them.
#
# ![A vote on polar factors agrees best with Muon's step](figures/6_what_a_sign_loses.png)
#
# The notebook trains a small GPT and looks at three values that eight workers could vote on: the
# gradient, its moving average (the momentum), and the polar factor of the momentum
# (`signax.orthogonalize`). It measures
#
# 1. the distribution of their entries, and the share of energy that a sign with one scale keeps;
# 2. how far workers agree;
# 3. the spectrum of the votes, and their angle to the step that Muon takes in full precision;
#
# and compares these with the losses of `benchmarks/language_model.py`.

# %%
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import signax
from signax import diagnostics

sys.path.insert(0, "../examples")
import train_language_model as language_model

plt.rcParams["figure.dpi"] = 80
WORKERS, DECAY, STEPS = 8, 0.8, 100
LOOKS = (10, 50, 100)  # the steps at which the notebook looks

# %% [markdown]
# `examples/train_language_model.py` defines the model, here with three layers of width 96. It is
# trained by AdamW on the mean of the workers' gradients: all three values then come from one run,
# and none of them decides where the run goes.

# %%
args = types.SimpleNamespace(
    **{**language_model.sizes["small"], "layers": 3, "width": 96}, dtype="float32", seed=0
)
text, _ = language_model.load_text()
graph, params = nnx.split(language_model.GPT(args, nnx.Rngs(0)))


def loss_fn(params, batch):
    logits = nnx.merge(graph, params)(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def load_batch(number, rows=32):
    starts = np.random.default_rng(number).integers(len(text) - args.context, size=rows)
    batch = language_model.windows(text, starts, args.context)
    return jnp.asarray(batch).reshape(WORKERS, rows // WORKERS, -1)


adamw = optax.adamw(optax.linear_schedule(0, 8e-3, 20), b1=0.8, b2=0.95)


@jax.jit
def step(params, state, momenta, batch):
    gradients = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
    momenta = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g, momenta, gradients)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    updates, state = adamw.update(mean, state, params)
    return optax.apply_updates(params, updates), state, momenta, gradients


# %% [markdown]
# Only the matrices of the blocks count here, the leaves that Muon orthogonalises.


# %%
def matrices(tree):
    """The leaves that Muon orthogonalises."""
    numbers = jax.tree.leaves(language_model.matrices(params), is_leaf=is_entry)
    return [
        leaf
        for leaf, entry in zip(jax.tree.leaves(tree), numbers, strict=True)
        if entry is not None
    ]


def is_entry(node):
    return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def polar(matrix):
    return signax.orthogonalize().update(matrix, optax.EmptyState())[0]


state, momenta = adamw.init(params), jax.tree.map(lambda p: jnp.zeros((WORKERS, *p.shape)), params)
seen = {}  # the values at each look: lists of rows [M, m, n]
for number in range(1, STEPS + 1):
    params, state, momenta, gradients = step(params, state, momenta, load_batch(number))
    if number in LOOKS:
        own = matrices(momenta)
        seen[number] = {
            "gradient": matrices(gradients),
            "momentum": own,
            "polar factor": [jax.vmap(polar)(rows) for rows in own],
        }
print(f"loss {loss_fn(params, load_batch(0).reshape(32, -1)):.2f} after {STEPS} steps")

# %% [markdown]
# ## 1. The entries
#
# A sign with one scale, the mean magnitude, keeps the share
# $\lVert x \rVert_1^2 / (d \lVert x \rVert_2^2)$ of the energy of $d$ entries
# (`diagnostics.density`). It is 1 for entries $\pm c$, and $2 / \pi = 0.637$ for Gaussian entries.

# %%
kept = {
    name: [
        np.mean([diagnostics.density(row) for rows in at[name] for row in rows])
        for at in seen.values()
    ]
    for name in seen[STEPS]
}
print(f"{'energy kept at step':20}", *(f"{number:7}" for number in LOOKS))
for name, shares in kept.items():
    print(f"{name:20}", *(f"{share:7.3f}" for share in shares))
print(f"{'Gaussian':20} {2 / math.pi:7.3f}")

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
edges = np.linspace(0, 6, 61)
for name, leaves in seen[STEPS].items():
    sizes = [jnp.abs(row) / jnp.sqrt(jnp.mean(row**2)) for rows in leaves for row in rows]
    sizes = np.concatenate([np.asarray(size).ravel() for size in sizes])
    axes.stairs(np.histogram(sizes, edges, density=True)[0], edges, label=name)
    print(f"{name}: {np.mean(sizes > 4):.2%} of the entries are above four times the rms")
axes.plot(
    edges, 2 * np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi), ":", color="gray", label="Gaussian"
)
axes.set(
    yscale="log", ylim=(1e-5, None), xlabel="magnitude over root mean square", ylabel="density"
)
axes.legend()
plt.show()
# %% [markdown]
# A polar factor's entries follow the Gaussian curve. Gradients and momenta have heavy tails, whose
# sizes a sign forgets.
#
# ## 2. Agreement
#
# The share of a worker's signs that agree with the signs of the other workers' sum is a half for
# pure noise.

# %%
agreement = {}
for name, leaves in seen[STEPS].items():
    equal = [jnp.sign(rows) == jnp.sign(jnp.sum(rows, axis=0) - rows) for rows in leaves]
    agreement[name] = float(np.mean(np.concatenate([np.asarray(each).ravel() for each in equal])))
    print(f"{name:14} {agreement[name]:.3f}")

# %% [markdown]
# After a hundred steps with such small batches the workers hardly agree on any of the three values.
# Agreement does not explain the losses.
#
# ## 3. The spectrum
#
# Muon's step in full precision is the polar factor of the mean momentum. The *alignment* of a vote
# is its cosine with this step. Its *stable rank*, $\lVert V \rVert_F^2 / \lVert V \rVert_2^2$,
# counts the directions that matter. The table divides it by the number of rows or columns,
# whichever is smaller; a polar factor has 1.


# %%
def stable_rank(matrix):
    return float(jnp.sum(matrix**2) / jnp.linalg.norm(matrix, 2) ** 2 / min(matrix.shape))


def cosine(one, other):
    return float(jnp.vdot(one, other) / jnp.linalg.norm(one) / jnp.linalg.norm(other))


def majority(rows):
    vote = jax.vmap(lambda own: signax.pvote(own, "workers", step=0), axis_name="workers")
    return vote(rows)[0]


rank, alignment = {}, {}
for number, at in seen.items():
    targets = [polar(jnp.mean(rows, axis=0)) for rows in at["momentum"]]
    for name, leaves in at.items():
        votes = [majority(rows) for rows in leaves]
        rank[name, number] = np.mean([stable_rank(vote) for vote in votes])
        pairs = zip(votes, targets, strict=True)
        alignment[name, number] = np.mean([cosine(*pair) for pair in pairs])
    behind = [polar(majority(rows)) for rows in at["momentum"]]
    pairs = zip(behind, targets, strict=True)
    rank["polar step behind", number] = np.mean([stable_rank(step) for step in behind])
    alignment["polar step behind", number] = np.mean([cosine(*pair) for pair in pairs])

print(f"{'':34} {'stable rank':>12} {'alignment':>10}")
for (name, number), share in rank.items():
    print(f"{name:24} step {number:4} {share:12.3f} {alignment[name, number]:10.3f}")

# %% tags=["lead"]
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
names = {
    "gradient": "vote on gradients",
    "momentum": "vote on momenta",
    "polar step behind": "vote on momenta, then a polar step",
    "polar factor": "vote on polar factors",
}
for name, label in names.items():
    axes.plot(LOOKS, [alignment[name, number] for number in LOOKS], "o-", label=label)
axes.set(xlabel="step", ylabel="cosine with Muon's step", ylim=(0, None))
figure.legend(loc="outside upper center", ncols=2)
plt.show()
# %% [markdown]
# ## 4. The losses
#
# The benchmark trained the model of a million parameters for 300 steps, each method tuned alike:

# %%
with open("../benchmarks/results/language_model.json") as file:
    tuned = json.load(file)["results"]["tuned"]
losses = {
    "AdamW on the mean": "adamw",
    "vote on momenta (signum)": "signum",
    "vote on momenta (Lion)": "lion",
    "Muon on the mean": "muon-mean",
    "vote on polar factors": "muon",
}
for label, method in losses.items():
    print(f"{label:26} {tuned[method]['validation_loss']:.3f}")

# %%
last = {name: alignment[name, STEPS] for name in names}
assert max(last, key=lambda name: last[name]) == "polar factor"
assert last["gradient"] < last["momentum"] < last["polar factor"]
assert abs(kept["polar factor"][-1] - 2 / math.pi) < 0.05
assert kept["gradient"][-1] < 0.55
assert rank["gradient", STEPS] < rank["polar factor", STEPS]
assert tuned["muon"]["validation_loss"] < tuned["adamw"]["validation_loss"]
assert tuned["lion"]["validation_loss"] > tuned["adamw"]["validation_loss"]

# %% [markdown]
# The losses of votes are in the order of their alignments, and an alignment of 0.43 is enough to
# come close to Muon. A vote on gradients or momenta moves a matrix along the few directions in
# which gradients are large. A vote on polar factors also follows the other directions, since each
# worker raises them before it rounds anything to a bit. A polar step *after* a vote on momenta
# comes too late. It makes the spectrum flat, but the signs have already lost the small directions,
# so the step hardly aligns with Muon's.
