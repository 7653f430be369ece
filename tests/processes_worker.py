"""One of the processes of test_processes.py, and what it shares with the test: models, batches, training."""

import functools
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from flax import linen as nn
from flax import nnx
from jax.experimental import multihost_utils

import embax
import embax.linen.embed as linen_embed
import embax.nnx.embed as nnx_embed
from embax import checkpoint
from embax.checkpoint import _save
from embax.nnx import checkpoint as nnx_checkpoint

BATCH, VALENCY, DIM, VOCABULARY = 16, 3, 4, 60
OPTIMIZERS = {
    "adagrad": embax.AdagradOptimizerSpec(0.1),
    "adam": embax.AdamOptimizerSpec(0.1),
    "row_wise": embax.RowWiseAdagradOptimizerSpec(0.1),
}
STEPS, SAVED_AT, DIES_AT = 5, 3, 4


def make_specs(names=("adagrad", "adam", "row_wise"), batch=BATCH, **fields):
    """A table and a feature of each optimizer."""
    tables = {
        name: oracle.table_spec(name, VOCABULARY - 7 * number, DIM, "mean", OPTIMIZERS[name], **fields)
        for number, name in enumerate(names)
    }
    return {name: oracle.feature_spec(name, table, batch) for name, table in tables.items()}


def draw(names, number):
    """Ids and targets of the whole batch of a step."""
    rng = np.random.default_rng(number)
    ids = {name: rng.integers(-1, VOCABULARY - 14, (BATCH, VALENCY)).astype(np.int32) for name in names}
    return ids, rng.standard_normal((BATCH, DIM)).astype(np.float32)


def mine(tree, parts=None):
    """The part of a batch that this process feeds; several feed the same where there are fewer parts than processes."""
    parts = parts or jax.process_count()
    size = BATCH // parts
    return jax.tree.map(lambda leaf: leaf[size * (jax.process_index() % parts) :][:size], tree)


def whole(tree):
    """Arrays on the host, those on several processes from all of them."""
    several = jax.process_count() > 1
    return (
        jax.tree.map(lambda array: np.asarray(multihost_utils.process_allgather(array, tiled=True)), tree)
        if several
        else jax.tree.map(np.asarray, tree)
    )


def global_mesh(replicas=1):
    """All devices of all processes; None where there is one process, which uses one device."""
    if jax.process_count() == 1:
        return None
    devices = np.array(jax.devices()).reshape(replicas, -1)
    return (
        jax.sharding.Mesh(devices[0], "devices")
        if replicas == 1
        else jax.sharding.Mesh(devices, ("replicas", "devices"))
    )


def num_devices(mesh):
    return 1 if mesh is None else mesh.shape["devices"]


class Functional:
    """Training by functions, inside `jax.shard_map` where there is a mesh."""

    def __init__(self, names=("adagrad", "adam", "row_wise")):
        self.names, self.mesh = names, global_mesh()
        self.specs = embax.prepare_feature_specs_for_training(make_specs(names), num_devices(self.mesh), 2)
        self.variables = embax.init_embedding_variables(jax.random.key(1), self.specs, mesh=self.mesh)

        def step(variables, packed, number):
            activations = embax.lookup(packed, variables, specs=self.specs)
            gradients = jax.tree.map(lambda a: 0.5 * a + 0.1, activations)
            new = embax.apply_gradients(
                gradients, packed, variables, specs=self.specs, step=number, activations=activations
            )
            return new, activations

        if self.mesh is not None:
            over = jax.P("devices")
            step = jax.shard_map(step, mesh=self.mesh, in_specs=(over, over, jax.P()), out_specs=over)
        self.stepped = jax.jit(step, donate_argnums=0)

    def pack(self, number):
        packed = embax.preprocess(mine(draw(self.names, number)[0]), specs=self.specs)
        return packed if self.mesh is None else embax.place_batch(packed, self.mesh)

    def train(self, numbers):
        """Trains; the activations of the last step."""
        for number in numbers:
            self.variables, activations = self.stepped(self.variables, self.pack(number), jnp.int32(number))
        return activations

    def save(self, path, **options):
        checkpoint.save(path, self.variables, specs=self.specs, **options)

    def load(self, path):
        self.variables, _ = checkpoint.load(path, specs=self.specs, mesh=self.mesh)

    def tables(self):
        return oracle.tables_of(whole(self.variables), self.specs)


def loss_of(activations, targets):
    return sum(jnp.mean((leaf - targets) ** 2) for leaf in jax.tree.leaves(activations))


