"""The forms of ids and weights: all that say the same give the same buffers, and what each refuses."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from test_pack import assert_same_as_reference, make_feature, make_table, place

import embax
from embax import Ragged, SparseCoo
from embax._preprocess.packer import Packer

COMBINERS = ["sum", "mean", "sqrtn"]


def specs_of(combiner="sum", vocabulary=20, sparsecores=3):
    return place({"f": make_feature("f", make_table("t", vocabulary, combiner=combiner))}, 1, sparsecores)


def coo_of(rows, values=None, integer=np.int64):
    """`values` (the rows themselves when None) at the coordinates of `rows`."""
    indices = [(sample, position) for sample, row in enumerate(rows) for position in range(len(row))]
    flat = np.array([value for row in (rows if values is None else values) for value in row])
    width = max(map(len, rows), default=0)
    return SparseCoo(np.array(indices, integer).reshape(-1, 2), flat, (len(rows), width))


def shuffled(coo, seed):
    """The same entries, samples in another order, but the entries of each sample in theirs."""
    rng = np.random.default_rng(seed)
    key = rng.permutation(coo.dense_shape[0])[coo.indices[:, 0]]
    order = np.argsort(key, kind="stable")
    return SparseCoo(coo.indices[order], coo.values[order], coo.dense_shape)


def objects(rows):
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


def dense(rows, filler):
    return np.array([list(row) + [filler] * (8 - len(row)) for row in rows]).reshape(-1, 8)


def forms_of(rows, weights):
    """(ids, weights) in every form; `weights` are rows like those of the ids."""
    arrays = [np.array(row, np.int64) for row in rows]
    weight_arrays = [np.array(row, np.float32) for row in weights]
    splits = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    flat, flat_weights = np.concatenate(arrays), np.concatenate(weight_arrays)
    coo, coo_weights = coo_of(rows), coo_of(rows, weights)
    mixed, mixed_weights = shuffled(coo, 0), shuffled(coo_weights, 0)
    return {
        "dense": (dense(rows, -1), dense(weights, np.nan)),
        "JAX": (jnp.asarray(dense(rows, -1)), jnp.asarray(dense(weights, 0.0), jnp.float32)),
        "lists": (rows, weights),
        "lists of arrays": (arrays, weight_arrays),
        "object arrays": (objects(arrays), objects(weight_arrays)),
        "lists, flat weights": (arrays, flat_weights),
        "Ragged": (Ragged(flat, splits), Ragged(flat_weights, splits)),
        "Ragged, flat weights": (Ragged(flat, splits), flat_weights),
        "Ragged, lists of weights": (Ragged(flat, splits), weights),
        "Ragged of JAX": (
            Ragged(jnp.asarray(flat), splits.astype(np.int32)),
            Ragged(jnp.asarray(flat_weights), splits),
        ),
        "SparseCoo": (coo, coo_weights),
        "SparseCoo, flat weights": (coo, flat_weights),
        "SparseCoo of other types": (
            SparseCoo(coo.indices.astype(np.uint32), coo.values.astype(np.uint64), np.array(coo.dense_shape)),
            SparseCoo(coo.indices, coo_weights.values.astype(np.float64), list(coo.dense_shape)),
        ),
        "SparseCoo of JAX": (jax.tree.map(jnp.asarray, coo), jnp.asarray(flat_weights)),
        "SparseCoo, unsorted": (mixed, mixed_weights),
        "SparseCoo, unsorted, flat weights": (mixed, mixed_weights.values),
        "SparseCoo of JAX, unsorted": (jax.tree.map(jnp.asarray, mixed), jax.tree.map(jnp.asarray, mixed_weights)),
    }


ROWS = [[3, 3, 7], [], [19, 0, 0, 4, 11], [5], [], [1, 2, 3, 4, 5, 6, 7, 3]]
rng = np.random.default_rng(7)
WEIGHTS = [rng.uniform(0.5, 2, len(row)).astype(np.float32).tolist() for row in ROWS]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("form", forms_of(ROWS, WEIGHTS))
def test_every_form_gives_the_same_buffers(form, combiner, weighted):
    ids, weights = forms_of(ROWS, WEIGHTS)[form]
    packer = Packer(specs_of(combiner))
    packed = packer({"f": ids}, {"f": weights} if weighted else None)
    assert_same_as_reference(packer, packed, [ROWS], [WEIGHTS if weighted else None])


def test_every_form_is_covered():
    """Weights change the buffers, so the comparison above sees them."""
    packed = [embax.preprocess({"f": ROWS}, weights, specs=specs_of()) for weights in (None, {"f": WEIGHTS})]
    assert not np.array_equal(packed[0].gains, packed[1].gains, equal_nan=True)


@given(
    st.lists(st.lists(st.integers(0, 19), max_size=6), max_size=9),
    st.sampled_from(COMBINERS),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_sparse_ids_equal_ragged_ids(rows, combiner, sparsecores, seed):
    packer = Packer(specs_of(combiner, sparsecores=sparsecores))
    weights = [np.random.default_rng(seed).uniform(0.5, 2, len(row)).astype(np.float32) for row in rows]
    ids, given_weights = shuffled(coo_of(rows), seed), shuffled(coo_of(rows, weights), seed)
    packed = packer({"f": ids}, {"f": given_weights})
    assert_same_as_reference(packer, packed, [rows], [weights])


def test_entries_of_a_sample_keep_their_order():
    """Sums in float32 depend on it."""
    rows, weights = [[1, 2, 3]], [[1.0, 2.0**25, -(2.0**25)]]
    indices = np.array([[1, 0], [0, 9], [0, 4], [0, 0]])  # Positions say nothing about the order.
    packer = Packer(specs_of("mean", sparsecores=1))
    ids = SparseCoo(indices, np.array([5, 1, 2, 3]), (2, 10))
    packed = packer({"f": ids}, {"f": np.array([1.0, *weights[0]])})
    assert_same_as_reference(packer, packed, [[*rows, [5]]], [[*weights, [1.0]]])


def test_sparse_ids_with_empty_samples_at_the_ends():
    packer = Packer(specs_of())
    packed = packer({"f": SparseCoo([[2, 0]], [4], (5, 1))})
    assert_same_as_reference(packer, packed, [[[], [], [4], [], []]], [None])


@pytest.mark.parametrize("batch", [0, 4])
def test_sparse_ids_without_entries(batch):
    for empty in (
        SparseCoo(np.zeros((0, 2)), [], (batch, 0)),
        SparseCoo(np.zeros((0, 2), int), np.zeros(0, int), (batch, 3)),
        SparseCoo([], [], (batch, 3)),
    ):
        packed = embax.preprocess({"f": empty}, {"f": empty}, specs=specs_of())
        assert not packed.row_pointers.any()
        assert packed.layout.stacks[0].batch_sizes == (batch,)


@pytest.mark.parametrize("dense_shape", [(np.uint64(5), 1), (5, np.uint64(1)), [np.int32(5), 2**63], (jnp.int32(5), 1)])
def test_dense_shapes_of_any_integers(dense_shape):
    packer = Packer(specs_of())
    packed = packer(
        {"f": SparseCoo([[2, 0]], [4], dense_shape)}, {"f": SparseCoo([[2, 0]], [2.0], (5, dense_shape[1]))}
    )
    assert_same_as_reference(packer, packed, [[[], [], [4], [], []]], [[[], [], [2.0], [], []]])


def test_sparse_batches_divide_by_the_devices():
    specs = place({"f": make_feature("f", make_table())}, 2, 2)
    with pytest.raises(ValueError, match=r"Feature 'f' has a batch of 3, which does not divide by the 2 devices"):
        embax.preprocess({"f": SparseCoo([[0, 0]], [4], (3, 1))}, specs=specs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Features:
    user: Any
    items: Any


@pytest.mark.parametrize(
    "tree",
    [
        lambda a, b: {"x": {"y": a}, "z": [b]},
        lambda a, b: [a, (b,)],
        lambda a, b: (a, {"b": b}),
        lambda a, b: Features(user=a, items=[b]),
    ],
)
def test_sparse_ids_are_one_leaf_of_any_tree(tree):
    specs = place(tree(make_feature("f", make_table()), make_feature("g", make_table("u"))))
    coo, weights = SparseCoo([[1, 0]], [3], (2, 1)), SparseCoo([[1, 0]], [2.0], (2, 1))
    for second, second_weights in ((coo, weights), (np.array([[-1], [3]]), np.array([[0], [2.0]])), ([[], [3]], None)):
        packed = embax.preprocess(tree(coo, second), tree(weights, second_weights), specs=specs)
        start = packed.layout.stacks[1].entries_start
        assert packed.embedding_ids[[0, start]].tolist() == [3, 3]
        assert packed.sample_ids[[0, start]].tolist() == [1, 1]
        assert packed.gains[[0, start]].tolist() == [2, 1 if second_weights is None else 2]


def test_one_sparse_feature_is_a_tree():
    packed = embax.preprocess(SparseCoo([[1, 0]], [3], (2, 1)), specs=place(make_feature("f", make_table())))
    assert (packed.embedding_ids[0], packed.sample_ids[0]) == (3, 1)


def test_sparse_ids_are_a_pytree():
    coo = coo_of(ROWS)
    moved = jax.tree.map(jnp.asarray, coo)
    assert isinstance(moved, SparseCoo)
    assert jax.tree.structure(coo).num_leaves == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        coo.values = 1


def error_of(ids, weights=None, **kwargs):
    with pytest.raises(ValueError) as error:
        embax.preprocess({"f": ids}, None if weights is None else {"f": weights}, specs=specs_of(**kwargs))
    return str(error.value)


GOOD = SparseCoo(np.array([[0, 0], [0, 4], [2, 1]]), np.array([1, 2, 3]), (3, 5))


def changed(**changes):
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (changed(indices=[[0, 0], [3, 4], [2, 1]]), ["entry 1: sample 3 in its indices is outside the batch of 3"]),
        (changed(indices=[[0, 0], [0, 5], [2, 1]]), ["entry 1: position 5 in its indices is outside the width of 5"]),
        (changed(indices=[[0, 0], [0, 4], [-1, 1]]), ["entry 2: sample -1", "from 0 and below that. Remove the entry"]),
        (changed(indices=[[0, -2], [0, 4], [9, 1]]), ["entry 0: position -2", "or correct dense_shape"]),
        (changed(indices=np.array([[0, 0], [0, 4], [2**64 - 1, 1]], np.uint64)), [f"entry 2: sample {2**64 - 1} in"]),
        (changed(indices=jnp.array([[0, 0], [0, 7], [2, 1]])), ["entry 1: position 7"]),
        (changed(indices=GOOD.indices * 1.0), ["its indices are", "float64; they must be integers", "indices.astype"]),
        (changed(values=GOOD.values * 1.0), ["its ids are", "float64; they must be integers", "ids.astype(np.int64)"]),
        (changed(values=GOOD.values > 1), ["its ids are", "dtype bool"]),
        (changed(indices=GOOD.indices[:2]), ["indices of shape (2, 2) and values of shape (3,)", "[n, 2], of (sample"]),
        (changed(indices=GOOD.indices.T), ["indices of shape (2, 3)"]),
        (changed(indices=GOOD.indices[:, 0]), ["indices of shape (3,)"]),
        (changed(values=GOOD.values[:, None]), ["values of shape (3, 1)"]),
        (changed(dense_shape=(3,)), ["the dense_shape of its SparseCoo is (3,); it must be (batch, width)"]),
        (changed(dense_shape=3), ["the dense_shape of its SparseCoo is 3;"]),
        (changed(dense_shape=(3, 5.0)), ["is (3, 5.0);"]),
        (changed(dense_shape=(3, None)), ["is (3, None);"]),
        (changed(dense_shape=(3, [1])), ["is (3, [1]);"]),
        (changed(dense_shape={3, 5}), ["is {3, 5};"]),
        (changed(dense_shape=(True, 5)), ["is (True, 5);"]),
        (changed(dense_shape=np.array([3, 5.0])), ["is array([3., 5.]);"]),
        (
            changed(dense_shape=(3, np.ma.masked)),
            ["its dense_shape are a masked array", "Pass dense_shape without a mask."],
        ),
        (
            changed(indices=[[0, 0], [0], [2, 1]]),
            ["its indices are not an array of numbers but a list whose parts", "[n, 2]"],
        ),
        (changed(indices=[[0, 0], [0, 2**70], [2, 1]]), [f"entry 1: position {2**70} in its indices is outside"]),
        (changed(indices=2**70), ["indices of shape () and values of shape (3,)"]),
        (changed(indices=[]), ["indices of shape (0, 2) and values of shape (3,)"]),
        (
            changed(values=[[1], [2], [3, 4]]),
            ["its ids are not an array of numbers but a list whose parts", "one an entry"],
        ),
        (changed(values=[1, 2, np.ma.masked]), ["its ids are a masked array"]),
        (changed(dense_shape=(-1, 5)), ["is (-1, 5);", "two integers from 0"]),
        (changed(dense_shape=(2**31, 5)), [f"is ({2**31}, 5);", f"the batch up to {2**31 - 1}"]),
        (changed(values=np.ma.masked_array([1, 2, 3])), ["its ids are a masked array", "ids.filled(-1)"]),
        (
            changed(indices=np.ma.masked_array(GOOD.indices)),
            ["its indices are a masked array, whose mask would be lost. Pass indices without a mask."],
        ),
        (Ragged(np.ma.masked_array([1, 2, 3]), [0, 3]), ["its ids are a masked array"]),
    ],
)
def test_sparse_ids_that_are_refused(ids, texts):
    text = error_of(ids)
    assert text.startswith("Feature 'f'")
    for part in texts:
        assert part in text


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [20, -1])
def test_sparse_ids_outside_of_the_vocabulary(bad, dtype):
    indices = np.array([[2, 1], [0, 7], [0, 3], [0, 5]])
    text = error_of(SparseCoo(indices, np.array([1, 2, bad, 4], dtype), (3, 8)))
    # The place is that of the indices: the id is the second of its sample.
    assert text == (
        f"Feature 'f', sample 0, position 3: id {bad} is outside the vocabulary of table 't', which has 20 rows (ids 0 to 19). "
        "Remove it, map it (for example id % vocabulary_size), or give the table more rows; only in dense 2-d ids is -1 "
        "padding, sparse ids leave out what is not there."
    )
    sorted_ = SparseCoo(np.array([[0, 3], [2, 5], [2, 9]]), np.array([1, 2, bad], dtype), (3, 10))
    assert error_of(sorted_).startswith(f"Feature 'f', sample 2, position 9: id {bad} is outside")


def test_unsigned_sparse_ids_never_wrap():
    indices = np.array([[2, 1], [0, 7], [0, 3]])
    text = error_of(SparseCoo(indices, np.array([1, 2, 2**64 - 1], np.uint64), (3, 8)))
    assert text.startswith(f"Feature 'f', sample 0, position 3: id {2**64 - 1} is outside")


@pytest.mark.parametrize(
    ("weights", "texts"),
    [
        (
            changed(indices=[[0, 0], [0, 3], [2, 1]]),
            ["entry 1: its id is at (sample, position) (0, 4), its weight at (0, 3)"],
        ),
        (
            changed(indices=GOOD.indices[::-1]),
            ["entry 0: its id is at (sample, position) (0, 0), its weight at (2, 1)"],
        ),
        (changed(indices=GOOD.indices[:2]), ["its weights have indices of shape (2, 2), its ids of shape (3, 2)"]),
        (changed(values=np.ones(2)), ["there are 2 weights for 3 ids; each id needs one"]),
        (
            changed(values=np.ones((3, 1))),
            ["the SparseCoo of its weights has values of shape (3, 1); they must be [n]"],
        ),
        (changed(values=[[1.0], 2.0, 3.0]), ["its weights are not an array of numbers but a list", "one an entry"]),
        (changed(indices=[[0, 0], [0], [2, 1]]), ["weights: its indices are not an array of numbers but a list"]),
        (changed(indices=2**70), ["its weights have indices of shape (), its ids of shape (3, 2)"]),
        (changed(indices=np.full((3, 2), "a")), ["weights: its indices are", "must be integers"]),
        (changed(dense_shape=(3, 6)), ["the dense_shape of its weights is (3, 6), of its ids (3, 5)"]),
        (
            changed(values=np.array([1.0, np.nan, 1])),
            ["sample 0, position 4: the weight is nan; weights must be finite"],
        ),
        (np.array([1.0, 1.0, -np.inf]), ["sample 2, position 1: the weight is -inf", "Use 0 for an id that should"]),
        (np.array([1.0, 1.0, 1e300]), ["sample 2, position 1: the weight is inf"]),
        (np.ones(4), ["there are 4 weights for 3 ids"]),
        (
            np.ones((3, 1)),
            ["weights are a NumPy array of shape (3, 1)", "a SparseCoo with the same indices, a 1-d array"],
        ),
        ([1.0, 1.0, 1.0], ["its weights are a list; for ids in a SparseCoo"]),
        (Ragged(np.ones(3), [0, 2, 2, 3]), ["its weights are a Ragged; for ids in a SparseCoo"]),
        (np.array(["a", "b", "c"]), ["must be real numbers"]),
        (np.ma.masked_array([1.0, 2.0, 3.0]), ["its weights are a masked array", "weights.filled(0)"]),
        (changed(values=np.ma.masked_array([1.0, 2.0, 3.0])), ["its weights are a masked array"]),
    ],
)
def test_weights_of_sparse_ids_that_are_refused(weights, texts):
    text = error_of(GOOD, weights)
    assert text.startswith("Feature 'f'")
    for part in texts:
        assert part in text


def test_faulty_weights_of_unsorted_sparse_ids_are_named_by_their_position():
    ids = SparseCoo(np.array([[2, 1], [0, 7], [0, 3]]), np.array([1, 2, 3]), (3, 8))
    text = error_of(ids, np.array([1.0, 1.0, np.nan]))
    assert text.startswith("Feature 'f', sample 0, position 3: the weight is nan;")


def test_invalid_sparse_entries_are_dropped_on_request():
    ids = SparseCoo(np.array([[2, 1], [0, 7], [0, 3], [1, 0]]), np.array([1, 20, 3, 4]), (3, 8))
    packer = Packer(specs_of("mean"), validation="drop")
    packed = packer({"f": ids}, {"f": np.array([1.0, 1.0, 2.0, np.nan])})
    assert packed.stats.invalid_ids == {"f": 2}
    packed.stats.invalid_ids.clear()
    assert_same_as_reference(packer, packed, [[[3], [], [1]]], [[[2.0], [], [1.0]]])


def test_sparse_weights_are_for_sparse_ids():
    weights = dataclasses.replace(GOOD, values=np.ones(3))
    assert "its weights are a SparseCoo, its ids have shape (3, 5)" in error_of(np.zeros((3, 5), int), weights)
    assert "its weights are a SparseCoo; for ragged ids they must be ragged" in error_of([[1, 2], [], [3]], weights)


def test_traced_sparse_ids():
    specs = specs_of()
    with pytest.raises(ValueError, match=r"Feature 'f': its indices are traced by JAX.*call it outside jit"):
        jax.jit(lambda coo: embax.preprocess({"f": coo}, specs=specs).gains)(GOOD)
