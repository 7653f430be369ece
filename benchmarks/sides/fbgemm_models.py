"""A model in PyTorch, eager, whose tables are FBGEMM's: their backward pass updates them."""

import os
from collections.abc import Iterable
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

from benchmarks.sides.model_setting import Batch, ModelSetting, ModelWorker, first_rows

COLUMNS = 4
"""The number of columns of a table is a multiple of this."""


def tables_of(setting: ModelSetting, features: dict[str, str]) -> Any:
    """The tables of some features, of one learning rate, as one module."""
    names = list(dict.fromkeys(features.values()))
    tables = [setting.tables[name] for name in names]
    (rate,) = {table.rate for table in tables}
    widths = [-(-table.dim // COLUMNS) * COLUMNS for table in tables]
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [
            (table.rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)
            for table, width in zip(tables, widths, strict=True)
        ],
        feature_table_map=[names.index(name) for name in features.values()],
        optimizer=OptimType.EXACT_ADAGRAD,
        learning_rate=rate,
        eps=0.0,
        pooling_mode=PoolingMode.MEAN,
    )
    for weights, table in zip(module.split_embedding_weights(), tables, strict=True):
        weights.zero_()[:, : table.dim] = torch.from_numpy(first_rows(table))
    module.momentum1_host.detach().fill_(setting.accumulator)
    return module


def ids_of(batch: Batch, features: Iterable[str]) -> tuple[Any, Any]:
    """Ids of some features of a batch, one after the other, and where those of each sample begin."""
    lengths = []
    for feature in features:
        splits = batch.splits.get(feature)
        lengths.append(np.ones(len(batch.labels), np.int64) if splits is None else np.diff(splits))
    ids = np.concatenate([batch.ids[feature] for feature in features]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return torch.from_numpy(ids), torch.from_numpy(offsets)


class Products(torch.autograd.Function):
    """The dot products of all pairs of vectors, float32[batch, pairs], of float32[batch, vectors, dim].

    The gradient is one product with a symmetric matrix, as on embax's side, which is faster than that of autograd.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Any, places: Any, pairs: Any) -> Any:
        """`places` are those of pairs in all products, `pairs` the pair of each place, beyond the last where it has none."""
        ctx.save_for_backward(vectors, pairs)
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient of the vectors."""
        vectors, pairs = ctx.saved_tensors
        padded = torch.nn.functional.pad(gradients[0], (0, 1))
        symmetric = padded.index_select(1, pairs).view(len(vectors), vectors.shape[1], vectors.shape[1])
        return torch.bmm(symmetric, vectors), None, None


class Dense(torch.nn.Module):
    """What is not tables: log odds from the activations of the deep and of the wide features and the dense inputs."""

    def __init__(self, setting: ModelSetting, values: dict[str, tuple[np.ndarray, np.ndarray]]):
        super().__init__()
        layers = {name: torch.nn.Linear(*sizes) for name, sizes in setting.layers().items()}
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(torch.from_numpy(values[name][0].T))
                layer.bias.copy_(torch.from_numpy(values[name][1]))

        def mlp(part: str) -> Any:
            found = [layer for name, layer in layers.items() if name.startswith(part)]
            between = [step for layer in found[:-1] for step in (layer, torch.nn.ReLU())]
            return torch.nn.Sequential(*between, found[-1])

        self.setting = setting
        self.bottom, self.top = mlp("bottom"), mlp("top")
        self.wide = mlp("wide") if setting.wide else None
        vectors = len(setting.deep) + 1
        first, second = torch.triu_indices(vectors, vectors, 1)
        pairs = torch.full((vectors, vectors), len(first))
        pairs[first, second] = pairs[second, first] = torch.arange(len(first))
        self.pairs, self.places = pairs.flatten(), first * vectors + second

    def forward(self, deep: Any, wide: Any, dense: Any) -> Any:
        """float32[batch]."""
        summary = self.bottom(dense)
        flat = torch.cat([summary, deep], dim=1)
        vectors = flat.view(len(dense), -1, summary.shape[1])
        products = Products.apply(vectors, self.places, self.pairs)
        beside = [flat, dense] if self.setting.all_beside else [summary]
        log_odds = self.top(torch.cat([products, *beside], dim=1))
        if self.wide is not None:
            # Of the columns of a wide feature only the first is used: its table has one, but for FBGEMM's multiples.
            log_odds = log_odds + self.wide(dense) + wide[:, ::COLUMNS].sum(dim=1, keepdim=True)
        return log_odds[:, 0]


class Side:
    """A model; ids, offsets, dense inputs and labels are tensors, made beforehand."""

    def __init__(self, setting: ModelSetting):
        torch.set_num_threads(os.cpu_count() or 1)
        self.setting = setting
        self.values, batches = setting.read()
        self.parts_of_tables = [features for features in (setting.deep, setting.wide) if features]
        self.batches = [
            (
                [ids_of(batch, features) for features in self.parts_of_tables],
                torch.from_numpy(batch.dense),
                torch.from_numpy(batch.labels),
            )
            for batch in batches
        ]
        self.tables: list[Any] = []
        self.dense: Any = None
        self.optimizer: Any = None

    def make_tables(self) -> None:
        """Makes tables, slots and dense parameters."""
        setting = self.setting
        self.tables = [tables_of(setting, features) for features in self.parts_of_tables]
        self.dense = Dense(setting, self.values)
        if setting.adamw:
            self.optimizer = torch.optim.AdamW(
                self.dense.parameters(), setting.dense_rate, weight_decay=setting.weight_decay, fused=True
            )
        else:
            self.optimizer = torch.optim.SGD(self.dense.parameters(), setting.dense_rate, fused=True)

    def _lookup(self, number: int) -> list[Any]:
        ids, _, _ = self.batches[number % len(self.batches)]
        return [module(*of) for module, of in zip(self.tables, ids, strict=True)]

    def _train_dense(self, number: int, activations: list[Any]) -> Any:
        _, dense, labels = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        log_odds = self.dense(activations[0], activations[1] if self.setting.wide else None, dense)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def step(self, number: int) -> Any:
        """A training step; returns its loss."""
        return self._train_dense(number, self._lookup(number))

    def parts(self) -> dict[str, Any]:
        """The step, its tables alone, lookup and update, and what is dense alone."""
        leaves: dict[int, list[Any]] = {}

        def tables(number: int) -> None:
            activations = self._lookup(number)
            torch.autograd.backward(activations, [1e-4 * one.detach() for one in activations])

        def dense(number: int) -> None:
            number %= len(self.batches)
            if number not in leaves:
                leaves[number] = [one.detach().requires_grad_() for one in self._lookup(number)]
            for leaf in leaves[number]:
                leaf.grad = None
            self._train_dense(number, leaves[number])

        return {"step": self.step, "tables": tables, "dense": dense}


def worker(text: str) -> ModelWorker:
    """What `benchmarks.sides.worker` serves."""
    return ModelWorker(Side(ModelSetting.from_json(text)))
