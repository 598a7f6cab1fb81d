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
# # Error feedback
#
# Karimireddy et al. claim that signs lose accuracy, more with smaller batches, and that error
# feedback, which adds the part that compression left out to the next update, prevents this. Scaled
# signs do end 0.3, 1.7 and 2.3 points behind SGD with momentum at batches of 128, 32 and 8, and
# error feedback is level with SGD or ahead, but signs with momentum do not fall behind, as they do
# in the paper.
#
# ![Held-out accuracy of four methods at batches of 128, 32 and 8](figures/5_error_feedback.png)
#
# The notebook runs the claims of Karimireddy et al., *Error Feedback Fixes SignSGD and other
# Gradient Compression Schemes*, 2019 ([arXiv 1901.09847](https://arxiv.org/abs/1901.09847)), and of
# Zheng, Huang and Kwok, *Communication-Efficient Distributed Blockwise Momentum SGD with
# Error-Feedback*, 2019 ([arXiv 1905.10936](https://arxiv.org/abs/1905.10936)), one by one:
#
# 1. On three convex problems signSGD does not converge, and with error feedback it does. *This
#    holds.*
# 2. Where there are more parameters than data, signs find a solution that generalises worse, and
#    error feedback does not. *This holds.*
# 3. The memory stays bounded, for every compressor that keeps a share $\delta$ of its input. *This
#    holds.*
# 4. The smaller the batch, the more error feedback matters. *This holds, but the sign with momentum
#    does not fall behind, as it does in the paper.*
# 5. Top-k and random-k are such compressors too. *Top-k keeps up with SGD. Random-k does not.*
# 6. Error feedback works over workers in both directions, at one bit each way. *This holds.*
#
# The compressor takes $p_t = g_t + e_t$. Its output $C(p_t)$ moves the parameters, and the rest,
# $e_{t+1} = p_t - C(p_t)$, waits for the next step. In the paper $e$ includes the step size
# $\gamma$. signax keeps $\gamma$ out, so here $e$ is in units of the gradient.

# %%
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from digits import Network, load_data, warmup_cosine
from flax import nnx
from jax import lax
from jax.sharding import AxisType

import signax
from signax import diagnostics

jax.config.update("jax_num_cpu_devices", 8)
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
COLOURS = {
    "SGD": "black",
    "sign": "tab:red",
    "scaled sign": "tab:orange",
    "error feedback": "tab:blue",
    "error feedback, sign": "tab:cyan",
}
DIRECTIONS = {
    "SGD": optax.identity(),
    "sign": signax.scale_by_sign(),
    "scaled sign": signax.scale_by_scaled_sign(),
    "error feedback": signax.error_feedback(signax.scale_by_scaled_sign()),
}
measured = []  # the lines of the table at the end


def claim(text, result):
    measured.append((text, result))


def draw_band(axis, values, label, every=1):
    """The median over the first axis of values, and all of them as a band."""
    x = np.arange(1, values.shape[1] + 1)[::every]
    low, middle, high = np.quantile(values, (0, 0.5, 1), axis=0)[:, ::every]
    axis.plot(x, middle, label=label, color=COLOURS[label])
    axis.fill_between(x, low, high, color=COLOURS[label], alpha=0.2, linewidth=0)


# %% [markdown]
# ## 1. Three problems on which signs fail
#
# All three problems are convex. The step sizes are $0.05 / \sqrt t$ unless the text says otherwise.
# `vmap` repeats each run with other random numbers. Bands are the whole range over the repeats, and
# lines are the median.


# %%
@partial(jax.jit, static_argnames=("direction", "gradient", "project"))
def descend(direction, gradient, start, rates, keys, project=lambda x: x):
    """x_1, x_2, ... for every row of `rates` and key: f32[repeats, steps, dimensions]."""

    def run(rates, key):
        def step(carry, rate_and_key):
            x, state = carry
            rate, key = rate_and_key
            update, state = direction.update(gradient(x, key), state)
            x = project(x - rate * update)
            return (x, state), x

        keys = jax.random.split(key, len(rates))
        return lax.scan(step, (start, direction.init(start)), (rates, keys))[1]

    return jax.vmap(run)(rates, keys)


STEPS, REPEATS = 4000, 40
keys = jax.random.split(jax.random.key(0), REPEATS)


def shrinking(steps):
    return jnp.broadcast_to(0.05 / jnp.sqrt(jnp.arange(1, steps + 1)), (REPEATS, steps))