class Nnx:
    """An NNX model that divides batches into minibatches."""

    names = ("adagrad", "row_wise")

    def __init__(self):
        self.mesh = mesh = global_mesh()
        limits = {"max_ids_per_partition": 4, "max_unique_ids_per_partition": 4}

        class Model(nnx.Module):
            def __init__(self, names):
                self.embed = nnx_embed.SparseCoreEmbed(
                    make_specs(names, **limits),
                    rngs=nnx.Rngs(0),
                    mesh=mesh,
                    num_sc_per_device=4 // num_devices(mesh),
                    enable_minibatching=True,
                    limits="raise",
                )
                self.bias = nnx.Param(jnp.zeros(DIM))

        self.model = Model(self.names)
        self.optimizer = nnx_embed.PartitionedOptimizer(self.model, optax.sgd(0.1))
        if mesh is not None:
            for node in (self.model, self.optimizer):
                state = nnx.state(node, nnx_embed.is_non_embedding_variables)
                nnx.update(node, jax.device_put(state, nnx_embed.get_named_sharding(state, mesh)))

        @nnx.jit
        def step(model, optimizer, packed, targets):
            def loss(model):
                activations = jax.tree.map(lambda leaf: leaf + model.bias.get_value(), model.embed(packed))
                return loss_of(activations, targets)

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        self.stepped = step

    def train(self, numbers):
        """Trains; the last loss, and the number of minibatches."""
        for number in numbers:
            ids, targets = draw(self.names, number)
            packed = self.model.embed.preprocess(mine(ids))
            loss = self.stepped(self.model, self.optimizer, packed, on_devices(self.mesh, targets))
        return [loss, packed.num_minibatches[:1]]

    def save(self, path):
        nnx_checkpoint.save(path, self.model, self.optimizer)

    def load(self, path):
        nnx_checkpoint.restore(path, self.model, self.optimizer)

    def tables(self):
        layer = self.model.embed
        variables = jax.tree.map(
            lambda one: one[...], layer.tables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
        tables = oracle.tables_of(whole(variables), layer.feature_specs)
        return {**tables, "bias": [whole(self.model.bias.get_value())]}


class Linen:
    """A Linen model whose optimizer needs the number of the step."""

    names = ("adam",)

    def __init__(self):
        # Four processes hold the tables twice.
        replicas = 2 if jax.process_count() == 4 else 1
        self.mesh = mesh = global_mesh(replicas)
        self.parts = jax.process_count() // replicas
        axis = None if mesh is None else "devices"
        self.layer = layer = linen_embed.SparseCoreEmbed(make_specs(self.names), axis, mesh, num_sc_per_device=2)
        smallest = layer.preprocess({name: np.zeros((2, 1), np.int32) for name in self.names})
        self.params = {**layer.init(jax.random.key(0), smallest)["params"], "bias": jnp.zeros(DIM)}
        if mesh is not None:
            self.params = jax.device_put(self.params, nn.get_sharding(self.params, mesh))
        optimizer = linen_embed.create_optimizer_for_sc_model(self.params, optax.sgd(0.1, momentum=0.9))
        self.state = optimizer.init(self.params)
        self.key, self.sharded = jax.random.key(3), jnp.arange(8.0)
        if mesh is not None:
            place = functools.partial(jax.sharding.NamedSharding, mesh)
            self.key = jax.jit(lambda: jax.random.key(3), out_shardings=place(jax.P()))()
            self.sharded = jax.jit(lambda: jnp.arange(8.0), out_shardings=place(jax.P("devices")))()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, packed, targets, number):
            def loss(params):
                activations = layer.apply({"params": params}, packed, number)
                return loss_of(jax.tree.map(lambda leaf: leaf + params["bias"], activations), targets)

            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return linen_embed.apply_updates_for_sc_model(params, updates), state, value

        self.stepped = step

    def train(self, numbers):
        """Trains; the last loss."""
        for number in numbers:
            ids, targets = draw(self.names, number)
            packed = self.layer.preprocess(mine(ids, self.parts))
            targets = on_devices(self.mesh, targets, self.parts)
            self.params, self.state, loss = self.stepped(self.params, self.state, packed, targets, jnp.int32(number))
        return [loss]

    def _parts(self):
        dense = dict(self.params)
        return dense.pop("sc_embedding_variables"), (dense, self.state, self.key, self.sharded)

    def save(self, path):
        box, extra = self._parts()
        checkpoint.save(path, box.value, specs=self.layer.placed_specs, extra=extra)

    def load(self, path):
        box, extra = self._parts()
        axis = None if self.mesh is None else "devices"
        tables, (dense, self.state, self.key, self.sharded) = checkpoint.load(
            path, specs=self.layer.placed_specs, extra=extra, mesh=self.mesh, sharding_axis=axis
        )
        self.params = {**dense, "sc_embedding_variables": box.replace(value=tables)}

    def tables(self):
        box, (dense, _, key, sharded) = self._parts()
        rest = whole([dense["bias"], jax.random.key_data(key), sharded])
        return {**oracle.tables_of(whole(box.value), self.layer.placed_specs), "rest": rest}


KINDS = {"functional": Functional, "nnx": Nnx, "linen": Linen}


