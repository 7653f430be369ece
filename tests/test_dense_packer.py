"""The short way to pack dense batches like one before: the same result as the general way, which has all others."""

import copy
import dataclasses
import pickle

import jax
import numpy as np
import pytest
from flax import nnx

import embax
from embax import _native
from embax._preprocess.packer import Packer
from embax.nnx.embed import SparseCoreEmbed

VOCABULARY = 50


def place(features=3, devices=2, **changes):
    tables = [
        embax.TableSpec(
            name=f"t{i}",
            vocabulary_size=VOCABULARY,
            embedding_dim=8,
            initializer=jax.nn.initializers.zeros,
            optimizer=embax.SGDOptimizerSpec(learning_rate=0.1),
            combiner="mean",
            **changes,
        )
        for i in range(features)
    ]
    specs = {
        t.name: embax.FeatureSpec(name=t.name, table_spec=t, input_shape=(16, 4), output_shape=(16, 8)) for t in tables
    }
    return embax.prepare_feature_specs_for_training(specs, devices, 2)


def batch_of(seed, batch=16, valency=4, dtype=np.int32):
    rng = np.random.default_rng(seed)
    return {f"t{i}": rng.integers(-1, VOCABULARY, (batch, valency)).astype(dtype) for i in range(3)}


@pytest.fixture
def short(monkeypatch):
    """How many batches were packed in the short way."""
    found = []
    general = Packer._pack_likewise

    def count(self, ids):
        packed = general(self, ids)
        found.append(packed is not None)
        return packed

    monkeypatch.setattr(Packer, "_pack_likewise", count)
    return found


def in_the_general_way(packer, *args, **kwargs):
    packer._note_needs()
    packer._likewise = ()
    return packer(*args, **kwargs)


def assert_equal(found, expected):
    assert found.layout == expected.layout
    np.testing.assert_array_equal(found.row_pointers, expected.row_pointers)
    S, N = found.layout.num_sparsecores_per_device, found.layout.num_sparsecores
    entries = found.layout.entries_per_device
    for stack in found.layout.stacks:
        for device in range(found.layout.num_local_devices):
            for sparsecore in range(S):
                pointer = (
                    device * found.layout.row_pointers_per_device + stack.row_pointers_start + sparsecore * max(N, 8)
                )
                start = device * entries + stack.entries_start + sparsecore * stack.capacity // S
                end = start + found.row_pointers[pointer + N - 1]
                for name in ("embedding_ids", "sample_ids", "gains"):
                    np.testing.assert_array_equal(getattr(found, name)[start:end], getattr(expected, name)[start:end])
    for field in dataclasses.fields(found.stats):
        ours, theirs = getattr(found.stats, field.name), getattr(expected.stats, field.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("limits", ["grow", "raise"])
@pytest.mark.parametrize("validation", ["raise", "trust"])
def test_the_same_batch_as_in_the_general_way(limits, validation, short):
    packer = Packer(place(), limits=limits, validation=validation)
    for seed in range(4):
        packer(batch_of(seed))
    short.clear()
    for seed in range(3):
        for changes in ({}, {"dtype": np.int64}, {"valency": 2}, {"valency": 0}):
            ids = batch_of(seed, **changes)
            assert_equal(packer(ids), in_the_general_way(packer, ids))
    assert short[::2] == [True] * 12


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:8],
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(">i4"),
        lambda a: a.astype(np.uint8) % VOCABULARY,
        lambda a: [row[row >= 0] for row in a],
        lambda a: embax.Ragged(np.abs(a).reshape(-1), np.arange(17) * 4),
        lambda a: jax.numpy.asarray(a),
    ],
)
def test_other_forms_and_sizes_after_a_dense_batch(change, short):
    packer = Packer(place())
    ids = batch_of(0)
    packer(ids)
    short.clear()
    ids["t1"] = change(ids["t1"])
    assert_equal(packer(ids), in_the_general_way(packer, ids))
    assert short == [False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.where(a == a.max(), VOCABULARY, a), "50"),
        (lambda a: np.ma.masked_less(a, 0), "masked array"),
        (lambda a: a.astype(np.float32), "float32"),
        (lambda a: a[:15], "does not divide"),
        (lambda a: a.reshape(-1), "2 dimensions"),
        (lambda a: None, "NoneType"),
    ],
)
def test_faults_after_a_dense_batch_have_the_same_messages(change, message):
    packer = Packer(place())
    packer(batch_of(0))
    ids = batch_of(1)
    ids["t2"] = change(ids["t2"])
    with pytest.raises(ValueError, match=message) as found:
        packer(ids)
    with pytest.raises(ValueError) as expected:
        in_the_general_way(packer, ids)
    assert str(found.value) == str(expected.value)
    with pytest.raises(ValueError, match="t2"):
        packer({name: ids[name] for name in ("t0", "t1")})


def test_a_limit_is_a_limit():
    packer = Packer(place(max_ids_per_partition=8, max_unique_ids_per_partition=8), limits="raise")
    few = {name: np.arange(16, dtype=np.int32)[:, None] for name in batch_of(0)}
    packer(few)
    assert packer(few).stats.max_ids_per_partition["t0"].max() <= 8
    with pytest.raises(embax.LimitExceededError, match="max_ids_per_partition=8"):
        packer(few | {"t1": np.arange(64, dtype=np.int32).reshape(16, 4) % 12 * 4})