# %% [markdown]
# **First.** $\min_{-1 \le x \le 1} x / 4$, with a stochastic gradient that is 4 with probability
# 1/4 and -1 otherwise. The mean of the gradient is 1/4, and the mean of its sign is -1/2: signSGD
# walks to the wrong end. In one dimension the scaled sign is the gradient itself, and error
# feedback on it is SGD. So the notebook gives the unscaled sign a memory as well. On average its
# errors stay bounded, since the mean gradient is below 1, and nothing more is needed. There are
# 9000 steps. The text below says why.


# %%
def rare_and_large(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.25), 4.0, -1.0) * jnp.ones_like(x)


def into_interval(x):
    return jnp.clip(x, -1, 1)


one_bit = {"error feedback, sign": signax.error_feedback(signax.scale_by_sign())}
first = {
    name: descend(direction, rare_and_large, jnp.zeros(1), shrinking(9000), keys, into_interval)
    for name, direction in (DIRECTIONS | one_bit).items()
}
first = {name: path[..., 0] for name, path in first.items()}
ends = {name: np.asarray(path[:, -1]) for name, path in first.items()}
for name, end in ends.items():
    print(f"{name:22} ends between {end.min():+.3f} and {end.max():+.3f}; the minimum is at -1")

# %%
assert np.all(ends["sign"] > 0.9)
assert np.all(ends["error feedback"] < -0.9)
assert np.all(ends["error feedback, sign"] < -0.9)
np.testing.assert_array_equal(first["error feedback"], first["SGD"])
claim(
    "min x/4: signs drift to +1, with error feedback to -1",
    f"medians {np.median(ends['sign']):+.2f} and {np.median(ends['error feedback, sign']):+.2f}",
)

# %% [markdown]
# The drift towards the minimum adds up to $\frac14 \sum_t \gamma_t = 2.4$, and the noise, of
# variance 4.7, to a standard deviation of $(4.7 \sum_t \gamma_t^2)^{1/2} = 0.3$. So all of 40
# repeats come to the wall at a distance of 1. There, with $\gamma = 0.05 / \sqrt{9000}$ at the end,
# the distance from the wall is distributed about exponentially with mean
# $4.7 \gamma / (2 \cdot 1/4) = 0.005$. The tolerance is twenty times this mean.
#
# **Second.** $f(x) = \epsilon |x_1 + x_2| + |x_1 - x_2|$ from $(1, 1)$, $0 < \epsilon < 1$, with
# subgradients of $\pm 1$ at the kinks, as `jax.grad` has them. Every subgradient has signs
# $\pm(1, -1)$. So signs stay on $x_1 + x_2 = 2$, where $f \ge 2 \epsilon$, *for all step sizes*.
# Here the step sizes are random in $[0, 1]$, and differ in every repeat. They are multiples of
# 1/1024, so there is no rounding and the assertion is exact.


# %%
EPSILON = 0.5


def kinked(x):
    return EPSILON * jnp.abs(x[0] + x[1]) + jnp.abs(x[0] - x[1])


def kinked_gradient(x, key):
    del key
    return jax.grad(kinked)(x)


corner = jnp.ones(2)
any_rates = jax.random.randint(jax.random.key(1), (REPEATS, 1000), 0, 1025) / 1024
for name in ("sign", "scaled sign"):
    path = descend(DIRECTIONS[name], kinked_gradient, corner, any_rates, keys)
    assert np.ptp(path[..., 0]) > 1  # it does move
    np.testing.assert_array_equal(path.sum(axis=-1), 2)
second = {
    name: jax.vmap(jax.vmap(kinked))(
        descend(direction, kinked_gradient, corner, shrinking(STEPS)[:1], keys[:1])
    )
    for name, direction in DIRECTIONS.items()
}
for name, value in second.items():
    print(f"{name:16} f = {value[0, -1]:.4f}")
assert np.min(second["sign"]) >= 2 * EPSILON * (1 - 1e-4)
assert np.min(second["scaled sign"]) >= 2 * EPSILON * (1 - 1e-4)
assert second["error feedback"][0, -1] < 0.01
claim(
    "eps|x1+x2| + |x1-x2|: signs stay on x1+x2=2 for any step sizes",
    f"40 random sequences: exactly; f after {STEPS} steps: sign {second['sign'][0, -1]:.2f}, "
    f"error feedback {second['error feedback'][0, -1]:.1e}",
)