def on_devices(mesh, targets, parts=None):
    if mesh is None:
        return targets
    sharding = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    return jax.make_array_from_process_local_data(sharding, mine(targets, parts), targets.shape)


def attempt(function, *args: Any, **options: Any) -> str:
    """The text of the error."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistakes(folder: Path) -> dict[str, str]:
    """Things that one process does wrong, and after which the others go on."""
    first, mesh = jax.process_index() == 0, global_mesh()
    layer = linen_embed.SparseCoreEmbed(make_specs(), mesh=mesh)
    ids = mine(draw(OPTIMIZERS, 0)[0])

    def changed(ids, **others):
        return ids if first else ids | others

    texts = {}
    texts["size"] = attempt(layer.preprocess, changed(ids, adam=ids["adam"][:-2]))
    texts["bad id"] = attempt(layer.preprocess, changed(ids, adam=ids["adam"] - 9))
    texts["missing"] = attempt(layer.preprocess, ids if first else None)

    def place(limit):
        specs = make_specs(("adam",), max_ids_per_partition=limit)
        embax.prepare_feature_specs_for_training(specs, num_devices(mesh), 1)
        try:
            packed = embax.preprocess({"adam": ids["adam"]}, specs=specs)
        except ValueError as error:
            packed = error
        embax.place_batch(packed, mesh)

    texts["limits"] = attempt(place, 64 if first else 72)
    texts["limit exceeded"] = attempt(place, 64 if first else 1)
    texts["grow"] = attempt(linen_embed.SparseCoreEmbed, make_specs(), mesh=mesh, limits="grow")

    ahead = []
    thread = threading.Thread(target=lambda: ahead.extend(map(layer.packer, (ids, changed(ids, adam=ids["adam"] - 9)))))
    thread.start()
    thread.join()
    texts["ahead"] = attempt(layer.preprocess, ahead[0])
    texts["ahead, bad id"] = attempt(layer.preprocess, ahead[1])

    thread = threading.Thread(target=lambda: texts.update(thread=attempt(layer.preprocess, ids)), name="prefetch")
    thread.start()
    thread.join()

    minibatched = linen_embed.SparseCoreEmbed(make_specs(), mesh=mesh, enable_minibatching=True)
    texts["minibatches, bad id"] = attempt(minibatched.preprocess, changed(ids, adam=ids["adam"] - 9))
    texts["minibatches, size"] = attempt(minibatched.preprocess, changed(ids, adam=ids["adam"][:-2]))
    texts["out of step"] = attempt(layer.preprocess if first else minibatched.preprocess, ids)
    texts["afterwards"] = attempt(layer.preprocess, ids)

    model = Functional(("adagrad",))
    write, written = _save.write_arrays, []

    def full(directory, arrays):
        written.append(directory)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(directory, arrays)

    _save.write_arrays = full
    texts["disk full"] = attempt(model.save, folder / "full")
    _save.write_arrays = write
    texts["left on the disk"] = (
        ", ".join(path.name for path in folder.iterdir() if "full" in path.name) if first else ""
    )
    texts["not storable"] = attempt(model.save, folder / "bad", extra={"name": "text"} if first else {"name": 1})
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").touch()
    texts["taken"] = attempt(model.save, folder / "taken")
    model.save(folder / "good")
    texts["nothing there"] = attempt(model.load, folder / ("good" if first else "nothing"))
    texts["good"] = attempt(model.load, folder / "good")
    return texts


def train_and_die(folder: Path) -> None:
    """Two processes train and save; then one of them dies, and the other one says how it ends."""
    process = jax.process_index()
    results = {}
    for name, kind in KINDS.items():
        model = kind()
        results[name] = {"results": whole(model.train(range(SAVED_AT)))}
        model.save(folder / name)
        results[name]["tables"] = model.tables()
    if process == 0:
        np.savez(folder / "results.npz", **{str(n): leaf for n, leaf in enumerate(jax.tree.leaves(results))})
    (folder / f"mistakes{process}.json").write_text(json.dumps(mistakes(folder)))
    model = Functional()
    model.load(folder / "functional")
    model.train(range(SAVED_AT, DIES_AT))
    if process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    model.train(range(DIES_AT, 100))  # Until it ends.


def resume(folder: Path) -> None:
    """Trains on from the checkpoints of another number of processes."""
    results = {}
    for name, kind in KINDS.items():
        model = kind()
        model.load(folder / name)
        model.train(range(SAVED_AT, STEPS))
        results[name] = model.tables()
    if jax.process_index() == 0:
        np.savez(folder / "resumed.npz", **{str(n): leaf for n, leaf in enumerate(jax.tree.leaves(results))})


def main(coordinator: str, processes: int, process: int, what: str, folder: str) -> None:
    devices = 2 if processes == 2 else 1
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=10,
    )
    assert (jax.process_count(), jax.local_device_count()) == (processes, devices)
    {"train_and_die": train_and_die, "resume": resume}[what](Path(folder))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
