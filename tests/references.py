"""The algorithms in NumPy, written from the papers and from the statement of the vote's rules.

Nothing here uses the library. Arrays are f64, unless an algorithm prescribes another dtype.
"""

from functools import cache, partial

import numpy as np

# The vote: Bernstein et al. 2019 (arXiv 1810.05291), with dithered zeros and ties.


def hash_word(number):
    """MurmurHash3's 32-bit finaliser of a number."""
    word = 0xFFFFFFFF
    number ^= number >> 16
    number = number * 0x85EBCA6B & word
    number ^= number >> 13
    number = number * 0xC2B2AE35 & word
    number ^= number >> 16
    return number


def hash_bits(number):
    """Two bits of the hash of a number."""
    return hash_word(number) & 1, hash_word(number) >> 16 & 1


def places(step, num_workers, shuffled=False):
    """The place of each worker at a step. Every second step rotates or shuffles the places."""
    pair = step // 2
    if not shuffled:
        return (np.arange(num_workers) + pair) % num_workers
    hashes = [hash_word(hash_word(pair) + i & 0xFFFFFFFF) for i in range(num_workers)]
    return np.argsort(np.argsort(hashes))


def participants(values, active):
    """Whether each of M workers takes part: it must be active, and all its values finite."""
    takes_part = np.isfinite(values).all(axis=1)
    return takes_part if active is None else takes_part & np.asarray(active)


