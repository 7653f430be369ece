"""What becomes of ids outside their vocabulary and of weights that are not finite."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from test_pack import Fitting, assert_same_as_reference, batches, make_feature, make_table, place

import embax
from embax._preprocess.packer import Packer

BAD_IDS = (-2, -(2**31), 2**31 - 1)


def pack(batch, ids, weights, validation):
    packer = Packer(batch.specs, limits="raise", num_local_devices=batch.local_devices, validation=validation)
    packer._limits = Fitting(packer)
    return packer, packer(ids, weights)


@settings(deadline=None, max_examples=200)
@given(batches(), st.integers(0, 2**32 - 1))
def test_what_is_not_valid_is_dropped_and_counted(batch, seed):
    rng = np.random.default_rng(seed)
    ids, weights, rows, row_weights, invalid = {}, {}, [], [], {}
    for name, good, good_weights in zip(batch.ids, batch.rows, batch.row_weights, strict=True):
        spoilt, spoilt_weights, kept, kept_weights, count = [], [], [], [], 0
        for sample, row in enumerate(good):
            given_weights = [1.0] * len(row) if good_weights is None else good_weights[sample]
            spoilt.append([])
            spoilt_weights.append([])
            kept.append([])
            kept_weights.append([])
            for id_, weight in zip(row, given_weights, strict=True):
                if id_ == -1:
                    continue
                kind = rng.integers(6)
                bad_weight = kind == 1 and good_weights is not None
                bad = kind == 0 or bad_weight
                spoilt[-1].append(int(rng.choice(BAD_IDS)) if kind == 0 else id_)
                spoilt_weights[-1].append(float(rng.choice([np.nan, np.inf, -np.inf])) if bad_weight else weight)
                if bad:
                    count += 1
                else:
                    kept[-1].append(id_)
                    kept_weights[-1].append(weight)
        ids[name] = spoilt
        weights[name] = None if good_weights is None else spoilt_weights
        rows.append(kept)
        row_weights.append(None if good_weights is None else kept_weights)
        invalid[name] = count
    packer, packed = pack(batch, ids, weights, "drop")
    assert packed.stats.invalid_ids == invalid
    packed.stats.invalid_ids.clear()
    assert_same_as_reference(packer, packed, rows, row_weights)


@settings(deadline=None, max_examples=100)
@given(batches())
def test_trust_packs_valid_batches_the_same(batch):
    packer, packed = pack(batch, batch.ids, batch.weights, "trust")
    assert_same_as_reference(packer, packed, batch.rows, batch.row_weights)


def specs_of(**changes):
    return place({"f": make_feature("f", make_table(vocabulary=20, **changes))}, 1, 2)


def test_dense_padding_is_not_counted():
    ids = np.array([[1, -1, 20], [-2, 3, -1]])
    packed = embax.preprocess({"f": ids}, specs=specs_of(), validation="drop")
    assert packed.stats.invalid_ids == {"f": 2}
    same = embax.preprocess({"f": np.array([[1, -1, -1], [-1, 3, -1]])}, specs=specs_of())
    assert packed.row_pointers.tolist() == same.row_pointers.tolist()
    ragged = embax.preprocess({"f": [[1, -1], []]}, specs=specs_of(), validation="drop")
    assert ragged.stats.invalid_ids == {"f": 1}


def test_weights_of_padding_do_not_matter():
    ids, weights = np.array([[1, -1]]), np.array([[1.0, np.nan]], np.float32)
    packed = embax.preprocess({"f": ids}, {"f": weights}, specs=specs_of(), validation="drop")
    assert packed.stats.invalid_ids == {"f": 0}


def test_gains_that_are_not_finite_become_zero():
    # The first sample's weights sum to 1e-15, and 1e30 divided by that overflows.
    ids = {"f": np.array([[1, 2, 3], [1, 2, 3]])}
    weights = {"f": np.array([[1e30, -1e30, 1e-15], [1, 1, 2]], np.float32)}
    specs = place({"f": make_feature("f", make_table(vocabulary=20, combiner="mean"))}, 1, 1)
    with pytest.raises(ValueError, match="the divisor or the result is beyond the range of float32"):
        embax.preprocess(ids, weights, specs=specs)
    packed = embax.preprocess(ids, weights, specs=specs, validation="drop")
    assert packed.stats.invalid_ids == {"f": 3}
    assert packed.gains[:6].tolist() == [0, 0.25, 0, 0.25, 0, 0.5]


@pytest.mark.parametrize("validation", ["drop", "trust"])
@pytest.mark.parametrize("splits", [[1, 2], [0, 3], [0, 2, 1, 2], [0, -1, 2]])
def test_row_splits_are_checked_always(validation, splits):
    with pytest.raises(ValueError, match="row_splits"):
        embax.preprocess(
            {"f": embax.Ragged(np.array([1, 2]), np.array(splits))}, specs=specs_of(), validation=validation
        )


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("sparsecores", [1, 3, 4])
def test_trusted_ids_that_are_bad_crash_nothing(backend, sparsecores):
    rng = np.random.default_rng(0)
    specs = place({"f": make_feature("f", make_table(vocabulary=20, combiner="mean"))}, 1, sparsecores)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids = rng.choice(np.array([0, 5, 19, 20, 21, 39, 40, 1000, -1, -2, 2**31 - 1, -(2**31), 2**40, -(2**62)]), (500, 9))
    weights = rng.choice(np.array([0, 1, -1, np.nan, np.inf], np.float32), ids.shape)
    for given_weights in (None, {"f": weights}):
        packed = embax.preprocess({"f": ids}, given_weights, specs=specs, validation="trust", limits="grow")
        with embax.use_backend(backend):
            activations = embax.lookup(packed, variables, specs=specs)
            new = embax.apply_gradients(activations, packed, variables, specs=specs)
        jax.block_until_ready(new)
        assert activations["f"].shape == (500, 8)
    assert packed.stats.invalid_ids == {}


def test_sparse_coordinates_are_validated_as_all_others():
    indices = np.array([[1, 7], [0, 2], [1, 3]])
    ids, weights = np.array([5, 99, 4]), np.array([np.nan, 1, 1], np.float32)
    coo = embax.SparseCoo(indices, ids, (2, 8))
    specs = specs_of()
    with pytest.raises(ValueError, match="sample 0, position 2: id 99"):
        embax.preprocess({"f": coo}, {"f": weights}, specs=specs)
    good = embax.SparseCoo(indices, np.array([5, 6, 4]), (2, 8))
    with pytest.raises(ValueError, match="sample 1, position 7: the weight is nan"):
        embax.preprocess({"f": good}, {"f": weights}, specs=specs)
    packed = embax.preprocess({"f": coo}, {"f": weights}, specs=specs, validation="drop")
    assert packed.stats.invalid_ids == {"f": 2}
    same = embax.preprocess({"f": [[], [4]]}, specs=specs)
    assert packed.row_pointers.tolist() == same.row_pointers.tolist()


@pytest.mark.parametrize(
    ("combiner", "weights", "divisor"),
    [
        ("mean", [3e38, 3e38], "inf"),
        ("mean", [-3e38, -3e38], "-inf"),
        ("sqrtn", [2e19, 2e19], "inf"),
        ("sqrtn", [1e-23, 1e-23], "0"),
        ("mean", [1e-45, 3e38], None),
    ],
)
def test_sums_beyond_float32_are_not_silent(combiner, weights, divisor):
    specs = place({"f": make_feature("f", make_table(vocabulary=20, combiner=combiner))}, 1, 1)
    ids, given_weights = {"f": [[3], [1, 2]]}, {"f": [[1.0], weights]}
    if divisor is None:  # Large, but right.
        assert np.isfinite(embax.preprocess(ids, given_weights, specs=specs).gains[:3]).all()
        return
    with pytest.raises(ValueError, match=f"'f', sample 1: combiner '{combiner}' divides its weights by {divisor}, and"):
        embax.preprocess(ids, given_weights, specs=specs)
    packed = embax.preprocess(ids, given_weights, specs=specs, validation="drop")
    assert packed.stats.invalid_ids == {"f": 2}
    assert packed.gains[:3].tolist() == [0, 0, 1]


def test_weights_of_zero_are_no_underflow():
    for combiner in ("mean", "sqrtn"):
        specs = place({"f": make_feature("f", make_table(vocabulary=20, combiner=combiner))}, 1, 1)
        assert embax.preprocess({"f": [[1, 2]]}, {"f": [[0.0, 0.0]]}, specs=specs).gains[:2].tolist() == [0, 0]


def test_gains_that_add_up_to_infinity():
    table = make_table(vocabulary=20)
    specs = place({"f": make_feature("f", table), "g": make_feature("g", table)}, 1, 1)
    ids = {"f": [[5]], "g": [[4, 1, 2, 1]]}
    weights = {"f": None, "g": [[1.0, 3e38, 1.0, 3e38]]}
    text = "Feature 'g', sample 0, position 3: the gains of id 1, which the sample names several times, add up to inf"
    with pytest.raises(ValueError, match=text):
        embax.preprocess(ids, weights, specs=specs)
    packed = embax.preprocess(ids, weights, specs=specs, validation="drop")
    assert packed.stats.invalid_ids == {"f": 0, "g": 1}
    assert packed.gains[:4].tolist() == [0, 1, 1, 1]
    assert np.isinf(embax.preprocess(ids, weights, specs=specs, validation="trust").gains[0])
