"""The sides that train whole models: their settings and batches as files, and the gradient that is written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.processes import SideProgram, running
from benchmarks.sides.embax_models import products
from benchmarks.sides.model_setting import Batch, ModelSetting, Table, first_rows

EMBAX = SideProgram("embax", "embax_models", None, ("adagrad",))
TINY = ModelSetting(
    name="tiny",
    tables={"a": Table(40, 8, 0.05), "b": Table(7, 8, 0.05), "memory": Table(64, 1, 0.1)},
    deep={"one": "a", "other": "a", "third": "b"},
    wide={"cross": "memory"},
    batch=16,
    inputs=3,
    bottom=(6, 8),
    top=(5, 1),
    all_beside=True,
    adamw=True,
    dense_rate=0.01,
    weight_decay=0.1,
)


def batches(count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        lengths = rng.integers(0, 4, TINY.batch)
        ids = {"one": rng.integers(0, 40, 16), "other": rng.integers(0, 40, lengths.sum())}
        ids |= {"third": rng.integers(0, 7, 16), "cross": rng.integers(0, 64, 16)}
        splits = {"other": np.concatenate([[0], np.cumsum(lengths)])}
        labels = (rng.random(16) < 0.5).astype(np.float32)
        found.append(
            Batch(
                {k: v.astype(np.int32) for k, v in ids.items()},
                splits,
                rng.standard_normal((16, 3), np.float32),
                labels,
            )
        )
    return found


def test_a_model_learns_its_batches_and_stacks_change_nothing(tmp_path):
    written = batches(2)
    setting = TINY.write(tmp_path, written)
    assert ModelSetting.from_json(setting.to_json()).layers() == setting.layers()
    layers, read = setting.read()
    assert layers["top0"][0].shape == (6 + 4 * 8 + 3, 5)
    assert read[1].splits["other"].tolist() == written[1].splits["other"].tolist()
    with running((EMBAX, setting), (EMBAX, dataclasses.replace(setting, stacked=True))) as sides:
        losses, stacked = (side.losses([0, 1] * 20) for side in sides)
        assert {len(sides[0].time(1, part=part)) for part in ("step", "packing", "lookup", "dense", "update")} == {1}
    np.testing.assert_allclose(losses, stacked, rtol=1e-5)
    assert losses[-2] < 0.9 * losses[0]
    assert losses[-1] < 0.9 * losses[1]


def test_the_gradient_of_products_is_that_of_automatic_differentiation():
    vectors = jax.random.normal(jax.random.key(0), (5, 4, 3))
    weights = jax.random.normal(jax.random.key(1), (5, 6))
    first, second = np.triu_indices(4, 1)

    def plain(vectors: jax.Array) -> jax.Array:
        return jnp.einsum("bid,bjd->bij", vectors, vectors)[:, first, second]

    np.testing.assert_allclose(products(vectors), plain(vectors), rtol=1e-6)
    ours, theirs = (jax.grad(lambda v, f=f: (f(v) * weights).sum())(vectors) for f in (products, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_first_rows_differ_from_row_to_row_and_column_to_column():
    rows = first_rows(Table(31, 31, 0.1))
    assert len(np.unique(rows, axis=0)) == len(np.unique(rows, axis=1).T) == 31
    assert np.abs(rows).max() < 0.031
