"""`SparseCoreEmbed` for Flax Linen: large embedding tables that are updated in place in the backward pass."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError("embax.linen needs Flax and optax: pip install 'embax[flax]'") from error

from embax._layer import Shell, float32_variables
from embax._lookup_vjp import lookup_and_update, update_of
from embax._matmul import flatten_like
from embax._preprocess.all_reduce import AllReduceInterface
from embax._preprocess.buffers import PreprocessedInput
from embax._rows import load_tables, read_rows, write_rows
from embax._specs import FeatureSpec
from embax._variables import EmbeddingVariables
from embax._witness import WIDTH, judge_stored, refuse_misused, stored_witness
from embax.linen._box import EMBEDDING_PARAM_NAME as EMBEDDING_PARAM_NAME
from embax.linen._box import WithSparseCoreLayout as WithSparseCoreLayout
from embax.linen.embed_optimizer import apply_updates_for_sc_model as apply_updates_for_sc_model
from embax.linen.embed_optimizer import create_optimizer_for_sc_model as create_optimizer_for_sc_model


class SparseCoreEmbed(nn.Module):
    """Looks features up in large embedding tables, and updates the tables as it is differentiated.

    The backward pass applies each table's own optimizer to the rows that the batch touched, and returns the new tables in the
    place of their gradient. So a step must call the layer once; create the optimizer of the model by
    `create_optimizer_for_sc_model`, and apply its updates by `apply_updates_for_sc_model`. Donate the parameters to the jitted
    step, and leave the tables out of what is done to gradients in between, such as clipping.

    Args:
        feature_specs: pytree of `FeatureSpec`. Specs that are not placed yet are placed in a copy.
        sharding_axis: the axis of the mesh, or a tuple of axes, that tables are sharded over by rows, and the batch by
            samples; over the other axes they are replicated. None where the mesh has one axis.
        mesh: the devices; None for one device.
        table_sharding_strategy: "MOD", the only one: row `id` is on SparseCore `id % N`.
        enable_minibatching: whether a batch beyond the limits of partitions is divided into minibatches.
        num_sc_per_device: SparseCores of a device; None or -1 means its own (4 virtual ones off TPU).
        limits: "grow", the limits grow with the batches, recompiling the step now and then; "raise", a batch beyond the
            limits of the specs is a ValueError; or "drop", ids beyond them are dropped and counted: see `embax.preprocess`.
            None means "grow" where this process has all devices, else "raise".
        validation: what happens to ids and weights that are not valid, "raise", "drop" or "trust": see `embax.preprocess`.
        embedding_var_limits: `(min, max)` that the new rows of a stack's table are clipped to, by the name of the stack: see
            `embax.apply_gradients`.
        frozen: True, or a tuple of names of tables: these are never updated and have no slots. All tables of a stack must be
            frozen, or none.
        skip_nonfinite: whether a step with a gradient of an activation that is not finite, on any device, leaves all tables
            and slots as they are.
        dtype: of the activations, such as `jnp.bfloat16`; None means float32. Tables are looked up and updated in float32.

    Raises:
        ValueError: the specs are inconsistent, or an argument is not what is described here.

    Example:
        >>> embed = SparseCoreEmbed(features)
        >>> packed = embed.preprocess(ids)
        >>> variables = embed.init(jax.random.key(0), packed)
        >>> activations = embed.apply(variables, packed)
    """

    feature_specs: Any
    sharding_axis: str | tuple[str, ...] | None = None
    mesh: jax.sharding.Mesh | None = None
    table_sharding_strategy: str = "MOD"
    enable_minibatching: bool = False
    num_sc_per_device: int | None = None
    limits: str | None = None
    validation: str = "raise"
    embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None
    frozen: bool | Collection[str] = False
    skip_nonfinite: bool = False
    dtype: Any = None
    _shared: "_Shared | None" = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.init and field.name not in ("parent", "name", "_shared")
        }
        if self._shared is None or self._shared.fields != _comparable(fields):
            object.__setattr__(self, "_shared", _Shared(fields))
        super().__post_init__()

    @property
    def _shell(self) -> Shell:
        assert self._shared is not None
        return self._shared.shell

    @property
    def placed_specs(self) -> Any:
        """The placed feature specs."""
        return self._shell.specs

    @property
    def num_shards(self) -> int:
        """Devices that the tables are sharded over."""
        return self._shell.plan.num_devices

    @property
    def data_partition(self) -> jax.P:
        """How packed batches and activations are sharded."""
        mesh = self._shell.mesh
        return jax.P() if mesh is None else mesh.leading

    @property
    def embedding_table_partition(self) -> jax.P:
        """How tables are sharded."""
        mesh = self._shell.mesh
        return jax.P() if mesh is None else jax.P(*mesh.leading, None)

    @property
    def embedding_table(self) -> dict[str, EmbeddingVariables]:
        """`EmbeddingVariables` of each stack by name, of a bound module.

        Raises:
            ValueError: this is differentiated with respect to the tables.
        """
        tables = _unboxed(self._parameter())
        return _no_gradient(tables) if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tables)) else tables

    def setup(self) -> None:
        """Makes the parameter, where it is missing."""
        if not self.has_variable("params", EMBEDDING_PARAM_NAME):
            self.param(EMBEDDING_PARAM_NAME, self._init, unbox=False)

    def _init(self, key: jax.Array) -> WithSparseCoreLayout:
        shell = self._shell
        optimizers = tuple((stack.name, stack.optimizer) for stack in shell.plan.stacks)
        mesh = None if shell.mesh is None else shell.mesh.mesh
        partition = tuple(self.embedding_table_partition)
        box = WithSparseCoreLayout(shell.init(key), partition, mesh, stored_witness(self.num_shards), optimizers)
        return box.replace(witness=self._stored_witness(box))

    def _stored_witness(self, box: WithSparseCoreLayout) -> jax.Array:
        witness = stored_witness(self.num_shards)
        return witness if box.mesh is None else _placed(witness, box.get_sharding(box.mesh).witness)

    def _parameter(self) -> Any:
        return self.get_variable("params", EMBEDDING_PARAM_NAME)

    @property
    def packer(self) -> Callable[..., PreprocessedInput | Exception]:
        """What packs for this layer ahead of the steps, in any thread: `packer(ids, weights)`.

        Pass what it returns to `preprocess` in the main thread. On one process that is the batch as `preprocess` returns it; on
        several, which put batches on the devices together, a batch that is on none yet, or the exception that packing raised. The
        module need not be bound to variables.
        """
        return self._shell.pack_ahead

    def preprocess(self, ids: Any, weights: Any = None, *, last: jax.Array | None = None) -> PreprocessedInput:
        """Packs a batch on the host, ahead of the jitted step. The module need not be bound to variables.

        With a mesh of several processes all call it, in their main thread, and compare their batches: see `embax.place_batch`.

        Args:
            ids: ids of each feature, in the structure of the specs: see `embax.preprocess`. Of the samples of a batch each of
                several processes gives those of its own devices. Or what `packer` returned.
            weights: None, or float weights of the same structure and shapes.
            last: None, or a small result of the step before, such as the loss: with a mesh of several devices this waits until
                at most 16 such steps are unfinished (see `embax.StepsInFlight`).

        Returns:
            The packed batch, to be passed into the step; with a mesh its arrays are on the devices.

        Raises:
            ValueError: an id or a weight is not valid, the batch does not divide over the devices, or under `limits="raise"`
                a limit is exceeded, or the batches of several processes differ in size.
            RuntimeError: another process could not pack its part.
        """
        if isinstance(last, jax.Array):
            self._shell.wait(last)
        return self._shell.pack(ids, weights)

    def preprocess_inputs(
        self,
        step: int | jax.Array | None,
        features: Any,
        features_weights: Any,
        all_reduce_interface: AllReduceInterface | None = None,
    ) -> PreprocessedInput:
        """`preprocess` with the arguments of JAX SparseCore.

        Args:
            step: the number of the batch, by which several processes that divide it into minibatches name it. If it is a JAX
                array it is waited for as `last` of `preprocess` is.
            features: ids of each feature.
            features_weights: None, or weights of the same structure.
            all_reduce_interface: how processes agree on minibatches; None means `embax.DistributedAllReduce()`.
        """
        if isinstance(step, jax.Array):
            self._shell.wait(step)
        batch_number = int(step) if self.enable_minibatching and step is not None else None
        return self._shell.pack(features, features_weights, batch_number=batch_number, all_reduce=all_reduce_interface)

    def __call__(self, inputs: Any, step: int | jax.Array | None = None, *, weights: Any = None) -> Any:
        """The activations of a batch.

        The ids that were left out of raw ids inside jit are counted, int32[features] in the order of the feature leaves, and
        sown as "invalid_ids" into the collection "intermediates".

        Args:
            inputs: what `preprocess` returned; or ids in the structure of the specs. Outside jit these are packed by
                `preprocess`; inside jit they are packed there, and those that are not valid are left out.
            step: the number of the step, for schedules and for optimizers that need it (Adam, F2A).
            weights: with ids None, or weights of the same structure and shapes.

        Returns:
            float32[batch, output_dim] of each feature, or of the layer's dtype, in the structure of the specs. NaN inside jit
            after a misuse of the tables, see `apply_updates_for_sc_model`; then the backward pass updates nothing.

        Raises:
            ValueError: the batch was packed for other specs, an id or a weight is not valid, or a schedule needs `step`. Outside
                jit also: an earlier step misused the tables.
        """
        shell, box = self._shell, self._parameter()
        witness = _witness_of(box)
        trusted = witness is None or refuse_misused(witness)
        if not isinstance(inputs, PreprocessedInput):
            inputs = shell.pack(inputs, weights)
        elif weights is not None:
            raise ValueError("SparseCoreEmbed: weights come with ids; a packed batch has them in it already.")
        batch = inputs.replace(invalid_ids=None)
        features: Any = lookup_and_update(
            shell.settings, _unboxed(box), jnp.float32(0) if witness is None else witness, batch, step
        )
        if not trusted:
            misused = judge_stored(jax.lax.stop_gradient(witness)) > 0
            features = [jnp.where(misused, jnp.float32(jnp.nan), activations) for activations in features]
        if shell.dtype is not None:
            features = [activations.astype(shell.dtype) for activations in features]
        if inputs.invalid_ids is not None:
            self.sow("intermediates", "invalid_ids", inputs.invalid_ids)
        return jax.tree.unflatten(shell.structure, features)

    def apply_gradient(self, gradients: Any, inputs: PreprocessedInput, step: Any = None) -> dict[str, Any]:
        """The tables and slots after one optimizer step, where gradients are there without the backward pass of this layer.

        Args:
            gradients: gradient with respect to the activations: [batch, output_dim] of each feature, in the structure of the
                specs.
            inputs: the packed batch.
            step: the number of the step.

        Returns:
            A dict of one item: the path of the parameter in the model, joined by "/", and what takes its place.

        Raises:
            ValueError: the gradients have another structure or shape. Outside jit also: an earlier step misused the tables.
        """
        shell, box = self._shell, self._parameter()
        _refuse_misused(box)
        leaves = flatten_like(gradients, shell.structure, "gradients")
        new = update_of(shell.settings, leaves, inputs, float32_variables(_unboxed(box)), step)
        path = "/".join((*self.path, EMBEDDING_PARAM_NAME))
        return {path: box.replace(value=new) if isinstance(box, WithSparseCoreLayout) else new}

    def rows(self, table: str, ids: Any) -> jax.Array:
        """Rows of a table by id, of a bound module: see `embax.read_rows`.

        Raises:
            ValueError: the table or an id is not known, or this is differentiated with respect to the tables. Outside jit also:
                an earlier step misused the tables.
        """
        _refuse_misused(self._parameter())
        return read_rows(self.embedding_table, table, ids, specs=self._shell.specs)

    def set_rows(self, params: Any, table: str, ids: Any, values: Any) -> Any:
        """The layer's parameters with new rows of a table, see `embax.write_rows`. The module need not be bound.

        Args:
            params: the parameters of this layer, a dict that holds "sc_embedding_variables".
            table: name of the table.
            ids: of the rows.
            values: of the rows.
        """
        return _with_tables(params, lambda old: write_rows(old, table, ids, values, specs=self._shell.specs))

    def load(self, params: Any, tables: Mapping[str, Any]) -> Any:
        """The layer's parameters with given weights in the place of whole tables. The module need not be bound.

        The tables of `params` are donated: use the result only, see `embax.load_tables`. The result is as after `init` for
        the layer's checks: this clears what a misuse of the tables left, also if `tables` is empty.

        Args:
            params: the parameters of this layer, a dict that holds "sc_embedding_variables".
            tables: floating point array [vocabulary_size, embedding_dim] by the name of its table.
        """
        specs = self._shell.specs
        new = _with_tables(params, lambda old: load_tables(old, tables, specs=specs) if tables else old)
        box = new[EMBEDDING_PARAM_NAME]
        if _witness_of(box) is not None:
            new[EMBEDDING_PARAM_NAME] = box.replace(witness=self._stored_witness(box))
        return new


class _Shared:
    """What the copies that Flax makes of a module share."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = _comparable(fields)
        num_sc = fields.pop("num_sc_per_device")
        self.shell = Shell(
            "SparseCoreEmbed", fields.pop("feature_specs"), num_sc_per_device=None if num_sc == -1 else num_sc, **fields
        )


