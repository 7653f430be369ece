"""Stacking and packing against the released reference, bit for bit. `make test-reference` runs this; elsewhere it skips."""

import dataclasses
import importlib
import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

import embax
from embax.compat.sparsecore.lib.core import input_preprocessing as our_input_preprocessing
from embax.compat.sparsecore.lib.core import pybind_input_preprocessing as our_pybind
from embax.compat.sparsecore.lib.nn import embedding as our_embedding
from embax.compat.sparsecore.lib.nn import embedding_spec as our_specs
from embax.compat.sparsecore.lib.nn import table_stacking as our_stacking

pytest.importorskip("jax_tpu_embedding", reason="jax-tpu-embedding is not installed; `make test-reference` installs it")

from jax_tpu_embedding.sparsecore.lib.core import input_preprocessing, pybind_input_preprocessing
from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec, table_stacking

from benchmarks.peer import check_equal_packing, from_peer, peer_pack, peer_specs

# The same examples in every run.
differential = settings(max_examples=150, derandomize=True, deadline=None)

POSITIVE = np.random.default_rng(0).uniform(0.01, 8, 64).astype(np.float32)
SIGNED = np.concatenate([POSITIVE, -POSITIVE])
WEIGHTS = {"sum": np.append(SIGNED, np.float32([0, 1e-8])), "mean": POSITIVE, "sqrtn": SIGNED}
"""Without sums of 0, of which the reference makes NaN."""


def make_table(name, vocabulary, combiner="sum", **changes):
    fields = {
        "embedding_dim": 8,
        "initializer": jax.nn.initializers.zeros,
        "optimizer": embax.SGDOptimizerSpec(learning_rate=0.1),
    }
    return embax.TableSpec(name=name, vocabulary_size=vocabulary, combiner=combiner, **(fields | changes))


def make_feature(name, table, batch):
    dim = table.embedding_dim
    return embax.FeatureSpec(name=name, table_spec=table, input_shape=(batch, 1), output_shape=(batch, dim))


@dataclasses.dataclass
class Problem:
    """Placed specs of both sides, and one batch as lists."""

    ours: dict[str, embax.FeatureSpec]
    theirs: dict[str, Any]
    devices: int
    local_devices: int
    sparsecores: int
    rows: dict[str, list[list[int]]]
    weights: dict[str, list[list[float]] | None] | None = None

    def pack_ours(self, ids=None, weights=None, **options):
        if ids is None:
            ids = {name: list_of_arrays(rows, np.int32) for name, rows in self.rows.items()}
            weights = self.weights and {
                name: rows and list_of_arrays(rows, np.float32) for name, rows in self.weights.items()
            }
        options = {"limits": "raise"} | options
        return embax.preprocess(ids, weights, specs=self.ours, num_local_devices=self.local_devices, **options)

    def pack_theirs(self, **options):
        ids = {name: peer_array(rows, np.int32) for name, rows in self.rows.items()}
        weights = None
        if self.weights is not None:
            # The reference takes weights for all features or for none.
            ones = {name: [[1.0] * len(row) for row in rows] for name, rows in self.rows.items()}
            weights = {name: peer_array(rows or ones[name], np.float32) for name, rows in self.weights.items()}
        sizes = (self.local_devices, self.devices, self.sparsecores)
        return peer_pack(self.theirs, ids, weights, *sizes, **options)

    def check(self, packed, theirs, stats):
        check_equal_packing(packed, theirs)
        self.check_stats(packed, stats)

    def check_stats(self, packed, stats):
        for field in ("max_ids_per_partition", "max_unique_ids_per_partition", "required_buffer_size_per_sc"):
            mine, other = getattr(packed.stats, field), getattr(stats, field)
            assert mine.keys() == other.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name], other[name], f"{field} of {name}", strict=True)


def have_one_length(rows):
    return len({len(row) for row in rows}) == 1


def matrix(rows, dtype):
    return np.array(rows, dtype).reshape(len(rows), -1)


def object_array(rows, dtype):
    array = np.empty(len(rows), object)
    array[:] = [np.array(row, dtype) for row in rows]
    return array


def list_of_arrays(rows, dtype):
    return [np.array(row, dtype) for row in rows]


def ragged(rows, dtype):
    return embax.Ragged(np.array([x for row in rows for x in row], dtype), np.cumsum([0, *map(len, rows)]))


