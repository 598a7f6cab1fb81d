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
# # Sign or gradient?
#
# Bernstein et al. claim that steps along the sign of a gradient beat steps along the gradient
# itself where the noise is sparse, and do not where the noise is dense. Both parts hold: the mean
# of $f$ over a run is 7.0 times as high for SGD as for signSGD under sparse noise, 0.81 times under
# dense noise, and 0.09 times under dense noise with a sparse gradient.
#
# ![SGD and signSGD over 10,000 steps, under sparse and dense noise](figures/1_sign_or_gradient.png)
#
# The notebook runs the claims about a single worker from Bernstein et al., *signSGD: Compressed
# Optimisation for Non-Convex Problems*, 2018, [arXiv 1802.04434](https://arxiv.org/abs/1802.04434):
#
# 1. signSGD converges on non-convex functions, at a rate with known constants. *This holds.*
# 2. Signs beat gradients where the noise is sparse, and do not where it is dense. *This holds.*
# 3. The densities of gradient and noise tell which of the two cases a network is in. *The densities
#    of one network are measured.*
# 4. Signum, which is signSGD with momentum, learns like Adam, and tuned SGD may be ahead of both.
#    *The first part holds. SGD is not ahead here.*
# 5. Signum's theory needs a warm-up, of 54 steps for a momentum of 0.9. *This holds.*

# %%
import math

import digits
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import signax

plt.rcParams["figure.dpi"] = 80
measured = {}  # what each claim came to, printed at the end

# %% [markdown]
# ## 1. The rate
#
# Let coordinate $i$ of the gradient change by at most $L_i$ per unit of $x_i$, and let a stochastic
# gradient have standard deviation $\sigma_i$ there. A run takes $K$ steps of size
# $1/\sqrt{\lVert L\rVert_1 K}$. Each step uses the mean of $K$ stochastic gradients, so the run
# uses $N = K^2$ of them. Then
#
# $$\mathbb{E}\left[\frac1K \sum_{k<K} \lVert g_k \rVert_1\right]^2 \le \frac{1}{\sqrt N}
# \left[\sqrt{\lVert L\rVert_1}\left(f_0 - f_* + \tfrac12\right)
# + 2 \lVert\sigma\rVert_1\right]^2 .$$
#
# Both functions here are $f(x) = \sum_i L_i h(x_i)$ with $|h''| \le 1 = h''(0)$ and $f_* = 0$. So
# $L$ is exactly the constant of the theorem, not an estimate. One $h$ is a parabola. The other $h$
# flattens away from its minimum and is concave there. Smoothness and noise spread over two orders
# of magnitude, independently of each other.

# %%
dimension, repeats = 100, 32
rng = np.random.default_rng(0)
smoothness = rng.permutation(np.logspace(-2, 0, dimension)).astype(np.float32)
sigma = rng.permutation(np.logspace(-2, 0, dimension)).astype(np.float32)
start = 2 * rng.standard_normal(dimension).astype(np.float32)
shapes = {
    "convex, $x^2/2$": lambda x: x**2 / 2,
    "non-convex, $x^2/(2 + 2x^2)$": lambda x: x**2 / (2 * (1 + x**2)),
}


def gradient_norm(shape, num_steps, key):
    """The mean over the steps of the l1 norm of the true gradient."""
    tx = signax.sign_sgd(1 / math.sqrt(smoothness.sum() * num_steps))
    # Of K normal gradients the mean is normal too, with a K-th of the variance.
    deviation = sigma / math.sqrt(num_steps)

    def step(carry, key):
        x, state = carry
        gradient = jax.grad(lambda x: jnp.sum(smoothness * shape(x)))(x)
        noise = deviation * jax.random.normal(key, x.shape)
        updates, state = tx.update(gradient + noise, state, x)
        return (optax.apply_updates(x, updates), state), jnp.abs(gradient).sum()

    carry = jnp.asarray(start), tx.init(start)
    return jax.lax.scan(step, carry, jax.random.split(key, num_steps))[1].mean()


def bound(shape, num_steps):
    first = np.sum(smoothness * shape(start))
    terms = np.sqrt(smoothness.sum()) * (first + 1 / 2) + 2 * sigma.sum()
    return terms**2 / num_steps


