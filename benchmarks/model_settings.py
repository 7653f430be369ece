"""The models that are measured, and their batches."""

import pathlib

import numpy as np

from benchmarks.sides.model_setting import Batch, ModelSetting, Table
from benchmarks.workloads import CRITEO
from examples.ctr import flights
from examples.ctr import model as demo
from examples.ctr.dataset import RaggedIds
from examples.ctr.train import DENSE_LEARNING_RATE, DENSE_WEIGHT_DECAY

DEMO_BATCH = 1024
"""The default of the demo's command line."""
DENSE_INPUTS = 13
"""Of the Criteo data."""
BATCHES = 8


def click_model(folder: pathlib.Path, stacked: bool) -> ModelSetting:
    """The model of `examples.ctr` and its data, flights in random order; without dropout, and at a constant learning rate."""
    dataset = flights.load()
    features = dataset.features
    wide = {name: feature.table for name, feature in features.items() if feature.is_cross}
    deep = {name: feature.table for name, feature in features.items() if not feature.is_cross}
    setting = ModelSetting(
        name="click model of the demo",
        tables={
            name: Table(table.rows, demo.WIDE_DIM, demo.WIDE_LEARNING_RATE)
            if name in wide.values()
            else Table(table.rows, demo.DEEP_DIM, demo.DEEP_LEARNING_RATE)
            for name, table in dataset.tables.items()
        },
        deep=deep,
        wide=wide,
        batch=DEMO_BATCH,
        inputs=dataset.dense.shape[1],
        bottom=(demo.BOTTOM_WIDTH, demo.DEEP_DIM),
        top=(*demo.TOP_WIDTHS, 1),
        all_beside=True,
        adamw=True,
        dense_rate=DENSE_LEARNING_RATE,
        weight_decay=DENSE_WEIGHT_DECAY,
        accumulator=demo.ACCUMULATOR_START,
        stacked=stacked,
    )
    order = np.random.default_rng(0).permutation(dataset.rows(dataset.train))
    batches = []
    for number in range(BATCHES):
        ids, dense, labels = dataset.batch(order[number * DEMO_BATCH : (number + 1) * DEMO_BATCH])
        ragged = {name: column for name, column in ids.items() if isinstance(column, RaggedIds)}
        flat = {name: column.values if isinstance(column, RaggedIds) else column for name, column in ids.items()}
        splits = {name: column.row_splits for name, column in ragged.items()}
        batches.append(Batch(flat, splits, dense, labels))
    return setting.write(folder, batches)


def dlrm(folder: pathlib.Path, stacked: bool) -> ModelSetting:
    """A DLRM with small MLPs on tables and ids as those of the workload `criteo`."""
    table = Table(CRITEO.vocabulary, CRITEO.dim, 0.01)
    found = CRITEO.batches(BATCHES)
    setting = ModelSetting(
        name="DLRM",
        tables=dict.fromkeys(found[0], table),
        deep={name: name for name in found[0]},
        wide={},
        batch=CRITEO.batch,
        inputs=DENSE_INPUTS,
        bottom=(64, CRITEO.dim),
        top=(128, 64, 1),
        all_beside=False,
        adamw=False,
        dense_rate=0.01,
        stacked=stacked,
    )
    rng = np.random.default_rng(0)
    batches = []
    for ids in found:
        dense = rng.standard_normal((CRITEO.batch, DENSE_INPUTS), np.float32)
        labels = (rng.random(CRITEO.batch) < 0.25).astype(np.float32)
        batches.append(Batch({name: column[:, 0] for name, column in ids.items()}, {}, dense, labels))
    return setting.write(folder, batches)


MODELS = {"demo": click_model, "dlrm": dlrm}