def peer_array(rows, dtype):
    return (matrix if have_one_length(rows) else object_array)(rows, dtype)


def sparse(rows):
    """Indices, values and dense shape of rows of ids."""
    indices = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
    values = np.array([id_ for row in rows for id_ in row], np.int32)
    shape = np.array([len(rows), max(map(len, rows))], np.int64)
    return np.array(indices, np.int64).reshape(-1, 2), values, shape


def place_both(draw, ours, devices, sparsecores, limit):
    """Stacks and places the specs of both sides by the same arguments; returns the reference's."""
    theirs = peer_specs(ours)
    tables = embax.get_table_specs(ours)
    # Different ones for each stack, never below `limit`.
    limits = {
        "stack_to_max_ids_per_partition": lambda name, samples: limit + len(name) + samples % 5,
        "stack_to_max_unique_ids_per_partition": lambda name, samples: limit + samples % 3,
    }
    how = draw(st.sampled_from(["alone", "auto", "auto", "by hand"]))
    rotation = draw(st.sampled_from([None, 0, 1, 3, -1]))
    if how == "auto":
        options = {"activation_mem_bytes_limit": draw(st.sampled_from([None, 64, 512])), **limits}
        embax.auto_stack_tables(ours, devices, sparsecores, rotation, **options)
        table_stacking.auto_stack_tables(theirs, devices, sparsecores, rotation, **options)
    elif how == "by hand":

        def kind(table):
            return -(-table.embedding_dim // 8), table.combiner, table.optimizer

        alike = [name for name, table in tables.items() if kind(table) == kind(next(iter(tables.values())))]
        names = draw(st.permutations(alike))[: draw(st.integers(1, len(alike)))]
        options = {"stack_name": draw(st.sampled_from([None, "stack"])), **limits}
        embax.stack_tables(ours, names, devices, sparsecores, rotation, **options)
        table_stacking.stack_tables(theirs, names, devices, sparsecores, rotation, **options)
    embax.prepare_feature_specs_for_training(ours, devices, sparsecores)
    embedding.prepare_feature_specs_for_training(theirs, devices, sparsecores)
    return theirs


@st.composite
def problems(draw, weighted=True, small_limits=False, several_hosts=True):
    devices = draw(st.sampled_from([1, 2, 4]))
    local_devices = draw(st.integers(1, devices)) if several_hosts else devices
    sparsecores = draw(st.sampled_from([2, 4]))
    num_tables = draw(st.integers(1, 4))
    owners = [*range(num_tables), *draw(st.lists(st.integers(0, num_tables - 1), max_size=2))]
    counts = [draw(st.integers(1, 3)) for _ in owners]  # Samples of each feature on a SparseCore.
    longest = [draw(st.sampled_from([1, 2, 6])) for _ in owners]
    if small_limits:
        limits, rooms = st.sampled_from([1, 3, 12, 40]), [8 * sparsecores, 16 * sparsecores]
        longest = [6 * length for length in longest]
    else:
        # No SparseCore has more ids than this, so that no partition does. In a buffer of its own size it also needs the
        # entries that fill up partitions.
        most = 16 + sum(count * length for count, length in zip(counts, longest, strict=True))
        limits, room = st.integers(most, most + 9), (-(-most // 8) + devices * sparsecores) * 8 * sparsecores
        rooms = [room, room - 5]
    # One for all, or mostly one, so that tables come to share stacks.
    one_combiner = draw(st.sampled_from([None, "sum", "mean", "sqrtn"]))
    tables = [
        make_table(
            name,
            draw(st.sampled_from([1, 5, 40, 3000, 100_000])),
            one_combiner or draw(st.sampled_from(["sum", "mean", "sqrtn"])),
            embedding_dim=draw(st.sampled_from([6, 8, 8, 16])),
            optimizer=embax.SGDOptimizerSpec(learning_rate=draw(st.sampled_from([0.1, 0.1, 0.1, 0.2]))),
            max_ids_per_partition=draw(limits),
            max_unique_ids_per_partition=draw(limits),
            suggested_coo_buffer_size_per_device=draw(st.sampled_from([None, *rooms])),
        )
        for name in draw(st.permutations([f"t{i}" for i in range(num_tables)]))
    ]
    names = draw(st.permutations([f"f{i}" for i in range(len(owners))]))
    ours = {
        name: make_feature(name, tables[owner], count * devices * sparsecores)
        for name, owner, count in zip(names, owners, counts, strict=True)
    }
    theirs = place_both(draw, ours, devices, sparsecores, draw(limits))

    # Hypothesis draws the shape of the problem and a seed: drawing every id would be slow and explore no more.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weighted = weighted and draw(st.booleans())
    rows, weights = {}, {}
    for name, count, length in zip(names, counts, longest, strict=True):
        table = ours[name].table_spec
        top = min(
            table.vocabulary_size, draw(st.sampled_from([1, 4, 40, 10**6]))
        )  # 1: one hot id; 4, 40: many duplicates.
        least = draw(st.sampled_from([0, length]))
        lengths = rng.integers(least, length + 1, count * local_devices * sparsecores)
        rows[name] = [rng.integers(0, top, n).tolist() for n in lengths]
        pool = WEIGHTS[table.combiner]
        weights[name] = [rng.choice(pool, len(row)).tolist() for row in rows[name]] if draw(st.booleans()) else None
    return Problem(ours, theirs, devices, local_devices, sparsecores, rows, weights if weighted else None)


@differential
@given(problems())
def test_stacking_places_tables_as_the_reference_does(problem):
    # The two sides were stacked while the problem was drawn.
    theirs = embedding.get_stacked_table_specs(problem.theirs)
    ours = embax.get_stacked_table_specs(problem.ours)
    assert list(ours) == list(theirs)
    for name, mine in ours.items():
        for field in (
            "stack_name",
            "stack_vocab_size",
            "stack_embedding_dim",
            "combiner",
            "total_sample_count",
            "max_ids_per_partition",
            "max_unique_ids_per_partition",
            "suggested_coo_buffer_size_per_device",
        ):
            assert getattr(mine, field) == getattr(theirs[name], field), (name, field)
    for name, mine in problem.ours.items():
        other = problem.theirs[name]
        assert dataclasses.asdict(mine._id_transformation) == dataclasses.asdict(other.id_transformation)
        setting = dataclasses.asdict(mine.table_spec.setting_in_stack)
        assert setting == dataclasses.asdict(other.table_spec.setting_in_stack)


@differential
@given(problems(), st.data())
def test_packing_equals_the_reference(problem, data):
    ids, weights = {}, {}
    for name, rows in problem.rows.items():
        forms = [list_of_arrays, object_array, ragged, *([matrix] if have_one_length(rows) else [])]
        form = data.draw(st.sampled_from(forms))
        ids[name] = form(rows, data.draw(st.sampled_from([np.int32, np.int64])))
        given_weights = problem.weights and problem.weights[name]
        weights[name] = given_weights and form(given_weights, np.float32)
    leading = {"has_leading_dimension": data.draw(st.booleans())}
    problem.check(problem.pack_ours(ids, weights, **leading), *problem.pack_theirs(**leading))


@differential
@given(problems(weighted=False))
def test_packing_equals_the_reference_on_sparse_tensors(problem):
    tensors = {name: sparse(rows) for name, rows in problem.rows.items()}
    theirs, stats = embedding.preprocess_sparse_dense_matmul_input_from_sparse_tensor(
        *({name: tensor[i] for name, tensor in tensors.items()} for i in range(3)),
        problem.theirs,
        problem.local_devices,
        problem.devices,
        num_sc_per_device=problem.sparsecores,
    )
    problem.check(problem.pack_ours(), theirs, stats)
    coo = {name: embax.SparseCoo(*tensor) for name, tensor in tensors.items()}
    problem.check(problem.pack_ours(coo), theirs, stats)


def check_drop_counters(problem, packed, stats):
    # Where the buffer is too small, the reference counts equal ids of a sample once; beyond a limit it counts each.
    repeated = any(len(set(row)) < len(row) for rows in problem.rows.values() for row in rows)
    sized = {
        stack.stack_name
        for stack in embax.get_stacked_table_specs(problem.ours).values()
        if stack.suggested_coo_buffer_size_per_device is not None
    }
    counters = packed.stats.id_drop_counters
    assert counters.keys() == stats.id_drop_counters.keys()
    for name, count in stats.id_drop_counters.items():
        if repeated and name in sized:
            assert counters[name] >= count
        else:
            assert counters[name] == count


@differential
@given(problems(small_limits=True))
def test_dropping_equals_the_reference(problem):
    packed = problem.pack_ours(limits="drop")
    theirs, stats = problem.pack_theirs(allow_id_dropping=True)
    problem.check(packed, theirs, stats)
    check_drop_counters(problem, packed, stats)


@differential
@given(problems(several_hosts=False), st.booleans())
def test_a_single_minibatch_equals_the_reference(problem, leading):
    options = {"enable_minibatching": True, "has_leading_dimension": leading}
    problem.check(problem.pack_ours(**options), *problem.pack_theirs(**options))


def entries(packed):
    """The entries of a batch in minibatches: columns device, stack, SparseCore, partition, row, sample, gain; and minibatch."""
    layout, number = packed.layout, int(packed.num_minibatches[0])
    S, N = layout.num_sparsecores_per_device, layout.num_sparsecores
    of_devices = {
        field: getattr(packed, field).reshape(layout.num_local_devices, -1)
        for field in ("row_pointers", "embedding_ids", "sample_ids", "gains")
    }
    columns, minibatches = [], []
    for device, (k, stack) in itertools.product(range(layout.num_local_devices), enumerate(layout.stacks)):
        pointers, *values = (
            array[device, start : start + size]
            for array, start, size in zip(
                of_devices.values(),
                [stack.row_pointers_start, *[stack.entries_start] * 3],
                [S * number * max(N, 8), *[stack.capacity] * 3],
                strict=True,
            )
        )
        ends = pointers.reshape(S * number, -1)[:, :N].reshape(-1)
        begins = np.append(0, -(-ends[:-1] // 8) * 8)
        counts = ends - begins
        assert (counts >= 0).all()
        places = np.concatenate([np.arange(*bounds) for bounds in zip(begins, ends, strict=True)])
        segment, partition = np.divmod(np.repeat(np.arange(len(ends)), counts), N)
        rows, samples, gains = (array[places] for array in values)
        same = np.full_like(rows, 1)
        columns.append(
            np.stack([device * same, k * same, segment // number, partition, rows, samples, gains.view(np.int32)])
        )
        minibatches.append(segment % number)
    return np.concatenate(columns, axis=1), np.concatenate(minibatches)


def exceeds_limits(packed):
    return any(
        (packed.stats.max_ids_per_partition[stack.name] > stack.max_ids_per_partition).any()
        or (packed.stats.max_unique_ids_per_partition[stack.name] > stack.max_unique_ids_per_partition).any()
        for stack in packed.layout.stacks
    )


@differential
@given(problems(several_hosts=False, small_limits=True))
def test_minibatches_hold_what_those_of_the_reference_hold(problem):
    packed = problem.pack_ours(limits="drop", enable_minibatching=True)
    theirs, stats = problem.pack_theirs(allow_id_dropping=True, enable_minibatching=True)
    problem.check_stats(packed, stats)
    if not exceeds_limits(packed):
        check_equal_packing(packed, theirs)
        check_drop_counters(problem, packed, stats)
        return
    whole, _ = entries(problem.pack_ours(limits="grow", enable_minibatching=True))
    for side, counters in (packed, packed.stats.id_drop_counters), (from_peer(theirs, packed), stats.id_drop_counters):
        assert int(side.num_minibatches[0]) > 1
        kept, minibatches = entries(side)
        # The columns that name a row of a stack are never in two minibatches.
        names = np.unique(kept[[1, 3, 4]], axis=1)
        assert np.unique(np.vstack([kept[[1, 3, 4]], minibatches]), axis=1).shape[1] == names.shape[1]
        assert set(map(tuple, kept.T)) <= set(map(tuple, whole.T))
        assert (kept.shape == whole.shape) == (not any(counters.values()))


@pytest.mark.parametrize("minibatching", [False, True])
@pytest.mark.parametrize("sparsecores", [2, 4])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_sizes_equal_those_of_the_reference(devices, sparsecores, minibatching):
    theirs = embedding.compute_row_pointers_size_per_device(
        global_device_count=devices, num_sc_per_device=sparsecores, enable_minibatching=minibatching
    )
    assert embax.compute_row_pointers_size_per_device(devices, sparsecores, minibatching) == theirs
    for max_ids in (1, 8, 9, 1000):
        arguments = max_ids, devices, sparsecores, minibatching
        theirs = embedding.compute_theoretical_max_coo_buffer_size(*arguments)
        assert embax.compute_theoretical_max_coo_buffer_size(*arguments) == theirs


@differential
@given(problems(), st.booleans(), st.booleans())
def test_shapes_without_data_equal_those_of_the_reference(problem, minibatching, leading):
    sizes = problem.devices, problem.sparsecores, minibatching
    buffers = embedding.compute_coo_buffer_size_per_device(problem.theirs, *sizes)
    assert embax.compute_coo_buffer_size_per_device(problem.ours, *sizes) == buffers
    options = {"enable_minibatching": minibatching, "has_leading_dimension": leading}
    ours = embax.eval_preprocess_shape(problem.ours, num_local_devices=problem.local_devices, **options)
    theirs = embedding.eval_preprocess_sparse_dense_matmul_input_shape(
        problem.theirs, problem.local_devices, problem.devices, num_sc_per_device=problem.sparsecores, **options
    )
    for mine, others in (
        (ours.row_pointers, theirs.lhs_row_pointers),
        (ours.embedding_ids, theirs.lhs_embedding_ids),
        (ours.sample_ids, theirs.lhs_sample_ids),
        (ours.gains, theirs.lhs_gains),
    ):
        # The reference tells flat shapes, whatever it packs.
        assert {other.dtype for other in others.values()} == {mine.dtype}
        assert sum(other.size for other in others.values()) == mine.size
        assert mine.shape == ((problem.local_devices, mine.size // problem.local_devices) if leading else (mine.size,))
    for stack in ours.layout.stacks:
        assert theirs.lhs_gains[stack.name].shape == (problem.local_devices * stack.capacity,)
    if minibatching:
        assert (ours.num_minibatches.shape, ours.num_minibatches.dtype) == (
            theirs.num_minibatches.shape,
            theirs.num_minibatches.dtype,
        )


def limits_of(stacks):
    fields = ("max_ids_per_partition", "max_unique_ids_per_partition", "suggested_coo_buffer_size_per_device")
    return {name: [getattr(stack, field) for field in fields] for name, stack in stacks.items()}


@differential
@given(problems())
def test_limits_follow_statistics_as_in_the_reference(problem):
    packed, (_, stats) = problem.pack_ours(), problem.pack_theirs()
    embax.update_preprocessing_parameters(problem.ours, packed.stats, problem.sparsecores)
    embedding.update_preprocessing_parameters(problem.theirs, stats, problem.sparsecores)
    ours = limits_of(embax.get_stacked_table_specs(problem.ours))
    theirs = limits_of(embedding.get_stacked_table_specs(problem.theirs))
    # The reference takes a limit of 0 from a stack without ids, and cannot pack with it.
    least = [1, 1, problem.sparsecores]
    assert ours == {name: list(map(max, limits, least)) for name, limits in theirs.items()}
    if ours == theirs:
        problem.check(problem.pack_ours(), *problem.pack_theirs())


def test_samples_of_weight_zero_are_nan_in_the_reference_alone():
    ours = embax.prepare_feature_specs_for_training([make_feature("f", make_table("t", 40, "mean"), 4)], 1, 4)
    theirs = peer_specs([make_feature("f", make_table("t", 40, "mean"), 4)])
    embedding.prepare_feature_specs_for_training(theirs, 1, 4)
    ids, weights = np.full((4, 2), 3, np.int32), np.float32([[0, 0], [1, -1], [1, 1], [2, 0]])
    packed, _ = peer_pack(theirs, [ids], [weights], 1, 1, 4)
    entries = slice(0, None, packed.lhs_gains["t"].size // 4)  # The one entry of each SparseCore.
    np.testing.assert_array_equal(packed.lhs_gains["t"][entries], np.float32([np.nan, np.nan, 1, 1]))
    mine = embax.preprocess([ids], [weights], specs=ours)
    np.testing.assert_array_equal(mine.gains[entries], np.float32([0, 0, 1, 1]))


def mirrored(theirs):
    """Specs of `embax.compat` with the fields and the placement of the reference's."""
    tables, stacks = {}, {}

    def feature(one):
        table, stack = one.table_spec, one.table_spec._stacked_table_spec
        if table.name not in tables:
            fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table) if field.init}
            optimizer = our_specs.SGDOptimizerSpec(table.optimizer.learning_rate)
            if stack.stack_name not in stacks:
                of_stack = {field.name: getattr(stack, field.name) for field in dataclasses.fields(stack)}
                stacks[stack.stack_name] = our_specs.StackedTableSpec(**of_stack | {"optimizer": optimizer})
            setting = our_specs.TableSettingInStack(**dataclasses.asdict(table.setting_in_stack))
            placed = {"_stacked_table_spec": stacks[stack.stack_name], "_setting_in_stack": setting}
            tables[table.name] = our_specs.TableSpec(**fields | placed | {"optimizer": optimizer})
        return our_specs.FeatureSpec(
            name=one.name,
            table_spec=tables[table.name],
            input_shape=one.input_shape,
            output_shape=one.output_shape,
            _id_transformation=our_specs.FeatureIdTransformation(**dataclasses.asdict(one.id_transformation)),
        )

    return {name: feature(one) for name, one in theirs.items()}


def check_buffers(mine, theirs, num_sparsecores, parts):
    """That the arrays of stacks are equal, bit for bit, up to the last row pointer of each of `parts` SparseCores."""
    assert mine[0].keys() == theirs[0].keys()
    for stack, pointers in mine[0].items():
        np.testing.assert_array_equal(pointers, theirs[0][stack], strict=True)
        ends = -(-pointers.reshape(parts, -1)[:, num_sparsecores - 1] // 8) * 8
        written = np.arange(mine[1][stack].size // parts) < ends[:, None]
        for array, other in zip(mine[1:4], theirs[1:4], strict=True):
            assert array[stack].shape == other[stack].shape
            a, b = (side[stack].reshape(parts, -1)[written].view(np.int32) for side in (array, other))
            np.testing.assert_array_equal(a, b)


@differential
@given(problems(), st.booleans(), st.sampled_from([0, 10**6]))
def test_the_low_level_of_compat_equals_the_reference(problem, leading, shift):
    """Also on ids beyond the vocabulary, which lie in other rows, or in none."""
    specs = mirrored(problem.theirs)
    names = list(specs)
    ids = [peer_array([[id_ + shift for id_ in row] for row in problem.rows[name]], np.int32) for name in names]
    arguments = problem.local_devices, problem.devices
    options = {"num_sc_per_device": problem.sparsecores, "has_leading_dimension": leading, "allow_id_dropping": True}
    sides = [
        module.preprocess_sparse_dense_matmul_input(ids, None, [tree[name] for name in names], *arguments, **options)
        for module, tree in ((our_pybind, specs), (pybind_input_preprocessing, problem.theirs))
    ]
    N, parts = problem.devices * problem.sparsecores, problem.local_devices * problem.sparsecores
    check_buffers(sides[0][:4], sides[1][:4], N, parts)
    assert sides[0][4] == sides[1][4]
    for field in ("max_ids_per_partition", "max_unique_ids_per_partition", "required_buffer_sizes"):
        mine, other = (getattr(side[5], field) for side in sides)
        jax.tree.map(np.testing.assert_array_equal, mine, dict(other))


@differential
@given(problems())
def test_compat_stacks_and_sizes_equal_those_of_the_reference(problem):
    specs = mirrored(problem.theirs)
    N = problem.devices * problem.sparsecores
    rng = np.random.default_rng(0)
    tables = {
        name: rng.normal(size=(table.vocabulary_size, table.embedding_dim)).astype(np.float32)
        for name, table in our_embedding.get_table_specs(specs).items()
        if table.vocabulary_size <= 3000
    }
    for minibatching in (False, True):
        sizes = problem.devices, problem.sparsecores, minibatching
        expected = embedding.compute_coo_buffer_size_per_device(problem.theirs, *sizes)
        assert our_embedding.compute_coo_buffer_size_per_device(specs, *sizes) == expected
    small = len(tables) == len(our_embedding.get_table_specs(specs))
    if small:
        stacked = [
            module.stack_and_shard_tables(functions.get_table_specs(tree), tables, N)
            for module, functions, tree in (
                (our_stacking, our_embedding, specs),
                (table_stacking, embedding, problem.theirs),
            )
        ]
        jax.tree.map(np.testing.assert_array_equal, *map(dict, stacked))


@differential
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_whole_buffers_equal_those_of_the_reference(seed, devices):
    rng = np.random.default_rng(seed)
    batches = [[rng.integers(0, 60, rng.integers(0, 6)) for _ in range(8)] for _ in range(2)]
    weights = [[rng.normal(size=len(row)).astype(np.float32) for row in batch] for batch in batches]
    mesh = SimpleNamespace(devices=np.arange(devices))
    options = {"max_ids_per_partition": 20, "max_unique_ids_per_partition": 20, "num_sc_per_device": 4}
    for arguments in (
        (batches[0], weights[0], mesh, options),
        (batches, weights, mesh, options | {"enable_minibatching": True}),
    ):
        ours, theirs = (
            module.preprocess_sparse_dense_matmul_input(*arguments[:3], **arguments[3])
            for module in (our_input_preprocessing, input_preprocessing)
        )
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("leading", [False, True])
def test_initial_values_equal_those_of_the_reference(leading):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None, None) if leading else jax.P("x", None))
    sides = []
    normal = jax.nn.initializers.normal(1.0)
    for functions, specs in ((our_embedding, our_specs), (embedding, embedding_spec)):
        tables = [
            specs.TableSpec(
                name=name,
                vocabulary_size=vocabulary,
                embedding_dim=dim,
                initializer=normal,
                optimizer=optimizer,
                combiner="sum",
            )
            for name, vocabulary, dim, optimizer in [
                ("z", 100, 6, specs.FTRLOptimizerSpec()),
                ("b", 300, 5, specs.FTRLOptimizerSpec()),
                ("c", 9, 20, specs.AdamOptimizerSpec()),
            ]
        ]
        features = [
            specs.FeatureSpec(
                name=table.name, table_spec=table, input_shape=(32, 1), output_shape=(32, table.embedding_dim)
            )
            for table in tables
        ]
        functions.auto_stack_tables(features, len(jax.devices()), 4)
        functions.prepare_feature_specs_for_training(features, len(jax.devices()), 4)
        with jax.numpy_dtype_promotion("standard"):
            sides.append(
                functions.init_embedding_variables(jax.random.key(3), functions.get_table_specs(features), sharding, 4)
            )
    ours, theirs = ({name: (state.table, *state.slot) for name, state in side.items()} for side in sides)
    jax.tree.map(np.testing.assert_array_equal, ours, dict(theirs))


MIRRORED = (
    "lib.nn.embedding",
    "lib.nn.embedding_spec",
    "lib.nn.table_stacking",
    "lib.core.constants",
    "lib.core.input_preprocessing",
    "lib.fdo.fdo_client",
    "lib.fdo.file_fdo_client",
    "lib.fdo.csv_file_fdo_client",
    "utils.utils",
)
"""Modules of which the mirror has everything by now."""

ABSENT = {"_round_up_to", "estimate_preprocessing_parameters"}
"""Names of the wheel that the mirrored commit does not have."""


def parameters_of(function):
    return [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", MIRRORED)
def test_public_names_and_arguments_are_those_of_the_reference(name):
    ours = importlib.import_module(f"embax.compat.sparsecore.{name}")
    theirs = importlib.import_module(f"jax_tpu_embedding.sparsecore.{name}")
    for attribute, value in vars(theirs).items():
        own = getattr(value, "__module__", None) == theirs.__name__
        if not own or attribute.startswith("_") or attribute in ABSENT or not callable(value):
            continue
        mine = getattr(ours, attribute)
        if inspect.isfunction(value):
            assert parameters_of(mine) == parameters_of(value), attribute
        elif inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_") and method != "replace":
                    assert parameters_of(getattr(mine, method)) == parameters_of(function), f"{attribute}.{method}"
            if dataclasses.is_dataclass(value) and not attribute.endswith("OptimizerSpec"):
                fields = [field.name for field in dataclasses.fields(value)]
                assert {*fields} <= {field.name for field in dataclasses.fields(mine)}, attribute


@pytest.mark.parametrize("step", [None, 0, 3, 1000])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdagradMomentum", "FTRL", "LaProp", "F2A", "Custom"])
def test_hyperparameters_are_those_of_the_reference(name, step):
    ours, theirs = (getattr(specs, f"{name}OptimizerSpec")(0.3) for specs in (our_specs, embedding_spec))
    with jax.numpy_dtype_promotion("standard"):
        pairs = list(zip(ours.get_hyperparameters(step), theirs.get_hyperparameters(step), strict=True))
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        # Those of the reference cancel: 1 - b**t in float32.
        np.testing.assert_allclose(mine, other, rtol=1e-5)
    assert ours.get_float_params() == theirs.get_float_params()
    assert ours.get_bool_params() == theirs.get_bool_params()
