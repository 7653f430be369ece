"""`SparseCoreEmbed` for Flax NNX: large embedding tables that are updated in place in the backward pass."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

try:
    import optax
    from flax import nnx
except ImportError as error:
    raise ImportError("embax.nnx needs Flax and optax: pip install 'embax[flax]'") from error

from embax._layer import Shell
from embax._mesh import TableMesh, replicated
from embax._preprocess.buffers import PreprocessedInput
from embax._ref_lookup import LayerRefs
from embax._refs import is_ref
from embax._rows import load_tables, write_rows
from embax._variables import EmbeddingVariables, without_slots
from embax.nnx._ref_variables import EmbeddingVariable as EmbeddingVariable
from embax.nnx._ref_variables import InvalidIds as InvalidIds
from embax.nnx._ref_variables import RefVariable, StepCounter, UpdateOrder


class EmbeddingVariablesParam(nnx.Param):
    """Tables and slots of a layer of `embax.compat`. What differentiation returns for it is their new value, not a gradient."""


def is_embedding_variables(path: Any, value: Any) -> bool:
    """An NNX filter for what embedding layers hold in refs (tables, slots, counters), and for the tables of `embax.compat`."""
    del path
    return isinstance(value, RefVariable | EmbeddingVariablesParam)


def is_non_embedding_variables(path: Any, value: Any) -> bool:
    """An NNX filter for everything but what `is_embedding_variables` finds: arrays that any optimizer may see."""
    return not is_embedding_variables(path, value)


def get_named_sharding(node: Any, mesh: jax.sharding.Mesh) -> nnx.State:
    """The shardings of the state of a model, an optimizer or the like, such as `nnx.jit` and `jax.device_put` take them.

    A `SparseCoreEmbed` puts its tables on the devices of its mesh when it is made, and JAX moves no refs. So put the rest of a
    model there as the example does.

    Args:
        node: an NNX module, graph node or state.
        mesh: the mesh of its layers.

    Returns:
        The state with a `NamedSharding` in the place of every array: tables and slots by rows over the axis of their layer,
        all else as NNX says, and replicated where it says nothing.

    Example:
        >>> state = nnx.state(model, embax.nnx.embed.is_non_embedding_variables)
        >>> nnx.update(model, jax.device_put(state, embax.nnx.embed.get_named_sharding(state, mesh)))
    """

    def of_variable(variable):
        axes = variable.get_metadata().get("sharding_axes")
        value = variable.get_raw_value()
        if isinstance(variable, RefVariable | EmbeddingVariablesParam):
            over = None if axes is None else TableMesh(mesh, axes)
            shardings = jax.tree.map(functools.partial(_sharding_of, mesh, over), value)
        else:
            spec = nnx.get_partition_spec(variable).get_value()
            sharding = None if spec is None or spec == jax.P() else jax.sharding.NamedSharding(mesh, spec)
            shardings = jax.tree.map(lambda array: sharding or replicated(mesh, jnp.ndim(array)), value)
        return variable.replace(shardings)

    state = node if isinstance(node, nnx.State) else nnx.state(node)
    return jax.tree.map(of_variable, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _sharding_of(mesh: jax.sharding.Mesh, over: TableMesh | None, array: Any) -> jax.sharding.NamedSharding:
    ndim = len(array.shape)
    return replicated(mesh, ndim) if over is None or ndim == 0 else over.sharding(ndim)


class SparseCoreEmbed(nnx.Module):
    """Looks features up in large embedding tables, and updates the tables as it is differentiated.

    Use it like any layer, under `nnx.jit`, `nnx.value_and_grad`, `nnx.Optimizer(model, tx, wrt=nnx.Param)` and any optax
    transformation. Tables and slots are held in refs (`jax.Ref`), which no optimizer sees. The backward pass of each lookup
    applies each table's own optimizer to the rows that the batch touched, and writes the refs in place. Nothing is donated.

    - A step may look a layer up several times. Each lookup takes an optimizer step of its own; all lookups read the tables as
      they were before the step.
    - What is done to gradients after the backward pass (scaling, clipping, averaging) does not reach the tables. See
      `gradient_scale` for a scaled loss, and `embax.nnx.value_and_grad` for gradients of tables that are applied later.
    - Without differentiation, a lookup only reads. Exclude `token` from what is differentiated, and the tables stay as they are.
    - `nnx.clone` and `copy.deepcopy` give the copy tables of its own. `nnx.split` and `nnx.merge` do not copy: models that are
      merged from one state share its tables.

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
        tables: `EmbeddingVariables` of each stack by name, whose leaves are NNX variables: `tables["movie"].table[...]`.
        token: float32[], an `nnx.Param` whose gradient is always 0. It makes lookups differentiable.
        step: int32[], the optimizer steps that were taken, in a ref. Schedules, Adam and F2A read it. All lookups of one training
            step see the same number.
        invalid_ids: int32[features] in a ref, in the order of the feature leaves, overwritten by each call with raw ids inside
            jit: the ids that were left out since they or their weights are not valid.

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
        self._shell = nnx.static(shell)
        self._options = nnx.static(options)
        axes = None if shell.mesh is None else shell.mesh.axes
        variable = functools.partial(EmbeddingVariable, sharding_axes=axes)
        self.tables = nnx.data(jax.tree.map(variable, shell.init(rngs.params())))
        self.token = nnx.Param(shell.small(jnp.zeros((), jnp.float32)))
        self.order = UpdateOrder(shell.by_device(jnp.zeros(shell.plan.num_devices, jnp.int32)), sharding_axes=axes)
        self.step = StepCounter(shell.small(jnp.zeros((), jnp.int32)))
        self.invalid_ids = InvalidIds(shell.small(jnp.zeros(shell.plan.num_features, jnp.int32)))

    @property
    def embedding_table(self) -> dict[str, EmbeddingVariables]:
        """`EmbeddingVariables` of refs of each stack by name, as `embax.lookup` and `embax.checkpoint.save` take them."""
        self.make_refs()
        return jax.tree.map(lambda variable: variable.held, self.tables, is_leaf=_is_variable)

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
                a limit is exceeded; or the batches of several processes differ in size.
            RuntimeError: another process could not pack its part.
        """
        self.make_refs()
        self._shell.wait(self.order.held)
        return self._shell.pack(ids, weights)

    def __call__(
        self,
        inputs: Any,
        step: int | jax.Array | None = None,
        *,
        weights: Any = None,
        gradient_scale: float | jax.Array | None = None,
    ) -> Any:
        """The activations of a batch.

        Args:
            inputs: what `preprocess` returned; or ids in the structure of the specs. Outside jit these are packed by
                `preprocess`; inside jit they are packed there, and those that are not valid are counted in `invalid_ids`.
            step: the number of the step, for schedules and for optimizers that need it. None means the layer's own `step`, which
                else continues behind this number.
            weights: with ids None, or weights of the same structure and shapes.
            gradient_scale: None, or what the loss is multiplied by, a number or a traced scalar. Gradients are divided by it
                before the tables are updated, and before `skip_nonfinite` looks at them.

        Returns:
            float32[batch, output_dim] of each feature, or of the layer's dtype, in the structure of the specs.

        Raises:
            ValueError: the batch was packed for other specs, an id or a weight is not valid, or this layer was made inside jit
                and has not been given refs.
        """
        activations, invalid_ids = self._shell.lookup_in_refs(
            self._refs(), self.token.get_value(), inputs, weights, step, gradient_scale, self.step.origin
        )
        if invalid_ids is not None:
            self.invalid_ids[...] = invalid_ids
        return activations

    def rows(
        self,
        table: str,
        ids: Any,
        step: int | jax.Array | None = None,
        *,
        gradient_scale: float | jax.Array | None = None,
    ) -> jax.Array:
        """Rows of a table by id, as they are stored: a lookup that is not combined, weighted or quantized.

        Differentiated, it updates these rows like any other lookup. Under `jax.lax.stop_gradient` it is a constant.

        Args:
            table: name of the table.
            ids: integer array of any shape; outside jit every id must be in `[0, vocabulary_size)`.
            step: as in the call of the layer.
            gradient_scale: as in the call of the layer.

        Returns:
            float32[*ids.shape, embedding_dim]; inside jit NaN for an id outside the vocabulary.

        Raises:
            ValueError: the table is unknown, or an id is not an integer or is outside the vocabulary.

        Example:
            >>> logits = hidden @ embed.rows("word", jnp.arange(vocabulary_size)).T
        """
        return self._shell.rows_in_refs(
            self._refs(), self.token.get_value(), table, ids, step, gradient_scale, self.step.origin
        )

    def set_rows(self, table: str, ids: Any, values: Any) -> None:
        """Sets rows of a table by id, in place: see `embax.write_rows`."""
        write_rows(self.embedding_table, table, ids, values, specs=self._shell.specs)

    def load(self, tables: Mapping[str, Any]) -> None:
        """Puts given weights in the place of whole tables, in place: see `embax.load_tables`."""
        load_tables(self.embedding_table, tables, specs=self._shell.specs)

    def without_slots(self) -> "SparseCoreEmbed":
        """A frozen layer with the same tables and without slots, to evaluate and to serve.

        The tables are the same refs: the frozen layer sees what this layer learns. `nnx.clone` of it has tables of its own.
        """
        options: dict[str, Any] = self._options | {"frozen": True, "skip_nonfinite": False}
        # An abstract layer, so that no table is drawn.
        layer = nnx.eval_shape(lambda: type(self)(self._shell.specs, rngs=nnx.Rngs(0), **options))
        self.make_refs()
        layer.tables = nnx.data(without_slots(self.tables))
        small = layer._shell.small
        layer.token.set_value(small(jnp.zeros((), jnp.float32)))
        layer.order = UpdateOrder(self.order[...], sharding_axes=self.order.sharding_axes)
        layer.step = StepCounter(self.step[...])
        layer.invalid_ids = InvalidIds(small(jnp.zeros(self._shell.plan.num_features, jnp.int32)))
        return layer

    def make_refs(self) -> None:
        """Puts the arrays of a layer that was made inside jit into refs. Does nothing inside jit, or where they are refs already.

        `preprocess` and calls outside jit do it by themselves.
        """
        if is_ref(self.step.held):
            return
        state = (self.tables, self.order, self.step, self.invalid_ids)
        variables = jax.tree.leaves(state, is_leaf=_is_variable)
        if not any(isinstance(variable.held, Tracer | jax.ShapeDtypeStruct) for variable in variables):
            for variable in variables:
                variable.make_ref()

    def _refs(self) -> LayerRefs:
        return LayerRefs(self.embedding_table, self.order.held, self.step.held)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, RefVariable)


class PartitionedOptimizer(nnx.Optimizer):
    """`nnx.Optimizer(model, dense_optimizer, wrt=nnx.Param)`, under the name of JAX SparseCore: no table is an `nnx.Param`.

    Args:
        model: a model that holds any number of `SparseCoreEmbed`.
        dense_optimizer: optax transformation of all `nnx.Param`.
    """

    def __init__(self, model: nnx.Module, dense_optimizer: optax.GradientTransformation):
        super().__init__(model, dense_optimizer, wrt=nnx.All(nnx.Param, nnx.Not(EmbeddingVariablesParam)))
