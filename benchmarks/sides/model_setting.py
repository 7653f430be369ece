"""What the sides of a comparison of whole models are told, and what they are asked. It needs NumPy alone."""

import ctypes
import dataclasses
import itertools
import json
import pathlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.sides.worker import Worker


class Table(NamedTuple):
    """A table of a model: its rows, its columns, the learning rate of its Adagrad."""

    rows: int
    dim: int
    rate: float


class Batch(NamedTuple):
    """A batch of a model.

    Args:
        ids: of each feature, int32[number of ids].
        splits: of each feature of which a sample has several ids or none, int64[batch + 1]; others have one id each.
        dense: float32[batch, inputs].
        labels: float32[batch], 0 or 1.
    """

    ids: dict[str, np.ndarray]
    splits: dict[str, np.ndarray]
    dense: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ModelSetting:
    """A DLRM, perhaps with a wide part, whose tables are trained with Adagrad; the loss is the mean binary cross-entropy.

    A bottom MLP makes a vector of the dense inputs. It and the vectors of the deep features, means of rows, meet pairwise in dot
    products, and a top MLP makes log odds of these and of what stands beside them. Wide features and a linear function of the
    dense inputs are added. MLPs have a ReLU between layers, and no dropout.

    Args:
        name: of the model.
        tables: by name.
        deep: the table of each deep feature, all of the same dim.
        wide: the table of each wide feature, of dim 1; there may be none.
        batch: samples of a step.
        inputs: dense inputs.
        bottom: widths of the bottom MLP, of which the last is the dim of the deep features.
        top: widths of the top MLP, of which the last is 1.
        all_beside: whether all vectors and the dense inputs stand beside the products, or the bottom's output alone.
        adamw: whether AdamW trains the dense parameters, or SGD.
        dense_rate: its learning rate.
        weight_decay: of AdamW.
        accumulator: of Adagrad at the start.
        data: the folder that `write` fills.
        batches: how many it holds.
        stacked: whether embax stacks the tables.
    """

    name: str
    tables: dict[str, Table]
    deep: dict[str, str]
    wide: dict[str, str]
    batch: int
    inputs: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    all_beside: bool
    adamw: bool
    dense_rate: float
    weight_decay: float = 0.0
    accumulator: float = 1e-6
    data: str = ""
    batches: int = 0
    stacked: bool = False

    @classmethod
    def from_json(cls, text: str) -> "ModelSetting":
        """The setting that `to_json` wrote."""
        fields = json.loads(text)
        fields["tables"] = {name: Table(*table) for name, table in fields["tables"].items()}
        return cls(**fields)

    def to_json(self) -> str:
        """The setting as text."""
        return json.dumps(dataclasses.asdict(self))

    def layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer, by name."""
        vectors, dim = len(self.deep) + 1, self.bottom[-1]
        beside = vectors * dim + self.inputs if self.all_beside else dim
        widths = {"bottom": (self.inputs, *self.bottom), "top": (vectors * (vectors - 1) // 2 + beside, *self.top)}
        if self.wide:
            widths["wide"] = (self.inputs, 1)
        return {f"{part}{n}": pair for part, of in widths.items() for n, pair in enumerate(itertools.pairwise(of))}

    def write(self, folder: pathlib.Path, batches: list[Batch], seed: int = 0) -> "ModelSetting":
        """Fills a folder with batches and with the dense parameters at the start; returns the setting that reads them."""
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, (inputs, outputs) in self.layers().items():
            arrays[f"{name}.weights"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
            arrays[f"{name}.bias"] = np.zeros(outputs, np.float32)
        for number, batch in enumerate(batches):
            arrays |= {f"{number}.dense": batch.dense, f"{number}.labels": batch.labels}
            arrays |= {f"{number}.ids.{feature}": ids for feature, ids in batch.ids.items()}
            arrays |= {f"{number}.splits.{feature}": splits for feature, splits in batch.splits.items()}
        np.savez(folder / "model.npz", **arrays)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(self, data=str(folder), batches=len(batches))

    def read(self) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[Batch]]:
        """Weights, [inputs, outputs], and bias of each layer, and batches."""
        with np.load(pathlib.Path(self.data) / "model.npz") as file:
            arrays = dict(file)
        layers = {name: (arrays[f"{name}.weights"], arrays[f"{name}.bias"]) for name in self.layers()}
        features = [*self.deep, *self.wide]
        batches = [
            Batch(
                {feature: arrays[f"{n}.ids.{feature}"] for feature in features},
                {f: arrays[f"{n}.splits.{f}"] for f in features if f"{n}.splits.{f}" in arrays},
                arrays[f"{n}.dense"],
                arrays[f"{n}.labels"],
            )
            for n in range(self.batches)
        ]
        return layers, batches


def first_rows(table: Table) -> np.ndarray:
    """float32[rows, dim]: the values of a table at the start, small ones that differ from row to row and column to column."""
    rows, columns = np.arange(table.rows)[:, None], np.arange(table.dim)
    return ((7 * rows + 13 * columns) % 31 - 15).astype(np.float32) * np.float32(0.002)


def keep_memory() -> None:
    """Lets the C library keep what is given back to it, instead of asking the system for the same memory in each step.

    glibc maps every block of more than 32 MB anew, and pages are zeroed as they are touched: that of XLA's temporary memory took
    as long as the products of a step. Environment variables do the same: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647,
    and for blocks of more than 64 MB MALLOC_ARENA_MAX=1.
    """
    trim_threshold, mmap_max, largest = -1, -4, 2**31 - 1  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, largest)
        mallopt(mmap_max, 0)


class ModelSide(Protocol):
    """A model and its training step."""

    def make_tables(self) -> None:
        """Makes tables, slots and dense parameters."""

    def parts(self) -> dict[str, Any]:
        """What can be timed, as functions of the number of a batch: "step" at least, which ends when all is computed."""
        ...

    def step(self, number: int) -> Any:
        """A training step, from ids to updated tables and parameters; returns its loss."""
        ...


class ModelWorker(Worker):
    """A model, and what may be asked of it: `time` and `memory`, as of tables alone, and the losses of steps."""

    def __init__(self, side: ModelSide):
        keep_memory()
        self.model = side
        super().__init__(side, 1)  # pyright: ignore[reportArgumentType]

    def losses(self, numbers: list[int]) -> list[float]:
        """The losses of steps with these batches."""
        return [float(self.model.step(number)) for number in numbers]
