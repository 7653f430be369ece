"""Stacking and packing against the released reference, bit for bit. `make test-reference` runs this; elsewhere it skips."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

import embax

pytest.importorskip("jax_tpu_embedding", reason="jax-tpu-embedding is not installed; `make test-reference` installs it")

from jax_tpu_embedding.sparsecore.lib.nn import embedding, table_stacking

from benchmarks.peer import check_equal_packing, peer_pack, peer_specs

# The same examples in every run.
differential = settings(max_examples=200, derandomize=True, deadline=None)

# For combiner "sqrtn" the reference contracts `sum += w * w` into one operation (FMA), which rounds once where embax
# rounds twice. On samples of up to 6 positive weights that moves a gain by up to 3 units in the last place, and by up to
# 5 where gains of equal ids were added. Where float32 holds the squares and their sums exactly, and for the other
# combiners in any case, the gains agree bit for bit.
SQRTN_ULP = 5

EXACT = np.float32([1, 0.5, 2, 3.25, 0.125, 0.75])
POSITIVE = np.random.default_rng(0).uniform(0.01, 8, 64).astype(np.float32)
SIGNED = np.float32([1.3, 0.7, 2.9, 5.1, -0.01, -3.7, 0, 0.3, 1e-8])


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
    max_ulp: dict[str, int] | None = None

    def pack_ours(self, ids=None, weights=None, limits="raise"):
        ids = (
            {name: [np.array(row, np.int32) for row in rows] for name, rows in self.rows.items()}
            if ids is None
            else ids
        )
        return embax.preprocess(ids, weights, specs=self.ours, limits=limits, num_local_devices=self.local_devices)

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
        check_equal_packing(packed, theirs, max_ulp=self.max_ulp)
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
def problems(draw, weights_are=("none", "exact", "any"), small_limits=False):
    devices = draw(st.sampled_from([1, 2, 4]))
    local_devices = draw(st.integers(1, devices))
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
    how = draw(st.sampled_from(weights_are))
    rows, weights = {}, {}
    for name, count, length in zip(names, counts, longest, strict=True):
        table = ours[name].table_spec
        top = min(
            table.vocabulary_size, draw(st.sampled_from([1, 4, 40, 10**6]))
        )  # 1: one hot id; 4, 40: many duplicates.
        least = draw(st.sampled_from([0, length]))
        lengths = rng.integers(least, length + 1, count * local_devices * sparsecores)
        rows[name] = [rng.integers(0, top, n).tolist() for n in lengths]
        pool = EXACT if how == "exact" else SIGNED if table.combiner == "sum" else POSITIVE
        weights[name] = [rng.choice(pool, len(row)).tolist() for row in rows[name]] if draw(st.booleans()) else None
    rounded = (
        {}
        if how != "any"
        else {
            name: SQRTN_ULP for name, stack in embax.get_stacked_table_specs(ours).items() if stack.combiner == "sqrtn"
        }
    )
    return Problem(ours, theirs, devices, local_devices, sparsecores, rows, None if how == "none" else weights, rounded)


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
    problem.check(problem.pack_ours(ids, weights), *problem.pack_theirs())


@differential
@given(problems(weights_are=("none",)))
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
    if hasattr(embax, "SparseCoo"):
        coo = {name: embax.SparseCoo(*tensor) for name, tensor in tensors.items()}
        problem.check(problem.pack_ours(coo), theirs, stats)


def can_drop():
    try:
        embax.preprocess([], specs=[], limits="drop")
    except ValueError as error:
        return "limits is" not in str(error)
    return True


@pytest.mark.skipif(not can_drop(), reason='embax.preprocess has no limits="drop"')
@differential
@given(problems(small_limits=True))
def test_dropping_equals_the_reference(problem):
    weights = problem.weights and {
        name: rows and list_of_arrays(rows, np.float32) for name, rows in problem.weights.items()
    }
    packed = problem.pack_ours(weights=weights, limits="drop")
    theirs, stats = problem.pack_theirs(allow_id_dropping=True)
    problem.check(packed, theirs, stats)
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