# %%
steps = np.array([4, 16, 64, 256, 1024, 4096])
keys = jax.random.split(jax.random.key(0), repeats)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
shares, slopes = [], []
for axes, (name, shape) in zip(panels, shapes.items(), strict=True):
    run = jax.jit(jax.vmap(gradient_norm, (None, None, 0)), static_argnums=(0, 1))
    norms = np.array([run(shape, int(num_steps), keys) for num_steps in steps])  # [K, repeats]
    means, errors = norms.mean(axis=1), norms.std(axis=1, ddof=1) / math.sqrt(repeats)
    bounds = np.array([bound(shape, num_steps) for num_steps in steps])
    slopes.append(np.polyfit(np.log(steps[-3:] ** 2), np.log(means[-3:] ** 2), 1)[0])
    shares.append(means**2 / bounds)

    axes.loglog(steps**2, bounds, "k--", label="bound")
    axes.loglog(steps**2, means**2, "o-", label="measured")
    spread = np.square(norms)
    axes.fill_between(steps**2, spread.min(axis=1), spread.max(axis=1), alpha=0.4, label="range")
    axes.set(title=name, xlabel="N, stochastic gradients")
    print(f"{name}: of the bound {np.round(shares[-1], 3)}, slope {slopes[-1]:.2f}")
    assert (np.square(means + 4 * errors) < bounds).all()
panels[0].set(ylabel=r"$(\frac{1}{K}\sum_k \Vert g_k \Vert_1)^2$")
panels[0].legend()
plt.show()

# %% [markdown]
# The bound holds for every $K$ by four standard errors of the 32 repeats. On the parabola the bound
# is not loose either: from 65,536 gradients on, a run uses about seven tenths of it, and the next
# cell asserts more than half. There the square of the measured norm falls as the bound does, with
# $N^{-1/2}$. A shorter run stays further below its bound, since the gradient cannot be larger than
# at the start. The slope is fitted to the last three points. The assertion allows a tenth around
# -1/2, because the shortest of these three runs still shows a little of this effect.

# %%
assert all(-0.6 < slope < -0.4 for slope in slopes)
assert (shares[0][-3:] > 0.5).all()
measured["rate"] = (
    f"of the bound {shares[0].max():.2f} (convex) and {shares[1].max():.2f} (non-convex) at most, "
    f"N = 16 to {steps[-1] ** 2:,}; the squared norm falls with N^{slopes[0]:.2f} and "
    f"N^{slopes[1]:.2f}"
)

# %% [markdown]
# ## 2. Sparse noise and dense noise
#
# The paper's toy problem (its figure A.1) is $f(x) = \lVert x\rVert^2/2$ in 100 dimensions, from a
# normal start, for 10,000 steps. The gradient's first coordinate has noise of
# $\mathcal{N}(0, 100^2)$, and the other coordinates have none. The notebook adds two opposite
# problems. In the first, noise of the same energy is spread over all coordinates. In the second,
# the noise is dense, $\mathcal{N}(0, 1)$, and the gradient is sparse: only the first coordinate
# starts away from its minimum, at 100.
#
# Each method gets the best of 13 step sizes, half a decade apart. The best step size has the
# smallest mean value of $f$ over the run. On the paper's toy problem the best step sizes must be
# the paper's, 0.001 for SGD and 0.01 for signSGD.

# %%
dimension, repeats, num_steps = 100, 10, 10_000
first = np.eye(dimension)[0]
rates = np.logspace(-5, 1, 13)
toys = {  # deviation of the noise, and the starts
    "sparse noise": (100 * first, rng.standard_normal((repeats, dimension))),
    "dense noise": (np.full(dimension, 10.0), rng.standard_normal((repeats, dimension))),
    "dense noise, sparse gradient": (np.ones(dimension), np.tile(100 * first, (repeats, 1))),
}
methods = {"SGD": optax.sgd, "signSGD": signax.sign_sgd}


def descend(method, rate, deviation, start, key):
    """The value of f at every step."""
    tx = methods[method](rate)

    def step(carry, key):
        x, state = carry
        gradient = x + deviation * jax.random.normal(key, x.shape)
        updates, state = tx.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), jnp.sum(x**2) / 2

    return jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, num_steps))[1]


# Repeats have starts and noise of their own, which all rates share.
descents = jax.vmap(descend, (None, None, None, 0, 0))
descents = jax.jit(jax.vmap(descents, (None, 0, None, None, None)), static_argnums=0)