def test_limits_grow_as_they_do_in_the_general_way(short):
    sizes = [1, 3, 2, 3, 9, 8, 10, 10, 30, 31, 5, 33, 38, 60]
    batches = [batch_of(n, valency=size) for n, size in enumerate(sizes)]
    found, expected = Packer(place()), Packer(place())
    for ids in batches:
        assert_equal(found(ids), in_the_general_way(expected, ids))
        np.testing.assert_array_equal(found._limits.current, expected._limits.current)
    assert 3 < short[::2].count(True) < len(sizes)


def test_what_was_packed_in_the_short_way_counts_when_limits_grow(short):
    few = np.zeros((16, 1), np.int32)
    many_distinct = np.tile(np.arange(24, dtype=np.int32) % 20 * 2, 2).reshape(16, 3)
    many_ids = np.tile(np.arange(12, dtype=np.int32) * 2, (16, 1))
    specs = place(features=1, devices=1)
    found, expected = Packer(specs), Packer(specs)
    for ids in (few, many_distinct, many_ids):
        assert_equal(found({"t0": ids}), in_the_general_way(expected, {"t0": ids}))
        np.testing.assert_array_equal(found._limits.current, expected._limits.current)
    assert short[::2] == [False, True, False]
    assert found._limits.current[0, 1] >= 20 + 20 // 4 + 32


def test_batches_of_two_sizes_in_turns(short):
    packer = Packer(place())
    for size in (16, 8, 16, 16, 8, 8):
        assert_equal(packer(batch_of(size, size)), Packer(place())(batch_of(size, size)))
    layouts = [packer(batch_of(1, size)).layout for size in (16, 8, 16, 8)]
    assert layouts[0] is layouts[2]
    assert layouts[1] is layouts[3]
    assert short[-4:] == [True] * 4


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_packers_can_be_sent_to_other_processes(copied):
    specs = place()
    found, expected = Packer(specs), Packer(specs)
    for ids in (batch_of(n, valency=size) for n, size in enumerate([1, 4, 4, 4, 20])):
        assert_equal(found(ids), expected(ids))
        found = copied(found)


def test_layers_that_have_packed_can_be_copied():
    layer = SparseCoreEmbed(place(devices=1), rngs=nnx.Rngs(0))
    layer.preprocess(batch_of(0))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(copied.preprocess(batch_of(0)), layer.preprocess(batch_of(0)))


@pytest.mark.parametrize(
    "copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.copy, copy.deepcopy, dataclasses.replace]
)
def test_statistics_are_as_good_as_their_copies(copied):
    packer = Packer(place())
    for _ in range(2):  # In the general and in the short way.
        packed = packer(batch_of(0))
        assert_equal(dataclasses.replace(packed, stats=copied(packed.stats)), packed)
        assert dataclasses.asdict(packed.stats).keys() == dataclasses.asdict(copied(packed.stats)).keys()
        assert "max_ids_per_partition={'t0'" in repr(packed.stats)
        with pytest.raises(AttributeError, match="max_ids"):
            _ = packed.stats.max_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"features": np.zeros((1, 2), int)},
        {"stacks": np.zeros((1, 2), int)},
        {"order": np.array([1])},
        {"validation": 3},
        {"batch_sizes": np.zeros(2, int)},
        {"placements": np.zeros((2, 3), int)},
        {"placements": np.zeros((1, 2), int)},
        {"limits": np.zeros((2, 3), int)},
        {"num_local_devices": 0},
        {"num_local_devices": 3},
    ],
)
def test_native_code_refuses_contradictions(changes):
    arguments = {
        "features": np.array([[8, 0, 0]]),
        "stacks": np.array([[0, 8, 1]]),
        "order": np.array([0]),
        "num_local_devices": 1,
        "sparsecores_per_device": 1,
        "num_sparsecores": 1,
        "validation": 0,
        "batch_sizes": np.array([2]),
        "placements": np.array([[0, 0, 8]]),
        "limits": np.array([[8, 8, 8]]),
        "row_pointers": 8,
        "entries": 8,
    }
    packer = _native.DensePacker(**arguments)
    ids = np.array([[1, 2], [3, 1]], np.int32)
    packed = packer.pack([ids], 1)
    assert packed is not None
    assert packed[1][:4].tolist() == [1, 1, 2, 3]
    assert packer.needs.tolist() == [4, 3, 8]
    assert packer.pack([], 1) is None
    assert packer.pack([ids + 8], 1) is None
    assert packer.needs.tolist() == [4, 3, 8]
    # Placements outside the arrays hold no batch.
    assert _native.DensePacker(**arguments | {"placements": np.array([[0, 1, 8]])}).pack([ids], 1) is None
    assert _native.DensePacker(**arguments | {"entries": 0}).pack([ids], 1) is None
    with pytest.raises(ValueError):
        _native.DensePacker(**arguments | changes)
