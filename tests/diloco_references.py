"""DiLoCo in NumPy, written from the papers: Douillard et al. 2023 and 2025 (arXiv 2311.08105 and
2501.18512), with a least-squares problem whose gradient is written out.

Nothing here uses the library. Parameters are dictionaries of arrays in f64.
"""

import numpy as np


class SGD:
    """Heavy-ball or Nesterov momentum on one array, in the form of Sutskever et al. 2013."""

    def __init__(self, rate, momentum=0.0, nesterov=False):
        self.rate, self.momentum, self.nesterov = rate, momentum, nesterov
        self.velocity = 0.0

    def step(self, params, gradient):
        self.velocity = self.momentum * self.velocity + gradient
        ahead = gradient + self.momentum * self.velocity if self.nesterov else self.velocity
        return params - self.rate * ahead


class AdamW:
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), on one array."""

    def __init__(self, rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
        self.rate, self.b1, self.b2, self.eps, self.weight_decay = rate, b1, b2, eps, weight_decay
        self.count, self.first, self.second = 0, 0.0, 0.0

    def step(self, params, gradient):
        self.count += 1
        self.first = self.b1 * self.first + (1 - self.b1) * gradient
        self.second = self.b2 * self.second + (1 - self.b2) * gradient**2
        first = self.first / (1 - self.b1**self.count)
        second = self.second / (1 - self.b2**self.count)
        direction = first / (np.sqrt(second) + self.eps) + self.weight_decay * params
        return params - self.rate * direction


def mean(rows, name):
    """Combine the workers' differences of a leaf by their mean, as both papers do."""
    del name
    return np.mean(rows, axis=0)


def diloco(params, gradients, num_local_steps, make_inner, make_outer, combine=mean, due=None):
    """The common parameters, the workers' own, and their losses, after each step.

    Args:
      params: the initial parameters.
      gradients: for each step a list of the workers' functions from parameters to a pair of the
        loss and the gradient.
      num_local_steps: H.
      make_inner: makes an inner optimiser for a leaf.
      make_outer: makes an outer optimiser for a leaf.
      combine: the common outer gradient, from the differences [M, ...] of a leaf and its name.
      due: the remainder of the number of steps, divided by H, at which a leaf is exchanged; by
        default 0 for all leaves. Other remainders give the fragments of Streaming DiLoCo.
    """
    num_workers = len(gradients[0])
    common = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    own = [dict(common) for _ in range(num_workers)]
    inner = [{name: make_inner() for name in common} for _ in range(num_workers)]
    outer = {name: make_outer() for name in common}
    history = []
    for step, functions in enumerate(gradients, start=1):
        losses = []
        for worker, function in enumerate(functions):
            loss, gradient = function(own[worker])
            own[worker] = {
                name: inner[worker][name].step(leaf, gradient[name])
                for name, leaf in own[worker].items()
            }
            losses.append(loss)
        for name in common:
            if (step - (due or {}).get(name, 0)) % num_local_steps:
                continue
            differences = np.stack([common[name] - params[name] for params in own])
            common[name] = outer[name].step(common[name], combine(differences, name))
            for mine in own:
                mine[name] = common[name]
        history.append((dict(common), [dict(mine) for mine in own], losses))
    return history


def least_squares(x, y):
    """The loss mean((x w + b - y)^2) and its gradient, as a function of parameters w and b."""

    def loss_and_gradient(params):
        error = x @ params["w"] + params["b"] - y
        slope = 2 * error / error.size
        return np.mean(error**2), {"w": x.T @ slope, "b": slope.sum(axis=0)}

    return loss_and_gradient
