"""What happens to a touched row around every rule: clipping, decay and limits, and what of it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax

BACKENDS = pytest.mark.parametrize("backend", ["native", "portable"])


def take_step(optimizer, gradient, limits=None, backend="native", dim=8):
    """Table and slots before and after a step in which row k < 6 has the gradient `gradient[k]`."""
    table = oracle.table_spec(vocabulary=20, dim=dim, optimizer=optimizer)
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, 6, 1)}, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": np.arange(6)[:, None]}, specs=specs)
    gradients = {"f": jnp.asarray(gradient, jnp.float32)}
    with embax.use_backend(backend):
        new = embax.apply_gradients(gradients, packed, variables, specs=specs, step=0, embedding_var_limits=limits)
    return tuple(oracle.tables_of(state, specs)["table"] for state in (variables, new))


@BACKENDS
@pytest.mark.parametrize("limits", [(-0.5, 0.25), (None, 0.25), (-0.5, None), (None, None), (0.1, 0.1)])
@pytest.mark.parametrize("optimizer", [embax.AdagradOptimizerSpec(0.1), embax.RowWiseAdamOptimizerSpec(0.1)])
def test_new_rows_are_clipped_to_limits_and_nothing_else_is(backend, limits, optimizer):
    gradient = np.random.default_rng(0).standard_normal((6, 8))
    before, after = take_step(optimizer, gradient, {"table": limits}, backend)
    _, free = take_step(optimizer, gradient, None, backend)
    low, high = (
        np.float32(np.nan_to_num(np.nan if end is None else end, nan=inf))
        for end, inf in zip(limits, (-np.inf, np.inf), strict=True)
    )
    np.testing.assert_allclose(after[0][:6], np.clip(free[0][:6], low, high), rtol=1e-6)
    np.testing.assert_array_equal(after[0][6:], before[0][6:])
    assert limits == (None, None) or (after[0][6:] > 0.25).any()  # Rows that stay may be outside.
    for slot, wanted in zip(after[1:], free[1:], strict=True):
        np.testing.assert_allclose(slot, wanted, rtol=1e-6)


@BACKENDS
def test_a_gradient_is_clipped_at_any_size(backend):
    gradient = np.zeros((6, 8), np.float32)
    gradient[0] = 3e38  # Its squares overflow, and so does its norm.
    gradient[1] = 1e-30  # Its squares vanish.
    gradient[2, 3] = np.nan
    gradient[4] = [3, 4, 0, 0, 0, 0, 0, 0]
    gradient[5] = [0.3, -0.4, 0, 0, 0, 0, 0, 0]
    before, after = take_step(embax.SGDOptimizerSpec(1.0, clip_gradient_norm=1.0), gradient, backend=backend)
    moved = before[0][:6].astype(np.float64) - after[0][:6]
    np.testing.assert_allclose(np.linalg.norm(moved[0]), 1, rtol=1e-6)
    np.testing.assert_allclose(moved[0], 8**-0.5, rtol=1e-5)
    np.testing.assert_array_equal(moved[[1, 3]], 0)  # No larger than the rounding of the row.
    assert np.isnan(moved[2, 3])
    assert not np.isnan(after[0][[0, 1, 3, 4, 5]]).any()
    np.testing.assert_allclose(moved[4], np.array([3, 4, 0, 0, 0, 0, 0, 0]) / 5, atol=1e-6)
    np.testing.assert_allclose(moved[5], gradient[5], atol=1e-6)
    before, after = take_step(embax.SGDOptimizerSpec(1.0, clip_gradient_value=0.5), gradient, backend=backend)
    np.testing.assert_allclose(before[0][4] - after[0][4], [0.5, 0.5, 0, 0, 0, 0, 0, 0], atol=1e-6)
    assert np.isnan(after[0][2, 3])


@BACKENDS
def test_decay_of_a_schedule_follows_its_rate(backend):
    optimizer = embax.SGDOptimizerSpec(lambda step: 0.5 / (1 + step), weight_decay=0.1)
    before, after = take_step(optimizer, np.zeros((6, 8)), backend=backend)
    np.testing.assert_allclose(after[0][:6], before[0][:6] * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(after[0][6:], before[0][6:])


def test_bits_are_those_without_options_where_options_ask_for_nothing():
    gradient = np.random.default_rng(0).standard_normal((6, 8))
    _, plain = take_step(embax.AdamOptimizerSpec(0.1), gradient)
    _, wide = take_step(embax.AdamOptimizerSpec(0.1, clip_gradient_norm=1e6, clip_gradient_value=1e6), gradient)
    for one, other in zip(plain, wide, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"other": (0, 1)}, r"embedding_var_limits has \['other'\], which are no stacks; the stacks are \['table'\]"),
        ({"table": (1, 0)}, r"of stack 'table' is \(1, 0\); it must be two finite numbers \(min, max\) in this order"),
        ({"table": (0,)}, r"of stack 'table' is \(0,\); it must be two"),
        ({"table": (float("nan"), 1)}, "it must be two finite numbers"),
        ({"table": ("0", 1)}, "it must be two finite numbers"),
        ({"table": 3}, "it must be two finite numbers"),
        ({"table": (1e39, None)}, "it must be two finite numbers"),
        ([(0, 1)], "embedding_var_limits is a list. Pass a dict"),
    ],
)
def test_bad_limits_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        take_step(embax.SGDOptimizerSpec(0.1), np.zeros((6, 8)), limits)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight_decay", -0.1, "weight_decay is -0.1; it must be a number of at least 0"),
        ("weight_decay", None, "weight_decay is None; it must be a number"),
        ("weight_decay_mode", "L2", "weight_decay_mode is 'L2'; it must be one of 'decoupled', 'l2'"),
        ("clip_gradient_value", 0, "clip_gradient_value is 0; it must be a number above 0, or None"),
        ("clip_gradient_norm", -1, "clip_gradient_norm is -1; it must be a number above 0, or None"),
        ("clip_gradient_norm", 1e-60, "it must be a number above 0, or None"),  # 0 in float32.
        ("weight_decay", 1e39, "weight_decay is 1e\\+39; it must be a number"),  # Infinite in float32.
        ("weight_decay", 10**400, "it must be a number"),
    ],
)
def test_bad_options_are_refused(field, value, message):
    with pytest.raises(ValueError, match=f"AdamOptimizerSpec: .*{message}"):
        embax.AdamOptimizerSpec(**{field: value})


def test_ftrl_does_not_decay_apart_from_its_rule():
    with pytest.raises(
        ValueError, match="FTRLOptimizerSpec: weight_decay is 0.1; .* Its own remedy is l2_regularization_st"
    ):
        embax.FTRLOptimizerSpec(weight_decay=0.1)
    assert embax.FTRLOptimizerSpec(weight_decay=0.1, weight_decay_mode="l2").l2 == 0.1