# %% [markdown]
# Error feedback gets as near to the minimum 0 as its last steps are long, like SGD: $f$ changes in
# a step by no more than $\gamma (1 + \epsilon) \lVert p \rVert_1$. This is 0.005 with
# $\lVert p \rVert_1 = 4$, twice the norm of a gradient. With the shrinking step sizes, sums are
# rounded. The tolerance of $10^{-4}$ is for this.
#
# **Third**, a smooth problem: $f(x) = \langle a_1, x \rangle^2 + \langle a_2, x \rangle^2$ with
# $a_{1,2} = \pm(1, -1) + \epsilon (1, 1)$, from $(1, 1)$. Each step takes one of the two terms at
# random. The gradients of both terms have signs $\pm(1, -1)$, and $f \ge 8 \epsilon^2 = 2$ on the
# line $x_1 + x_2 = 2$.

# %%
TERMS = jnp.array([[1.0, -1.0], [-1.0, 1.0]]) + EPSILON


def least_squares(x):
    return jnp.sum((TERMS @ x) ** 2)


def one_term(x, key):
    term = jax.random.choice(key, TERMS)
    return 2 * jnp.dot(term, x) * term


third = {
    name: jax.vmap(jax.vmap(least_squares))(
        descend(direction, one_term, corner, shrinking(STEPS), keys)
    )
    for name, direction in DIRECTIONS.items()
}
for name, value in third.items():
    low, middle, high = np.quantile(value[:, -1], (0, 0.5, 1))
    print(f"{name:16} f = {middle:.1e} ({low:.1e} to {high:.1e})")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
for name in ("SGD", "sign", "error feedback, sign"):
    draw_band(axes[0], np.asarray(first[name]), name, every=20)
for name in DIRECTIONS:
    draw_band(axes[1], np.asarray(second[name]), name, every=20)
    draw_band(axes[2], np.asarray(third[name]), name, every=20)
axes[0].set(title="rare large gradients", ylabel="x", xlabel="step")
axes[1].set(title="kinks", ylabel="f(x)", xlabel="step", yscale="log")
axes[2].set(title="two squares", ylabel="f(x)", xlabel="step", yscale="log")
for axis in axes:
    axis.legend(fontsize=8)
figure.tight_layout()

# %%
assert np.min(third["sign"]) >= 8 * EPSILON**2 * (1 - 1e-4)
assert np.min(third["scaled sign"]) >= 8 * EPSILON**2 * (1 - 1e-4)
assert np.max(third["error feedback"][:, -1]) < 1e-3
claim(
    "<a1,x>^2 + <a2,x>^2: signs stay at f >= 2, error feedback does not",
    f"f after {STEPS} steps, median of {REPEATS}: "
    + ", ".join(f"{name} {np.median(value[:, -1]):.1e}" for name, value in third.items()),
)

# %% [markdown]
# The tolerance of $10^{-4}$ is for rounding: 4000 steps in f32. With error feedback (and SGD) $f$
# is less than a thousandth of the value that signs reach, and still falling.
#
# ## 2. More parameters than data
#
# 200 points have labels $y = \pm 1$ at equal odds, and 1200 dimensions. The first coordinate is
# $y$, and the next two are 1. Every point also has coordinates of its own that are 1: one if
# $y = 1$, and five if $y = -1$. Half of the points train, by full gradients of
# $\frac{1}{2}\,\mathrm{mean}(\langle a, x \rangle - y)^2$ from 0. The other half is held out. All
# methods fit the training data. But SGD stays in the span of the data, and of all solutions finds
# the shortest. Signs leave the span. With error feedback
#
# $$ x_t - \gamma\, e_t = x_0 - \gamma \sum_{s < t} g_s, \qquad\text{so that}\qquad
#    \mathrm{dist}(x_t, \mathrm{span}) \le \gamma\, \lVert e_t \rVert . $$
#
# The data are random, so the notebook repeats everything with 20 draws of them. Step sizes are 0.5
# for SGD and 10 for the other methods, whose updates are shorter by the square root of their
# density.

# %%
POINTS, DIMENSIONS, DRAWS, FIT_STEPS = 200, 1200, 20, 400


def draw_points(key):
    labels = jax.random.rademacher(key, (POINTS,), jnp.float32)
    own = 3 + 5 * jnp.arange(POINTS)[:, None]
    width = jnp.where(labels > 0, 1, 5)[:, None]
    coordinate = jnp.arange(DIMENSIONS)
    points = jnp.where((coordinate >= own) & (coordinate < own + width), 1.0, 0.0)
    return points.at[:, 0].set(labels).at[:, 1:3].set(1.0), labels


def mean_square(x, points, labels):
    return jnp.mean((points @ x - labels) ** 2)


