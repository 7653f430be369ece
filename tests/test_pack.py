"""Packing on the host against its definition, bit for bit, and what must hold of packed batches."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import threading

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import embax
from embax._preprocess.buffers import PADDING_VALUE
from embax._preprocess.inputs import Ragged
from embax._preprocess.pack import preprocess
from embax._preprocess.packer import Packer
from embax._preprocess.reference import pack_reference
from embax._specs import FeatureIdTransformation, StackedTableSpec, TableSettingInStack


def make_table(name="t", vocabulary=20, **changes):
    fields = {
        "name": name,
        "vocabulary_size": vocabulary,
        "embedding_dim": 8,
        "initializer": jax.nn.initializers.zeros,
        "optimizer": embax.SGDOptimizerSpec(learning_rate=0.1),
        "combiner": "sum",
    }
    return embax.TableSpec(**(fields | changes))


def make_feature(name, table, batch=4, valency=3):
    return embax.FeatureSpec(name=name, table_spec=table, input_shape=(batch, valency), output_shape=(batch, 8))


def place(features, devices=1, sparsecores=1):
    return embax.prepare_feature_specs_for_training(features, devices, sparsecores)


def stack_by_hand(features, devices, sparsecores, rotation):
    """Puts all tables of `features` into one stack: packing must not depend on how stacks come about."""
    N = devices * sparsecores
    tables = {feature.table_spec.name: feature.table_spec for feature in features}
    offset, settings_ = 0, {}
    for k, table in enumerate(tables.values()):
        rows = -(-table.vocabulary_size // (8 * N)) * 8 * N
        settings_[table.name] = TableSettingInStack("stack", rows, 8, offset // N, k * rotation % N)
        offset += rows
    first = next(iter(tables.values()))
    stack = StackedTableSpec(
        "stack",
        offset,
        8,
        first.optimizer,
        first.combiner,
        0,
        num_devices=devices,
        num_sparsecores_per_device=sparsecores,
    )
    row_offset = 0
    for feature in features:
        setting = settings_[feature.table_spec.name]
        feature.table_spec._setting_in_stack, feature.table_spec._stacked_table_spec = setting, stack
        feature._id_transformation = FeatureIdTransformation(
            row_offset, setting.row_offset_in_shard * N, setting.shard_rotation
        )
        row_offset += feature.output_shape[0]


def limits_of(packed):
    rows = [(s.max_ids_per_partition, s.max_unique_ids_per_partition, s.capacity) for s in packed.layout.stacks]
    return np.array(rows, np.int64)


def assert_same_as_reference(packer, packed, rows, weights, drop=False):
    expected, written = pack_reference(
        packer.plan, rows, weights, limits_of(packed), packer.num_local_devices, drop=drop
    )
    assert packed.layout == expected.layout
    np.testing.assert_array_equal(packed.row_pointers, expected.row_pointers)
    for name, dtype in (("embedding_ids", np.int32), ("sample_ids", np.int32), ("gains", np.float32)):
        ours, theirs = getattr(packed, name), getattr(expected, name)
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        # As bits, so that NaN equals NaN and -0 differs from 0.
        np.testing.assert_array_equal(ours[written].view(np.int32), theirs[written].view(np.int32))
    for field in dataclasses.fields(packed.stats):
        ours, theirs = getattr(packed.stats, field.name), getattr(expected.stats, field.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], strict=True)


@dataclasses.dataclass
class Batch:
    specs: dict
    ids: dict
    weights: dict
    rows: list
    row_weights: list
    local_devices: int


# No smaller than this, so that no sum other than 0 is too small to divide by.
_weights = st.floats(0.0078125, 8, width=32) | st.floats(-8, -0.0078125, width=32) | st.sampled_from([0.0, 1.0, -1.0])


@st.composite
def batches(draw):
    devices, sparsecores = draw(
        st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4), (3, 4), (1, 8), (4, 1), (4, 3), (5, 1)])
    )
    local_devices = draw(st.integers(1, devices))
    combiner = draw(st.sampled_from(["sum", "mean", "sqrtn"]))
    tables = [
        make_table(f"t{i}", draw(st.sampled_from([1, 3, 40, 3000, 100_000])), combiner=combiner)
        for i in range(draw(st.integers(1, 3)))
    ]
    features = [make_feature(f"f{i}", draw(st.sampled_from(tables)), valency=1) for i in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        stack_by_hand(features, devices, sparsecores, draw(st.integers(0, 5)))
    specs = place({feature.name: feature for feature in features}, devices, sparsecores)
    ids, weights, all_rows, all_weights = {}, {}, [], []
    for feature in features:
        vocabulary = feature.table_spec.vocabulary_size
        batch = draw(st.integers(0, 9)) * local_devices
        # Hypothesis draws the shape of the problem and a seed: drawing every id would be slow and explore no more.
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        top = min(vocabulary, draw(st.sampled_from([1, 4, 10**6])))  # 1: one hot id; 4: many duplicates.
        dtype = draw(st.sampled_from([np.int32, np.int64]))
        longest = draw(st.sampled_from([1, 1, 2, 3, 70]))
        weighted = draw(st.booleans())
        kind = draw(st.sampled_from(["dense", "padded", "rows", "Ragged"]))
        if kind in ("dense", "padded"):
            array = rng.integers(0, top, (batch, longest)).astype(dtype)
            if kind == "padded":
                array[rng.random(array.shape) < 0.5] = -1
            rows, leaf = array.tolist(), array
        else:
            lengths = rng.integers(0, longest + 1, batch)
            parts = [rng.integers(0, top, length).astype(dtype) for length in lengths]
            rows = [part.tolist() for part in parts]
            leaf = parts
            if kind == "Ragged":
                leaf = Ragged(np.concatenate([np.zeros(0, dtype), *parts]), np.concatenate([[0], np.cumsum(lengths)]))
        row_weights, weights_leaf = None, None
        if weighted:
            pool = np.float32(draw(st.lists(_weights, min_size=1, max_size=6)))
            flat = rng.choice(pool, sum(map(len, rows)))
            row_weights = np.split(flat, np.cumsum([len(row) for row in rows])[:-1]) if rows else []
            if kind in ("dense", "padded"):
                weights_leaf = flat.reshape(np.shape(leaf))
            else:
                weights_leaf = row_weights if kind == "rows" else Ragged(flat, leaf.row_splits)
        ids[feature.name], weights[feature.name] = leaf, weights_leaf
        all_rows.append(rows)
        all_weights.append(row_weights)
    return Batch(specs, ids, weights, all_rows, all_weights, local_devices)


class Fitting:
    """Limits that hold the batch, and those of another number of devices."""

    def __init__(self, packer):
        self.sparsecores = packer.plan.num_sparsecores_per_device
        self.current = np.zeros((len(packer.plan.stacks), 3), np.int64)

    def problem(self, counts):
        return None

    def fit(self, counts):
        return counts.needs + np.array([0, 1, 8 * self.sparsecores])

    def note(self, needs):
        pass


def pack(batch):
    """Packs with buffers that fit, on any number of local devices."""
    packer = Packer(batch.specs, limits="raise", num_local_devices=batch.local_devices)
    packer._limits = Fitting(packer)
    return packer, packer(batch.ids, batch.weights)


@settings(deadline=None, max_examples=400)
@given(batches())
def test_equals_the_reference_bit_for_bit(batch):
    packer, packed = pack(batch)
    assert_same_as_reference(packer, packed, batch.rows, batch.row_weights)


@settings(deadline=None, max_examples=200)
@given(batches(), st.data())
def test_what_fits_as_expected_is_the_same(batch, data):
    packer, packed = pack(batch)
    packer._limits.current = limits_of(packed)
    for stack in data.draw(st.sets(st.integers(0, len(packer.plan.stacks) - 1)), "too small"):
        packer._limits.current[stack, 2] //= 2
        packer._limits.current[stack, 2] -= packer._limits.current[stack, 2] % (8 * packer._limits.sparsecores)
    again = packer(batch.ids, batch.weights)
    assert again.layout == packed.layout
    assert_same_as_reference(packer, again, batch.rows, batch.row_weights)


@pytest.mark.parametrize("valency", [1, 20])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("vocabulary", [2, 3_000, 5_000_000, 2_000_000_000])
def test_large_batches_equal_the_reference(vocabulary, combiner, weighted, valency):
    # Enough ids for every number of sorting passes, for blocks to end inside of a sample, and for several threads.
    specs = place({"f": make_feature("f", make_table(vocabulary=vocabulary, combiner=combiner))}, 1, 3)
    rng = np.random.default_rng(vocabulary)
    ids = (vocabulary * rng.random((5000 // valency * 4, valency)) ** 3).astype(np.int64)
    weights = rng.standard_normal(ids.shape).astype(np.float32) if weighted else None
    packer = Packer(specs)
    packed = packer({"f": ids}, {"f": weights})
    assert_same_as_reference(packer, packed, [ids.tolist()], [weights])


def split_sample(stack, place_, sparsecores, sample):
    """The feature that a sample belongs to, its batch, its share of it, and the number of the sample in that."""
    for feature, batch in zip(stack.features, place_.batch_sizes, strict=True):
        share = -(-batch // sparsecores)
        if sample < share:
            return feature, batch, share, sample
        sample -= share
    raise AssertionError("no feature has this sample")


def unpack(packer, packed):
    """All (feature, sample, id) -> gain of a packed batch, found from the layout alone."""
    plan, layout = packer.plan, packed.layout
    L, S, N = layout.num_local_devices, layout.num_sparsecores_per_device, layout.num_sparsecores
    found = {}
    arrays = [packed.row_pointers, packed.embedding_ids, packed.sample_ids, packed.gains]
    pointers, ids, samples, gains = (array.reshape(L, -1) for array in arrays)
    for stack, place_ in zip(plan.stacks, layout.stacks, strict=True):
        for device in range(L):
            for sparsecore in range(S):
                first = place_.entries_start + sparsecore * place_.capacity // S
                pointer = place_.row_pointers_start + sparsecore * max(N, 8)
                start = 0
                for partition in range(N):
                    end = pointers[device, pointer + partition]
                    for entry in range(first + start, first + end):
                        sample, row = samples[device, entry], ids[device, entry]
                        feature, batch, share, number = split_sample(stack, place_, S, sample)
                        table = feature.table
                        id_ = (row - table.rows.row_offset_in_shard) * N + (partition - table.rows.rotation) % N
                        key = (feature.leaf, device * batch + sparsecore * share + number, id_)
                        assert key not in found
                        found[key] = gains[device, entry]
                    start = -(-end // 8) * 8
    return found


@settings(deadline=None, max_examples=100)
@given(batches())
def test_unpacking_gives_back_every_id_and_gain(batch):
    packer, packed = pack(batch)
    combiners = {f.leaf: stack.spec.combiner for stack in packer.plan.stacks for f in stack.features}
    expected = {}
    for leaf, rows in enumerate(batch.rows):
        for sample, row in enumerate(rows):
            weights = [1.0] * len(row) if batch.row_weights[leaf] is None else batch.row_weights[leaf][sample]
            pairs = [(id_, float(w)) for id_, w in zip(row, weights, strict=True) if id_ != -1]
            total = sum(float(np.float32(w)) for _, w in pairs)
            square = sum(w * w for _, w in pairs) ** 0.5
            divisor = {"sum": 1.0, "mean": total, "sqrtn": square}[combiners[leaf]]
            for id_, w in pairs:
                expected.setdefault((leaf, sample, id_), []).append((w, divisor))
    found = unpack(packer, packed)
    assert found.keys() == expected.keys()
    for key, gain in found.items():
        terms = expected[key]
        # A mean over weights that cancel has a divisor without accurate digits; the bits are tested elsewhere.
        if all(abs(divisor) > 1e-2 for _, divisor in terms):
            scale = sum(abs(w / divisor) for w, divisor in terms)
            assert abs(float(gain) - sum(w / divisor for w, divisor in terms)) <= 1e-2 * scale + 1e-6


def test_merges_duplicates_after_the_combiner():
    table = make_table(vocabulary=16, combiner="mean")
    packed = preprocess({"f": np.array([[3, 3, 5, 5, 5, 5, 6, 7]])}, specs=place({"f": make_feature("f", table)}))
    assert packed.embedding_ids[:4].tolist() == [3, 5, 6, 7]
    assert packed.gains[:4].tolist() == [0.25, 0.5, 0.125, 0.125]
    assert packed.row_pointers.tolist() == [4] + [8] * 7
    assert packed.sample_ids[4:8].tolist() == [PADDING_VALUE] * 4
    assert np.isnan(packed.gains[4:8]).all()


def test_mean_of_weights_that_sum_to_zero_contributes_nothing():
    specs = place({"f": make_feature("f", make_table(combiner="mean"))})
    packed = preprocess({"f": np.array([[1, 2, -1]])}, {"f": np.float32([[1, -1, np.nan]])}, specs=specs)
    assert packed.gains[:2].tolist() == [0, 0]
    assert packed.row_pointers[0] == 2


def test_statistics_are_those_of_merged_entries():
    specs = place({"f": make_feature("f", make_table())}, 1, 2)
    stats = preprocess({"f": np.array([[0, 2, 2], [0, 1, -1], [4, 6, 8], [-1, -1, 3]])}, specs=specs).stats
    # SparseCore 0 has samples 0 and 1: ids 0, 2, 0 for itself, id 1 for the other.
    assert stats.max_ids_per_partition["t"].tolist() == [3, 1]
    assert stats.max_unique_ids_per_partition["t"].tolist() == [3, 1]
    assert stats.required_buffer_size_per_sc["t"].tolist() == [16, 16]
    assert {array.dtype for array in stats.max_ids_per_partition.values()} == {np.dtype(np.int32)}


def test_leaves_what_lies_behind_the_last_partition_alone(monkeypatch):
    specs = place({"f": make_feature("f", make_table())}, 1, 2)
    packer = Packer(specs, limits="raise")
    given_arrays = []

    def marked(layout, empty=embax._preprocess.packer.empty_arrays):
        given_arrays.extend(empty(layout))
        for array in given_arrays:
            array[:] = 77
        return tuple(given_arrays)

    monkeypatch.setattr("embax._preprocess.packer.empty_arrays", marked)
    packed = packer({"f": np.array([[0, 1, 2], [0, 1, 2]])})
    share = packed.layout.stacks[0].capacity // 2
    for array in (packed.embedding_ids, packed.sample_ids, packed.gains):
        assert (array[16:share] == 77).all()
        assert (array[share + 16 :] == 77).all()
        assert not (array[:16] == 77).any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.uint64, ">i4", ">i8"])
def test_takes_every_integer_dtype(dtype):
    specs = place({"f": make_feature("f", make_table())})
    ids = np.array([[3, 3, 5], [1, 0, 19]])
    expected, ours = preprocess({"f": ids}, specs=specs), preprocess({"f": ids.astype(dtype)}, specs=specs)
    assert ours.embedding_ids[:8].tolist() == expected.embedding_ids[:8].tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16, np.int32])
def test_takes_every_real_weight(dtype):
    specs = place({"f": make_feature("f", make_table())})
    packed = preprocess({"f": np.array([[3, 5]])}, {"f": np.array([[2, 0.5]]).astype(dtype)}, specs=specs)
    assert packed.gains[:2].tolist() == [2, 0 if dtype is np.int32 else 0.5]


@pytest.mark.parametrize(
    "leaf",
    [
        np.array([[3, 4], [5, -1]])[:, ::1],
        np.asfortranarray(np.array([[3, 4], [5, -1]])),
        np.array([[3, 9, 4, 9], [5, 9, -1, 9]])[:, ::2],
        jnp.array([[3, 4], [5, -1]]),
        [[3, 4], [5]],
        ([3, 4], np.array([5])),
        [np.array([3, 4]), jnp.array([5])],
        [np.array([3, 4], np.int32), np.array([5], np.uint64)],
        np.array([np.array([3, 4]), np.array([5])], dtype=object),
        Ragged([3, 4, 5], [0, 2, 3]),
        Ragged(jnp.array([3, 4, 5]), np.array([0, 2, 3], np.int32)),
    ],
)
def test_takes_every_form_of_ids(leaf):
    specs = place({"f": make_feature("f", make_table())})
    packed = preprocess({"f": leaf}, specs=specs)
    assert packed.embedding_ids[:3].tolist() == [3, 4, 5]
    assert packed.sample_ids[:3].tolist() == [0, 0, 1]


def test_takes_one_id_a_sample_in_one_dimension():
    specs = place({"f": make_feature("f", make_table(), valency=1)})
    packed = preprocess({"f": np.array([3, -1, 5])}, {"f": np.array([2.0, 9.0, 4.0])}, specs=specs)
    assert packed.embedding_ids[:2].tolist() == [3, 5]
    assert packed.sample_ids[:2].tolist() == [0, 2]
    assert packed.gains[:2].tolist() == [2, 4]


def test_takes_empty_batches():
    specs = place({"f": make_feature("f", make_table()), "g": make_feature("g", make_table("u"))}, 1, 4)
    for empty in (np.zeros((0, 3), np.int64), np.zeros((4, 0), np.int64), [], [[], []], Ragged([], [0, 0])):
        packed = preprocess({"f": empty, "g": empty}, specs=specs)
        assert not packed.row_pointers.any()


@pytest.mark.parametrize("tree", [lambda a, b: [a, b], lambda a, b: (a, (b,)), lambda a, b: {"x": {"y": a}, "z": [b]}])
def test_takes_any_tree(tree):
    specs = place(tree(make_feature("f", make_table()), make_feature("g", make_table("u"))))
    packed = preprocess(tree(np.array([[3]]), [[4]]), tree(None, [[2.0]]), specs=specs)
    second = packed.layout.stacks[1].entries_start
    assert packed.embedding_ids[[0, second]].tolist() == [3, 4]
    assert packed.gains[[0, second]].tolist() == [1, 2]


def test_takes_one_feature_as_the_tree():
    assert preprocess(np.array([[3]]), specs=place(make_feature("f", make_table()))).embedding_ids[0] == 3


def test_stays_a_pytree_and_enters_jit_without_a_copy():
    specs = place({"f": make_feature("f", make_table())})
    packed = preprocess({"f": np.array([[3, 5]])}, specs=specs)
    for array in jax.tree.leaves(packed):
        assert array.ctypes.data % 64 == 0
    out = jax.jit(lambda p: (p.gains[:2] * 2, p.row_pointers))(packed)
    assert out[0].tolist() == [2, 2]


def test_a_second_batch_leaves_the_first_alone():
    packer = Packer(place({"f": make_feature("f", make_table())}))
    first = packer({"f": np.array([[3, 5]])})
    before = first.embedding_ids[:8].copy()
    packer({"f": np.array([[1, 2]])})
    np.testing.assert_array_equal(first.embedding_ids[:8], before)


def needs_of(batch_size):
    return np.arange(batch_size).reshape(-1, 1) % 5000


def test_growing_buffers_change_a_logarithmic_number_of_times():
    tables = [make_table(f"t{i}", 5000) for i in range(12)]
    packer = Packer(place({t.name: make_feature(t.name, t) for t in tables}, 1, 2))
    layouts = set()
    rng = np.random.default_rng(0)
    sizes = range(100, 3000, 20)
    for size in sizes:
        # Each stack grows at its own pace; left to themselves they would ask at different times.
        ids = {t.name: needs_of(2 * (size + int(rng.integers(0, 20)))) for t in tables}
        packed = packer(ids)
        layouts.add(limits_of(packed).tobytes())
        for stack in packer.plan.stacks:
            needed = packed.stats.required_buffer_size_per_sc[stack.name].max() * 2
            capacity = next(place_.capacity for place_ in packed.layout.stacks if place_.name == stack.name)
            assert needed <= capacity <= 2 * needed + 200
            assert capacity % 16 == 0
    assert len(sizes) == 145
    assert 5 < len(layouts) <= 1 + np.log(3000 / 100) / np.log(1.25)


def test_growing_buffers_keep_earlier_batches_and_never_shrink():
    packer = Packer(place({"f": make_feature("f", make_table(vocabulary=5000))}, 1, 2))
    first = packer({"f": needs_of(10)})
    large = packer({"f": needs_of(4000)})
    small = packer({"f": needs_of(10)})
    assert first.layout.stacks[0].capacity < large.layout.stacks[0].capacity
    assert small.layout.stacks[0].capacity == large.layout.stacks[0].capacity
    assert first.embedding_ids[:3].tolist() == small.embedding_ids[:3].tolist() == [0, 1, 2]
    assert first.layout.stacks[0].batch_sizes == small.layout.stacks[0].batch_sizes


def test_growing_buffers_start_at_the_suggestion():
    table = make_table(suggested_coo_buffer_size_per_device=1000)
    packer = Packer(place({"f": make_feature("f", table)}, 1, 2))
    assert packer({"f": np.array([[1]])}).layout.stacks[0].capacity == 1008
    assert packer({"f": np.array([[1]])}).layout is packer({"f": np.array([[2]])}).layout


def test_raising_buffers_are_as_the_specs_say():
    specs = place({"f": make_feature("f", make_table(max_ids_per_partition=12))}, 1, 4)
    assert preprocess({"f": np.array([[1]])}, specs=specs).layout.stacks[0].capacity == 16 * 4 * 4
    specs = place({"f": make_feature("f", make_table(suggested_coo_buffer_size_per_device=64))}, 1, 4)
    assert preprocess({"f": np.array([[1]])}, specs=specs).layout.stacks[0].capacity == 64


def test_preprocess_notices_changed_specs():
    features = place({"f": make_feature("f", make_table(max_ids_per_partition=2))})
    ids = {"f": np.array([[1, 2]])}
    assert preprocess(ids, specs=features).layout.stacks[0].capacity == 8
    table = features["f"].table_spec
    table._stacked_table_spec = table._stacked_table_spec.replace(max_ids_per_partition=1)
    with pytest.raises(ValueError, match="max_ids_per_partition=1"):
        preprocess(ids, specs=features)


def digest(packed):
    pointers = packed.row_pointers.reshape(-1)
    bits = [pointers.tobytes(), *(a.tobytes() for a in packed.stats.required_buffer_size_per_sc.values())]
    for stack in packed.layout.stacks:
        sparsecores = packed.layout.num_sparsecores_per_device
        for s, required in enumerate(packed.stats.required_buffer_size_per_sc[stack.name]):
            start = stack.entries_start + s * stack.capacity // sparsecores
            for array in (packed.embedding_ids, packed.sample_ids, packed.gains):
                bits.append(array[start : start + required].tobytes())
    return hash(tuple(bits))


def many_stacks():
    tables = [make_table(f"t{i}", 1000 * (i + 1), combiner="sqrtn") for i in range(6)]
    packer = Packer(place({t.name: make_feature(t.name, t) for t in tables}, 1, 4))
    rng = np.random.default_rng(0)
    ids = {t.name: rng.integers(-1, t.vocabulary_size, (500, 12)) for t in tables}
    weights = {t.name: rng.random((500, 12)) for t in tables}
    return packer, ids, weights


def test_same_bits_for_any_number_of_threads_and_in_any_thread(monkeypatch):
    packer, ids, weights = many_stacks()
    digests = []
    for threads in ("1", "2", "3", "16", "1"):
        monkeypatch.setenv("EMBAX_NUM_THREADS", threads)
        digests += [digest(packer(ids, weights)) for _ in range(20)]
    found = [[] for _ in range(8)]

    def work(number):
        found[number] = [digest(packer(ids, weights)) for _ in range(30)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(len(some) == 30 for some in found)
    assert len(set(digests).union(*found)) == 1


def run_python(code, **environment):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_packs_in_a_forked_child():
    # No JAX backend runs in the parent, as in a data loader that forks its workers; JAX warns of forks all the same.
    result = run_python(
        """
        import os, threading, warnings
        import numpy as np
        import test_pack
        warnings.filterwarnings("ignore", ".*fork.*")
        packer, ids, weights = test_pack.many_stacks()
        expected = [array.tobytes() for array in packer(ids, weights).stats.max_ids_per_partition.values()]
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                packer(ids, weights)
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads: thread.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                found = [array.tobytes() for array in packer(ids, weights).stats.max_ids_per_partition.values()]
                os._exit(0 if found == expected else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        for thread in threads: thread.join()
        print("packed")
        """,
        EMBAX_NUM_THREADS="3",
        PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *(p for p in sys.path if p)]),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "packed\n"


def test_ends_cleanly_while_a_thread_packs():
    result = run_python(
        """
        import logging
        import threading
        import test_pack
        logging.getLogger("embax").setLevel("ERROR")  # Of the notice that limits grow.
        packer, ids, weights = test_pack.many_stacks()
        def busy():
            while True:
                packer(ids, weights)
        for _ in range(3):
            threading.Thread(target=busy, daemon=True).start()
        packer(ids, weights)
        """,
        EMBAX_NUM_THREADS="3",
        PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *(p for p in sys.path if p)]),
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_global_batch_may_be_larger_than_int32():
    table = make_table(vocabulary=100)
    batch = 3_000_000_000
    feature = embax.FeatureSpec(name="f", table_spec=table, input_shape=(batch, 4), output_shape=(batch, 8))
    specs = place({"f": feature, "g": make_feature("g", table)}, 128, 4)
    assert table.stacked_table_spec.total_sample_count == batch + 4
    assert specs["g"].id_transformation.row_offset == batch
    ids = {"f": np.zeros((400_000, 4), np.int32), "g": np.array([[7]])}
    packed = preprocess(ids, specs=specs, limits="drop", num_local_devices=1)
    # Each SparseCore has 100,000 samples of id 0, all for one partition, which holds 256.
    assert packed.stats.max_ids_per_partition["t"].max() == 100_000
    assert packed.stats.id_drop_counters == {"t": 4 * (400_000 - 4 * 256)}
