"""Training in several processes, each of which feeds its own slice of the batch; README.md says how to start them.

The tables are sharded over the devices of all processes. What is learned: every id has a hidden value, and the label says
whether those of a sample add up to more than 0. All processes draw the same batches, so that any number of them reaches the same
result; a real program reads only its own slice.
"""

import argparse
import os
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import embax
import embax.nnx.checkpoint
import embax.nnx.embed

VOCABULARY, DIM, IDS = 100_000, 16, 8
REPORT_EVERY = 10  # steps


def initialize() -> None:
    """Joins the processes of the job: those of the launcher, else those that the cluster's variables tell JAX of."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    else:
        jax.distributed.initialize()


class Model(nnx.Module):
    """Log odds of the label."""

    def __init__(self, batch_size: int, mesh: jax.sharding.Mesh, rngs: nnx.Rngs):
        table = embax.TableSpec(
            name="item",
            vocabulary_size=VOCABULARY,
            embedding_dim=DIM,
            combiner="sum",
            initializer=jax.nn.initializers.normal(0.1),
            optimizer=embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=1e-6),
            # Several processes cannot let limits grow, each by what it alone has seen: these hold any batch.
            max_ids_per_partition=batch_size * IDS,
            max_unique_ids_per_partition=batch_size * IDS,
        )
        feature = embax.FeatureSpec(
            name="items", table_spec=table, input_shape=(batch_size, IDS), output_shape=(batch_size, DIM)
        )
        self.embed = embax.nnx.embed.SparseCoreEmbed({"items": feature}, mesh=mesh, rngs=rngs)
        self.out = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, packed) -> jax.Array:
        """float32[batch] from packed ids."""
        return self.out(self.embed(packed)["items"])[:, 0]


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, packed, labels: jax.Array) -> jax.Array:
    """One step; returns the mean loss over the batch of all processes."""

    def loss(model: Model) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(model(packed), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def draw(seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32[batch, ids] and float32[batch]: the batch of a step, the same whatever came before, so that training can resume."""
    rng = np.random.default_rng((seed, step))
    ids = (VOCABULARY * rng.random((batch_size, IDS)) ** 4).astype(np.int32)  # small ids are frequent
    hidden = np.random.default_rng(seed).normal(size=VOCABULARY)
    return ids, (hidden[ids].sum(axis=1) > 0).astype(np.float32)


def resume(folder: Path, model: Model, optimizer: nnx.Optimizer) -> int:
    """Restores the newest checkpoint in a folder, saved by however many processes; the step that it was saved after, else 0."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    if steps:
        embax.nnx.checkpoint.restore(folder / str(max(steps)), model, optimizer)
    return max(steps, default=0)


def main() -> None:
    """Trains, and prints the loss now and then; the first process speaks for all."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.distributed", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch-size", type=int, default=512, help="samples a step, of all processes together")
    parser.add_argument("--local-devices", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and batches")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that all processes see: training goes on from the newest one"
    )
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    options = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", options.local_devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize()
    processes, process = jax.process_count(), jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    if options.batch_size % jax.device_count():
        raise SystemExit(f"--batch-size is {options.batch_size}; make it a multiple of {jax.device_count()} devices.")

    if process == 0:
        print(f"processes: {processes}, devices: {jax.device_count()}")

    model = Model(options.batch_size, mesh, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    for node in (model, optimizer):  # replicate all arrays but the tables, which the layer has placed
        state = nnx.state(node, embax.nnx.embed.is_non_embedding_variables)
        nnx.update(node, jax.device_put(state, embax.nnx.embed.get_named_sharding(state, mesh)))

    by_sample = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    own = np.split(np.arange(options.batch_size), processes)[process]
    done = 0 if options.checkpoints is None else resume(options.checkpoints, model, optimizer)
    if process == 0 and done:
        print(f"resumed after step {done}")
    losses = []
    for step in range(done + 1, options.steps + 1):
        ids, labels = draw(options.seed, step, options.batch_size)
        packed = model.embed.preprocess({"items": ids[own]})
        losses.append(
            float(train_step(model, optimizer, packed, jax.make_array_from_process_local_data(by_sample, labels[own])))
        )
        if process == 0 and step % REPORT_EVERY == 0:
            print(f"step {step}: loss {np.mean(losses[-REPORT_EVERY:]):.6f}", flush=True)
        if options.checkpoints is not None and step % options.save_every == 0:
            embax.nnx.checkpoint.save(options.checkpoints / str(step), model, optimizer)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
