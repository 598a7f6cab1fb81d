"""The algorithms in NumPy, written from the papers and from the statement of the vote's rules.

Nothing here uses the library. Arrays are f64 unless a dtype is part of what is stated.
"""

import numpy as np


# The vote: Bernstein et al. 2019 (arXiv 1810.05291), with dithered zeros and ties.


def hash_bits(number):
    """Two bits of MurmurHash3's 32-bit finaliser of a number."""
    word = 0xFFFFFFFF
    number ^= number >> 16
    number = number * 0x85EBCA6B & word
    number ^= number >> 13
    number = number * 0xC2B2AE35 & word
    number ^= number >> 16
    return number & 1, number >> 16 & 1


def vote(values, step=0, zeros="dither", ties="dither", active=None):
    """The decision on each of d coordinates, from [M, d] values of M workers.

    An even parity is +1. Nobody takes part who is not active or has a value that is not finite.
    """
    values = np.asarray(values, np.float64)
    num_workers, size = values.shape
    takes_part = np.isfinite(values).all(axis=1)
    if active is not None:
        takes_part &= np.asarray(active)
    if not takes_part.any():
        return np.zeros(size)

    h1, h2 = hash_bits(step // 2)
    j = np.arange(size)
    ballots = np.sign(np.where(takes_part[:, None], values, 0))
    for i in np.flatnonzero(takes_part):
        place = (i + step // 2) % num_workers
        parity = (place + j + step + h1) % 2
        if zeros == "dither":
            ballots[i] = np.where(ballots[i] == 0, np.where(parity == 0, 1, -1), ballots[i])
        elif zeros == "plus":
            ballots[i] = np.where(ballots[i] == 0, 1, ballots[i])
    result = np.sign(ballots[takes_part].sum(axis=0))
    if zeros == "abstain":
        return result
    coin = 1 if ties == "plus" else np.where((j + step + h2) % 2 == 0, 1, -1)
    return np.where(result == 0, coin, result)


def mean(values, active=None):
    """The mean over the workers that take part, from [M, d] values; 0 if nobody does."""
    values = np.asarray(values, np.float64)
    takes_part = np.isfinite(values).all(axis=1)
    if active is not None:
        takes_part &= np.asarray(active)
    return values[takes_part].mean(axis=0) if takes_part.any() else np.zeros(values.shape[1])
