"""FBGEMM's table-batched embeddings on CPU, whose backward pass updates the tables: all tables in one operator."""

import os
from typing import Any

import fbgemm_gpu  # noqa: F401  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (  # pyright: ignore[reportMissingImports]
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # pyright: ignore[reportMissingImports]
    ComputeDevice,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.sides.setting import FIRST_ACCUMULATOR, FIRST_VALUE, Setting

OPTIMIZERS = {
    "sgd": OptimType.EXACT_SGD,
    "adagrad": OptimType.EXACT_ADAGRAD,
    "rowwise": OptimType.EXACT_ROWWISE_ADAGRAD,
}


class Side:
    """The tables of a setting in one module; ids of all tables are one int64 array, made beforehand like its offsets."""

    def __init__(self, setting: Setting, ids: np.ndarray, targets: np.ndarray):
        torch.set_num_threads(os.cpu_count() or 1)
        self.setting = setting
        self.batches = [torch.from_numpy(batch.reshape(-1).astype(np.int64)) for batch in ids]
        self.offsets = torch.arange(0, self.batches[0].numel() + 1, setting.valency)
        # float32[batch, tables * dim], as the operator gives activations.
        self.targets = torch.from_numpy(np.concatenate(targets, axis=1))
        self.module: Any = None

    def make_tables(self) -> None:
        """Makes tables and slots."""
        setting = self.setting
        table = (setting.vocabulary, setting.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [table] * setting.num_tables,
            optimizer=OPTIMIZERS[setting.optimizer],
            learning_rate=setting.learning_rate,
            eps=0.0,
            pooling_mode=PoolingMode.SUM,
        )
        for weights in self.module.split_embedding_weights():
            weights.fill_(FIRST_VALUE)
        if setting.optimizer != "sgd":
            self.module.momentum1_host.detach().fill_(FIRST_ACCUMULATOR)

    def step(self, number: int) -> None:
        """A whole step, from ids to updated tables."""
        out = self.module(self.batches[number % len(self.batches)], self.offsets)
        out.backward(out.detach() - self.targets)

    def parts(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def activations(self, number: int) -> np.ndarray:
        """The activations of a batch."""
        with torch.no_grad():
            return self.module(self.batches[number], self.offsets).numpy()

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return self.module.split_embedding_weights()[table].detach()[torch.from_numpy(ids)].numpy()
