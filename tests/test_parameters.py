"""Limits of placed specs that follow statistics."""

import re

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings

import embax
from embax import SparseDenseMatmulInputStats
from embax._stacking.plan import make_plan

LIMITS = ("max_ids_per_partition", "max_unique_ids_per_partition", "suggested_coo_buffer_size_per_device")


def stacked(devices=1, sparsecores=2):
    """Two tables in stack "s", one alone; features of "a" hold equal but different objects of the table."""

    def table(name):
        return oracle.table_spec(name, 40, max_ids_per_partition=100, max_unique_ids_per_partition=90)

    specs = {"x": oracle.feature_spec("x", table("a"), batch=8), "y": oracle.feature_spec("y", table("b"), batch=8)}
    specs["z"] = oracle.feature_spec("z", table("c"), batch=8)
    embax.stack_tables(specs, ["a", "b"], devices, sparsecores, stack_name="s")
    return embax.prepare_feature_specs_for_training(specs, devices, sparsecores)


def limits_of(specs):
    return {
        name: tuple(getattr(stack, limit) for limit in LIMITS)
        for name, stack in embax.get_stacked_table_specs(specs).items()
    }


def update(specs, *fields, num_sc_per_device=None):
    return embax.update_preprocessing_parameters(specs, SparseDenseMatmulInputStats(*fields), num_sc_per_device)


@pytest.mark.parametrize(
    "value",
    [
        7,
        np.int64(7),
        np.array(7),
        np.array([3, 7, 1]),
        np.array([[1, 2], [7, 0]], np.uint8),
        [5, 7],
        jnp.array([7, 2]),
        7.0,
    ],
)
def test_values_of_any_rank(value):
    specs = stacked()
    assert update(specs, {"s": value}, {"s": value}, {"s": value}) is specs
    assert limits_of(specs) == {"s": (7, 7, 14), "c": (100, 90, None)}


def test_what_is_missing_stays():
    specs = stacked()
    update(specs, {"s": 5, "c": 6})
    assert limits_of(specs) == {"s": (5, 256, None), "c": (6, 90, None)}
    update(specs, {}, {"c": 4})
    assert limits_of(specs) == {"s": (5, 256, None), "c": (6, 4, None)}
    update(specs, {}, {}, {"s": [8, 16]})
    assert limits_of(specs) == {"s": (5, 256, 32), "c": (6, 4, None)}
    update(specs)
    assert limits_of(specs) == {"s": (5, 256, 32), "c": (6, 4, None)}


def test_all_tables_of_a_stack_hold_one_stack():
    specs = stacked()
    update(specs, {"s": 5})
    assert specs["x"].table_spec.stacked_table_spec is specs["y"].table_spec.stacked_table_spec
    assert [stack.name for stack in make_plan(specs).stacks] == ["s", "c"]


def test_equal_tables_that_are_different_objects_are_all_updated():
    tables = [oracle.table_spec("t"), oracle.table_spec("t")]
    specs = [oracle.feature_spec(name, table) for name, table in zip("fg", tables, strict=True)]
    embax.prepare_feature_specs_for_training(specs, 1, 2)
    update(specs, {"t": 5})
    assert limits_of(specs) == {"t": (5, 256, None)}
    assert tables[0] == tables[1]


def test_equal_limits_leave_the_specs_as_they_are():
    """So that what is kept by the identity of the specs, such as packers, is kept."""
    specs = stacked()
    update(specs, {"s": 5})
    before = specs["x"].table_spec.stacked_table_spec
    update(specs, {"s": np.array([5, 2])})
    assert specs["x"].table_spec.stacked_table_spec is before


def test_a_batch_without_ids_leaves_the_smallest_limits():
    specs = stacked()
    packed = embax.preprocess({name: np.full((8, 3), -1) for name in "xyz"}, specs=specs, limits="grow")
    embax.update_preprocessing_parameters(specs, packed.stats)
    assert limits_of(specs) == {"s": (1, 1, 2), "c": (1, 1, 2)}
    embax.preprocess({name: np.full((8, 3), -1) for name in "xyz"}, specs=specs)


