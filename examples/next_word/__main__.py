"""Command line of the example: ``python -m examples.next_word --help``."""

import argparse
import platform
import time

import jax
import numpy as np

from . import model, text

BEGINNINGS = ("the value of the", "if the", "this is a list of")


def main() -> None:
    """Trains the model and prints its perplexity beside those of models that count, and what it would say next."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.next_word",
        description="Train a recurrent model of the next word on the reference of the Python language.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training text")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step")
    parser.add_argument("--paragraphs", type=int, help="use the first paragraphs only; all where absent")
    parser.add_argument("--seed", type=int, default=0, help="of initial values, dropout and shuffling")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that share tables and batches")
    options = parser.parse_args()
    started = time.perf_counter()
    mesh = None
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)  # virtual ones, which share the cores
        mesh = jax.make_mesh((options.devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    data = text.load(options.paragraphs)
    before, words = text.pairs(data.test)
    trained_on = len(text.pairs(data.train)[0])
    print(
        f"The language reference of Python {platform.python_version()}: {trained_on:,} words to train on, "
        f"{len(words):,} to test, a vocabulary of {len(data.vocabulary):,}"
    )
    next_word = model.new_model(data, options.batch_size, mesh)
    params, _ = model.train(next_word, data, options.batch_size, options.epochs, options.seed)

    perplexities = {
        "embax, recurrent": model.perplexity(next_word, params, data.test, options.batch_size),
        "bigrams, Kneser-Ney": np.exp(-np.log(text.bigram(data)[before, words]).mean()),
        "unigrams": np.exp(-np.log(text.unigram(data)[words]).mean()),
    }
    print("\nof the test words    perplexity")
    for name, value in perplexities.items():
        print(f"{name:<21}{value:>10.1f}")
    print()
    for beginning in BEGINNINGS:
        likely = model.likely(next_word, params, data, beginning.split(), 3, options.batch_size)
        print(f"{beginning} ...", ", ".join(f"{word} {probability:.0%}" for word, probability in likely))
    print(f"\n{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
