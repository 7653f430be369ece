"""Sequence features: items as samples, and their activations as sequences again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embax
from embax import flatten_sequences, unflatten_sequences

BATCH, LENGTH, VALENCY, DIM = 4, 5, 3, 8


def sequence_specs(combiner="mean", valency=VALENCY):
    table = oracle.table_spec("items", 40, DIM, combiner)
    rows = BATCH * LENGTH
    shapes = {"input_shape": (rows, valency), "output_shape": (rows, DIM)}
    return {
        "watched": embax.FeatureSpec(name="watched", table_spec=table, **shapes),
        "user": oracle.feature_spec("user", table, BATCH, VALENCY),
    }


def looked_up_by_items(table, sequences, combiner, weights=None):
    """float64[batch, LENGTH, DIM], an item after the other; `sequences` are lists of lists of ids."""
    out = np.zeros((len(sequences), LENGTH, DIM))
    for number, sequence in enumerate(sequences):
        for place, item in enumerate(sequence):
            item_weights = None if weights is None else [weights[number][place]]
            out[number, place] = oracle.lookup(table, [item], combiner, item_weights)[0]
    return out


def draw_sequences(rng):
    return [[rng.integers(0, 40, rng.integers(0, VALENCY + 1)).tolist() for _ in range(n)] for n in (LENGTH, 0, 3, 1)]


def weights_like(rng, sequences):
    return [[rng.uniform(0.5, 2, len(item)).tolist() for item in sequence] for sequence in sequences]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_end_to_end(combiner, weighted):
    specs = embax.prepare_feature_specs_for_training(sequence_specs(combiner), 1, 3)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    table = oracle.tables_of(variables, specs)["items"][0]
    rng = np.random.default_rng(0)
    sequences, user = draw_sequences(rng), rng.integers(0, 40, (BATCH, VALENCY))
    weights = weights_like(rng, sequences) if weighted else None
    packed = embax.preprocess(
        {"watched": flatten_sequences(sequences, LENGTH), "user": user},
        {"watched": flatten_sequences(weights, LENGTH), "user": None} if weights else None,
        specs=specs,
    )
    activations = embax.lookup(packed, variables, specs=specs)
    found = unflatten_sequences(activations["watched"], LENGTH)
    assert found.shape == (BATCH, LENGTH, DIM)
    np.testing.assert_allclose(found, looked_up_by_items(table, sequences, combiner, weights), rtol=1e-5, atol=1e-5)
    for number, sequence in enumerate(sequences):
        assert not np.asarray(found[number, len(sequence) :]).any()  # Padding is 0, exactly.
    np.testing.assert_allclose(activations["user"], oracle.lookup(table, user, combiner), rtol=1e-5, atol=1e-5)


def test_the_example_of_the_specification():
    """[batch, sequence, valency] through the layer, under jit, and trained."""
    nnx = pytest.importorskip("flax.nnx")
    from embax.nnx.embed import SparseCoreEmbed

    embed = SparseCoreEmbed(sequence_specs(), rngs=nnx.Rngs(0))
    table = oracle.tables_of(oracle.variables_of(embed), embed.feature_specs)["items"][0]
    rng = np.random.default_rng(1)
    ids = {"watched": rng.integers(-1, 40, (BATCH, LENGTH, VALENCY)), "user": rng.integers(0, 40, (BATCH, 1, VALENCY))}
    flat = jax.tree.map(flatten_sequences, ids)
    lengths = {"watched": LENGTH, "user": 1}
    packed = embed.preprocess(flat)

    @nnx.jit
    def forward(embed, packed):
        return jax.tree.map(unflatten_sequences, embed(packed), lengths)

    found = forward(embed, packed)
    expected = looked_up_by_items(table, ids["watched"].tolist(), "mean")
    np.testing.assert_allclose(found["watched"], expected, rtol=1e-5, atol=1e-5)
    assert found["user"].shape == (BATCH, 1, DIM)

    def loss_of(embed, packed):
        return jnp.sum(unflatten_sequences(embed(packed)["watched"], LENGTH)[:, 0])  # The first items alone.

    nnx.grad(loss_of)(embed, packed)
    new = oracle.tables_of(oracle.variables_of(embed), embed.feature_specs)["items"][0]
    gradient = np.ones((BATCH, DIM))
    expected, _ = oracle.row_gradients(len(table), [(ids["watched"][:, 0], None, gradient)], "mean")
    np.testing.assert_allclose(new, table - 0.1 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_order_is_kept(kind):
    ids = np.arange(24, dtype=np.int32).reshape(2, 4, 3)
    flat = flatten_sequences(kind(ids))
    assert isinstance(flat, jax.Array) == (kind is jnp.asarray)
    np.testing.assert_array_equal(flat, [ids[b, s] for b in range(2) for s in range(4)], strict=True)
    np.testing.assert_array_equal(unflatten_sequences(flat, 4), ids, strict=True)


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, jnp.bfloat16])
def test_arrays_are_padded_and_cut(dtype, transform):
    values = np.arange(1, 13).reshape(2, 2, 3).astype(dtype)
    filler = -1 if dtype is np.int32 else 0
    expected = np.concatenate([values, np.full((2, 2, 3), filler, dtype)], axis=1).reshape(8, 3)
    for kind in (np.asarray, jnp.asarray):
        padded = transform(functools.partial(flatten_sequences, max_sequence_length=4))(kind(values))
        np.testing.assert_array_equal(padded, expected, strict=True)
        first = transform(functools.partial(flatten_sequences, max_sequence_length=1, truncate=True))(kind(values))
        np.testing.assert_array_equal(first, values[:, 0], strict=True)
    np.testing.assert_array_equal(transform(lambda a: unflatten_sequences(a, 4))(expected)[:, :2], values, strict=True)


def test_two_dimensions_are_one_id_an_item():
    ids = np.array([[3, 4], [5, -1]])
    np.testing.assert_array_equal(flatten_sequences(ids), [[3], [4], [5], [-1]])
    np.testing.assert_array_equal(flatten_sequences(jnp.asarray(ids), 3), [[3], [4], [-1], [5], [-1], [-1]])


def objects(rows):
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


@pytest.mark.parametrize(
    "sequences",
    [
        [[[3, 4], [5]], [], [[6]]],
        ([[3, 4], [5]], [], [6]),
        [[np.array([3, 4]), jnp.array([5])], np.zeros(0, int), np.array([6])],
        [np.array([[3, 4], [5, -1]]), np.zeros((0, 2), int), np.array([[6, -1]])],
        [jnp.array([[3, 4], [5, -1]]), [], jnp.array([6])],
        objects([objects([np.array([3, 4]), np.array([5])]), [], [[6]]]),
        [[[3, 4], 5], [[]], [[6], []]],
    ],
)
def test_lists_of_any_form(sequences):
    expected = np.array([[3, 4], [5, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1], [6, -1], [-1, -1], [-1, -1]])
    flat = flatten_sequences(sequences, 3)
    assert isinstance(flat, np.ndarray)
    np.testing.assert_array_equal(flat, expected)
    assert flat.dtype.kind == "i"


@pytest.mark.parametrize(
    "sequences",
    [
        [np.array([3], np.uint64), np.array([4, 5], np.int64)],
        [np.array([3], np.uint64), np.array([4, 5], np.int8)],
        [np.array([3], np.uint32), [np.array([4], np.uint64), jnp.array([5])]],
        [[np.uint64(3)], [np.uint64(4), 5]],
        [np.array([[3]], np.uint8), np.array([4, 5], np.uint64)],
    ],
)
def test_integers_stay_integers_and_are_padded_with_no_id(sequences):
    flat = flatten_sequences(sequences, 2)
    assert flat.dtype.kind == "i"
    np.testing.assert_array_equal(flat, [[3], [-1], [4], [5]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
def test_unsigned_arrays_are_padded_with_no_id(dtype):
    flat = flatten_sequences(np.array([[3], [4]], dtype), 2)
    np.testing.assert_array_equal(flat, np.array([[3], [-1], [4], [-1]]), strict=True)


def test_weights_of_several_dtypes():
    flat = flatten_sequences([np.array([1, 2]), np.array([0.5], jnp.bfloat16), np.array([3], np.float16)], 2)
    np.testing.assert_array_equal(flat, np.array([[1], [2], [0.5], [0], [3], [0]], np.float32), strict=True)


def test_lists_of_nothing():
    assert flatten_sequences([], 3).shape == (0, 1)
    np.testing.assert_array_equal(flatten_sequences([[], []], 1), [[-1], [-1]])


@given(
    st.lists(st.lists(st.lists(st.integers(0, 99), max_size=3), max_size=5), max_size=4),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=60)
def test_lists_equal_a_loop(sequences, length, as_weights):
    cast = float if as_weights else int
    sequences = [[[cast(id_) for id_ in item] for item in sequence] for sequence in sequences]
    flat = flatten_sequences(sequences, length, truncate=True)
    kept = [item for sequence in sequences for item in sequence[:length]]
    valency = max([1, *map(len, kept)])
    has_values = any(kept)
    expected = np.full((len(sequences), length, valency), 0 if as_weights and has_values else -1, np.int64)
    for number, sequence in enumerate(sequences):
        for place, item in enumerate(sequence[:length]):
            expected[number, place, : len(item)] = item
    np.testing.assert_array_equal(flat.reshape(expected.shape), expected)
    if has_values:
        assert flat.dtype.kind == ("f" if as_weights else "i")


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the reason is not ours")


@pytest.mark.parametrize(
    ("values", "length", "text"),
    [
        (
            np.zeros((2, 4, 1), int),
            3,
            "every sequence has 4 items, above max_sequence_length=3. Make it at least 4, or pass",
        ),
        (
            [[1], [1, 2, 3, 4]],
            3,
            "sequence 1 has 4 items, above max_sequence_length=3. Make it at least 4, or pass truncate",
        ),
        ([[[1, 2]], [[1]] * 5], 3, "sequence 1 has 5 items"),
        ([[1]], None, "a list of sequences needs max_sequence_length"),
        ([[1]], 0, "max_sequence_length is 0; it must be an integer from 1"),
        (
            np.zeros(3, int),
            3,
            "the values are a NumPy array of shape (3,) and dtype int64. Allowed are an array [batch",
        ),
        (np.zeros((2, 2, 2, 2), int), None, "the values are a NumPy array of shape (2, 2, 2, 2)"),
        ("abc", 3, "the values are a str. Allowed are"),
        (None, 3, "the values are a NoneType"),
        ({"f": [[1]]}, 3, "the values are a dict"),
        (embax.Ragged([1], [0, 1]), 3, "the values are a Ragged"),
        ([1, 2], 3, "sequence 0 is no list of items"),
        ([None], 3, "sequence 0 is a NoneType; ids must be integers"),
        (["abc"], 3, "sequence 0 is a str; ids must be integers"),
        ([[1], [True]], 3, "sequence 1 is a list; ids must be integers"),
        ([[[1], [2, "a"]]], 3, "sequence 0, item 1 is a list; ids must be integers"),
        ([[[1], [[2]]]], 3, "sequence 0 is no list of items, each an id or a 1-d array or list of ids"),
        ([np.zeros((1, 1, 1), int)], 3, "sequence 0 is no list of items"),
        (
            jnp.zeros((2, 2), np.uint32),
            3,
            "dtype uint32 is to be padded; only signed integers (ids, by -1) and floats (weights, by 0) can be. Convert it with "
            "ids.astype(jnp.int32) if all ids are below 2**31",
        ),
        (np.zeros((2, 2), bool), 3, "dtype bool is to be padded; only signed"),
        (
            np.array([[2**64 - 1]], np.uint64),
            3,
            f"flatten_sequences: id {2**64 - 1} is beyond int64, and so outside every",
        ),
        ([[1], np.array([1, 2**63], np.uint64)], 3, f"flatten_sequences: sequence 1: id {2**63} is beyond int64"),
        (
            [[2**63, 1], [1]],
            3,
            f"sequence 0: id {2**63} is beyond int64, and so outside every vocabulary. Remove it, or map",
        ),
        ([[[1], [2**63, -1]]], 3, f"sequence 0, item 1: id {2**63} is beyond int64"),
        ([[1], [-(2**70)]], 3, f"sequence 1: id {-(2**70)} is beyond int64"),
        ([[1], Unreadable()], 3, "flatten_sequences: sequence 1 is no list of items, each an id or"),
        ([[1, Unreadable()]], 3, "flatten_sequences: sequence 0 is no list of items, each an id or"),
        (np.array(None), 3, "the values are a NumPy array of shape () and dtype object"),
        (np.ma.masked_array(np.zeros((2, 2), int)), 3, "are a masked array, whose mask would be lost"),
        ([[np.ma.masked_array(np.zeros(2, int))]], 3, "sequence 0, item 0: its items are a masked array"),
        ([np.ma.masked_array(np.zeros(2, int))], 3, "or make them padding: filled(-1) for ids, filled(0) for weights."),
        ([[1, 2**70]], 3, f"sequence 0: id {2**70} is beyond int64"),
        ([np.ma.masked_array(np.zeros(2, int))], 3, "sequence 0: its items are a masked array"),
    ],
)
def test_sequences_that_are_refused(values, length, text):
    with pytest.raises(ValueError) as error:
        flatten_sequences(values, length)
    assert text in str(error.value)


def test_traced_sequences_of_different_lengths():
    with pytest.raises(ValueError, match="sequence 0: its items are traced by JAX"):
        jax.jit(lambda a: flatten_sequences([a], 3))(np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="sequence 0, item 0: its items are traced by JAX"):
        jax.jit(lambda a: flatten_sequences([[a]], 3))(np.zeros(2, np.int32))


@pytest.mark.parametrize(
    ("activations", "length", "text"),
    [
        (
            np.zeros((7, 2)),
            3,
            "7 items do not divide by sequence_length=3; pass the length that they were flattened with",
        ),
        (np.zeros((6, 2)), 0, "sequence_length is 0; it must be"),
        ({"f": np.zeros((6, 2))}, 3, "the activations are a dict; they must be an array"),
        (
            np.float32(1),
            3,
            "must be an array [batch * sequence, dim] of one feature. For a tree of features call it by",
        ),
    ],
)
def test_activations_that_are_refused(activations, length, text):
    with pytest.raises(ValueError) as error:
        unflatten_sequences(activations, length)
    assert text in str(error.value)