@partial(jax.jit, static_argnames="tx")
def fit(tx, key):
    """Losses on both halves, the distance from the span of the data, and the last state."""
    points, labels = draw_points(key)
    train, held_out = (points[:100], labels[:100]), (points[100:], labels[100:])
    span, _ = jnp.linalg.qr(train[0].T)

    def step(carry, _):
        x, state = carry
        gradient = jax.grad(mean_square)(x, *train) / 2
        updates, state = tx.update(gradient, state, x)
        x = x + updates
        distance = jnp.linalg.norm(x - span @ (span.T @ x))
        memory = optax.tree.get(state, "error", jnp.zeros(DIMENSIONS))
        result = mean_square(x, *train), mean_square(x, *held_out), distance
        return (x, state), (*result, jnp.linalg.norm(memory))

    x = jnp.zeros(DIMENSIONS)
    return lax.scan(step, (x, tx.init(x)), length=FIT_STEPS)[1]


FIT_RATE = 10.0
fits = {}
for name, rate in {"SGD": 0.5, "scaled sign": FIT_RATE, "error feedback": FIT_RATE}.items():
    tx = optax.chain(DIRECTIONS[name], optax.scale_by_learning_rate(rate))
    fits[name] = jax.vmap(partial(fit, tx))(jax.random.split(jax.random.key(2), DRAWS))
    fits[name] = [np.asarray(values, np.float64) for values in fits[name]]

for name, (train_loss, test_loss, distance, _) in fits.items():
    print(f"{name}: training loss at most {train_loss[:, -1].max():.0e}")
    for steps in (80, FIT_STEPS):
        loss, far = test_loss[:, steps - 1], distance[:, steps - 1]
        print(
            f"  {steps:3} steps: test loss {loss.mean():.4f} +- {loss.std(ddof=1):.4f}, "
            f"distance from the span {far.mean():.1e} +- {far.std(ddof=1):.0e}"
        )

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for name, (_, test_loss, distance, _) in fits.items():
    draw_band(axes[0], test_loss, name)
    draw_band(axes[1], distance, name)
axes[0].set(xlabel="step", ylabel="mean square on held-out points", yscale="log")
axes[1].set(xlabel="step", ylabel="distance from the span", yscale="log")
axes[0].legend()
figure.tight_layout()

# %%
final = {name: values[1][:, -1] for name, values in fits.items()}
for train_loss, *_ in fits.values():
    assert np.all(train_loss[:, -1] < 1e-8)
assert np.all(final["scaled sign"] > 100 * final["SGD"])
np.testing.assert_allclose(final["error feedback"], final["SGD"], rtol=0.01)
_, _, distance, memory = fits["error feedback"]
assert np.all(distance <= 1.001 * FIT_RATE * memory + 1e-4)
claim(
    "over-parametrised least squares: signs generalise worse, error feedback does not",
    f"test loss over {DRAWS} draws: "
    + ", ".join(f"{name} {x.mean():.4f}+-{x.std(ddof=1):.4f}" for name, x in final.items()),
)
claim(
    "dist(x, span of the data) <= gamma ||e||",
    f"at all {FIT_STEPS} steps of {DRAWS} draws; at the end {distance[:, -1].max():.0e}, "
    f"scaled sign {fits['scaled sign'][2][:, -1].mean():.1f}",
)

# %% [markdown]
# Training losses of $10^{-8}$ and less are fits as good as f32 has them. The scaled sign's test
# loss is about 600 times SGD's. The assertion asks for a factor of a hundred in every draw. In the
# bound on the distance $10^{-4}$ is for rounding in f32. This rounding comes to $10^{-6}$ for SGD,
# which is in the span, but to more where steps were as long as the early ones of rate 10. The
# factor of 1.001 is for the rounding of the norms. At the end the memory is empty, the iterates are
# back in the span, and the losses of SGD and of error feedback agree within 1% in every draw.
#
# ## 3. The memory stays bounded
#
# A compressor keeps a share $\delta$ if
# $\lVert C(p) - p \rVert^2 \le (1 - \delta) \lVert p \rVert^2$. For the scaled sign, $\delta$ is
# at least the density $\phi(p) = \lVert p \rVert_1^2 / (d \lVert p \rVert_2^2)$. For top-k and (on
# average) random-k it is $k / d$. The paper's lemma says: with
# $\mathrm{E} \lVert g_t \rVert^2 \le \sigma^2$
#
# $$ \mathrm{E} \lVert e_t \rVert^2 \le \frac{4 (1 - \delta)}{\delta^2} \sigma^2 , $$
#
# times $\gamma^2$ if the memory includes the step size. (The lemma follows from
# $\lVert e_{t+1} \rVert^2 \le (1 - \delta) \lVert e_t + g_t \rVert^2$, with $\delta / 2$ of the
# contraction spent on $\lVert e_t \rVert^2$ and the rest on $\lVert g_t \rVert^2$.) Here the digits
# network trains on batches of 32, with five seeds. $\delta$ is $k / d$, or the smallest density
# that any layer of any seed met. $\sigma^2$ is the largest mean over seeds of
# $\lVert g_t \rVert^2$.

