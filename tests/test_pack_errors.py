"""Everything that packing refuses, and that its messages say what, where, the value, the limit and the remedy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pack import assert_same_as_reference, make_feature, make_table, place

from embax import _native
from embax._preprocess.coo import SparseCoo
from embax._preprocess.faults import TOO_MANY_IDS, Fault, fault_error
from embax._preprocess.inputs import Ragged
from embax._preprocess.pack import preprocess
from embax._preprocess.packer import Packer
from embax._stacking.plan import make_plan


@pytest.fixture
def specs():
    table = make_table("movie", 100)
    return place({"watched": make_feature("watched", table), "liked": make_feature("liked", table)})


@pytest.fixture
def good():
    return np.array([[1, 2], [3, -1]])


def error_of(ids, weights=None, **kwargs):
    with pytest.raises(ValueError) as error:
        preprocess(ids, weights, **kwargs)
    return str(error.value)


def watched(ids, weights=None, *, specs, good=((1, 2), (3, 4))):
    """The error for these ids (and weights) of feature "watched"; its second feature is fine."""
    weights = None if weights is None else {"watched": weights, "liked": None}
    return error_of({"watched": ids, "liked": np.array(good)}, weights, specs=specs)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [100, -2, 2**31 - 1, -(2**31), 2**31, 2**32 + 1, -(2**63), 2**63 - 1])
def test_ids_outside_of_the_vocabulary(bad, dtype, specs):
    if abs(bad + 0.5) > np.iinfo(dtype).max + 0.5:
        pytest.skip("not a number of this type")
    ids = np.zeros((30, 5), dtype)
    ids[17, 3] = bad
    assert watched(ids, specs=specs) == (
        f"Feature 'watched', sample 17, position 3: id {bad} is outside the vocabulary of table 'movie', which has 100 "
        "rows (ids 0 to 99). Remove it, map it (for example id % vocabulary_size), or give the table more rows; in "
        "dense ids -1 is padding."
    )


@pytest.mark.parametrize("bad", [2**32 - 1, 2**63, 2**64 - 1])
def test_unsigned_ids_never_wrap(bad, specs):
    ids = np.zeros((3, 2), np.uint64)
    ids[2, 1] = bad
    assert watched(ids, specs=specs).startswith(f"Feature 'watched', sample 2, position 1: id {bad} is outside")
    rows = [np.zeros(2, np.uint64), np.array([], np.int64), np.array([0, 5, bad], np.uint64), np.array([-5])]
    assert watched(rows, specs=specs).startswith(f"Feature 'watched', sample 2, position 2: id {bad} is outside")
    ragged = Ragged(np.array([0, 5, bad], np.uint64), [0, 1, 3])
    assert watched(ragged, specs=specs).startswith(f"Feature 'watched', sample 1, position 1: id {bad} is outside")
    assert watched(np.array([[2**32 - 1]], np.uint32), specs=specs).startswith(
        "Feature 'watched', sample 0, position 0: id 4294967295 is outside"
    )


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_padding_is_for_dense_ids_only(dtype, specs):
    text = watched([np.array([1, 2], dtype), np.array([3, -1], dtype)], specs=specs)
    assert text.startswith("Feature 'watched', sample 1, position 1: id -1 is outside the vocabulary of table 'movie'")
    assert text.endswith("only in dense 2-d ids is -1 padding, ragged ids leave out what is not there.")


def test_the_first_fault_is_reported_whatever_the_threads_do(monkeypatch):
    tables = {name: make_table(name, 1000) for name in "abcdefgh"}
    packer = Packer(place({name: make_feature(name, table) for name, table in tables.items()}, 1, 4))
    ids = {name: np.zeros((2000, 8), np.int64) for name in tables}
    for name, sample, position in (
        ("h", 0, 0),
        ("c", 1999, 7),
        ("c", 1400, 5),
        ("c", 1400, 6),
        ("d", 3, 3),
        ("c", 1999, 0),
    ):
        ids[name][sample, position] = 1000 + sample
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("EMBAX_NUM_THREADS", threads)
        for _ in range(20):
            with pytest.raises(ValueError, match="Feature 'c', sample 1400, position 5: id 2400 is outside"):
                packer(ids)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weights_that_are_not_finite(bad, combiner):
    specs = place({"watched": make_feature("watched", make_table(combiner=combiner))}, 1, 2)
    weights = np.ones((9, 4), np.float32)
    weights[7, 2] = bad
    text = error_of({"watched": np.ones((9, 4), int)}, {"watched": weights}, specs=specs)
    assert text == (
        f"Feature 'watched', sample 7, position 2: the weight is {bad}; weights must be finite float32 numbers. Use 0 "
        "for an id that should not count."
    )
    rows = [np.ones(3, int)] * 8 + [np.ones(4, int)]
    weights = [np.ones(3)] * 8 + [np.array([1, 1, 1, bad])]
    text = error_of({"watched": rows}, {"watched": weights}, specs=specs)
    assert text.startswith(f"Feature 'watched', sample 8, position 3: the weight is {bad};")


def test_weights_that_float32_does_not_hold(specs, good):
    text = watched(good, np.array([[1.0, 1e300], [1, 1]]), specs=specs)
    assert text.startswith("Feature 'watched', sample 0, position 1: the weight is inf;")


def test_weights_whose_mean_overflows():
    specs = place({"watched": make_feature("watched", make_table(combiner="mean"))})
    text = error_of({"watched": [[1], [1, 2, 3]]}, {"watched": [[1.0], [3e38, -3e38, 0.001]]}, specs=specs)
    assert text == (
        "Feature 'watched', sample 1: combiner 'mean' divides its weights by 0.00100000005, and the divisor or "
        "the result is beyond the range of float32. Scale the weights, or use combiner 'sum'."
    )


@pytest.mark.parametrize(
    ("splits", "text"),
    [
        ([1, 2, 3], ": row_splits starts at 1; it must start at 0."),
        ([-1, 2, 3], ": row_splits starts at -1; it must start at 0."),
        ([0, 2, 2], ": row_splits ends at 2, but there are 3 values; it must end at their number."),
        ([0, 2, 4], ": row_splits ends at 4, but there are 3 values; it must end at their number."),
        ([0], ": row_splits ends at 0, but there are 3 values; it must end at their number."),
        ([0, 2, 1, 3], ", sample 1: row_splits decreases from 2 to 1; it must never decrease."),
        ([0, 2**62, 3], f", sample 1: row_splits decreases from {2**62} to 3; it must never decrease."),
        ([0, -(2**62), 3], f", sample 0: row_splits decreases from 0 to {-(2**62)}; it must never decrease."),
    ],
)
@pytest.mark.parametrize("sparsecores", [1, 2, 5])
def test_row_splits(splits, text, sparsecores):
    specs = place({"watched": make_feature("watched", make_table())}, 1, sparsecores)
    assert (
        error_of({"watched": Ragged(np.array([1, 2, 3]), np.array(splits))}, specs=specs) == f"Feature 'watched'{text}"
    )


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the reason is not ours")


THREE = Ragged([1, 2, 3], [0, 2, 3])
JOIN = ["join them with np.concatenate, or pass the list of samples without a Ragged"]


@pytest.mark.parametrize(
    ("leaf", "texts"),
    [
        (np.array([[1.0]]), ["array of shape (1, 1) and dtype float64", "must be integers", "astype(np.int64)"]),
        (np.array([[True]]), ["dtype bool", "must be integers"]),
        (np.array([["a"]]), ["dtype <U1", "must be integers"]),
        (np.array([[1 + 2j]]), ["dtype complex128", "must be integers"]),
        (np.array([[None]]), ["dtype object", "must be integers"]),
        (np.array(3), ["have shape ()", "must have 2 dimensions, [batch, valency]"]),
        (np.array([3, 4]), ["have shape (2,)", "must have 2 dimensions", "one id a sample; here it has 3"]),
        (np.zeros((2, 2, 2), int), ["have shape (2, 2, 2)", "must have 2 dimensions", "Reshape them"]),
        (jnp.zeros((2, 2)), ["a NumPy array of shape (2, 2) and dtype float32", "must be integers"]),
        ([[1, 2], [3.5]], ["sample 1: its ids are", "dtype float64", "must be integers"]),
        ([[1.0], [2.0]], ["sample 0: its ids are", "must be integers"]),
        ([np.array([1]), np.array([1.0])], ["sample 1: its ids are", "must be integers"]),
        ([[1], [True]], ["sample 1: its ids are", "dtype bool"]),
        ([[1], [[2]]], ["sample 1: its ids have 2 dimensions", "must be a 1-d array or a list"]),
        ([np.array([[1]])], ["sample 0: its ids have 2 dimensions"]),
        ([[1], [[2], [3, 4]]], ["sample 1: its ids are not an array of numbers"]),
        (
            [1, 2],
            ["sample 0: its ids are a int; in a list of samples each one must be a 1-d array or a list, and a samp"],
        ),
        ([None] * 8, ["sample 0: its ids are a NoneType; in a list of samples", "a sample without ids is []"]),
        (["ab"] * 8, ["sample 0: its ids are a str; in a list of samples"]),
        ([[1], {1, 2}], ["sample 1: its ids are a set; in a list of samples"]),
        (
            [["ab"]],
            ["sample 0: its ids are", "Map each string to an integer of its own first, the same in every batch"],
        ),
        (
            [[1], [2, None]],
            ["sample 1: its ids are", "dtype object; they must be integers. One of them is a NoneType."],
        ),
        ([[1], [2**70, 0.5]], ["sample 1: its ids are", "One of them is a float."]),
        (None, ["its ids are a NoneType", "Allowed are an integer array [batch, valency]"]),
        ("abc", ["its ids are a str"]),
        ({"a": 1}, ["its ids are a dict"]),
        (Ragged([[1]], [0, 1]), ["Ragged has values of shape (1, 1)", "must be 1-d"]),
        (Ragged([1], []), ["row_splits of shape (0,)"]),
        (Ragged([1], 1), ["row_splits of shape ()"]),
        (Ragged([1.5], [0, 1]), ["dtype float64", "must be integers"]),
        (Ragged([1], [0.0, 1.0]), ["its row_splits are", "must be integers"]),
        (Ragged([1, 2], [0, None]), ["its row_splits are", "One of them is a NoneType."]),
        (Ragged([[1, 2], [3]], [0, 2, 3]), ["its ids are not an array of numbers but a list whose parts", *JOIN]),
        (
            Ragged([1, 2, 3], [[0], 2, 3]),
            ["its row_splits are not an array of numbers but a list", "one list of integ"],
        ),
        (Ragged([1, np.ma.masked], [0, 2]), ["its ids are a masked array", "Leave masked ids out"]),
        (
            Ragged([1], np.ma.masked_array([0, 1])),
            ["its row_splits are a masked array", "Pass row_splits without a mask."],
        ),
        (
            [np.ma.masked_array([1, 2])],
            ["sample 0: its ids are a masked array, whose mask would be lost. Leave masked"],
        ),
        ([[1, np.ma.masked]], ["sample 0: its ids are a masked array"]),
        (Unreadable(), ["its ids are a Unreadable. Allowed"]),
        (jax.random.key(0), ["its ids are a JAX array of shape () and dtype key<fry>; they must be numbers."]),
        ([[1], [jax.random.key(0)]], ["sample 1: its ids are not an array of numbers but a list"]),
        ([[1], Unreadable()], ["sample 1: its ids are not an array of numbers but a Unreadable. Allowed"]),
        (np.array([[1.0]]), ["if they are whole numbers, and before embax.flatten_sequences."]),
    ],
)
def test_ids_of_other_forms(leaf, texts, specs):
    text = watched(leaf, specs=specs)
    assert text.startswith("Feature 'watched'")
    for part in texts:
        assert part in text
    assert text.count("Feature 'watched'") == 1
    assert not any(word in text for word in ("inhomogeneous", "filled(0)", "not ours"))


@pytest.mark.parametrize("bad", [2**70, -(2**70), 2**63, 10**400])
@pytest.mark.parametrize(
    "form",
    [
        lambda bad: [[1], [2, bad]],
        lambda bad: [[1], [np.uint64(2), bad]],
        lambda bad: [[1], np.array([2, bad], object)],
        lambda bad: Ragged([1, 2, bad], [0, 1, 3]),
        lambda bad: SparseCoo([[1, 1], [0, 0], [0, 1]], [bad, 1, 2], (2, 2)),
        lambda bad: np.array([[1, 2], [3, bad]], object),
    ],
)
def test_ids_beyond_int64(form, bad, specs):
    text = watched(form(bad), specs=specs)
    assert text.startswith("Feature 'watched', sample 1, position ")
    assert f"id {bad} is outside the vocabulary of table 'movie', which has 100 rows (ids 0 to 99)." in text
    packer = Packer(specs, validation="drop")
    assert packer({"watched": form(bad), "liked": [[1], [2]]}).stats.invalid_ids["watched"] == 1


def test_integers_that_numpy_makes_floats_stay_exact(specs):
    packer = Packer(specs)
    for ids in ([[np.uint64(3), 4], []], Ragged([np.uint64(3), 4], [np.uint64(0), 2, 2])):
        packed = packer({"watched": ids, "liked": [[], []]})
        assert_same_as_reference(packer, packed, [[[], []], [[3, 4], []]], [None, None])
    assert "sample 0, position 1: id -1 is outside" in watched(Ragged([1, -1, 2**63], [0, 2, 3]), specs=specs)


def test_traced_ids_in_lists(specs):
    for form in (
        lambda a: Ragged([a, 1], [0, 2]),
        lambda a: Ragged([1, 1], [0, a]),
        lambda a: SparseCoo([[a, 0]], [1], (1, 1)),
        lambda a: SparseCoo([[0, 0]], [a], (1, 1)),
        lambda a: SparseCoo([[0, 0]], [1], (a, 1)),
        lambda a: [[a]],
        lambda a: [[1], [1, (a,)]],
    ):
        with pytest.raises(ValueError, match=r"Feature 'watched'.*: its \w+ are traced by JAX.*call it outside jit"):
            jax.jit(lambda a, form=form: preprocess({"watched": form(a), "liked": [[]]}, specs=specs).gains)(1)


def test_more_sparsecores_than_row_pointers_count():
    plan = make_plan(place({"watched": make_feature("watched", make_table())}, 1, 2))
    for num_sparsecores, ids, texts in (
        (
            10**7,
            3,
            ["gets 3 ids of its stack; with 10000000 SparseCores in all", "at most 0. Place the tables on fewer"],
        ),
        (4, 2**31, [f"count at most {2**31 - 1 - 2048}. Split the batch, or use more SparseCores."]),
    ):
        large = dataclasses.replace(plan, num_sparsecores_per_device=num_sparsecores)
        text = str(fault_error(large, [], Fault(TOO_MANY_IDS, 0, 0, 0, ids, 0.0)))
        assert text.startswith("Feature 'watched': one SparseCore")
        assert all(part in text for part in texts)


@pytest.mark.parametrize(
    ("ids", "weights", "texts"),
    [
        (np.ones((2, 3), int), np.ones((2, 2)), ["weights are a NumPy array of shape (2, 2)", "ids have shape (2, 3)"]),
        (np.ones((2, 3), int), np.ones(6), ["weights are a NumPy array of shape (6,)", "ids have shape (2, 3)"]),
        (
            np.ones((2, 3), int),
            [[1.0] * 3] * 2,
            ["weights are a list", "array of the same shape", "Convert the list with np.asarray(weights, np.float32)"],
        ),
        (np.ones((2, 3), int), np.ones((2, 3), bool), ["dtype bool", "must be real numbers"]),
        (np.ones((2, 3), int), np.ones((2, 3), complex), ["dtype complex128", "must be real numbers"]),
        ([[1, 2], [3]], [[1.0, 2.0], [3.0, 4.0]], ["sample 1: there are 1 ids but 2 weights"]),
        ([[1, 2], [3]], [[1.0, 2.0]], ["weights have 1 samples, its ids have 2"]),
        ([[1, 2], [3]], np.ones((2, 2)), ["sample 1: there are 1 ids but 2 weights"]),
        ([[1, 2], [3]], 1.0, ["weights are a float", "ragged in the same way"]),
        ([[1, 2], [3]], np.array(1.0), ["weights are a NumPy array of shape ()", "ragged in the same way"]),
        ([[1, 2], [3]], [None, [1.0]], ["sample 0: its weights are a NoneType;", "None in place of the list"]),
        (
            [[1, 2], [3]],
            [[1.0, 10**400], [1.0]],
            ["sample 0: its weights are", "dtype object", "np.asarray(weights, np.fl"],
        ),
        (
            [[1, 2], [3]],
            [[1.0, np.ma.masked], [1.0]],
            ["sample 0: its weights are a masked array", "weights.filled(0)"],
        ),
        ([[1, 2], [3]], [["a", "b"], ["c"]], ["sample 0: its weights are", "must be real numbers"]),
        (Ragged([1, 2], [0, 2]), np.ones(3), ["there are 3 weights for 2 ids"]),
        (Ragged([1, 2], [0, 2]), Ragged(np.ones(3), [0, 2]), ["there are 3 weights for 2 ids"]),
        (Ragged([1, 2], [0, 1, 2]), Ragged(np.ones(2), [0, 2, 2]), ["sample 0: there are 1 ids but 2 weights"]),
        *(
            (THREE, Ragged([1.0, 2.0, 3.0], splits), [text])
            for splits, text in (
                (
                    [1, 3, 4],
                    "the row_splits of its weights start at 1; they must start at 0. They must equal the row_splits of the ids.",
                ),
                ([-1, 1, 2], "the row_splits of its weights start at -1;"),
                ([0, 4, 3], "sample 1: the row_splits of its weights decrease from 4 to 3; they must never decrease."),
                (np.array([0, 2, 1], np.uint64), "sample 1: the row_splits of its weights decrease from 2 to 1"),
                (
                    [0, 2, 4],
                    "the row_splits of its weights end at 4, but there are 3 weights; they must end at their number.",
                ),
                ([0, 2], "the row_splits of its weights end at 2, but there are 3 weights"),
                ([0, 3], "its weights have 1 samples, its ids have 2."),
                ([0, 1, 3], "sample 0: there are 2 ids but 1 weights."),
                (
                    [],
                    "the Ragged of its weights has values of shape (3,) and row_splits of shape (0,); they must be 1-d",
                ),
                (
                    [[0, 2, 3]],
                    "values of shape (3,) and row_splits of shape (1, 3); they must be 1-d, and row_splits one",
                ),
                (
                    [0.0, 2.0, 3.0],
                    "weights: its row_splits are a NumPy array of shape (3,) and dtype float64; they must be",
                ),
                ([0, [2], 3], "weights: its row_splits are not an array of numbers but a list"),
                (np.ma.masked_array([0, 2, 3]), "weights: its row_splits are a masked array"),
            )
        ),
        (THREE, Ragged([[1.0], [2.0], [3.0]], [0, 2, 3]), ["the Ragged of its weights has values of shape (3, 1)"]),
        (THREE, Ragged([[1.0, 2.0], [3.0]], [0, 2, 3]), ["its weights are not an array of numbers but a list", *JOIN]),
    ],
)
def test_weights_of_other_forms(ids, weights, texts, specs):
    text = watched(ids, weights, specs=specs)
    assert text.startswith("Feature 'watched'")
    for part in texts:
        assert part in text


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"a": 1}, "ids['b'] is missing"),
        ({"a": 1, "b": {"x": [1, 2]}, "c": 3}, "ids['c'] has no place in the specs"),
        ({"a": 1, "b": {"y": [1, 2]}}, "ids['b']['x'] is missing; ids['b']['y'] has no place in the specs"),
        ({"a": 1, "b": {"x": [1]}}, "ids['b']['x'] has 1 elements, the specs have 2"),
        ({"a": 1, "b": {"x": (1, 2)}}, "ids['b']['x'] is a tuple, the specs have a list"),
        ({"a": 1, "b": 2}, "ids['b'] is a int, the specs have a mapping with the keys ['x']"),
        ([1, 2], "ids is a list, the specs have a mapping with the keys ['a', 'b']"),
        (None, "ids is a NoneType, the specs have a mapping"),
    ],
)
def test_trees_of_another_structure(tree, text):
    table = make_table()
    specs = place({"a": make_feature("a", table), "b": {"x": [make_feature("bx0", table), make_feature("bx1", table)]}})
    message = error_of(tree, specs=specs)
    assert message.startswith("The ids must have the structure of the feature specs, one leaf a feature: ")
    assert text in message
    if tree is not None:
        ids = {"a": [[1]], "b": {"x": [[[1]], [[1]]]}}
        assert text.replace("ids", "weights") in error_of(ids, tree, specs=specs)


def test_traced_ids(specs, good):
    with pytest.raises(ValueError, match=r"Feature 'watched', sample 0: its ids are traced by JAX"):
        jax.jit(lambda ids: preprocess({"watched": [ids], "liked": good}, specs=specs))(good[0])


def test_batches_that_do_not_divide():
    specs = place({"f": make_feature("f", make_table())}, 4, 2)
    text = error_of({"f": np.ones((10, 2), int)}, specs=specs)
    assert text == (
        "Feature 'f' has a batch of 10, which does not divide by the 4 devices of this process; fill it up to 12 "
        "samples (dense ids of -1, or empty ragged samples, contribute nothing)."
    )
    assert "3 devices" in error_of({"f": np.ones((10, 2), int)}, specs=specs, num_local_devices=3)


def test_limits_of_ids():
    specs = place({"f": make_feature("f", make_table(vocabulary=64, max_ids_per_partition=2))}, 1, 2)
    ids = {"f": np.array([[0], [0], [5], [1], [3], [5]])}  # SparseCore 1 has three odd ids.
    assert error_of(ids, specs=specs) == (
        "Stack 't': a SparseCore of local device 0 has 3 ids for the rows of SparseCore 1, above "
        "max_ids_per_partition=2. Call embax.update_preprocessing_parameters(specs, error.stats) with the stats of this "
        "exception, which makes room for this batch, or set max_ids_per_partition to at least 3 in the spec of 't' before "
        'it is placed, or let the limits grow with limits="grow".'
    )
    assert preprocess(ids, specs=specs, limits="grow").row_pointers.any()


def test_limits_of_distinct_ids():
    specs = place({"f": make_feature("f", make_table(vocabulary=64, max_unique_ids_per_partition=2))}, 2, 1)
    ok = {"f": np.array([[0], [0], [0], [1], [3], [5]])}
    text = error_of(ok, specs=specs)
    assert (
        "local device 1 has 3 distinct ids for the rows of SparseCore 1, above max_unique_ids_per_partition=2" in text
    )
    assert "set max_unique_ids_per_partition to at least 3" in text
    assert preprocess({"f": np.array([[0], [0], [0], [1], [3], [3]])}, specs=specs).row_pointers.any()


def test_limits_of_buffers():
    table = make_table(vocabulary=64, suggested_coo_buffer_size_per_device=16)
    specs = place({"f": make_feature("f", table)}, 1, 2)
    ids = {"f": np.array([[0], [0], [0], [0], [1], [2]])}
    assert error_of(ids, specs=specs) == (
        "Stack 't': SparseCore 1 of local device 0 needs 16 entries of the packed buffer, above the 8 that it gets "
        "from suggested_coo_buffer_size_per_device=16. Call embax.update_preprocessing_parameters(specs, error.stats) with "
        "the stats of this exception, which makes room for this batch, or set suggested_coo_buffer_size_per_device to at "
        "least 32 in the spec of 't' before it is placed, or let the limits grow with limits=\"grow\"."
    )
    table = make_table(vocabulary=64, suggested_coo_buffer_size_per_device=32)
    assert preprocess(ids, specs=place({"f": make_feature("f", table)}, 1, 2)).row_pointers.any()


@pytest.mark.parametrize("limits", ["shrink", None, True, "Raise", ["grow"]])
def test_unknown_limits(limits, specs, good):
    text = error_of({"watched": good, "liked": good}, specs=specs, limits=limits)
    assert text == f"limits is {limits!r}; it must be one of 'raise', 'grow', 'drop'."


@pytest.mark.parametrize("validation", ["grow", None, False, "Drop", {}])
def test_unknown_validation(validation, specs, good):
    text = error_of({"watched": good, "liked": good}, specs=specs, validation=validation)
    assert text == f"validation is {validation!r}; it must be one of 'raise', 'drop', 'trust'."


def test_local_devices(specs, good):
    ids = {"watched": good, "liked": good}
    for number in (0, 2, -1, 1.5, True):
        assert "num_local_devices" in error_of(ids, specs=specs, num_local_devices=number)
    specs = place({"f": make_feature("f", make_table())}, 2, 1)
    assert "compile different programs and hang" in error_of(
        {"f": good}, specs=specs, limits="grow", num_local_devices=1
    )


def test_specs_that_are_not_specs(good):
    assert "every leaf must be a FeatureSpec" in error_of({"f": good}, specs={"f": 3})
    assert "The feature specs are empty" in error_of({}, specs={})


def test_specs_that_are_not_placed(good):
    text = error_of({"f": good}, specs={"f": make_feature("f", make_table())})
    assert "prepare_feature_specs_for_training" in text


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " 2", "9999", "²", "1" * 5000])
def test_thread_counts(value, specs, good, monkeypatch):
    monkeypatch.setenv("EMBAX_NUM_THREADS", value)
    text = error_of({"watched": good, "liked": good}, specs=specs)
    assert text == f"EMBAX_NUM_THREADS is {value!r}; it must be an integer from 1 to 1024, or unset."


def test_buffers_beyond_memory():
    """More than an address space holds, so that no memory is touched."""
    table = make_table(vocabulary=64, max_ids_per_partition=2**31 - 1, suggested_coo_buffer_size_per_device=2**31 - 65)
    specs = place(
        {f"f{i}": make_feature(f"f{i}", table if i == 0 else make_table(f"t{i}")) for i in range(3)}, 2**16, 1
    )
    ids = {f"f{i}": np.zeros((2**16, 1), np.int32) for i in range(3)}
    text = r"Packing needs more memory than there is: .* 3 stacks of 1 SparseCores a device and 65536 in all, and buffers of \d+"
    with pytest.raises(MemoryError, match=text):
        preprocess(ids, specs=specs, limits="drop")


class TestNativeArguments:
    """The native functions refuse what Python would never pass, rather than read or write out of bounds."""

    def arguments(self, **changes):
        arguments = {
            "ids": [np.zeros((2, 2), np.int32)],
            "weights": [None],
            "row_splits": [None],
            "features": np.array([[8, 0, 0]]),
            "stacks": np.array([[0, 8, 1]]),
            "order": np.array([0]),
            "num_local_devices": 1,
            "sparsecores_per_device": 1,
            "num_sparsecores": 1,
            "validation": 0,
            "count_merged": False,
            "threads": 1,
        }
        return arguments | changes

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"ids": []}, ValueError),
            ({"ids": [None]}, TypeError),
            ({"ids": [[1]]}, TypeError),
            ({"ids": [np.zeros((2, 2), np.float32)]}, ValueError),
            ({"ids": [np.zeros((2, 2), np.uint32)]}, ValueError),
            ({"ids": [np.zeros(4, np.int32)]}, ValueError),
            ({"ids": [np.zeros((4, 4), np.int32)[:, ::2]]}, TypeError),
            ({"row_splits": [np.zeros(3, np.int64)]}, ValueError),
            ({"ids": [np.zeros(4, np.int32)], "row_splits": [np.zeros(3, np.int32)]}, ValueError),
            ({"ids": [np.zeros(4, np.int32)], "row_splits": [np.zeros(0, np.int64)]}, ValueError),
            ({"weights": [np.zeros((2, 2))]}, ValueError),
            ({"weights": [np.zeros((4, 1), np.float32)]}, ValueError),
            ({"weights": [np.zeros(4, np.float32)]}, ValueError),
            ({"features": np.array([[8, 0]])}, ValueError),
            ({"features": np.array([[8.0, 0, 0]])}, TypeError),
            ({"stacks": np.array([[3, 8, 1]])}, ValueError),
            ({"stacks": np.array([[0, 8, 2]])}, ValueError),
            ({"stacks": np.array([[0, 8, -1]])}, ValueError),
            ({"order": np.array([1])}, ValueError),
            ({"order": np.array([-1])}, ValueError),
            ({"validation": 3}, ValueError),
            ({"validation": -1}, ValueError),
        ],
    )
    def test_refuses_wrong_arrays(self, changes, error):
        with pytest.raises(error):
            _native.sort_batch(**self.arguments(**changes))

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_local_devices": 0},
            {"num_local_devices": 2},
            {"sparsecores_per_device": 0},
            {"num_sparsecores": 0},
            {"num_sparsecores": 3},
            {"num_sparsecores": 2**40},
            {"features": np.array([[9, 0, 0]])},
            {"features": np.array([[0, 0, 0]])},
            {"features": np.array([[8, 1, 0]])},
            {"features": np.array([[8, -1, 0]])},
            {"features": np.array([[2**40, 0, 0]])},
            {"stacks": np.array([[0, 0, 1]])},
            {"stacks": np.array([[0, 2**31, 1]])},
        ],
    )
    def test_refuses_contradictions(self, changes):
        assert _native.sort_batch(**self.arguments(**changes))[0] == 8

    def test_refuses_more_ids_than_int32_can_count(self):
        # With so many partitions of 64 minibatches, 8 entries of padding each leave room for 511 ids.
        changes = {"num_sparsecores": 2**22 - 1, "stacks": np.array([[0, 2**22 - 1, 1]])}
        fault = _native.sort_batch(**self.arguments(ids=[np.zeros((8, 64), np.int32)], **changes))
        assert (fault[0], fault[1], fault[4]) == (7, 0, 512)

    @pytest.mark.parametrize("limits", [np.zeros((1, 2), int), np.zeros((2, 3), int), np.array([[1, 1, -1]])])
    def test_refuses_wrong_limits(self, limits):
        batch = _native.sort_batch(**self.arguments(count_merged=True))
        with pytest.raises(ValueError, match="limits"):
            _native.drop(batch, limits, False)
        with pytest.raises(ValueError, match="limits"):
            _native.minibatch_boundaries(batch, limits, 1)

    def test_drops_whatever_comes_in_which_order(self):
        # Without `count_merged`, each entry counts once; a second call, or one after minibatches, changes nothing unsound.
        for count_merged in (False, True):
            batch = _native.sort_batch(**self.arguments(count_merged=count_merged))
            assert _native.drop(batch, np.array([[1, 1, 0]]), False).tolist() == [4 if count_merged else 2]
            assert _native.form_minibatches(batch, 2**64 - 1, 1) == 1
            assert _native.form_minibatches(_native.sort_batch(**self.arguments()), 2**64 - 1, 1) == 64

    def test_refuses_arrays_that_do_not_hold_the_batch(self):
        batch = _native.sort_batch(**self.arguments())

        def write(placement=(0, 0, 8), pointers=8, entries=8, minibatches=False, **changes):
            arrays = {
                "row_pointers": np.zeros(pointers, np.int32),
                "ids": np.zeros(entries, np.int32),
                "samples": np.zeros(entries, np.int32),
                "gains": np.zeros(entries, np.float32),
            }
            arrays |= changes
            _native.write_batch(batch, np.array([placement]), **arrays, minibatches=minibatches, threads=1)

        write()
        write(minibatches=True, pointers=8)  # Of one minibatch.
        bad = (
            {"placement": (0, 0, 7)},
            {"placement": (0, 1, 8)},
            {"placement": (1, 0, 8)},
            {"placement": (-1, 0, 8)},
            {"placement": (0, -1, 8)},
            {"placement": (0, 0, 2**62)},
            {"placement": (2**62, 0, 8)},
            {"pointers": 7},
            {"entries": 7},
            {"minibatches": True, "pointers": 7},
            {"samples": np.zeros(9, np.int32)},
        )
        for changes in bad:
            with pytest.raises(ValueError):
                write(**changes)
        read_only = np.zeros(8, np.int32)
        read_only.flags.writeable = False
        wrong = (
            {"ids": np.zeros(8, np.int64)},
            {"gains": np.zeros(8)},
            {"ids": read_only},
            {"ids": np.zeros(16, np.int32)[::2]},
        )
        for changes in wrong:
            with pytest.raises(TypeError):
                write(**changes)