def cast(values, step, zeros, active, shuffled=False):
    """The ballots of the workers that take part, [voters, d], from values [M, d] of M workers."""
    values = np.asarray(values, np.float64)
    num_workers, size = values.shape
    takes_part = participants(values, active)
    h1, _ = hash_bits(step // 2)
    ballots = np.sign(np.where(takes_part[:, None], values, 0))
    for i, place in enumerate(places(step, num_workers, shuffled)):
        parity = (place + np.arange(size) + step + h1) % 2
        if zeros == "dither":
            ballots[i] = np.where(ballots[i] == 0, np.where(parity == 0, 1, -1), ballots[i])
        elif zeros == "plus":
            ballots[i] = np.where(ballots[i] == 0, 1, ballots[i])
    return ballots[takes_part]


def vote(values, step=0, zeros="dither", ties="dither", active=None, drift=0, shuffled=False):
    """The decision on each of d coordinates, from [M, d] values of M workers.

    An even parity is +1. If dead coordinates of even index have drifted, ties move them back.
    """
    ballots = cast(values, step, zeros, active, shuffled)
    result = np.sign(ballots.sum(axis=0))
    if zeros == "abstain" or not len(ballots):
        return result
    return broken_ties(result, step, ties, drift)


def broken_ties(result, step, ties, drift):
    """Decisions, with +1 or -1 where they are 0."""
    _, h2 = hash_bits(step // 2)
    even = np.arange(result.size) % 2 == 0
    first = (step + h2) % 2 == 0 if drift == 0 else drift < 0
    coin = 1 if ties == "plus" else np.where(even == first, 1, -1)
    return np.where(result == 0, coin, result)


# Weighted majority, and weights by log-odds: Nitzan and Paroush 1982, "Optimal decision rules in
# uncertain dichotomous choice situations".


def weighted_vote(values, weights, step=0, zeros="dither", ties="dither", active=None, **memory):
    """The sign of the sum of weighted ballots, [d], added up as f32 in the order of the workers."""
    ballots = cast(values, step, zeros, active, memory.get("shuffled", False))
    result = np.zeros(ballots.shape[1], np.float32)
    for weight, ballot in zip(
        np.float32(weights)[participants(values, active)], np.float32(ballots), strict=True
    ):
        result = result + weight * ballot
    result = np.sign(result)
    if zeros == "abstain" or not len(ballots):
        return result
    return broken_ties(result, step, ties, memory.get("drift", 0))


class Reputations:
    """Weights that follow from each worker's agreement with the weighted vote of the others."""

    def __init__(self, num_workers):
        self.average, self.weights = np.full(num_workers, 0.51), np.ones(num_workers)

    def of(self, takes_part):
        """The weights in a step. Voters that all have weight 0 count alike."""
        return self.weights if self.weights[takes_part].any() else np.ones(len(takes_part))

    def advance(self, values, step, active=None):
        """Record a step with values [M, d]. Weights change after each pair of steps."""
        takes_part = participants(values, active)
        signs = np.sign(np.where(takes_part[:, None], values, 0))
        for i, weighted in enumerate(self.of(takes_part)[:, None] * signs):
            others = np.sign(self.of(takes_part) @ signs - weighted)
            agree, disagree = ((signs[i] * others == sign).sum() for sign in (1, -1))
            if agree + disagree:
                self.average[i] += 0.01 * (agree / (agree + disagree) - self.average[i])
        if step % 2:
            clipped = np.clip(self.average, 0.01, 0.99)
            odds = np.maximum(0, np.log(clipped / (1 - clipped)))
            self.weights = np.round(256 * odds / (odds.max() or 1)) / 256


class DitherMemory:
    """The memory of a vote: the drift of dead coordinates of even index, and the first absence.

    After the pair of steps that has the first absence, places are shuffled.
    """

    def __init__(self):
        self.drift, self.first_missed = 0, np.inf

    def at(self, step):
        """Further arguments of `vote` at a step."""
        return {"drift": self.drift, "shuffled": step // 2 > self.first_missed}

    def advance(self, step, takes_part):
        """Record a step, where bool[M] says which workers took part."""
        dead = np.zeros((len(takes_part), 1))
        self.drift += vote(dead, step, active=takes_part, **self.at(step))[0]
        if not np.all(takes_part):
            self.first_missed = min(self.first_missed, step // 2)


def votes(values, active=None):
    """The decisions of a vote with a dither memory: [T, d], from [T, M, d] values."""
    memory, decisions = DitherMemory(), []
    for step, rows in enumerate(values):
        takes_part = participants(rows, None if active is None else active[step])
        decisions.append(vote(rows, step, active=takes_part, **memory.at(step)))
        memory.advance(step, takes_part)
    return np.array(decisions)


def agreements(values, active=None):
    """Count, for each of M workers, the coordinates on which it agrees and disagrees: [M, 2].

    A worker is compared with the others on coordinates where the others' signs add up to 3 or more,
    or to -3 or less. Zeros and excluded workers are not counted.
    """
    values = np.asarray(values, np.float64)
    signs = np.sign(np.where(participants(values, active)[:, None], values, 0))
    others = signs.sum(axis=0) - signs
    product = np.where(np.abs(others) >= 3, signs * others, 0)
    return np.stack([(product > 0).sum(axis=1), (product < 0).sum(axis=1)], axis=1)


def mean_of_signs(values, step=0, zeros="dither", active=None):
    """The mean ballot of the workers that take part, from values [M, d]; 0 if there are none."""
    ballots = cast(values, step, zeros, active)
    return ballots.mean(axis=0) if len(ballots) else np.zeros(ballots.shape[1])


def mean(values, active=None):
    """The mean over the workers that take part, from values [M, d]; 0 if there are none."""
    values = np.asarray(values, np.float64)
    takes_part = participants(values, active)
    return values[takes_part].mean(axis=0) if takes_part.any() else np.zeros(values.shape[1])


# Messages: each ballot as one or two bits, and words of 32 bits.


def ballots(values, zeros, ties, coin=0):
    """A worker's bits for +1, and with "abstain" for -1: a list of bool[...] like the values.

    For zero ballots the coin is added to the parity of a coordinate. With dithered ties the bits of
    odd coordinates are inverted.
    """
    values = np.asarray(values, np.float64)
    odd = np.arange(values.size).reshape(values.shape) % 2 == 1
    if zeros == "abstain":
        return [values > 0, values < 0]
    even_sum = (odd + coin) % 2 == 0
    undecided = np.isnan(values) | (values == 0)
    plus = np.where(undecided, even_sum if zeros == "dither" else True, values > 0)
    return [plus != odd if ties == "dither" else plus]


def packed(bits, axis=0, rows=None):
    """Words of an array that is cut along an axis into 32 slabs of `rows` rows, with padding.

    Bit b of word w is coordinate w of slab b. By default slabs are as short as possible.
    """
    rows = -(-bits.shape[axis] // 32) if rows is None else rows
    places = np.arange(bits.shape[axis])
    shape = list(bits.shape)
    shape[axis] = rows
    words = np.zeros(shape, np.uint32)
    for b in range(32):
        block = np.compress(places // max(rows, 1) == b, bits, axis).astype(np.uint32) << b
        inside = [slice(None)] * bits.ndim
        inside[axis] = slice(block.shape[axis])
        words[tuple(inside)] |= block
    return words.ravel()


def packed_consecutive(bits):
    """Words of a flat array: bit b of word w is coordinate 32 w + b."""
    padded = np.pad(bits, (0, -bits.size % 32))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def unpacked(words):
    """The bits of a flat array whose size is 32 times the number of words."""
    return np.concatenate([np.asarray(words) >> b & 1 == 1 for b in range(32)])


def by_tiles(words, shape):
    """Words in the order of tiles: 8 x 128 words along the last two axes."""
    *first, row, column = np.unravel_index(np.arange(words.size), shape)
    order = np.lexsort([column % 128, row % 8, column // 128, row // 8, *reversed(first)])
    return words[order]


# Signum: Bernstein et al. 2018 (arXiv 1802.04434). Gradients and updates are rows per step, [T, d].


def warmup_steps(b1, horizon=100_000):
    """The paper's C(b1): the first k from which on both conditions hold, up to a horizon."""
    k = np.arange(horizon)
    filled = (k / 2 * b1**k <= 1 / ((1 - b1**2) * (k + 1))) & (b1 ** (k + 1) <= 0.5)
    return 0 if filled.all() else int(np.flatnonzero(~filled)[-1]) + 1


def signum(gradients, b1, warmup=0, nesterov=False):
    """The signs that Signum follows. The first `warmup` steps follow the gradient's own sign."""
    momentum, signs = np.zeros_like(gradients[0]), []
    for t, gradient in enumerate(gradients):
        momentum = b1 * momentum + (1 - b1) * gradient
        direction = b1 * momentum + (1 - b1) * gradient if nesterov else momentum
        signs.append(np.sign(gradient if t < warmup else direction))
    return np.array(signs)


def lion(gradients, b1, b2):
    """The signs that Lion follows: Chen et al. 2023 (arXiv 2302.06675)."""
    momentum, signs = np.zeros_like(gradients[0]), []
    for gradient in gradients:
        signs.append(np.sign(b1 * momentum + (1 - b1) * gradient))
        momentum = b2 * momentum + (1 - b2) * gradient
    return np.array(signs)


def descend(params, directions, learning_rates, weight_decay=0.0):
    """Parameters after each step x <- x - alpha (u + lambda x), as in arXiv 1810.05291."""
    steps = []
    for direction, rate in zip(directions, learning_rates, strict=True):
        params = params - rate * (direction + weight_decay * params)
        steps.append(params)
    return np.array(steps)


# Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), Liu et al. 2025 (arXiv
# 2502.16982), and its vote: Mishra, Trivedi and Kumar 2026 (arXiv 2605.16311).


def polar(matrix, steps=5):
    """The polar factor by quintic Newton-Schulz iterations, scaled by the root of the longer side.

    The root mean square is then about 1.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (np.linalg.norm(wide) + 1e-8)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    factor = wide.T if matrix.shape[0] > matrix.shape[1] else wide
    return np.sqrt(max(matrix.shape)) * factor


def muon(gradients, beta, nesterov=True):
    """The scaled polar factors that one worker's Muon follows, with Optax's correction of bias."""
    momentum, directions = np.zeros_like(gradients[0]), []
    for count, gradient in enumerate(gradients, start=1):
        momentum = beta * momentum + (1 - beta) * gradient
        ahead = momentum
        if nesterov:
            ahead = beta * momentum / (1 - beta ** (count + 1))
            ahead = ahead + (1 - beta) * gradient / (1 - beta**count)
        directions.append(polar(ahead))
    return np.array(directions)


# Compressors and error feedback: Karimireddy et al. 2019 (arXiv 1901.09847).


def scaled_sign(values, block="leaf"):
    """mean |p| sign(p) over blocks of an array, or with "tree" over a list of arrays."""
    if block == "tree":
        scale = np.abs(np.concatenate([leaf.ravel() for leaf in values])).mean()
        return [scale * np.sign(leaf) for leaf in values]
    flat = values.ravel()
    row = values.shape[-1] if values.ndim else 1
    size = {"leaf": flat.size, "row": row}.get(block, block) or 1
    pieces = [flat[start : start + size] for start in range(0, flat.size, size)]
    signs = [np.abs(piece).mean() * np.sign(piece) for piece in pieces]
    return np.concatenate([flat[:0], *signs]).reshape(values.shape)


def top_k(values, k):
    """The k coordinates of largest magnitude; of equal magnitudes, the earlier coordinate."""
    first = sorted(range(values.size), key=lambda j: (-abs(values.flat[j]), j))[:k]
    kept = np.zeros_like(values)
    kept.flat[first] = values.flat[first]
    return kept


def error_feedback(gradients, compress, decay=1.0):
    """The updates C(p) and memories e of each step: p = g + decay e and e = p - C(p)."""
    error, emitted, memory = np.zeros_like(gradients[0]), [], []
    for gradient in gradients:
        corrected = gradient + decay * error
        emitted.append(compress(corrected))
        error = corrected - emitted[-1]
        memory.append(error)
    return np.array(emitted), np.array(memory)


def ef_sign_sgd(params, gradients, learning_rate):
    """EF-signSGD as the paper states it, with the memory in units of the learning rate."""
    error, steps = np.zeros_like(params), []
    for gradient in gradients:
        corrected = learning_rate * gradient + error
        delta = np.abs(corrected).mean() * np.sign(corrected)
        params, error = params - delta, corrected - delta
        steps.append(params)
    return np.array(steps)


# Feedback in both directions: Zheng, Huang and Kwok 2019 (arXiv 1905.10936). M workers serve parts.


def columns(shape):
    """The number of columns, always even, of a leaf that is laid out as a matrix of 32 rows.

    A row consists of whole slices along the first axis, preferably a multiple of 8 slices, unless
    padding would exceed a 64th.
    """
    size = int(np.prod(shape))
    if len(shape) > 1 and size:
        inner = size // shape[0]
        for slices in (8, 1 if inner % 2 == 0 else 2):
            length = slices * int(np.ceil(shape[0] / (32 * slices)))
            if 32 * length / shape[0] <= 65 / 64:
                return length * inner
    return 2 * int(np.ceil(size / 64))


def servers(shape, num_workers):
    """The server of each coordinate of a leaf, and the coordinate's place in the server's part."""
    width = columns(shape)
    share = 2 * int(np.ceil(width / (2 * num_workers)))
    row, column = np.divmod(np.arange(int(np.prod(shape))), max(width, 1))
    server, within = np.divmod(column, max(share, 1))
    return server, row * share + within


@cache
def blocks(shape, num_workers, block):
    """The block of each coordinate: a server's part, or at most `block` coordinates of it."""
    server, place = servers(shape, num_workers)
    within = np.zeros_like(place) if block is None else place // block
    return np.unique(np.stack([server, within]), axis=1, return_inverse=True)[1].reshape(-1)


def device_blocks(shape, counts):
    """The device that holds each coordinate of a leaf, its index there, and a block's shape.

    The leaf is cut into `counts` equal blocks along its dimensions; () leaves it whole.
    """
    if not counts:
        size = int(np.prod(shape))
        return np.zeros(size, int), np.arange(size), shape
    block = tuple(n // count for n, count in zip(shape, counts, strict=True))
    place = np.indices(shape).reshape(len(shape), -1)
    within = np.reshape(block, (-1, 1))
    device = np.ravel_multi_index(tuple(place // within), counts)
    return device, np.ravel_multi_index(tuple(place % within), block), block


@cache
def served_blocks(shape, counts, num_workers, block):
    """For each coordinate: its index in its device's block, its server, and its block of a part.

    Each device's block of the leaf is cut into the servers' parts, as a leaf of its own.
    """
    device, index, cut = device_blocks(shape, counts)
    pairs = np.stack([device, blocks(cut, num_workers, block)[index]])
    down = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
    return index, servers(cut, num_workers)[0][index], down


def signed_blocks(values, block, parity):
    """The mean |p| of a block times the sign of each coordinate. Zeros of even parity are +."""
    signs = np.where(values == 0, np.where(parity % 2 == 0, 1, -1), np.sign(values))
    number = np.bincount(block)
    return np.bincount(block, np.abs(values))[block] / number[block] * signs


# Uniform quantisers of a Gaussian: Max 1960, table II. The values are half the step for 4 and 16
# levels, in units of the mean magnitude, which is sqrt(2 / pi) standard deviations.
HALF_STEPS = {2: 0.9957 / 2 / 0.79788, 4: 0.3352 / 2 / 0.79788}


def quantized_blocks(values, block, parity, bits):
    """Each value's nearest of 2^bits odd multiples of a scale, signed as in `signed_blocks`."""
    scaled = signed_blocks(values, block, parity)
    scale = HALF_STEPS[bits] * np.abs(scaled)
    safe = np.where(scale > 0, scale, 1)
    steps = np.minimum(np.floor(np.abs(values) / (2 * safe)), 2 ** (bits - 1) - 1)
    return np.where(scaled >= 0, 1, -1) * (2 * steps + 1) * scale


def mean_of_scaled_signs(
    leaves, feedback="both", block=None, decay=1.0, active=None, bits=1, counts=None
):
    """Updates and memories after each of T steps, from a list of leaves [M, ...] for each step.

    With more than one bit, `quantized_blocks` quantises the values. `counts` has the numbers of
    devices' blocks along the dimensions of each leaf. A leaf has one scale on the way up, however
    it is cut.

    Returns:
      For each step and each leaf of d coordinates, in row-major order, a triple: the update [d],
      the workers' memories [M, d], and the servers' memories [d].
    """
    num_workers, shapes = len(leaves[0][0]), [leaf.shape[1:] for leaf in leaves[0]]
    leaves = [[leaf.reshape(num_workers, -1) for leaf in step] for step in leaves]
    memory = [np.zeros_like(leaf, np.float64) for leaf in leaves[0]]
    server = [np.zeros(leaf.shape[1]) for leaf in leaves[0]]
    history = []
    compress = signed_blocks if bits == 1 else partial(quantized_blocks, bits=bits)
    for t in range(len(leaves)):
        h1, _ = hash_bits(t // 2)
        at = places(t, num_workers)
        takes_part = np.all([np.isfinite(leaf).all(axis=1) for leaf in leaves[t]], axis=0)
        if active is not None:
            takes_part &= active[t]
        step = []
        for n, leaf in enumerate(leaves[t]):
            size, cut = leaf.shape[1], () if counts is None else counts[n]
            index, server_of, down = served_blocks(shapes[n], cut, num_workers, block)
            up = np.zeros_like(down) if block is None else down
            mean = np.zeros(size)
            for i in np.flatnonzero(takes_part):
                corrected = leaf[i] + (decay * memory[n][i] if feedback != "none" else 0)
                sent = compress(corrected, up, at[i] + index + t + h1)
                memory[n][i] = corrected - sent
                mean += sent / takes_part.sum()
            if feedback == "both" and takes_part.any():
                corrected = mean + decay * server[n]
                mean = compress(corrected, down, at[server_of] + index + t + h1)
                server[n] = corrected - mean
            step.append((mean, memory[n].copy(), server[n].copy()))
        history.append(step)
    return history


# Buckets: leaves that are exchanged in turn, with a worker's first NaN as the end of its part.


def bucket_participants(leaves, buckets, active=None):
    """Whether each of M workers takes part in each of B buckets, bool[B, M].

    The leaves are [M, ...], and `buckets` has the number of each leaf's bucket. A worker takes part
    in bucket b if it is active, and if its leaves of buckets 0 to b are finite.
    """
    rows = [leaf.reshape(len(leaf), -1) for leaf in leaves]
    return np.array(
        [
            participants(
                np.concatenate([r for r, n in zip(rows, buckets, strict=True) if n <= b], 1), active
            )
            for b in range(max(buckets) + 1)
        ]
    )


def signum_in_buckets(leaves, buckets, b1, active=None):
    """Decisions and momenta after each of T steps, from a list of leaves [M, ...] for each step.

    A worker that is not active still updates its momentum. Each bucket's vote has a dither memory.

    Returns:
      For each step and each leaf of d coordinates, in row-major order, a pair: the decision [d],
      and the workers' momenta [M, d].
    """
    memory = [DitherMemory() for _ in range(max(buckets) + 1)]
    momenta = [np.zeros_like(leaf.reshape(len(leaf), -1)) for leaf in leaves[0]]
    history = []
    for t, step in enumerate(leaves):
        finite = bucket_participants(step, buckets)
        votes = bucket_participants(step, buckets, None if active is None else active[t])
        pairs = []
        for n, (leaf, b) in enumerate(zip(step, buckets, strict=True)):
            moved = b1 * momenta[n] + (1 - b1) * leaf.reshape(len(leaf), -1)
            momenta[n] = np.where(finite[b][:, None], moved, momenta[n])
            decision = vote(momenta[n], t, active=votes[b], **memory[b].at(t))
            pairs.append((decision, momenta[n]))
        for b, takes_part in enumerate(votes):
            memory[b].advance(t, takes_part)
        history.append(pairs)
    return history


# Stochastic signs: Safaryan and Richtarik 2021 (arXiv 1905.12938).


def momenta(gradients, b1):
    """m <- b1 m + (1 - b1) g after each step, from [T, ...] gradients."""
    momentum, steps = np.zeros_like(gradients[0]), []
    for gradient in gradients:
        momentum = b1 * momentum + (1 - b1) * gradient
        steps.append(momentum)
    return np.array(steps)


def stochastic_sign_mean(values, norm="l2"):
    """The mean of each sign, 2 P(+1) - 1, with P(+1) = 1/2 + g / (2 norm), clipped at a bound."""
    largest = np.abs(values).max()
    if largest == 0:
        return np.zeros_like(values)
    relative = values / largest
    if norm == "l2":
        return relative / np.sqrt((relative**2).sum())
    return relative if norm == "linf" else np.clip(values / norm, -1, 1)


# 1-bit Adam: Tang et al. 2021 (arXiv 2102.02888), with corrected biases. After the freeze, steps
# stay within the bound of Adam's: Kingma and Ba 2015 (arXiv 1412.6980), section 2.1.


def one_bit_adam(leaves, warmup_steps, b1, b2, eps, block=None, counts=None, decay=1.0):
    """Directions and states after each of T steps, from a list of leaves [M, ...] for each step.

    A step in which no worker takes part changes nothing. A coordinate that no gradient reached
    before the freeze does not move then, and its gradients are not sent.

    Returns:
      For each step and each leaf of d coordinates, in row-major order: the direction [d], m [d],
      v [d], and a pair of the workers' [M, d] and the servers' [d] memories.
    """
    num_workers, taken, sent, history = len(leaves[0][0]), 0, [], []
    mu = [np.zeros(leaf[0].size) for leaf in leaves[0]]
    nu = [np.zeros(leaf[0].size) for leaf in leaves[0]]
    for step in leaves:
        flat = [leaf.reshape(num_workers, -1) for leaf in step]
        takes_part = participants(np.concatenate(flat, axis=1), None)
        exact, directions = taken < warmup_steps, [np.zeros_like(m) for m in mu]
        # A worker whose row is NaN sends nothing. During the warm-up no worker sends.
        own = [b1 * m + (1 - b1) * leaf for m, leaf in zip(mu, flat, strict=True)]
        own = [np.where(v > 0, momentum, 0) for v, momentum in zip(nu, own, strict=True)]
        silent = exact | ~takes_part[:, None]
        own = [np.where(silent, np.nan, momentum) for momentum in own]
        sent.append([m.reshape(leaf.shape) for m, leaf in zip(own, step, strict=True)])
        replies = mean_of_scaled_signs(sent, block=block, counts=counts, decay=decay)[-1]
        if takes_part.any():
            taken += 1
            for n, leaf in enumerate(flat):
                gradient, m, v = leaf[takes_part].mean(axis=0), mu[n], nu[n]
                mu[n] = b1 * m + (1 - b1) * gradient if exact else np.where(v > 0, replies[n][0], 0)
                nu[n] = b2 * v + (1 - b2) * gradient**2 if exact else v
                root = np.sqrt(nu[n] / (1 - b2 ** min(taken, warmup_steps)))
                most = np.inf if exact else max(1, (1 - b1) / np.sqrt(1 - b2))
                directions[n] = np.clip(mu[n] / (1 - b1**taken) / (root + eps), -most, most)
        memories = [(workers, server) for _, workers, server in replies]
        history.append(list(zip(directions, mu.copy(), nu.copy(), memories, strict=True)))
    return history
