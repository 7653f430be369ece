"""PyTorch: `torch.nn.EmbeddingBag(sparse=True)` for each table, and `torch.optim.SGD` or `torch.optim.Adagrad`."""

import os
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.sides.setting import FIRST_ACCUMULATOR, FIRST_VALUE, Setting


class Side:
    """The tables of a setting as bags; ids are int64[batch, valency] of each."""

    def __init__(self, setting: Setting, ids: np.ndarray, targets: np.ndarray):
        torch.set_num_threads(os.cpu_count() or 1)
        self.setting = setting
        self.batches = [[torch.from_numpy(one.astype(np.int64)) for one in batch] for batch in ids]
        self.targets = list(torch.from_numpy(targets))
        self.bags: list[Any] = []
        self.optimizer: Any = None

    def make_tables(self) -> None:
        """Makes bags and the optimizer with its state."""
        setting = self.setting
        for _ in range(setting.num_tables):
            weight = torch.full((setting.vocabulary, setting.dim), FIRST_VALUE)
            self.bags.append(torch.nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=True))
        parameters = [bag.weight for bag in self.bags]
        if setting.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=setting.learning_rate)
        else:
            self.optimizer = torch.optim.Adagrad(
                parameters, lr=setting.learning_rate, initial_accumulator_value=FIRST_ACCUMULATOR, eps=0.0
            )

    def step(self, number: int) -> None:
        """A whole step, from ids to updated tables."""
        ids = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        outputs = [bag(one) for bag, one in zip(self.bags, ids, strict=True)]
        torch.autograd.backward(
            outputs, [out.detach() - target for out, target in zip(outputs, self.targets, strict=True)]
        )
        self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def activations(self, number: int) -> np.ndarray:
        """The activations of a batch."""
        with torch.no_grad():
            return np.stack([bag(one).numpy() for bag, one in zip(self.bags, self.batches[number], strict=True)])

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return self.bags[table].weight.detach()[torch.from_numpy(ids)].numpy()