def test_a_size_that_was_set_for_a_device():
    stats = SparseDenseMatmulInputStats()
    stats.set_required_buffer_size_per_device("s", 101, 2)
    specs = embax.update_preprocessing_parameters(stacked(), stats)
    assert limits_of(specs)["s"][2] == 101


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), devices=st.sampled_from([1, 2]), sparsecores=st.sampled_from([1, 2, 3]))
def test_the_batch_whose_statistics_were_used_fits_exactly(seed, devices, sparsecores):
    rng = np.random.default_rng(seed)
    ids = {name: rng.integers(-1, rng.integers(1, 40), (8 * devices, rng.integers(1, 5))) for name in "xyz"}
    specs = stacked(devices, sparsecores)
    stats = embax.preprocess(ids, specs=specs, limits="grow", num_local_devices=devices).stats
    embax.update_preprocessing_parameters(specs, stats)
    embax.preprocess(ids, specs=specs, num_local_devices=devices)
    for stack, fitting in limits_of(specs).items():
        for limit, value, step in zip(LIMITS, fitting, (1, 1, 8 * sparsecores), strict=True):
            if value <= step:
                continue
            tables = {spec.table_spec.name: spec.table_spec for spec in specs.values()}
            tables = [table for table in tables.values() if table.stacked_table_spec.stack_name == stack]
            kept = tables[0].stacked_table_spec
            for table in tables:
                table._stacked_table_spec = kept.replace(**{limit: value - step})
            with pytest.raises(ValueError, match=f"Stack '{stack}': .*{limit}={value - step}"):
                embax.preprocess(ids, specs=specs, num_local_devices=devices)
            for table in tables:
                table._stacked_table_spec = kept


def test_an_unknown_stack_changes_nothing():
    specs = stacked()
    before = limits_of(specs)
    with pytest.raises(
        ValueError, match=r"max_unique_ids_per_partition names the stack 'a'; the stacks .* are \['c', 's'\]"
    ):
        update(specs, {"s": 5}, {"a": 5})
    assert limits_of(specs) == before


@pytest.mark.parametrize(
    "value",
    [
        -1,
        [3, -1],
        2.5,
        [0.5, 2],
        float("nan"),
        float("inf"),
        [],
        [[1], [2, 3]],
        "7",
        None,
        [True],
        2**31,
        np.uint64(2**63),
    ],
)
def test_bad_values(value):
    specs = stacked()
    for number, field in enumerate(("max_ids_per_partition", "max_unique_ids_per_partition")):
        with pytest.raises(
            ValueError,
            match=f"{field} of stack 's' is {re.escape(repr(value))}; it must be an integer from 0 to {2**31 - 1}, or",
        ):
            update(specs, *[{}] * number, {"s": value})
    assert limits_of(specs)["s"] == (256, 256, None)


@pytest.mark.parametrize("value", [-8, 2.25, 2**30, []])
def test_bad_buffer_sizes(value):
    with pytest.raises(ValueError, match="required_buffer_size_per_sc of stack 's' is"):
        update(stacked(), {}, {}, {"s": value})


def test_other_sparsecores():
    specs = stacked()
    update(specs, {}, {}, {"s": 8}, num_sc_per_device=2)
    with pytest.raises(
        ValueError, match="num_sc_per_device is 4, but the tables are placed for 2 SparseCores a device; leave"
    ):
        update(specs, {"s": 5}, num_sc_per_device=4)
    assert limits_of(specs)["s"] == (256, 256, 16)


def test_specs_that_are_not_placed():
    specs = [oracle.feature_spec("f", oracle.table_spec())]
    with pytest.raises(ValueError, match="Table 'table' has not been placed: .*prepare_feature_specs_for_training"):
        update(specs, {"table": 5})


def test_what_is_no_statistics():
    with pytest.raises(
        ValueError, match="updated_params is a NoneType without a mapping max_ids_per_partition; it must be"
    ):
        embax.update_preprocessing_parameters(stacked(), None)
    with pytest.raises(
        ValueError, match="updated_params is a dict .*stats of a batch that embax.preprocess has just packed"
    ):
        embax.update_preprocessing_parameters(stacked(), {"s": 5})


def test_setting_a_limit_of_a_placed_table_points_here():
    table = stacked()["x"].table_spec
    for limit in LIMITS:
        with pytest.raises(
            AttributeError,
            match=f"TableSpec 'a': {limit} cannot be set to 5, .*of its stack with embax.update_preprocessing_parameters",
        ):
            setattr(table, limit, 5)
    with pytest.raises(AttributeError, match="combiner cannot be set to 'mean', .*Set it before, or make a new spec"):
        table.combiner = "mean"
