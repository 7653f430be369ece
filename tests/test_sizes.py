"""Sizes of the packed arrays."""

import numpy as np
import oracle
import pytest

import embax


def placed(devices=1, sparsecores=4, **fields):
    table = oracle.table_spec(**fields)
    return embax.prepare_feature_specs_for_training([oracle.feature_spec("f", table, batch=8)], devices, sparsecores)


@pytest.mark.parametrize(
    ("devices", "sparsecores", "minibatching", "expected"),
    [
        (1, 4, False, 32),
        (1, 4, True, 2048),
        (2, 4, False, 32),
        (4, 4, False, 64),
        (3, 2, False, 16),
        (1, None, False, 32),
    ],
)
def test_row_pointers(devices, sparsecores, minibatching, expected):
    assert embax.compute_row_pointers_size_per_device(devices, sparsecores, minibatching) == expected


@pytest.mark.parametrize(
    ("max_ids", "devices", "sparsecores", "minibatching", "expected"),
    [
        (12, 1, 4, False, 256),
        (12, 1, 4, True, 16384),
        (8, 2, 2, False, 64),
        (1, 1, 1, False, 8),
        (16, 1, None, False, 256),
    ],
)
def test_theoretical_maximum(max_ids, devices, sparsecores, minibatching, expected):
    assert embax.compute_theoretical_max_coo_buffer_size(max_ids, devices, sparsecores, minibatching) == expected


@pytest.mark.parametrize(
    ("suggested", "minibatching", "expected"),
    [(None, False, 256), (None, True, 16384), (64, False, 64), (64, True, 64), (65, False, 96)],
)
def test_buffers_of_placed_specs(suggested, minibatching, expected):
    specs = placed(max_ids_per_partition=12, suggested_coo_buffer_size_per_device=suggested)
    sizes = embax.compute_coo_buffer_size_per_device(specs, enable_minibatching=minibatching)
    assert sizes == {"table": expected}
    assert embax.compute_coo_buffer_size_per_device(specs, 1, 4, minibatching) == sizes


def test_packed_arrays_have_the_computed_sizes():
    specs = placed(devices=2, sparsecores=2, max_ids_per_partition=12)
    packed = embax.preprocess([np.zeros((8, 3), np.int32)], specs=specs)
    assert packed.row_pointers.size == 2 * embax.compute_row_pointers_size_per_device(2, 2)
    assert packed.gains.size == 2 * embax.compute_coo_buffer_size_per_device(specs)["table"]


def test_each_stack_has_its_size():
    a, b = oracle.table_spec("a", max_ids_per_partition=8), oracle.table_spec("b", max_ids_per_partition=9)
    specs = {"a": oracle.feature_spec("a", a), "b": oracle.feature_spec("b", b)}
    embax.prepare_feature_specs_for_training(specs, 1, 2)
    assert embax.compute_coo_buffer_size_per_device(specs) == {"a": 32, "b": 64}


def test_errors():
    with pytest.raises(ValueError, match="compute_row_pointers_size_per_device: global_device_count is 0"):
        embax.compute_row_pointers_size_per_device(0, 4)
    with pytest.raises(ValueError, match="compute_row_pointers_size_per_device: num_sc_per_device is -1"):
        embax.compute_row_pointers_size_per_device(1, -1)
    with pytest.raises(ValueError, match="compute_theoretical_max_coo_buffer_size: max_ids_per_partition is 2.5"):
        embax.compute_theoretical_max_coo_buffer_size(2.5, 1, 4)
    with pytest.raises(ValueError, match=r"placed for .* \(1, 4\) and asked for on \(1, 2\); leave the counts out"):
        embax.compute_coo_buffer_size_per_device(placed(), num_sc_per_device=2)
    with pytest.raises(ValueError, match=r"placed for .* \(1, 4\) and asked for on \(2, 4\)"):
        embax.compute_coo_buffer_size_per_device(placed(), 2, 4)
    with pytest.raises(ValueError, match="Table 'table' has not been placed"):
        embax.compute_coo_buffer_size_per_device([oracle.feature_spec("f", oracle.table_spec())])
