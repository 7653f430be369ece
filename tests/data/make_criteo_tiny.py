"""Writes criteo_tiny.tsv.gz: 2,000 made-up lines in the format of the Criteo click logs, with something to learn.

Each category value has a hidden effect on the log odds of a click, and so have three of the integers. Run it anywhere;
the file comes out the same, byte for byte: ``python tests/data/make_criteo_tiny.py``.
"""

import gzip
from pathlib import Path

import numpy as np

LINES = 2_000
INTEGERS = 13
CARDINALITIES = [12] * 10 + [40] * 10 + [150] * 6


def lines(rng: np.random.Generator) -> list[str]:
    """The lines, without their ends."""
    integers = rng.geometric(0.1, (LINES, INTEGERS)) - 2
    log_odds = 0.9 * (np.log1p(integers[:, :3] + 1) - 2.0) @ np.array([1.0, -1.0, 0.5]) - 1.0
    columns = []
    for cardinality in CARDINALITIES:
        values = rng.integers(0, 1 << 32, cardinality)
        choice = (cardinality * rng.random(LINES) ** 2).astype(int)  # the first values are the frequent ones
        log_odds += rng.normal(0.0, 0.5, cardinality)[choice]
        columns.append([f"{value:08x}" for value in values[choice]])
    clicked = rng.random(LINES) < 1 / (1 + np.exp(-log_odds))
    fields = np.array([clicked.astype(int).astype(str), *integers.T.astype(str), *columns]).T
    missing = rng.random((LINES, fields.shape[1])) < 0.08
    missing[:, 0] = False
    return ["\t".join(line) for line in np.where(missing, "", fields)]


if __name__ == "__main__":
    text = "\n".join(lines(np.random.default_rng(2013))) + "\n"
    Path(__file__).with_name("criteo_tiny.tsv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
