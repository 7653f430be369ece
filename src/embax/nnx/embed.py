"""`SparseCoreEmbed` for Flax NNX: large embedding tables that are updated in place in the backward pass."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

try:
    import optax
    from flax import nnx
except ImportError as error:
    raise ImportError("embax.nnx needs Flax and optax: pip install 'embax[flax]'") from error

from embax._lookup_vjp import lookup_and_update
from embax._matmul import checked_limits, feature_structure, read_rows
from embax._preprocess.buffers import PreprocessedInput
from embax._preprocess.packer import Packer
from embax._stacking.plan import make_plan
from embax._stacking.stack import copy_feature_specs, prepare_feature_specs_for_training
from embax._variables import EmbeddingVariables, init_embedding_variables


class EmbeddingVariablesParam(nnx.Param):
    """Tables and slots of a `SparseCoreEmbed`. What differentiation returns for it is not a gradient: it is the new value."""


class _Features:
    """A placed feature tree as a static attribute, with the limits of new rows: compared by identity, no trace looks inside."""

    def __init__(self, specs: Any, embedding_var_limits: Mapping[str, Any] | None) -> None:
        self.specs = specs
        self.structure = feature_structure(specs)
        self.plan = make_plan(specs)
        self.limits = checked_limits(embedding_var_limits, self.plan)


class SparseCoreEmbed(nnx.Module):
    """Looks features up in large embedding tables, and updates the tables as it is differentiated.

    Use it like any layer, under `nnx.jit` with the model donated, `nnx.value_and_grad` and `PartitionedOptimizer`. The
    backward pass applies each table's own optimizer to the rows that the batch touched and returns the new tables in the
    place of their gradient, so a step must call the layer once, and any other optimizer than `PartitionedOptimizer` would
    take the new tables for gradients. Leave the tables out of what is done to gradients in between, such as clipping.

    Args:
        feature_specs: pytree of `FeatureSpec`. Specs that are not placed yet are placed in a copy.
        rngs: source of the key that draws the tables, `rngs.params()`.
        limits: "grow", the limits grow with the batches, recompiling the step now and then; "raise", a batch beyond the
            limits of the specs is a ValueError; or "drop", ids beyond them are dropped and counted: see `embax.preprocess`.
        validation: what happens to ids and weights that are not valid, "raise", "drop" or "trust": see `embax.preprocess`.
        enable_minibatching: whether a batch beyond the limits of partitions is divided into minibatches.
        num_sc_per_device: SparseCores of the device; None means its own (4 virtual ones off TPU).
        embedding_var_limits: `(min, max)` that the new rows of a stack's table are clipped to, by the name of the stack: see
            `embax.apply_gradients`.

    Attributes:
        embedding_table: `EmbeddingVariables` of each stack by name.

    Raises:
        ValueError: the specs are inconsistent.

    Example:
        >>> embed = SparseCoreEmbed(features, rngs=nnx.Rngs(0))
        >>> activations = embed(embed.preprocess(ids))
    """

    def __init__(
        self,
        feature_specs: Any,
        *,
        rngs: nnx.Rngs,
        limits: str = "grow",
        validation: str = "raise",
        enable_minibatching: bool = False,
        num_sc_per_device: int | None = None,
        embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None,
    ):
        specs = copy_feature_specs(feature_specs)
        prepare_feature_specs_for_training(specs, 1, num_sc_per_device)
        self._features = nnx.static(_Features(specs, embedding_var_limits))
        packer = Packer(specs, limits=limits, validation=validation, enable_minibatching=enable_minibatching)
        self._packer = nnx.static(packer)
        self.embedding_table = EmbeddingVariablesParam(init_embedding_variables(rngs.params(), specs))
        # Its "gradient" counts the differentiated lookups that the "gradient" of the tables is the sum of.
        self.lookups = EmbeddingVariablesParam(jnp.zeros((), jnp.float32))

    @property
    def feature_specs(self) -> Any:
        """The placed feature specs."""
        return self._features.specs

    @property
    def packer(self) -> Packer:
        """What packs for this layer: `packer(ids, weights)` is `preprocess(ids, weights)`.

        Another thread that packs ahead of the steps must take this once and call it: while `nnx.jit` updates a model, its
        attributes are missing for moments.
        """
        return self._packer

    def preprocess(self, ids: Any, weights: Any = None) -> PreprocessedInput:
        """Packs a batch on the host, ahead of the jitted step (in another thread: see `packer`).

        Args:
            ids: ids of each feature, in the structure of the specs: see `embax.preprocess`.
            weights: None, or float weights of the same structure and shapes.

        Returns:
            The packed batch, to be passed into the step.

        Raises:
            ValueError: an id or a weight is not valid, or under `limits="raise"` a limit is exceeded; or the last step looked
                the tables up more than once.
        """
        _refuse_several(self.lookups.get_value())
        return self._packer(ids, weights)

    def __call__(self, packed: PreprocessedInput, step: int | jax.Array | None = None) -> Any:
        """The activations of a packed batch.

        Args:
            packed: what `preprocess` returned.
            step: the number of the step, for schedules and for optimizers that need it (Adam, F2A).

        Returns:
            float32[batch, output_dim] of each feature, in the structure of the specs.

        Raises:
            ValueError: the batch was packed for other specs, or a schedule needs `step`.
        """
        if not isinstance(packed, PreprocessedInput):
            raise ValueError(
                f"SparseCoreEmbed was called with {type(packed).__name__}; it takes a packed batch: call "
                "embed(embed.preprocess(ids)), with preprocess outside jit."
            )
        activations: Any = lookup_and_update(
            self._features.plan,
            self._features.limits,
            self.embedding_table.get_value(),
            self.lookups.get_value(),
            packed,
            step,
        )
        return jax.tree.unflatten(self._features.structure, activations)

    def rows(self, table: str, ids: Any) -> jax.Array:
        """Rows of a table by id: see `embax.read_rows`."""
        return read_rows(self.embedding_table.get_value(), table, ids, specs=self._features.specs)


def _refuse_several(lookups: Any) -> None:
    """Raises a ValueError if the number of lookups is known, and above 1."""
    if isinstance(lookups, Tracer) or lookups.is_deleted() or not lookups.is_ready() or lookups <= 1:
        return
    raise ValueError(
        f"The tables were looked up {int(lookups)} times in one differentiated step. The backward pass of a lookup updates the "
        "tables, and several updates of one table cannot be added: the tables were left as they are. Look all batches up in "
        "one call, as features that share the table or as one larger batch."
    )


def _take_over(layer: "SparseCoreEmbed", new: Mapping[str, EmbeddingVariables], lookups: jax.Array) -> None:
    """Gives a layer the tables that its backward pass returned, if there was exactly one differentiated lookup.

    Without one the gradients are zeros, and of several they are a sum that means nothing: the layer keeps its tables, and
    raises at the next `preprocess`. XLA folds the number, a constant of the compiled step, and the choice with it; where it
    cannot, under `lax.cond`, the tables are copied.
    """
    _refuse_several(lookups)
    once = lookups == 1
    old = layer.embedding_table.get_value()
    layer.embedding_table.set_value(jax.tree.map(lambda before, after: jnp.where(once, after, before), old, dict(new)))
    layer.lookups.set_value(lookups)


class PartitionedOptimizer(nnx.Optimizer):
    """Steps the dense parameters of a model with optax, and takes over the tables that the backward pass has updated.

    Args:
        model: a model that holds any number of `SparseCoreEmbed`.
        dense_optimizer: optax transformation of all other `nnx.Param`.

    Example:
        >>> optimizer = PartitionedOptimizer(model, optax.adam(1e-3))
        >>> @functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
        ... def train_step(model, optimizer, packed, labels):
        ...     loss, gradients = nnx.value_and_grad(loss_of)(model, packed, labels)
        ...     optimizer.update(model, gradients)
        ...     return loss
    """

    def __init__(self, model: nnx.Module, dense_optimizer: optax.GradientTransformation):
        super().__init__(model, dense_optimizer, wrt=nnx.All(nnx.Param, nnx.Not(EmbeddingVariablesParam)))

    def update(self, model: nnx.Module, grads: Any, /, **kwargs: Any) -> Any:
        """Updates model and optimizer state from what `nnx.value_and_grad` returned, in place.

        Args:
            model: the model that was differentiated.
            grads: its gradients.
            **kwargs: passed on to optax.

        Returns:
            The updates of the dense parameters.
        """
        tables, dense = nnx.split_state(grads, EmbeddingVariablesParam, ...)
        flat = dict(nnx.to_flat_state(tables))
        for path, module in nnx.iter_graph(model):
            if isinstance(module, SparseCoreEmbed) and (*path, "embedding_table") in flat:
                new = flat[(*path, "embedding_table")].get_value()
                _take_over(module, new, flat[(*path, "lookups")].get_value())
        return super().update(model, dense, **kwargs)
