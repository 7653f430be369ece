"""Intel's extension for PyTorch: merged embedding bags, whose backward pass updates the tables, all in one operator."""

import os
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from intel_extension_for_pytorch.nn.modules.merged_embeddingbag import (  # pyright: ignore[reportMissingImports]
    EmbeddingSpec,
    MergedEmbeddingBagWithAdaGrad,
    MergedEmbeddingBagWithSGD,
)

from benchmarks.sides.setting import FIRST_ACCUMULATOR, FIRST_VALUE, Setting


class Side:
    """The tables of a setting in one module; ids and offsets are int64 arrays of each table, made beforehand."""

    def __init__(self, setting: Setting, ids: np.ndarray, targets: np.ndarray):
        torch.set_num_threads(os.cpu_count() or 1)
        self.setting = setting
        self.batches = [[torch.from_numpy(one.reshape(-1).astype(np.int64)) for one in batch] for batch in ids]
        offsets = torch.arange(0, setting.batch * setting.valency + 1, setting.valency)
        self.offsets = [offsets] * setting.num_tables
        self.targets = list(torch.from_numpy(targets))
        self.module: Any = None

    def make_tables(self) -> None:
        """Makes tables and slots."""
        setting, shape = self.setting, (self.setting.vocabulary, self.setting.dim)
        specs = [
            EmbeddingSpec(*shape, "sum", torch.float32, torch.full(shape, FIRST_VALUE), False, True)
            for _ in range(setting.num_tables)
        ]
        if setting.optimizer == "sgd":
            self.module = MergedEmbeddingBagWithSGD(specs, lr=setting.learning_rate)
        else:
            self.module = MergedEmbeddingBagWithAdaGrad(specs, lr=setting.learning_rate, eps=0.0)
            for accumulator in self.module.adagrad_args.hessian:
                accumulator.fill_(FIRST_ACCUMULATOR)

    def step(self, number: int) -> None:
        """A whole step, from ids to updated tables."""
        outputs = self.module(self.batches[number % len(self.batches)], self.offsets)
        torch.autograd.backward(
            outputs, [out.detach() - target for out, target in zip(outputs, self.targets, strict=True)]
        )

    def parts(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def activations(self, number: int) -> np.ndarray:
        """The activations of a batch."""
        with torch.no_grad():
            outputs = self.module(self.batches[number], self.offsets)
        return np.stack([out.numpy() for out in outputs])

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return self.module.weights[table].detach()[torch.from_numpy(ids)].numpy()
