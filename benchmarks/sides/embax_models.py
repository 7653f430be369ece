"""A model in JAX whose tables are embax's: batches are packed on the host, and one jitted step does the rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax
from benchmarks.sides.model_setting import Batch, ModelSetting, ModelWorker, first_rows

SPARSECORES = 4
"""By which stacks are laid out."""


def specs_of(setting: ModelSetting, batches: list[Batch]) -> dict[str, embax.FeatureSpec]:
    """Placed features."""
    tables = {
        name: embax.TableSpec(
            name=name,
            vocabulary_size=table.rows,
            embedding_dim=table.dim,
            initializer=jax.nn.initializers.zeros,
            optimizer=embax.AdagradOptimizerSpec(table.rate, initial_accumulator_value=setting.accumulator),
            combiner="mean",
        )
        for name, table in setting.tables.items()
    }
    features = {
        name: embax.FeatureSpec(
            name=name,
            table_spec=tables[table],
            input_shape=(setting.batch,) if name in batches[0].splits else (setting.batch, 1),
            output_shape=(setting.batch, setting.tables[table].dim),
        )
        for name, table in (setting.deep | setting.wide).items()
    }
    if setting.stacked:
        embax.auto_stack_tables(features, 1, SPARSECORES)
    return embax.prepare_feature_specs_for_training(features)


def mlp(layers: dict[str, Any], part: str, hidden: jax.Array) -> jax.Array:
    """The layers whose names begin with `part`, with a ReLU between them."""
    found = [layer for name, layer in layers.items() if name.startswith(part)]
    for weights, bias in found[:-1]:
        hidden = jax.nn.relu(hidden @ weights + bias)
    weights, bias = found[-1]
    return hidden @ weights + bias


@jax.custom_vjp
def products(vectors: jax.Array) -> jax.Array:
    """The dot products of all pairs of vectors, float32[batch, pairs], of float32[batch, vectors, dim]."""
    first, second = np.triu_indices(vectors.shape[1], 1)
    all_products = jnp.einsum("bid,bjd->bij", vectors, vectors)
    return all_products.reshape(len(vectors), -1)[:, first * vectors.shape[1] + second]


def _products_forward(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    return products(vectors), vectors


def _products_backward(vectors: jax.Array, gradients: jax.Array) -> tuple[jax.Array]:
    """One product with a symmetric matrix, which is read from `gradients`, where JAX would add up two with a scattered one."""
    count = vectors.shape[1]
    pair = np.zeros((count, count), np.int32)
    first, second = np.triu_indices(count, 1)
    pair[first, second] = pair[second, first] = np.arange(len(first))
    symmetric = jnp.where(np.eye(count, dtype=bool), 0.0, gradients[:, pair.reshape(-1)].reshape(-1, count, count))
    return (symmetric @ vectors,)


products.defvjp(_products_forward, _products_backward)


def log_odds_of(setting: ModelSetting, layers: Any, activations: Any, dense: jax.Array) -> jax.Array:
    """float32[batch]."""
    summary = mlp(layers, "bottom", dense)
    vectors = jnp.stack([summary, *(activations[name] for name in setting.deep)], axis=1)
    beside = [vectors.reshape(len(dense), -1), dense] if setting.all_beside else [summary]
    log_odds = mlp(layers, "top", jnp.concatenate([products(vectors), *beside], axis=1))
    if setting.wide:
        log_odds += mlp(layers, "wide", dense) + sum(activations[name] for name in setting.wide)
    return log_odds[:, 0]


class Side:
    """A model; dense inputs and labels are JAX arrays, made beforehand, ids those of NumPy."""

    def __init__(self, setting: ModelSetting):
        self.setting = setting
        self.values, batches = setting.read()
        self.specs = specs = specs_of(setting, batches)
        self.ids = [
            {
                name: embax.Ragged(ids, batch.splits[name]) if name in batch.splits else ids
                for name, ids in batch.ids.items()
            }
            for batch in batches
        ]
        self.inputs = [(jnp.asarray(batch.dense), jnp.asarray(batch.labels)) for batch in batches]
        self.state: Any = None
        if setting.adamw:
            optimizer = optax.adamw(setting.dense_rate, weight_decay=setting.weight_decay)
        else:
            optimizer = optax.sgd(setting.dense_rate)
        self.optimizer = optimizer

        def train_dense(layers, moments, activations, dense, labels):
            def loss(layers, activations):
                log_odds = log_odds_of(setting, layers, activations, dense)
                return optax.sigmoid_binary_cross_entropy(log_odds, labels).mean()

            value, (gradients, of_activations) = jax.value_and_grad(loss, argnums=(0, 1))(layers, activations)
            updates, moments = optimizer.update(gradients, moments, layers)
            return value, optax.apply_updates(layers, updates), moments, of_activations

        @functools.partial(jax.jit, donate_argnames="state")
        def train(state, packed, dense, labels):
            variables, layers, moments = state
            activations = embax.lookup(packed, variables, specs=specs)
            loss, layers, moments, gradients = train_dense(layers, moments, activations, dense, labels)
            variables = embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)
            return loss, (variables, layers, moments)

        @functools.partial(jax.jit, donate_argnames="variables")
        def update(variables, packed, gradients):
            return embax.apply_gradients(gradients, packed, variables, specs=specs)

        self._train, self._update = train, update
        self._train_dense = jax.jit(train_dense)
        self._lookup = jax.jit(lambda variables, packed: embax.lookup(packed, variables, specs=specs))
        for number in range(len(self.ids)):  # Buffers grow here, so that steps compile once.
            self.pack(number)

    def make_tables(self) -> None:
        """Makes tables, slots and dense parameters."""
        variables = embax.init_embedding_variables(jax.random.key(0), self.specs)
        tables = {name: first_rows(table) for name, table in self.setting.tables.items()}
        variables = embax.load_tables(variables, tables, specs=self.specs)
        layers = jax.tree.map(jnp.array, self.values)
        self.state = jax.block_until_ready((variables, layers, self.optimizer.init(layers)))

    def pack(self, number: int) -> embax.PreprocessedInput:
        """Packs a batch."""
        return embax.preprocess(self.ids[number % len(self.ids)], specs=self.specs, limits="grow")

    def begin_step(self, number: int) -> Any:
        """A training step, computed while Python goes on; returns its loss."""
        inputs = self.inputs[number % len(self.inputs)]
        loss, self.state = self._train(self.state, self.pack(number), *inputs)
        return loss

    def step(self, number: int) -> Any:
        """A training step, waited for; returns its loss."""
        loss = self.begin_step(number)
        jax.block_until_ready(self.state)
        return loss

    def parts(self) -> dict[str, Any]:
        """The step, packing, and on what was made beforehand lookup, what is dense, and update."""
        packed: dict[int, Any] = {}
        found: dict[int, Any] = {}

        def prepared(number: int) -> int:
            number %= len(self.ids)
            if number not in packed:
                packed[number] = jax.device_put(self.pack(number))
                found[number] = self._lookup(self.state[0], packed[number])
            return number

        def lookup(number: int) -> None:
            number = prepared(number)
            jax.block_until_ready(self._lookup(self.state[0], packed[number]))

        def dense(number: int) -> None:
            number = prepared(number)
            jax.block_until_ready(self._train_dense(*self.state[1:], found[number], *self.inputs[number]))

        def update(number: int) -> None:
            number = prepared(number)
            variables = self._update(self.state[0], packed[number], found[number])
            self.state = jax.block_until_ready((variables, *self.state[1:]))

        parts = {"packing": self.pack, "lookup": lookup, "dense": dense, "update": update}
        return {"step": self.step, "begin_step": self.begin_step, **parts}


def worker(text: str) -> ModelWorker:
    """What `benchmarks.sides.worker` serves."""
    return ModelWorker(Side(ModelSetting.from_json(text)))