# %% tags=["lead"]
figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
keys = jax.random.split(jax.random.key(1), repeats)
averages, chosen = {}, {}  # of f over the run: [repeats]; and step sizes
for axes, (toy, (deviation, starts)) in zip(panels, toys.items(), strict=True):
    for method in methods:
        values = descents(method, jnp.float32(rates), deviation, jnp.float32(starts), keys)
        over_run = np.nan_to_num(np.mean(values, axis=-1), nan=np.inf)  # [rates, repeats]
        best = over_run.mean(axis=1).argmin()
        averages[toy, method], chosen[toy, method] = over_run[best], rates[best]
        print(f"{toy}: {method}, rate {rates[best]:.4g}, f {over_run[best].mean():.2f} on average")

        curve = np.asarray(values[best])
        places = 1 + np.arange(num_steps)
        axes.loglog(places, curve.mean(axis=0), label=f"{method}, rate {rates[best]:.2g}")
        axes.fill_between(places, curve.min(axis=0), curve.max(axis=0), alpha=0.3)
    axes.set(title=toy, xlabel="step")
    axes.legend()
panels[0].set(ylabel="f (mean and range of 10 repeats)")
plt.show()

# %%
ratios = {toy: averages[toy, "SGD"].mean() / averages[toy, "signSGD"].mean() for toy in toys}
for toy, ratio in ratios.items():
    print(f"{toy}: SGD's mean value is {ratio:.2f} of signSGD's")
np.testing.assert_allclose(chosen["sparse noise", "SGD"], 0.001)
np.testing.assert_allclose(chosen["sparse noise", "signSGD"], 0.01)
assert (averages["sparse noise", "SGD"] > averages["sparse noise", "signSGD"]).all()
assert ratios["sparse noise"] > 3
assert (averages["dense noise", "SGD"] < averages["dense noise", "signSGD"]).all()
one_sparse = "dense noise, sparse gradient"
assert (10 * averages[one_sparse, "SGD"] < averages[one_sparse, "signSGD"]).all()
measured["sparse noise"] = "mean value of SGD over signSGD's: " + ", ".join(
    f"{ratio:.2f} ({toy})" for toy, ratio in ratios.items()
)

# %% [markdown]
# On each problem the same method is ahead in all ten repeats. Under sparse noise signSGD is ahead,
# by a factor of 7. Where the noise of this energy is spread out, SGD is ahead by a fifth: at the
# same step length a sign that is mostly noise follows the gradient only $\sqrt{2/\pi} \approx 0.8$
# times as fast. Where the gradient is sparse but the noise is dense, SGD is ahead by a factor of
# 11: a sign moves the one coordinate that matters no faster than the other 99. The assertions ask
# for factors of 3 and 10 only. They leave room for other random numbers, not for another winner.

# %% [markdown]
# ## 3. The density of gradient and noise
#
# The density of a vector of $d$ coordinates is
# $\phi(v) = \lVert v\rVert_1^2 / (d \lVert v\rVert_2^2)$. It is 1 if all coordinates have the same
# size, and $1/d$ if only one coordinate is not zero. Divide signSGD's bound by $d\,\phi(g)$ to
# write it in the Euclidean norm, the norm of SGD's bound. Its noise term becomes
#
# $$\frac{4}{\sqrt N} \frac{\phi(\sigma)}{\phi(g)} \lVert\sigma\rVert_2^2 .$$
#
# So as far as noise goes, signs suit a problem whose gradient is denser than its noise. Signs cost
# a factor of $\phi(\sigma)/\phi(g)$ where the gradient is sparser. For the toy problems above this
# factor is .01/.64, 1/.64 and 1/.01.
#
# Here Signum trains a network of 26,122 parameters on the digits. During the training the notebook
# measures the gradient of all training images and the standard deviation of the gradients of single
# images.

# %%
images, held_out, labels, held_out_labels = digits.load_data()
learned, validated = np.split(images, [1097]), np.split(labels, [1097])
training, validation = zip(learned, validated, strict=True)
test = held_out, held_out_labels
graph = nnx.split(digits.Network(nnx.Rngs(0)))[0]
num_steps, batch_size = 300, 32


