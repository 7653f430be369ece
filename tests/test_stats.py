"""Statistics of a packed batch: required buffer sizes, and the names that they are stored under."""

import dataclasses
import types

import numpy as np
import oracle
import pytest

import embax
from embax import SparseDenseMatmulInputStats


def stats_of(**required):
    return SparseDenseMatmulInputStats(required_buffer_size_per_sc=required)


def test_the_required_size_is_that_of_the_largest_need():
    stats = stats_of(t=np.array([8, 24, 16, 0], np.int32))
    assert stats.get_required_buffer_size_per_device("t") == 96
    assert stats.get_required_buffer_size_per_device("t", 2) == 48
    assert stats.get_required_buffer_size_per_device("unknown") is None
    assert type(stats.get_required_buffer_size_per_device("t")) is int


def test_a_large_required_size_does_not_overflow():
    stats = stats_of(t=np.array([2**30], np.int32))
    assert stats.get_required_buffer_size_per_device("t", 16) == 2**34


@pytest.mark.parametrize(("size", "sparsecores"), [(96, 4), (100, 8), (10, 3), (0, 4)])
def test_what_is_set_is_what_one_gets(size, sparsecores):
    stats = stats_of()
    stats.set_required_buffer_size_per_device("t", size, sparsecores)
    assert stats.required_buffer_size_per_sc["t"].shape == (sparsecores,)
    np.testing.assert_allclose(stats.required_buffer_size_per_sc["t"], size / sparsecores)
    assert stats.get_required_buffer_size_per_device("t") == size


def test_a_known_stack_keeps_its_number_of_values():
    stats = stats_of(t=np.array([8, 8]))
    stats.set_required_buffer_size_per_device("t", 64)
    np.testing.assert_array_equal(stats.required_buffer_size_per_sc["t"], np.array([32, 32]))


def test_an_unknown_stack_needs_the_number_of_sparsecores():
    with pytest.raises(ValueError, match="^num_sc_per_device must be provided if the table is not present.$"):
        stats_of().set_required_buffer_size_per_device("t", 64)


def test_from_native_statistics():
    native = types.SimpleNamespace(
        max_ids_per_partition={"t": np.array([1])},
        max_unique_ids_per_partition={"t": np.array([2])},
        required_buffer_sizes={"t": np.array([8])},
        dropped_id_count={"t": 3},
    )
    stats = SparseDenseMatmulInputStats.from_cc(native)
    assert stats.max_ids_per_partition is native.max_ids_per_partition
    assert stats.max_unique_ids_per_partition is native.max_unique_ids_per_partition
    assert stats.required_buffer_size_per_sc is native.required_buffer_sizes
    assert stats.id_drop_counters == {"t": 3}


def test_suffixes():
    fields = dataclasses.fields(SparseDenseMatmulInputStats)
    suffixes = {field.name: field.metadata["suffix"] for field in fields if "suffix" in field.metadata}
    assert suffixes == {
        "max_ids_per_partition": "_max_ids",
        "max_unique_ids_per_partition": "_max_unique_ids",
        "required_buffer_size_per_sc": "_required_buffer_size",
        "id_drop_counters": "_id_drop_counters",
    }


def test_the_buffer_that_packing_asks_for_fits_exactly():
    """Packing with the size that the statistics of the batch require succeeds, with one multiple less it fails."""
    ids = [np.arange(24, dtype=np.int32).reshape(8, 3) % 20]

    def pack(size, limits="raise"):
        table = oracle.table_spec(vocabulary=20, suggested_coo_buffer_size_per_device=size)
        specs = embax.prepare_feature_specs_for_training([oracle.feature_spec("f", table, batch=8)], 1, 2)
        return embax.preprocess(ids, specs=specs, limits=limits)

    stats = pack(None, "grow").stats
    size = stats.get_required_buffer_size_per_device("table")
    assert size > 16
    pack(size)
    with pytest.raises(ValueError, match="entries of the packed buffer"):
        pack(size - 16)
