"""embax: packing on the host, and jitted lookup, update and whole step, tables donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import embax
from benchmarks.sides.setting import FIRST_ACCUMULATOR, FIRST_VALUE, Setting

SPARSECORES = 4
"""By which stacks are laid out."""


def optimizer_of(setting: Setting) -> embax.OptimizerSpec:
    """The optimizer, without epsilon."""
    rate = setting.learning_rate
    if setting.optimizer == "sgd":
        return embax.SGDOptimizerSpec(learning_rate=rate)
    if setting.optimizer == "adagrad":
        return embax.AdagradOptimizerSpec(learning_rate=rate, initial_accumulator_value=FIRST_ACCUMULATOR)
    return embax.RowWiseAdagradOptimizerSpec(
        learning_rate=rate, initial_accumulator_value=FIRST_ACCUMULATOR, epsilon=0.0
    )


def name_of(table: int) -> str:
    """The name of a table and its feature."""
    return f"t{table:03}"


def specs_of(setting: Setting) -> dict[str, embax.FeatureSpec]:
    """Placed features."""
    init = jax.nn.initializers
    features = {}
    for number in range(setting.num_tables):
        table = embax.TableSpec(
            name=name_of(number),
            vocabulary_size=setting.vocabulary,
            embedding_dim=setting.dim,
            initializer=init.uniform(0.05) if setting.random else init.constant(FIRST_VALUE),
            optimizer=optimizer_of(setting),
            combiner="sum",
        )
        features[table.name] = embax.FeatureSpec(
            name=table.name,
            table_spec=table,
            input_shape=(setting.batch, setting.valency),
            output_shape=(setting.batch, setting.dim),
        )
    if setting.stacked:
        embax.auto_stack_tables(features, 1, SPARSECORES)
    return embax.prepare_feature_specs_for_training(features)


class Side:
    """The tables of a setting in embax."""

    def __init__(self, setting: Setting, ids: np.ndarray, targets: np.ndarray):
        self.specs = specs = specs_of(setting)
        self.batches = [{name_of(n): array for n, array in enumerate(batch)} for batch in ids]
        self.targets = {name_of(n): jnp.asarray(array) for n, array in enumerate(targets)}
        self.variables: Any = None

        @functools.partial(jax.jit, donate_argnames="variables")
        def train(variables, packed, targets):
            activations = embax.lookup(packed, variables, specs=specs)
            # They depend on the activations, so XLA sees that the lookup comes first.
            gradients = jax.tree.map(jnp.subtract, activations, targets)
            return embax.apply_gradients(gradients, packed, variables, specs=specs)

        @functools.partial(jax.jit, donate_argnames="variables")
        def update(variables, packed, gradients):
            return embax.apply_gradients(gradients, packed, variables, specs=specs)

        self._train, self._update = train, update
        self._lookup = jax.jit(lambda variables, packed: embax.lookup(packed, variables, specs=specs))
        for number in range(len(self.batches)):  # Buffers grow here, so that steps compile once.
            self.pack(number)

    def make_tables(self) -> None:
        """Makes tables and slots."""
        self.variables = jax.block_until_ready(embax.init_embedding_variables(jax.random.key(0), self.specs))

    def pack(self, number: int) -> embax.PreprocessedInput:
        """Packs a batch."""
        return embax.preprocess(self.batches[number % len(self.batches)], specs=self.specs, limits="grow")

    def begin_step(self, number: int) -> None:
        """A whole step, from ids to updated tables, which are computed while Python goes on."""
        self.variables = self._train(self.variables, self.pack(number), self.targets)

    def step(self, number: int) -> None:
        """A whole step, waited for."""
        self.begin_step(number)
        jax.block_until_ready(self.variables)

    def parts(self) -> dict[str, Any]:
        """Packing, and on batches packed beforehand lookup and update; the targets are the gradients of the latter."""
        packed: dict[int, Any] = {}

        def packed_batch(number: int) -> Any:
            number %= len(self.batches)
            if number not in packed:
                packed[number] = jax.device_put(self.pack(number))
            return packed[number]

        def pack_all(_: int) -> None:
            jax.block_until_ready([packed_batch(number) for number in range(len(self.batches))])

        def lookup(number: int) -> None:
            jax.block_until_ready(self._lookup(self.variables, packed_batch(number)))

        def update(number: int) -> None:
            self.variables = jax.block_until_ready(self._update(self.variables, packed_batch(number), self.targets))

        return {
            "step": self.step,
            "begin_step": self.begin_step,
            "packing": self.pack,
            "pack_all": pack_all,
            "lookup": lookup,
            "update": update,
        }

    def activations(self, number: int) -> np.ndarray:
        """The activations of a batch."""
        found = self._lookup(self.variables, self.pack(number))
        return np.stack([np.asarray(found[name]) for name in self.specs])

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Rows of a table."""
        return np.asarray(embax.read_rows(self.variables, name_of(table), ids, specs=self.specs))