# %%
images, held_out, labels, held_out_labels = map(jnp.asarray, load_data())
graph = nnx.graphdef(Network(nnx.Rngs(0)))
SEEDS = 11
starts = [nnx.state(Network(nnx.Rngs(seed))) for seed in range(SEEDS)]
starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
FRACTION = 0.05
COMPRESSORS = {
    "scaled sign": signax.scale_by_scaled_sign(),
    "top-k, 5%": signax.scale_by_top_k(FRACTION),
    "random-k, 5%": signax.scale_by_random_k(FRACTION, jax.random.key(3)),
}


def loss_fn(params, images, labels):
    logits = nnx.merge(graph, params)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradient_of_batch(params, key, size):
    chosen = jax.random.randint(key, (size,), 0, len(images))
    return jax.grad(loss_fn)(params, images[chosen], labels[chosen])


@partial(jax.jit, static_argnames=("compressor", "steps"))
def follow_memory(compressor, params, key, steps=200, rate=0.1):
    """Squared norms of gradient and memory, and the smallest density of a layer of p, per step."""
    feedback = signax.error_feedback(compressor)

    def step(carry, key):
        params, state = carry
        gradient = gradient_of_batch(params, key, 32)
        p = optax.tree.add(gradient, optax.tree.get(state, "error"))
        density = jnp.min(jnp.stack(jax.tree.leaves(diagnostics.density(p))))
        updates, state = feedback.update(gradient, state)
        memory = optax.tree.get(state, "error")
        params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
        square = partial(optax.tree.norm, squared=True)
        return (params, state), (square(gradient), square(memory), density)

    return lax.scan(step, (params, feedback.init(params)), jax.random.split(key, steps))[1]


figure, axis = plt.subplots(figsize=(6.5, 3.8))
five = jax.tree.map(lambda leaves: leaves[:5], starts)
five_keys = jax.random.split(jax.random.key(4), 5)
for name, compressor in COMPRESSORS.items():
    follow = jax.vmap(partial(follow_memory, compressor))
    gradients, memories, densities = follow(five, five_keys)
    delta = np.min(densities) if name == "scaled sign" else FRACTION
    sigma_squared = np.max(np.mean(gradients, axis=0))
    bound = 4 * (1 - delta) / delta**2 * sigma_squared
    memory = np.mean(memories, axis=0)
    assert np.all(memory <= bound)
    print(f"{name:12} delta {delta:.3f}, at most {memory.max() / bound:.1%} of the bound")
    claim(
        f"E||e||^2 <= 4 (1 - delta) sigma^2 / delta^2, {name}",
        f"delta {delta:.3f}, at most {memory.max() / bound:.1%} of it",
    )
    (line,) = axis.plot(memory / sigma_squared, label=name)
    low, high = (extreme(memories, axis=0) / sigma_squared for extreme in (np.min, np.max))
    axis.fill_between(range(len(memory)), low, high, color=line.get_color(), alpha=0.2)
    axis.axhline(bound / sigma_squared, color=line.get_color(), linestyle="--")
axis.set(
    xlabel="step",
    ylabel="$||e_t||^2 / \\sigma^2$, mean and range of seeds (dashed: bound)",
    yscale="log",
)
axis.legend()
figure.tight_layout()

# %% [markdown]
# The bound is for the worst gradients, and the worst gradients never change. Then random-k has
#
# $$ \mathrm{E} \lVert e \rVert^2 = \lVert g \rVert^2 \sum_n n^2 \delta (1 - \delta)^n =
#    (1 - \delta)(2 - \delta) \lVert g \rVert^2 / \delta^2 , $$
#
# since a coordinate that has waited for $n$ steps holds $n$ times its gradient. This is nearly half
# of the bound. So the bound cannot be improved by more than a factor of 2 or so.

# %%
constant = jnp.ones(1000)


def memory_of_constant_gradient(key):
    feedback = signax.error_feedback(signax.scale_by_random_k(FRACTION, key))
    state = feedback.init(constant)
    state, _ = lax.scan(lambda s, _: (feedback.update(constant, s)[1], None), state, length=400)
    return jnp.mean(optax.tree.get(state, "error") ** 2)  # of ||g||^2


