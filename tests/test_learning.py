"""Accuracies and losses on scikit-learn's digits, with the same tuning for every method."""

import functools

import numpy as np
import optax
from digits import learn, warmup_cosine

import signax

SEEDS = (0, 1, 2)


def test_with_small_batches_error_feedback_matches_sgd_and_scaled_signs_do_not():
    """Karimireddy et al. 2019: error feedback matters more for smaller batches.

    Two workers with 8 images each. The rate of each method is the best of .01, .03, .1, .3 and 1 by
    its mean accuracy.
    """
    num_workers, steps = 2, 400
    rate = functools.partial(warmup_cosine, steps=steps)
    plain = signax.mean_scaled_signs("data", feedback="none")
    methods = {
        "sgd": optax.chain(signax.average_updates("data"), optax.sgd(rate(0.1), 0.9)),
        "feedback": signax.ef_sign_sgd(rate(0.03), 0.9, axis_name="data"),
        "plain": optax.chain(plain, optax.scale_by_learning_rate(rate(0.3))),
    }
    accuracy = {
        name: [learn(tx, num_workers, steps, 8 * num_workers, seed)[1] for seed in SEEDS]
        for name, tx in methods.items()
    }
    assert np.mean(accuracy["feedback"]) >= np.mean(accuracy["sgd"]) - 0.01, accuracy
    assert np.mean(accuracy["plain"]) <= np.mean(accuracy["feedback"]) - 0.01, accuracy
    assert np.mean(accuracy["plain"]) <= np.mean(accuracy["sgd"]) - 0.02, accuracy


def test_eight_local_steps_for_each_vote_reach_the_same_loss():
    """Eight local steps and one vote on the difference, against a vote for every step.

    The step size of each is the best of 1.25e-4, 2.5e-4, 5e-4 and 1e-3 by its mean loss. A
    vote on eight steps takes a step of eight times the size.
    """
    num_workers, batches, batch_size, k = 8, 1600, 128, 8
    every = signax.signum(warmup_cosine(2.5e-4, batches), axis_name="data")
    losses = [learn(every, num_workers, batches, batch_size, seed)[0] for seed in SEEDS]
    rounds, own = batches // k, signax.signum(warmup_cosine(2.5e-4, batches))
    vote = signax.signum(warmup_cosine(k * 2.5e-4, rounds), 0.0, axis_name="data")
    local_losses = [
        learn(vote, num_workers, rounds, k * batch_size, seed, local=own, num_local_steps=k)[0]
        for seed in SEEDS
    ]
    assert np.mean(local_losses) <= 1.05 * np.mean(losses), (local_losses, losses)
