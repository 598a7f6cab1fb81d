"""Which leaves go into which bucket: the order of the backward pass, and sizes."""

import importlib
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from processes import EXAMPLES

import signax
from signax._overlap.find_buckets import _cut_evenly

WIDTH, LAYERS = 8, 5
PARAMS = {f"layer{n}": jnp.ones((WIDTH, WIDTH)) for n in (3, 0, 4, 1, 2)}
BACKWARDS = {f"layer{n}": LAYERS - 1 - n for n in range(LAYERS)}
INPUTS = jnp.ones((4, WIDTH))


def mlp(params, inputs, *, dtype=jnp.float32, layers=LAYERS):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    inputs = inputs.astype(dtype)
    for n in range(layers):
        inputs = jnp.tanh(inputs @ params[f"layer{n}"])
    return jnp.sum(inputs.astype(jnp.float32))


def test_the_last_layer_is_first():
    assert signax.find_buckets(mlp, PARAMS, INPUTS, number=LAYERS) == BACKWARDS


def test_parameters_may_be_cast_before_they_are_used():
    """The casts of all gradients are then the last operations of the backward pass."""
    found = signax.find_buckets(mlp, PARAMS, INPUTS, number=LAYERS, dtype=jnp.bfloat16)
    assert found == BACKWARDS


@pytest.mark.parametrize("kind", ["shapes", "numpy"])
def test_arguments_may_be_shapes_or_arrays(kind):
    arguments = PARAMS, INPUTS
    if kind == "shapes":
        params, inputs = jax.eval_shape(lambda: arguments)
    else:
        params, inputs = jax.tree.map(np.asarray, arguments)
    assert signax.find_buckets(mlp, params, inputs, number=LAYERS) == BACKWARDS


def test_arguments_may_be_static_and_by_keyword():
    loss = jax.jit(mlp, static_argnames=("dtype", "layers"))
    params = {name: PARAMS[name] for name in ("layer0", "layer1")}
    found = signax.find_buckets(loss, params, inputs=INPUTS, number=2, dtype="float32", layers=2)
    assert found == {"layer0": 1, "layer1": 0}


def test_a_loss_may_have_auxiliary_results_and_draw_random_numbers():
    def loss(params, inputs, key):
        dropped = jax.random.bernoulli(key, 0.5, inputs.shape) * inputs
        return mlp(params, dropped), {"name": "aux", "inputs": inputs}

    found = signax.find_buckets(
        loss, PARAMS, INPUTS, jax.random.key(0), number=LAYERS, has_aux=True
    )
    assert found == BACKWARDS


def test_gradients_that_need_no_backward_pass_are_first():
    params = {**PARAMS, "constant": jnp.ones(3), "unused": jnp.ones(2)}

    def loss(params, inputs):
        return mlp(params, inputs) + 2 * jnp.sum(params["constant"])

    found = signax.find_buckets(loss, params, INPUTS, number=LAYERS + 1)
    later = {name: bucket + 1 for name, bucket in BACKWARDS.items()}
    assert found == {**later, "constant": 0, "unused": 0}


def test_tied_embeddings_are_last():
    params = {"embedding": jnp.ones((20, WIDTH)), **PARAMS}

    def loss(params, tokens):
        hidden = params["embedding"][tokens]
        for n in range(LAYERS):
            hidden = jnp.tanh(hidden @ params[f"layer{n}"])
        return jnp.sum(jax.nn.log_softmax(hidden @ params["embedding"].T))

    found = signax.find_buckets(loss, params, jnp.arange(6), number=LAYERS + 1)
    assert found == {**BACKWARDS, "embedding": LAYERS}


def test_layers_in_a_scan_share_a_bucket():
    layers = {"up": jnp.ones((3, WIDTH, WIDTH)), "down": jnp.ones((3, WIDTH, WIDTH))}
    params = {"first": PARAMS["layer0"], "last": PARAMS["layer1"], "layers": layers}

    def loss(params, inputs):
        def layer(hidden, own):
            return jnp.tanh(hidden @ own["up"]) @ own["down"], None

        hidden, _ = lax.scan(layer, inputs @ params["first"], params["layers"])
        return jnp.sum(hidden @ params["last"])

    found = signax.find_buckets(loss, params, INPUTS, number=4)
    assert found == {"first": 2, "last": 0, "layers": {"up": 1, "down": 1}}


