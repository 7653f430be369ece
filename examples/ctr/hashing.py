"""The hashing trick: any tuple of integers becomes a row of a table of fixed size."""

import numpy as np


def hash_rows(columns: list[np.ndarray], rows: int, salt: int) -> np.ndarray:
    """int32[samples] in [0, rows): a hash of ``columns``, integer arrays [samples], that differs with ``salt``.

    The mixing step is the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    state = np.full(len(columns[0]), salt, np.uint64)
    for column in columns:
        state = state * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state % np.uint64(rows)).astype(np.int32)