def loss_fn(params, inputs, targets):
    logits = nnx.merge(graph, params)(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train(optimizer, rate, seed, watch, times):
    """Trains on small batches, and gives what `watch` makes of the parameters so many times."""
    schedule = digits.warmup_cosine(1.0, num_steps)
    tx = optimizer(lambda count: rate * schedule(count))
    params = nnx.split(digits.Network(nnx.Rngs(jax.random.key(seed))))[1]

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (batch_size,), 0, len(training[0]))
        grads = jax.grad(loss_fn)(params, *(jnp.asarray(part)[chosen] for part in training))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, watch(carry[0])

    keys = jax.random.split(jax.random.key(seed), (times, num_steps // times))
    return jax.lax.scan(stretch, (params, tx.init(params)), keys)[1]


# %%
@jax.jit
def densities(params):
    """Of the gradient and of the noise: f32[2, 4], for the network and the kernel of each layer."""

    def of_image(image, label):
        return jax.grad(loss_fn)(params, image[None], label[None])

    gradients = jax.vmap(of_image)(*map(jnp.asarray, training))
    found = []
    for moment in (jnp.mean, jnp.std):
        tree = jax.tree.map(lambda leaf, moment=moment: moment(leaf, axis=0), gradients)
        kernels = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
        found.append(signax.diagnostics.density([ravel_pytree(tree)[0], *kernels]))
    return jnp.array(found)


def watch_densities(seed):
    return train(signax.signum, 3e-3, seed, densities, times=20)


gradient, noise = np.moveaxis(jax.lax.map(jax.jit(watch_densities), jnp.arange(3)), 2, 0)
ratio = noise / gradient  # [seeds, times, parts]

# %%
places = np.linspace(0, num_steps, 21)[1:]
parts = ["whole network", "first kernel, 64 x 128", "second, 128 x 128", "third, 128 x 10"]
figure, panels = plt.subplots(1, 4, figsize=(14, 3.6), sharey=True, layout="constrained")
for axes, part, *curves in zip(panels, parts, gradient.T, noise.T, strict=True):
    for curve, label in zip(curves, ("gradient", "noise"), strict=True):  # [times, seeds]
        axes.plot(places, curve.mean(axis=1), label=label)
        axes.fill_between(places, curve.min(axis=1), curve.max(axis=1), alpha=0.3)
    axes.axhline(2 / np.pi, color="grey", linestyle=":", label="normal numbers")
    axes.set(title=part, xlabel="step", ylim=(0, 0.7))
panels[0].set(ylabel="density (mean and range of 3 seeds)")
panels[0].legend()
plt.show()

for part, ratios_of_part in zip(parts, ratio.T, strict=True):
    print(f"{part}: noise {ratios_of_part.min():.2f} to {ratios_of_part.max():.2f} of the gradient")
assert gradient.min() > 0.05
assert noise.min() > 0.05
assert (ratio[..., 0] > 1).all()
assert ratio[..., 0].mean() < 2
measured["density"] = (
    f"gradient {gradient[..., 0].min():.2f} to {gradient[..., 0].max():.2f}, noise "
    f"{noise[..., 0].min():.2f} to {noise[..., 0].max():.2f}, their ratio "
    f"{ratio[..., 0].mean():.2f} on average"
)

# %% [markdown]
# The densities are far above $1/d$, as the paper found on CIFAR-10, so the network does not
# resemble the sparse toy problems. But in the whole network noise is denser than the gradient all
# through training, by a factor of 1.1 to 2. By the theory's noise term, signs have nothing to win
# here, and little to lose. The first assertions ask for densities above .05, which is 64 times the
# density of a single coordinate of the smallest kernel. The others ask for noise that is denser
# than the gradient at all times and seeds, and less than twice as dense in the mean over them.

# %% [markdown]
# ## 4. Signum, Adam and SGD
#
# On ImageNet the paper finds Signum as good as Adam, and both about 2% below tuned SGD. On CIFAR-10
# the best of 300 settings each gave .917 for SGD, .912 for Signum and .916 for Adam.
#
# Here each method learns the digits with the same momentum of 0.9 (Adam's second decay is Optax's
# .999), batches of 32, a warm-up and a cosine decay. Each method gets the best of 13 peak step
# sizes from .001 to 1. The best peak step size has the lowest loss on 300 validation images, as the
# mean of 5 seeds. The comparison then uses twenty other seeds and 400 further images.

# %%
optimizers = {
    "SGD": lambda rate: optax.sgd(rate, momentum=0.9),
    "Adam": optax.adam,
    "Signum": signax.signum,
}
rates = np.logspace(-3, 0, 13)
tuning_seeds, other_seeds = np.arange(5), np.arange(5, 25)


def scores(params):
    predicted = nnx.merge(graph, params)(test[0]).argmax(axis=-1)
    return loss_fn(params, *validation), jnp.mean(predicted == test[1])


def learn(method, rate, seed):
    return train(optimizers[method], rate, seed, scores, times=20)


learn_all = jax.jit(jax.vmap(jax.vmap(learn, (None, None, 0)), (None, 0, None)), static_argnums=0)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
accuracy = {}  # [seeds]
for method in optimizers:
    losses = np.asarray(learn_all(method, jnp.float32(rates), tuning_seeds)[0])[..., -1]
    best = losses.mean(axis=1).argmin()
    assert 0 < best < len(rates) - 1  # the grid has both its ends
    curves = np.asarray(learn_all(method, jnp.float32(rates[[best]]), other_seeds)[1])[0]
    accuracy[method] = curves[:, -1]

    left.loglog(rates, losses.mean(axis=1), "o-", label=method)
    left.fill_between(rates, losses.min(axis=1), losses.max(axis=1), alpha=0.3)
    right.plot(places, 100 * curves.mean(axis=0), label=f"{method}, rate {rates[best]:.2g}")
    right.fill_between(places, 100 * curves.min(axis=0), 100 * curves.max(axis=0), alpha=0.3)
left.set(xlabel="peak step size", ylabel="validation loss (mean and range)", ylim=(0.05, 5))
right.set(xlabel="step", ylabel="test accuracy (%, mean and range)", ylim=(85, 100))
left.legend()
right.legend()
plt.show()

# %%
for method, shares in accuracy.items():
    error = shares.std(ddof=1) / math.sqrt(len(shares))
    print(f"{method}: {shares.mean():.2%}, standard error {error:.2%}")


def compare(one, other):
    """By how much `one` is ahead: the mean over the seeds, and its standard error."""
    differences = accuracy[one] - accuracy[other]
    return differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))