square = np.asarray(jax.jit(jax.vmap(memory_of_constant_gradient))(jax.random.split(keys[0], 40)))
expected = (1 - FRACTION) * (2 - FRACTION) / FRACTION**2
share = square.mean() / (4 * (1 - FRACTION) / FRACTION**2)
print(
    f"E||e||^2 / ||g||^2 = {square.mean():.0f}, expected {expected:.0f}, {share:.0%} of the bound"
)
np.testing.assert_allclose(square.mean(), expected, rtol=0.05)
claim("the bound is tight but for a factor of about 2", f"random-k reaches {share:.0%} of it")

# %% [markdown]
# The assertion allows 5%: $n^2$ of the 40,000 coordinates has a standard deviation of 2.2 times its
# mean, so the mean of the coordinates has a standard deviation of 1.1%. After 400 steps the
# distribution of waiting times is geometric up to $(1 - \delta)^{400} = 10^{-9}$.
#
# ## 4. The smaller the batch, the more feedback matters
#
# The paper trains ResNet-18 on CIFAR-100 for 200 epochs. The table shows by how many points of
# accuracy the other methods end behind SGD with momentum:
#
# | batch | scaled sign | sign with momentum | error feedback |
# |---|---|---|---|
# | 128 | 2.21 | 3.15 | 0.92 |
# | 8 | 36.35 | 6.6 | 0.64 |
#
# Here the digits network trains for 12 epochs at every batch size, with a warm-up and a cosine. As
# in the paper, SGD and the sign with momentum (Signum) have a momentum of 0.9, and the other two
# methods have none. For each method and batch size, one seed selects the step size: of ten, the one
# with the lowest held-out loss. Ten other seeds are then trained with it. One compiled program
# makes all ten runs, of the step sizes or of the seeds.


# %%
def trainer(method, batch_size, steps, num_workers=1):
    """A compiled function of peak rates and seeds that gives accuracies (%) and held-out losses."""
    shape = warmup_cosine(1.0, steps)
    over_workers = partial(jax.vmap, axis_name="workers", axis_size=num_workers)

    def train(rate, seed):
        tx = method(lambda count: rate * shape(count))
        start = jax.tree.map(lambda leaves: leaves[seed], starts)

        def step(carry, key):
            params, states = carry

            def update(state, key):
                return tx.update(gradient_of_batch(params, key, batch_size), state, params)

            updates, states = over_workers(update)(states, jax.random.split(key, num_workers))
            mean = jax.tree.map(lambda rows: rows[0], updates)  # the same for every worker
            return (optax.apply_updates(params, mean), states), None

        states = over_workers(lambda _: tx.init(start))(jnp.arange(num_workers))
        keys = jax.random.split(jax.random.key(seed), steps)
        (params, _), _ = lax.scan(step, (start, states), keys)
        right = nnx.merge(graph, params)(held_out).argmax(axis=-1) == held_out_labels
        return 100 * right.mean(), loss_fn(params, held_out, held_out_labels)

    return jax.jit(jax.vmap(train))


def tune(method, rates, *args):
    """Accuracies of as many seeds as there are rates, with the rate best for another seed."""
    train, runs = trainer(method, *args), len(rates)
    _, losses = train(jnp.asarray(rates), jnp.full(runs, SEEDS - 1, jnp.int32))
    best = within(rates, np.nanargmin(losses))
    accuracy, _ = train(jnp.full(runs, best), jnp.arange(runs))
    return np.asarray(accuracy, np.float64), best


def within(rates, place):
    """That rate, which has to have both its neighbours: the best may lie beyond an end."""
    assert 0 < place < len(rates) - 1
    return rates[place]