@pytest.mark.parametrize("together", [1, 2])
def test_layers_under_one_checkpoint_share_a_bucket(together):
    def loss(params, inputs):
        def some(inputs, matrices):
            for matrix in matrices:
                inputs = jnp.tanh(inputs @ matrix)
            return inputs

        for n in range(0, 4, together):
            own = [params[f"layer{m}"] for m in range(n, n + together)]
            inputs = jax.checkpoint(some)(inputs, own)
        return jnp.sum(inputs)

    params = {f"layer{n}": PARAMS[f"layer{n}"] for n in range(4)}
    found = signax.find_buckets(loss, params, INPUTS, number=4)
    assert found == {f"layer{n}": (3 - n) // together for n in range(4)}


def test_blocks_of_the_language_model_are_in_order(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("train_language_model")
    options = {"layers": 3, "heads": 2, "width": 6, "context": 8, "vocabulary": 16, "dtype": None}
    args = types.SimpleNamespace(**options)
    graph, params = nnx.split(nnx.eval_shape(lambda: example.GPT(args, nnx.Rngs(0))))

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    number = len(jax.tree.leaves(params))
    found = signax.find_buckets(loss, params, jnp.ones((2, 6), int), number=number)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    buckets = {
        jax.tree_util.keystr(path): bucket for path, bucket in jax.tree.leaves_with_path(found)
    }

    def of(*words):
        return [n for name, n in buckets.items() if all(word in name for word in words)]

    first, second, third = (of("'blocks'", f"[{n}]") for n in range(3))
    assert len(first) == len(second) == len(third) == 6
    assert of("['norm']", "scale") == [0]
    assert max(third) < min(second)
    assert max(second) < min(first)
    assert max(first) == min(of("embedding"))  # no product is left behind either
    assert max(of("characters")) == max(buckets.values())  # also the last layer


def test_one_bucket_holds_all():
    found = signax.find_buckets(mlp, PARAMS, INPUTS, number=1)
    assert {*jax.tree.leaves(found)} == {0}


# Sizes.


def best_cut(sizes, number):
    """The least sum of squares of the sums of runs, over all cuts."""
    places = itertools.combinations(range(1, len(sizes)), number - 1)
    return min(sum_of_squares(sizes, [0, *cut, len(sizes)]) for cut in places)


def sum_of_squares(sizes, edges):
    return sum(sum(sizes[a:b]) ** 2 for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("seed", range(20))
def test_sizes_are_as_even_as_possible(seed):
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(0, 30, rng.integers(1, 9))]
    for number in range(1, len(sizes) + 1):
        runs = _cut_evenly(sizes, number)
        edges = [0, *(stop for _, stop in runs)]
        assert runs == [*itertools.pairwise(edges)]
        assert edges[-1] == len(sizes)
        assert all(start < stop for start, stop in runs)
        assert len(runs) == number
        assert sum_of_squares(sizes, edges) == best_cut(sizes, number)


def test_large_leaves_have_buckets_of_their_own():
    shapes = {"layer0": (2, 100), "layer1": (100, 3), "layer2": (3, 3), "layer3": (3, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def loss(params, inputs):
        return mlp(params, inputs, layers=4)

    found = signax.find_buckets(loss, params, jnp.ones((4, 2)), number=3)
    assert found == {"layer0": 2, "layer1": 1, "layer2": 0, "layer3": 0}


# The number of buckets by default. A message has a bit for each parameter.


def find_number(monkeypatch, widths, *, backend="gpu", **options):
    """The number of buckets for a chain of matrices between layers of some widths."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    shapes = {f"layer{n}": shape for n, shape in enumerate(itertools.pairwise(widths))}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def loss(params, inputs):
        return mlp(params, inputs, layers=len(shapes))

    inputs = jax.ShapeDtypeStruct((4, widths[0]), jnp.float32)
    found = signax.find_buckets(loss, params, inputs, **options)
    numbers = {*jax.tree.leaves(found)}
    assert numbers == {*range(len(numbers))}
    return len(numbers)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("min_bytes", "number"),
    [
        (8, 6),  # a matrix of 8 x 8 takes 8 bytes
        (9, 3),  # two or three matrices, and the last
        (16, 3),
        (17, 2),
        (40, 2),
        (41, 1),
    ],
)
def test_every_message_but_the_last_has_the_least_bytes(monkeypatch, backend, min_bytes, number):
    widths = [WIDTH] * 7
    assert find_number(monkeypatch, widths, backend=backend, min_bytes=min_bytes) == number


def test_a_leaf_that_is_too_small_joins_another(monkeypatch):
    # 16, 8, 4, 8 and 16 bytes in the order of the backward pass, and the last layer with 8 bytes
    widths = [8, 8, 16, 4, 8, 8, 16]
    sizes = [a * b // 8 for a, b in itertools.pairwise(widths)]
    assert sizes == [8, 16, 8, 4, 8, 16]
    assert find_number(monkeypatch, widths, min_bytes=4) == 6
    assert find_number(monkeypatch, widths, min_bytes=5) == 5
    assert find_number(monkeypatch, widths, min_bytes=16) == 4
    assert find_number(monkeypatch, widths, min_bytes=17) == 3


def test_a_small_last_layer_does_not_stop_the_others(monkeypatch):
    assert find_number(monkeypatch, [1, *[WIDTH] * 4], min_bytes=8) == 4


def test_there_are_at_most_twelve_buckets(monkeypatch):
    assert find_number(monkeypatch, [WIDTH] * 31, min_bytes=1) == 12
    assert find_number(monkeypatch, [WIDTH] * 31, min_bytes=1, number=30) == 30


def test_a_message_has_a_mebibyte_by_default(monkeypatch):
    width = 2**20  # eight such rows are 8 x 2**20 bits
    assert find_number(monkeypatch, [8, width, 8]) == 2
    assert find_number(monkeypatch, [8, width - 1, 8]) == 1


def test_a_cpu_has_one_bucket_unless_told_otherwise(monkeypatch):
    widths = [WIDTH] * 7
    assert find_number(monkeypatch, widths, backend="cpu", min_bytes=8) == 1
    assert find_number(monkeypatch, widths, backend="cpu", min_bytes=8, number="auto") == 1
    assert find_number(monkeypatch, widths, backend="cpu", min_bytes=8, number=3) == 3


# Wrong arguments.


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (0, ValueError, "number=0 must be at least 1"),
        (-2, ValueError, "number=-2 must be at least 1"),
        (2.5, TypeError, r"number=2\.5 must be a whole number"),
        ("3", TypeError, "number='3' must be a whole number"),
        ("many", TypeError, "number='many' must be a whole number, or \"auto\""),
        (True, TypeError, "number=True must be a whole number"),
        (1.5, TypeError, r"number=1\.5 must be a whole number"),
        (-1, ValueError, "number=-1 must be at least 1"),
        (None, TypeError, "number=None must be a whole number"),
        (6, ValueError, "number=6 exceeds the 5 leaves of params"),
    ],
)
def test_rejects_wrong_numbers(number, kind, message):
    with pytest.raises(kind, match=message):
        signax.find_buckets(mlp, PARAMS, INPUTS, number=number)


@pytest.mark.parametrize(
    ("min_bytes", "kind"), [(0, ValueError), (-5, ValueError), (1e6, TypeError)]
)
def test_rejects_wrong_sizes_of_messages(min_bytes, kind):
    with pytest.raises(kind, match=f"min_bytes={min_bytes} must be"):
        signax.find_buckets(mlp, PARAMS, INPUTS, min_bytes=min_bytes)
