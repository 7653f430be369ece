"""Native code of embax. Private: its callers check what users give, and write the messages."""

import numpy as np

class SortedBatch:
    """Ids that were read, checked and sorted, and their counts."""

    @property
    def max_ids(self) -> np.ndarray: ...
    @property
    def max_unique_ids(self) -> np.ndarray: ...
    @property
    def required(self) -> np.ndarray: ...
    @property
    def invalid(self) -> np.ndarray: ...
    def needs(self, minibatches: bool) -> np.ndarray: ...

class BatchCounts:
    """Counts of a batch, as those of SortedBatch."""

    @property
    def max_ids(self) -> np.ndarray: ...
    @property
    def max_unique_ids(self) -> np.ndarray: ...
    @property
    def required(self) -> np.ndarray: ...

class DensePacker:
    """Packs batches of dense ids that have the sizes and keep the limits of one before them."""

    def __init__(
        self,
        features: np.ndarray,
        stacks: np.ndarray,
        order: np.ndarray,
        num_local_devices: int,
        sparsecores_per_device: int,
        num_sparsecores: int,
        validation: int,
        batch_sizes: np.ndarray,
        placements: np.ndarray,
        limits: np.ndarray,
        row_pointers: int,
        entries: int,
    ) -> None: ...
    def pack(
        self, ids: list[object], threads: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, BatchCounts] | None: ...
    @property
    def needs(self) -> np.ndarray: ...

def sort_batch(
    ids: list[np.ndarray],
    weights: list[np.ndarray | None],
    row_splits: list[np.ndarray | None],
    features: np.ndarray,
    stacks: np.ndarray,
    order: np.ndarray,
    num_local_devices: int,
    sparsecores_per_device: int,
    num_sparsecores: int,
    validation: int,
    count_merged: bool,
    threads: int,
    expected: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> SortedBatch | tuple[int, int, int, int, int, float]: ...
def minibatch_boundaries(batch: SortedBatch, limits: np.ndarray, threads: int) -> int: ...
def form_minibatches(batch: SortedBatch, boundaries: int, threads: int) -> int: ...
def drop(batch: SortedBatch, limits: np.ndarray, minibatches: bool) -> np.ndarray: ...
def write_batch(
    batch: SortedBatch,
    placements: np.ndarray,
    row_pointers: np.ndarray,
    ids: np.ndarray,
    samples: np.ndarray,
    gains: np.ndarray,
    minibatches: bool,
    threads: int,
) -> None: ...
def empty_arrays(row_pointers: int, entries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def available_processors() -> int: ...
def ffi_handlers() -> dict[str, object]: ...
def row_rules() -> dict[str, tuple[int, list[bool], int]]: ...
def simd() -> str: ...