def _comparable(fields: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """The fields of a module, in which Flax makes frozen dicts of dicts and tuples of lists."""
    leaves = {
        name: jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
        for name, value in fields.items()
    }
    return list(leaves.items())


def _placed(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.jit(lambda array: array, out_shardings=sharding)(array)


@jax.custom_jvp
def _no_gradient(tables: Any) -> Any:
    return tables


@_no_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "SparseCoreEmbed: rows and embedding_table cannot be differentiated with respect to the tables, because what "
        "differentiation returns for the tables is their new value, not a gradient. To read them as constants, bind the layer to "
        "jax.lax.stop_gradient(params). To train them, look the rows up as a second feature of the same table, or use "
        "embax.nnx.embed.SparseCoreEmbed."
    )


def _witness_of(box: Any) -> Any:
    """The witness of a parameter, None if there is none.

    Raises:
        ValueError: it has another shape.
    """
    witness = box.witness if isinstance(box, WithSparseCoreLayout) else None
    if witness is not None and (witness.ndim != 2 or witness.shape[1] != WIDTH):
        raise ValueError(
            f"The witness beside the tables has the shape {witness.shape}; it must be [devices, {WIDTH}]. Make the parameters "
            "with layer.init, and put the tables into its box."
        )
    return witness


def _refuse_misused(box: Any) -> None:
    if (witness := _witness_of(box)) is not None:
        refuse_misused(witness)


def _unboxed(box: Any) -> Any:
    return box.value if isinstance(box, nn.Partitioned) else box


def _of_jax_arrays(box: Any) -> Any:
    """The parameter with NumPy arrays, such as `jax.device_get` returns, put on the devices."""
    if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(box)):
        return box
    mesh = box.mesh if isinstance(box, WithSparseCoreLayout) else None
    return jax.tree.map(jnp.asarray, box) if mesh is None else jax.device_put(box, box.get_sharding(mesh))


def _with_tables(params: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    if not isinstance(params, Mapping) or EMBEDDING_PARAM_NAME not in params:
        raise ValueError(
            f"There is no {EMBEDDING_PARAM_NAME!r} in the parameters; pass those of the layer itself, such as "
            'variables["params"]["embed"].'
        )
    box = params[EMBEDDING_PARAM_NAME]
    new = change(_unboxed(_of_jax_arrays(box)))
    return {**params, EMBEDDING_PARAM_NAME: box.replace(value=new) if isinstance(box, nn.Partitioned) else new}
