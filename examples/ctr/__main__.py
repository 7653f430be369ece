"""Command line of the demo: ``python -m examples.ctr --help``."""

import argparse
from pathlib import Path

from .demo import Settings, check_restore, run


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.ctr",
        description="Train a click model on large embedding tables, on New York's flights or on a Criteo file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="TSV in Criteo format, plain or gzip; the flights where absent")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for checkpoint and pictures")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training samples")
    parser.add_argument("--batch-size", type=int, default=1024, help="samples a step")
    parser.add_argument("--rows-per-column", type=int, default=100_000, help="table rows for each category of --data")
    parser.add_argument("--seed", type=int, default=0, help="of initial values, dropout and shuffling")
    parser.add_argument("--check-restore", action="store_true", help="only check the checkpoint in --out")
    options = vars(parser.parse_args())
    check_only = options.pop("check_restore")
    (check_restore if check_only else run)(Settings(**options))


if __name__ == "__main__":
    main()
