"""`SparseCoreEmbed` for Flax NNX: large embedding tables that are updated in place in the backward pass."""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

try:
    import optax
    from flax import nnx
    from flax.errors import TraceContextError
except ImportError as error:
    raise ImportError("embax.nnx needs Flax and optax: pip install 'embax[flax]'") from error

from embax._layer import Shell, chosen, refuse_several
from embax._mesh import TableMesh, replicated
from embax._preprocess.buffers import PreprocessedInput
from embax._rows import load_tables, read_rows, write_rows
from embax._variables import EmbeddingVariables, without_slots


class EmbeddingVariablesParam(nnx.Param):
    """Tables and slots of a `SparseCoreEmbed`. What differentiation returns for it is not a gradient: it is the new value."""


class InvalidIds(nnx.Variable):
    """int32[features]: ids that the last call with raw ids inside jit left out since they or their weights are not valid."""


def is_embedding_variables(path: Any, value: Any) -> bool:
    """An NNX filter for the tables and slots of embedding layers."""
    del path
    return isinstance(value, EmbeddingVariablesParam)


def is_non_embedding_variables(path: Any, value: Any) -> bool:
    """An NNX filter for everything but the tables and slots of embedding layers."""
    return not is_embedding_variables(path, value)


def get_named_sharding(node: Any, mesh: jax.sharding.Mesh) -> nnx.State:
    """The shardings of the state of a model, an optimizer or the like, such as `nnx.jit` and `jax.device_put` take them.

    Args:
        node: an NNX module, graph node or state.
        mesh: the mesh of its layers.

    Returns:
        The state with a `NamedSharding` in the place of every array: tables and slots by rows over the axis of their layer,
        all else as NNX says, and replicated where it says nothing.

    Example:
        >>> shardings = embax.nnx.embed.get_named_sharding(model, mesh)
        >>> nnx.update(model, jax.device_put(nnx.state(model), shardings))
    """

    def of_variable(variable):
        value = variable.get_value()
        if isinstance(variable, EmbeddingVariablesParam):
            axes = variable.get_metadata().get("sharding_axes")
            over = None if axes is None else TableMesh(mesh, axes)
            return variable.replace(jax.tree.map(functools.partial(_sharding_of, mesh, over), value))
        spec = nnx.get_partition_spec(variable).get_value()
        sharding = None if spec is None or spec == jax.P() else jax.sharding.NamedSharding(mesh, spec)
        return variable.replace(jax.tree.map(lambda array: sharding or replicated(mesh, jnp.ndim(array)), value))

    state = node if isinstance(node, nnx.State) else nnx.state(node)
    return jax.tree.map(of_variable, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _sharding_of(mesh: jax.sharding.Mesh, over: TableMesh | None, array: Any) -> jax.sharding.NamedSharding:
    ndim = jnp.ndim(array)
    return replicated(mesh, ndim) if over is None or ndim == 0 else over.sharding(ndim)


class SparseCoreEmbed(nnx.Module):
    """Looks features up in large embedding tables, and updates the tables as it is differentiated.

    Use it like any layer, under `nnx.jit` with the model donated, `nnx.value_and_grad` and `PartitionedOptimizer`. The
    backward pass applies each table's own optimizer to the rows that the batch touched and returns the new tables in the
    place of their gradient, so a step must call the layer once, and any other optimizer than `PartitionedOptimizer` would
    take the new tables for gradients. Leave the tables out of what is done to gradients in between, such as clipping.

    Args:
        feature_specs: pytree of `FeatureSpec`. Specs that are not placed yet are placed in a copy.
        sharding_axis: the axis of the mesh, or a tuple of axes, that tables are sharded over by rows, and the batch by
            samples; over the other axes they are replicated. None where the mesh has one axis.
        mesh: the devices; None for one device.
        rngs: source of the key that draws the tables, `rngs.params()`.
        enable_minibatching: whether a batch beyond the limits of partitions is divided into minibatches.
        table_sharding_strategy: "MOD", the only one: row `id` is on SparseCore `id % N`.
        limits: "grow", the limits grow with the batches, recompiling the step now and then; "raise", a batch beyond the
            limits of the specs is a ValueError; or "drop", ids beyond them are dropped and counted: see `embax.preprocess`.
            None means "grow" where this process has all devices, else "raise".
        validation: what happens to ids and weights that are not valid, "raise", "drop" or "trust": see `embax.preprocess`.
        num_sc_per_device: SparseCores of a device; None means its own (4 virtual ones off TPU).
        embedding_var_limits: `(min, max)` that the new rows of a stack's table are clipped to, by the name of the stack: see
            `embax.apply_gradients`.
        frozen: True, or a tuple of names of tables: these are never updated and have no slots. All tables of a stack must be
            frozen, or none.
        skip_nonfinite: whether a step with a gradient of an activation that is not finite, on any device, leaves all tables
            and slots as they are.
        dtype: of the activations, such as `jnp.bfloat16`; None means float32. Tables are float32.

    Attributes:
        embedding_table: `EmbeddingVariables` of each stack by name.
        invalid_ids: int32[features] in the order of the feature leaves, overwritten by each call with raw ids inside jit: the
            ids that were left out since they or their weights are not valid. A function that closes over the model instead of
            taking it as an argument of `nnx.jit` does not get them.

    Raises:
        ValueError: the specs are inconsistent, or an argument is not what is described here.

    Example:
        >>> embed = SparseCoreEmbed(features, rngs=nnx.Rngs(0))
        >>> activations = embed(embed.preprocess(ids))
    """

    def __init__(
        self,
        feature_specs: Any,
        sharding_axis: str | tuple[str, ...] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rngs: nnx.Rngs | None = None,
        *,
        enable_minibatching: bool = False,
        table_sharding_strategy: str = "MOD",
        limits: str | None = None,
        validation: str = "raise",
        num_sc_per_device: int | None = None,
        embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None,
        frozen: bool | Collection[str] = False,
        skip_nonfinite: bool = False,
        dtype: Any = None,
    ):
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"SparseCoreEmbed: rngs is {rngs!r}; pass rngs=nnx.Rngs(seed).")
        options: dict[str, Any] = {
            "mesh": mesh,
            "sharding_axis": sharding_axis,
            "table_sharding_strategy": table_sharding_strategy,
            "limits": limits,
            "validation": validation,
            "enable_minibatching": enable_minibatching,
            "num_sc_per_device": num_sc_per_device,
            "embedding_var_limits": embedding_var_limits,
            "frozen": frozen,
            "skip_nonfinite": skip_nonfinite,
            "dtype": dtype,
        }
        shell = Shell("SparseCoreEmbed", feature_specs, **options)
        variables = shell.init(rngs.params())
        self._shell = nnx.static(shell)
        self._options = nnx.static(options)
        axes = None if shell.mesh is None else shell.mesh.axes
        self.embedding_table = EmbeddingVariablesParam(variables, sharding_axes=axes)
        # Its "gradient" counts the differentiated lookups that the "gradient" of the tables is the sum of.
        self.lookups = EmbeddingVariablesParam(shell.small(jnp.zeros((), jnp.float32)))
        self.invalid_ids = InvalidIds(shell.small(jnp.zeros(shell.plan.num_features, jnp.int32)))

    @property
    def feature_specs(self) -> Any:
        """The placed feature specs."""
        return self._shell.specs

    @property
    def packer(self) -> Callable[..., PreprocessedInput | Exception]:
        """What packs for this layer ahead of the steps, in any thread: `packer(ids, weights)`.

        Pass what it returns to `preprocess` in the main thread. On one process that is the batch as `preprocess` returns it; on
        several, which put batches on the devices together, a batch that is on none yet, or the exception that packing raised.
        Take this once, ahead of the steps: while `nnx.jit` updates a model, its attributes are missing for moments.
        """
        return self._shell.pack_ahead

    def preprocess(self, ids: Any, weights: Any = None) -> PreprocessedInput:
        """Packs a batch on the host, ahead of the jitted step (in another thread: see `packer`).

        With a mesh of several devices it waits until at most 16 steps are unfinished: see `embax.StepsInFlight`. With a mesh of
        several processes all call it, in their main thread, and compare their batches: see `embax.place_batch`.

        Args:
            ids: ids of each feature, in the structure of the specs: see `embax.preprocess`. Of the samples of a batch each of
                several processes gives those of its own devices. Or what `packer` returned.
            weights: None, or float weights of the same structure and shapes.

        Returns:
            The packed batch, to be passed into the step; with a mesh its arrays are on the devices.

        Raises:
            ValueError: an id or a weight is not valid, the batch does not divide over the devices, or under `limits="raise"`
                a limit is exceeded; or the last step looked the tables up more than once; or the batches of several
                processes differ in size.
            RuntimeError: another process could not pack its part.
        """
        lookups = self.lookups.get_value()
        refuse_several(lookups)
        self._shell.wait(lookups)
        packed = self._shell.pack(ids, weights)
        if not self._shell.alone:
            refuse_several(
                lookups, wait=True
            )  # Processes have waited for the last step when they have compared batches.
        return packed

    def __call__(self, inputs: Any, step: int | jax.Array | None = None, *, weights: Any = None) -> Any:
        """The activations of a batch.

        Args:
            inputs: what `preprocess` returned; or ids in the structure of the specs. Outside jit these are packed by
                `preprocess`; inside jit they are packed there, and those that are not valid are counted in `invalid_ids`.
            step: the number of the step, for schedules and for optimizers that need it (Adam, F2A).
            weights: with ids None, or weights of the same structure and shapes.

        Returns:
            float32[batch, output_dim] of each feature, or of the layer's dtype, in the structure of the specs.

        Raises:
            ValueError: the batch was packed for other specs, an id or a weight is not valid, or a schedule needs `step`.
        """
        variables, lookups = self.embedding_table.get_value(), self.lookups.get_value()
        activations, invalid_ids = self._shell.lookup(variables, lookups, inputs, weights, step)
        if invalid_ids is not None:
            with contextlib.suppress(
                TraceContextError
            ):  # The model is no argument of what is traced: it cannot take them out.
                self.invalid_ids.set_value(invalid_ids)
        return activations

    def rows(self, table: str, ids: Any) -> jax.Array:
        """Rows of a table by id: see `embax.read_rows`."""
        return read_rows(self.embedding_table.get_value(), table, ids, specs=self._shell.specs)

    def set_rows(self, table: str, ids: Any, values: Any) -> None:
        """Sets rows of a table by id, see `embax.write_rows`. Outside jit the table is copied once."""
        variables = self.embedding_table.get_value()
        self.embedding_table.set_value(write_rows(variables, table, ids, values, specs=self._shell.specs))

    def load(self, tables: Mapping[str, Any]) -> None:
        """Puts given weights in the place of whole tables, in place: see `embax.load_tables`."""
        variables = self.embedding_table.get_value()
        self.embedding_table.set_value(load_tables(variables, tables, specs=self._shell.specs))

    def without_slots(self) -> "SparseCoreEmbed":
        """A frozen layer with the same tables and without slots, to evaluate and to serve.

        The tables are the same arrays: a step of this layer that donates them deletes them for the other one too.
        """
        options: dict[str, Any] = self._options | {"frozen": True, "skip_nonfinite": False}
        # Of an abstract layer, so that no table is drawn.
        layer = nnx.eval_shape(lambda: type(self)(self._shell.specs, rngs=nnx.Rngs(0), **options))
        layer.embedding_table.set_value(without_slots(self.embedding_table.get_value()))
        layer.lookups.set_value(layer._shell.small(jnp.zeros((), jnp.float32)))
        layer.invalid_ids.set_value(jnp.zeros_like(self.invalid_ids.get_value()))
        return layer


def _take_over(layer: "SparseCoreEmbed", new: Mapping[str, EmbeddingVariables], lookups: jax.Array) -> None:
    """Gives a layer the tables that its backward pass returned, if there was exactly one differentiated lookup; see `chosen`.

    Otherwise it keeps its tables, and after several raises at the next `preprocess`.
    """
    old = layer.embedding_table.get_value()
    layer.embedding_table.set_value(chosen(lookups, dict(new), old))
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
