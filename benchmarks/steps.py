"""A training step of a workload, by embax and by plain JAX with optax: the same loss, the same optimizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax
from benchmarks.workloads import Workload


def loss(activations: dict[str, jax.Array], targets: dict[str, jax.Array]) -> jax.Array:
    """Half the squared distance to the targets."""
    return sum((0.5 * jnp.sum((activations[name] - targets[name]) ** 2) for name in activations), start=jnp.zeros(()))


def targets_of(workload: Workload) -> dict[str, jax.Array]:
    """float32[batch, dim] of each feature."""
    rng = np.random.default_rng(2)
    shape = (workload.batch, workload.dim)
    return {f"t{n:03}": jnp.asarray(rng.standard_normal(shape), jnp.float32) for n in range(workload.num_tables)}


class Embax:
    """Packing on the host, and jitted lookup, update and whole step, tables donated."""

    def __init__(self, workload: Workload):
        self.specs = specs = workload.specs()
        self.variables = embax.init_embedding_variables(jax.random.key(0), specs)
        self.targets = targets_of(workload)

        @functools.partial(jax.jit, donate_argnames="variables")
        def train(variables, packed, targets):
            activations = embax.lookup(packed, variables, specs=specs)
            value, gradients = jax.value_and_grad(loss)(activations, targets)
            new = embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)
            return value, new

        @functools.partial(jax.jit, donate_argnames="variables")
        def update(variables, packed, gradients):
            return embax.apply_gradients(gradients, packed, variables, specs=specs)

        self._train, self._update = train, update
        self._lookup = jax.jit(lambda variables, packed: embax.lookup(packed, variables, specs=specs))

    def pack(self, ids: dict[str, np.ndarray]) -> embax.PreprocessedInput:
        """Packs a batch."""
        return embax.preprocess(ids, specs=self.specs, limits="grow")

    def lookup(self, packed: embax.PreprocessedInput) -> None:
        """Looks a packed batch up."""
        jax.block_until_ready(self._lookup(self.variables, packed))

    def update(self, packed: embax.PreprocessedInput) -> None:
        """Updates the tables with the targets for gradients."""
        self.variables = jax.block_until_ready(self._update(self.variables, packed, self.targets))

    def step(self, ids: dict[str, np.ndarray]) -> float:
        """A whole step, from ids to updated tables."""
        value, self.variables = self._train(self.variables, self.pack(ids), self.targets)
        jax.block_until_ready(self.variables)
        return float(value)

    def rows(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return np.asarray(embax.read_rows(self.variables, table, ids, specs=self.specs))


class PlainJax:
    """`jnp.take`, `jax.grad` and `optax.adagrad` on whole tables, everything donated."""

    def __init__(self, workload: Workload, like: Embax):
        everything = np.arange(workload.vocabulary)
        self.tables = {name: jnp.asarray(like.rows(name, everything)) for name in like.specs}
        optimizer = optax.adagrad(0.01, initial_accumulator_value=0.1, eps=0.0)
        self.state: Any = optimizer.init(self.tables)
        self.targets = like.targets

        def activations_of(tables, ids):
            return {name: jnp.take(table, ids[name], axis=0).sum(axis=1) for name, table in tables.items()}

        @functools.partial(jax.jit, donate_argnames=("tables", "state"))
        def train(tables, state, ids, targets):
            value, gradients = jax.value_and_grad(lambda tables: loss(activations_of(tables, ids), targets))(tables)
            updates, state = optimizer.update(gradients, state)
            return value, optax.apply_updates(tables, updates), state

        self._train = train

    def step(self, ids: dict[str, np.ndarray]) -> float:
        """A whole step, from ids to updated tables."""
        value, self.tables, self.state = self._train(self.tables, self.state, ids, self.targets)
        jax.block_until_ready(self.tables)
        return float(value)

    def rows(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return np.asarray(self.tables[table][ids])


def check_equal(ours: Embax, other: PlainJax, batches: list[dict[str, np.ndarray]]) -> None:
    """Steps both through the batches and compares losses and touched rows; raises AssertionError where they differ."""
    for ids in batches:
        np.testing.assert_allclose(ours.step(ids), other.step(ids), rtol=1e-5)
    for name in list(ours.specs)[:4]:
        touched = np.unique(np.concatenate([ids[name].reshape(-1) for ids in batches]))[:50_000]
        np.testing.assert_allclose(ours.rows(name, touched), other.rows(name, touched), rtol=1e-4, atol=1e-6)