def two_at_a_time(function, items):
    """`map`, in which one item compiles while another runs."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def show(name, accuracy, best):
    error = accuracy.std(ddof=1) / np.sqrt(len(accuracy))
    print(f"{name:30} {accuracy.mean():.2f} +- {error:.2f} %   peak rate {best:.4f}")


def scaled_sign(rate):
    return optax.chain(signax.scale_by_scaled_sign(), optax.scale_by_learning_rate(rate))


METHODS = {
    "SGD": partial(optax.sgd, momentum=0.9),
    "scaled sign": scaled_sign,
    "sign": signax.signum,
    "error feedback": signax.ef_sign_sgd,
}
EPOCHS, RATES, BATCHES = 12, 10.0 ** np.arange(1, -4, -0.5), (128, 32, 8)


def tune_cell(cell):
    batch_size, name = cell
    return tune(METHODS[name], RATES, batch_size, EPOCHS * len(images) // batch_size)


table, cells = {}, list(product(BATCHES, METHODS))
for (batch_size, name), (accuracy, best) in zip(
    cells, two_at_a_time(tune_cell, cells), strict=True
):
    table[name, batch_size] = accuracy
    show(f"batch {batch_size:3}, {name}", accuracy, best)

# %% tags=["lead"]
figure, axis = plt.subplots(figsize=(6.5, 3.8))
for shift, name in enumerate(METHODS):
    accuracies = np.array([table[name, batch_size] for batch_size in BATCHES])
    error = accuracies.std(axis=1, ddof=1) / np.sqrt(accuracies.shape[1])
    where = np.arange(len(BATCHES)) + 0.05 * shift
    label = "sign, momentum" if name == "sign" else name
    axis.errorbar(
        where, accuracies.mean(axis=1), error, label=label, color=COLOURS[name], capsize=3
    )
axis.set(xlabel="batch size", ylabel="held-out accuracy (%), mean and its error")
axis.set_xticks(range(len(BATCHES)), [str(batch_size) for batch_size in BATCHES])
axis.legend()
figure.tight_layout()


# %%
def lead(one, other):
    """By how many points the mean of the first is ahead, and the standard error of that."""
    square = one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other)
    return one.mean() - other.mean(), np.sqrt(square)


def is_level(one, other):
    """Whether the first is not behind by three standard errors."""
    points, error = lead(one, other)
    return points > -3 * error


gains = []
for batch_size in BATCHES:
    at = {name: table[name, batch_size] for name in METHODS}
    gaps = {name: lead(at["SGD"], at[name]) for name in METHODS if name != "SGD"}
    line = ", ".join(f"{name} {gap:.2f} +- {error:.2f}" for name, (gap, error) in gaps.items())
    print(f"batch {batch_size:3}: points behind SGD with momentum: {line}")
    assert is_level(at["error feedback"], at["SGD"])
    claim(f"batch {batch_size}: points behind SGDm", line)
    gains.append(lead(at["error feedback"], at["scaled sign"]))
gained, errors = np.transpose(gains)
print("what feedback gains on the scaled sign:", ", ".join(f"{gain:.2f}" for gain in gained))
assert np.all(np.diff(gained) > 0)
assert gained[-1] > 1
assert gained[-1] - gained[0] > 3 * np.linalg.norm(errors[[0, -1]])
assert is_level(table["sign", 8], table["SGD", 8])  # not as in the paper

# %% [markdown]
# **What holds:** error feedback is level with SGD or ahead at every batch size. The smaller the
# batch, the more it gains on the scaled sign, its compressor. **What does not:** the sign with
# momentum, 6.6 points behind in the paper, is level with SGD here. There are three differences.
# Momentum averages many small batches before the sign is taken. The step size falls to 0 and is
# tuned for every batch size, while the paper's is tuned at 128 and divided by 16 for batches of 8.
# The digits are also an easy task.
#
# Here and below, "level" means not behind by three standard errors of the difference of the means,
# and "ahead" means ahead by more. By as much, feedback must also gain more at 8 than at 128, and at
# 8 it must gain more than a point.
#
# ## 5. Other compressors: top-k and random-k
#
# The compressors keep a hundredth of the coordinates per step, so $\delta = 0.01$. Training takes
# 200 steps on batches of 32. From here on the step size is one of seven from 10 to 0.01, with the
# lowest mean held-out loss over five seeds. The accuracies are those of the same five seeds.

# %%
FEW = 0.01
FEW_RATES = RATES[:7]


def best_of_five(method, *args):
    """Accuracies of five seeds with the rate that is best for them on average."""
    seeds = jnp.tile(jnp.arange(5), len(FEW_RATES))
    accuracy, losses = trainer(method, *args)(jnp.repeat(jnp.asarray(FEW_RATES), 5), seeds)
    best = np.nanargmin(np.mean(np.reshape(losses, (-1, 5)), axis=1))
    return np.asarray(accuracy, np.float64).reshape(-1, 5)[best], within(FEW_RATES, best)


def after_compression(compressor):
    return lambda rate: optax.chain(compressor, optax.scale_by_learning_rate(rate))


top_k, random_k = signax.scale_by_top_k(FEW), signax.scale_by_random_k(FEW, keys[1])
sparse_methods = {
    "SGD": optax.sgd,
    "top-k": after_compression(top_k),
    "top-k, error feedback": after_compression(signax.error_feedback(top_k)),
    "random-k, error feedback": after_compression(signax.error_feedback(random_k)),
}
results = two_at_a_time(lambda method: best_of_five(method, 32, 200), sparse_methods.values())
sparse = {}
for name, (accuracy, best) in zip(sparse_methods, results, strict=True):
    sparse[name] = accuracy
    show(name, accuracy, best)

# %%
kept = sparse["top-k, error feedback"]
assert is_level(kept, sparse["SGD"])
assert not is_level(sparse["top-k"], kept)
assert not is_level(sparse["random-k, error feedback"], kept)
claim(
    "top-k and random-k with feedback, k/d = 1%",
    ", ".join(f"{name} {accuracy.mean():.2f}%" for name, accuracy in sparse.items()),
)

# %% [markdown]
# With feedback, top-k keeps up with SGD on a hundredth of the coordinates. (None of the four
# methods has momentum.) Without feedback, top-k lags by points. Random-k lags even with feedback: a
# coordinate waits for 100 of the 200 steps on average, and its memory is as old.
#
# ## 6. In both directions
#
# Eight workers have 8 images each. Each worker compresses its message, with a memory of its own,
# and the server compresses the mean of the messages, with a memory of the server:
# `feedback="both"`, one bit each way. With `"worker"` the server sends the mean in full precision.
# With `"none"` it does so too, and no worker has a memory. The workers are a `vmap` with an axis
# name, inside the `vmap` over seeds. Zheng, Huang and Kwok put Nesterov momentum before the
# compressor. The notebook runs the methods without momentum and with it.

# %%
WORKERS, SHARED = 8, {"axis_name": "workers", "num_workers": 8}
nesterov = {"momentum": 0.9, "nesterov": True}


def averaged(rate, **options):
    return optax.chain(signax.average_updates("workers"), optax.sgd(rate, **options))


both_ways = {"mean of gradients, momentum": partial(averaged, **nesterov)}
for feedback in ("both", "worker", "none"):
    both_ways[f"feedback {feedback}"] = partial(signax.ef_sign_sgd, feedback=feedback, **SHARED)
for feedback in ("both", "none"):
    method = both_ways[f"feedback {feedback}"]
    both_ways[f"feedback {feedback}, momentum"] = partial(method, **nesterov)
results = two_at_a_time(lambda method: best_of_five(method, 8, 200, WORKERS), both_ways.values())
two_way = {}
for name, (accuracy, best) in zip(both_ways, results, strict=True):
    two_way[name] = accuracy
    show(name, accuracy, best)

# %% [markdown]
# XLA compiles the programs for eight devices. From these programs the notebook reads how many bytes
# a worker sends:

# %%
mesh = jax.make_mesh((WORKERS,), ("workers",), axis_types=(AxisType.Auto,))
params = jax.tree.map(lambda leaves: leaves[0], starts)
rows = jax.tree.map(lambda leaf: jnp.zeros((WORKERS, *leaf.shape)), params)
sent = {}
for name in list(both_ways)[:4]:
    parallel = signax.DataParallel(both_ways[name](0.1), mesh, "workers")
    state = parallel.init(params)
    compiled = jax.jit(parallel.update).lower(rows, state, params).compile()
    sent[name] = diagnostics.collective_bytes(compiled)
    print(f"{name:28} {sent[name]:7,} bytes per worker and step")

# %%
both, averaged_result = two_way["feedback both"], two_way["mean of gradients, momentum"]
assert is_level(both, averaged_result)
assert is_level(both, two_way["feedback worker"])
assert not is_level(two_way["feedback none"], both)
assert is_level(two_way["feedback none, momentum"], two_way["feedback both, momentum"])
# An f32 all-reduce against a bit each way is 32; of small leaves padding takes a good part.
assert sent["feedback both"] < sent["mean of gradients, momentum"] / 20
claim(
    "both directions, 8 workers: accuracy kept at one bit each way",
    ", ".join(f"{name} {two_way[name].mean():.2f}%, {size:,} bytes" for name, size in sent.items()),
)
claim(
    "the same behind Nesterov momentum",
    ", ".join(
        f"{name} {x.mean():.2f}%" for name, x in two_way.items() if name.endswith("momentum")
    ),
)

# %% [markdown]
# One bit down in place of full precision costs no accuracy that could be seen. Without momentum the
# scaled signs need their memories. Behind momentum they do not need them here, presumably because
# the mean of eight workers' scaled signs of averaged gradients is already close to a mean of
# gradients.
#
# ## What was measured

# %%
for text, result in measured:
    print(f"{text}\n    {result}")