for one, other in (("Signum", "Adam"), ("Signum", "SGD"), ("Adam", "SGD")):
    ahead, error = compare(one, other)
    print(f"{one} is ahead of {other} by {ahead:.2%} +- {error:.2%}")
    assert ahead - 3 * error > -0.01
measured["Signum"] = ", ".join(f"{method} {a.mean():.2%}" for method, a in accuracy.items())

# %% [markdown]
# Signum is like Adam here too. It is ahead by half a percentage point, which is two of the 400
# images. Tuned SGD is *not* ahead by two points, as on ImageNet. A network this small shows no such
# lead, and says nothing about large networks. The assertions fix the part that holds: Signum is
# less than one point behind Adam and SGD, and Adam is less than one point behind SGD. Each of these
# holds even if the paired difference over the twenty seeds is three standard errors worse.

# %% [markdown]
# ## 5. The warm-up
#
# The paper proves the rate of Signum for a method that takes signs of gradients in its first
# $C(\beta)$ steps, while the momentum fills. $C(\beta)$ is the smallest $C$ such that for all
# $k \ge C$
#
# $$\frac{k}{2} \beta^k \le \frac{1}{1 - \beta^2} \frac{1}{k + 1}
# \quad\text{and}\quad \beta^{k+1} \le \frac12 .$$
#
# `scale_by_signum(b1, warmup=True)` does this. To see the length of the warm-up, give it a huge
# gradient of +1e30 once, so that the momentum stays positive, and gradients of -1 from then on. Its
# updates change from -1 to +1 where the warm-up ends.


# %%
def observed_warmup(b1, num_steps=1000):
    tx = signax.scale_by_signum(b1, warmup=True)

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    gradients = jnp.full(num_steps, -1.0).at[0].set(1e30)
    signs = np.asarray(jax.lax.scan(step, tx.init(jnp.zeros(())), gradients)[1])
    # The huge gradient comes at step 0, where warm-up or not the sign is +1.
    return 1 + int(np.argmax(signs[1:] > 0))


def stated_warmup(b1, horizon=100_000):
    k = np.arange(horizon)
    holds = (k / 2 * b1**k <= 1 / (1 - b1**2) / (k + 1)) & (b1 ** (k + 1) <= 0.5)
    return 1 + int(np.flatnonzero(~holds)[-1])


warmups = {b1: (observed_warmup(b1), stated_warmup(b1)) for b1 in (0.8, 0.9, 0.95, 0.98)}
for b1, (observed, stated) in warmups.items():
    print(f"C({b1}) = {observed}")
    assert observed == stated
assert warmups[0.9][0] == 54  # as the paper has it
measured["warm-up"] = ", ".join(f"C({b1}) = {found}" for b1, (found, _) in warmups.items())

# %% [markdown]
# ## What was measured

# %%
for claim, value in measured.items():
    print(f"{claim}: {value}")
