"""Plain JAX: `jnp.take`, its gradient, and `optax.sgd` or `optax.adagrad` on whole tables, everything donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.sides.setting import FIRST_ACCUMULATOR, FIRST_VALUE, Setting


def activations_of(tables: list[jax.Array], ids: list[jax.Array]) -> list[jax.Array]:
    """The sums of rows."""
    return [jnp.take(table, one, axis=0).sum(axis=1) for table, one in zip(tables, ids, strict=True)]


class Side:
    """The tables of a setting as JAX arrays."""

    def __init__(self, setting: Setting, ids: np.ndarray, targets: np.ndarray):
        self.setting = setting
        self.batches = [list(batch) for batch in ids]
        self.targets = [jnp.asarray(array) for array in targets]
        self.tables: list[jax.Array] = []
        self.state: Any = None
        self.optimizer = {
            "sgd": optax.sgd(setting.learning_rate),
            "adagrad": optax.adagrad(setting.learning_rate, FIRST_ACCUMULATOR, eps=0.0),
        }[setting.optimizer]

        @functools.partial(jax.jit, donate_argnames=("tables", "state"))
        def train(tables, state, ids, targets):
            activations, backward = jax.vjp(lambda tables: activations_of(tables, ids), tables)
            (gradients,) = backward(jax.tree.map(jnp.subtract, activations, targets))
            updates, state = self.optimizer.update(gradients, state)
            return optax.apply_updates(tables, updates), state

        self._train = train
        self._activations = jax.jit(activations_of)

    def make_tables(self) -> None:
        """Makes tables and the optimizer's state."""
        shape = (self.setting.vocabulary, self.setting.dim)
        self.tables = [jnp.full(shape, FIRST_VALUE, jnp.float32) for _ in range(self.setting.num_tables)]
        self.state = self.optimizer.init(self.tables)
        jax.block_until_ready((self.tables, self.state))

    def begin_step(self, number: int) -> None:
        """A whole step, from ids to updated tables, which are computed while Python goes on."""
        ids = self.batches[number % len(self.batches)]
        self.tables, self.state = self._train(self.tables, self.state, ids, self.targets)

    def step(self, number: int) -> None:
        """A whole step, waited for."""
        self.begin_step(number)
        jax.block_until_ready((self.tables, self.state))

    def parts(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step, "begin_step": self.begin_step}

    def activations(self, number: int) -> np.ndarray:
        """The activations of a batch."""
        return np.stack([np.asarray(one) for one in self._activations(self.tables, self.batches[number])])

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return np.asarray(self.tables[table][ids])
