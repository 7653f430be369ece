"""What the layers for Linen and NNX share: everything but how each framework holds variables."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from embax import _collected_gradients as collected_gradients
from embax._checks import boolean
from embax._lookup_vjp import LookupSettings, lookup_and_update
from embax._matmul import checked_limits, feature_structure
from embax._mesh import StepsInFlight, TableMesh
from embax._ops.geometry import inside_shard_map
from embax._preprocess.all_reduce import AllReduceInterface, DistributedAllReduce
from embax._preprocess.buffers import PreprocessedInput
from embax._preprocess.coo import SparseCoo
from embax._preprocess.inputs import Ragged
from embax._preprocess.packer import Packer
from embax._ref_lookup import LayerRefs, lookup_in_refs, rows_in_refs
from embax._refs import is_ref, read
from embax._rows import place_of_table, valid_ids
from embax._stacking.plan import Plan, make_plan
from embax._stacking.stack import copy_feature_specs, prepare_feature_specs_for_training
from embax._variables import EmbeddingVariables, init_embedding_variables


def _frozen_stacks(frozen: Any, plan: Plan) -> frozenset[str]:
    """The stacks whose tables are frozen.

    Raises:
        ValueError: a name is of no table, or some tables of a stack are frozen and others not.
    """
    names = {table.name for stack in plan.stacks for table in stack.tables}
    if isinstance(frozen, bool):
        return frozenset(stack.name for stack in plan.stacks if frozen)
    if isinstance(frozen, str) or not isinstance(frozen, Collection):
        raise ValueError(f"frozen is {frozen!r}; it must be True, False or a tuple of names of tables.")
    if unknown := sorted(set(map(str, frozen)) - names):
        raise ValueError(f"frozen has {unknown}, which are no tables; the tables are {sorted(names)}.")
    stacks = set()
    for stack in plan.stacks:
        moving = [table.name for table in stack.tables if table.name not in frozen]
        if not moving:
            stacks.add(stack.name)
        elif len(moving) < len(stack.tables):
            raise ValueError(
                f"Stack {stack.name!r} holds frozen tables and others, {moving}, and is updated as a whole. Stack the frozen "
                "tables apart, or give the layer specs that are not stacked."
            )
    return frozenset(stacks)


def float32_variables(variables: Any) -> Any:
    """The variables with half precision arrays as float32, in which tables are looked up and updated."""

    def cast(array):
        half = getattr(array, "dtype", None) in (jnp.bfloat16, jnp.float16)
        return array.astype(jnp.float32) if half else array

    return jax.tree.map(cast, variables)


class Shell:
    """Placed specs, packing, lookup and first values of one layer. Compared by identity, so that no trace looks inside.

    Args:
        layer: name of the layer in errors.
        feature_specs: pytree of `FeatureSpec`; those that are not placed yet are placed in a copy.
        mesh: see `SparseCoreEmbed`, as all that follow.
        sharding_axis: the axis of the mesh that tables and batch are sharded over.
        table_sharding_strategy: "MOD".
        limits: "grow", "raise", "drop" or None.
        validation: "raise", "drop" or "trust".
        enable_minibatching: whether large batches are divided into minibatches.
        num_sc_per_device: SparseCores of a device.
        embedding_var_limits: what new rows are clipped to.
        frozen: True, or names of tables.
        skip_nonfinite: whether steps with gradients that are not finite are skipped.
        dtype: of the activations.

    Raises:
        ValueError: an argument is not what is described here, or the specs are inconsistent.
    """

    def __init__(
        self,
        layer: str,
        feature_specs: Any,
        *,
        mesh: Any = None,
        sharding_axis: Any = None,
        table_sharding_strategy: str = "MOD",
        limits: str | None = None,
        validation: str = "raise",
        enable_minibatching: bool = False,
        num_sc_per_device: int | None = None,
        embedding_var_limits: Mapping[str, Any] | None = None,
        frozen: bool | Collection[str] = False,
        skip_nonfinite: bool = False,
        dtype: Any = None,
    ):
        if table_sharding_strategy != "MOD":
            raise ValueError(f"table_sharding_strategy is {table_sharding_strategy!r}; it must be 'MOD'.")
        self.layer = layer
        self.mesh = TableMesh.checked(mesh, sharding_axis)
        num_devices = 1 if self.mesh is None else self.mesh.num_devices
        self.specs = copy_feature_specs(feature_specs)
        prepare_feature_specs_for_training(self.specs, num_devices, num_sc_per_device)
        self.structure = feature_structure(self.specs)
        self.plan = make_plan(self.specs)
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype is {self.dtype}; it must be a floating point type, such as jnp.bfloat16.")
        self.settings = LookupSettings(
            self.plan,
            checked_limits(embedding_var_limits, self.plan),
            self.mesh,
            _frozen_stacks(frozen, self.plan),
            boolean(layer, "skip_nonfinite", skip_nonfinite),
        )
        self._num_local = 1 if self.mesh is None else self.mesh.num_local_devices
        if self._num_local == 0:
            raise ValueError("No device of the mesh is of this process; make a mesh of devices of all processes.")
        self.alone = alone = self.mesh is None or self.mesh.processes.alone
        if limits == "grow" and not alone:
            raise ValueError(
                f'{layer}: limits="grow" with devices of several processes: processes whose buffers grow on their own compile '
                'different programs and hang. Use limits="raise", and embax.update_preprocessing_parameters to set the limits.'
            )
        self._packing: dict[str, Any] = {
            "limits": ("grow" if alone else "raise") if limits is None else limits,
            "validation": validation,
            "num_local_devices": self._num_local,
            "enable_minibatching": enable_minibatching,
        }
        all_reduce = None if alone or not enable_minibatching else DistributedAllReduce()
        self._packer = Packer(self.specs, **self._packing, all_reduce=all_reduce)
        self._agreeing: tuple[AllReduceInterface, Packer] | None = None
        self._in_flight = StepsInFlight()

    def init(self, key: jax.Array) -> dict[str, EmbeddingVariables]:
        """The first values; frozen stacks have no slots."""
        mesh, axes = (None, None) if self.mesh is None else (self.mesh.mesh, self.mesh.axes)
        return init_embedding_variables(
            key, self.specs, mesh=mesh, sharding_axis=axes, without_slots=self.settings.frozen
        )

    def small(self, array: jax.Array) -> jax.Array:
        """A small array of the layer where steps return it."""
        return array if self.mesh is None else self.mesh.replicate(array)

    def by_device(self, array: jax.Array) -> jax.Array:
        """An array of one element a device, [devices, ...], on the devices where steps return it."""
        if self.mesh is None:
            return array
        return jax.jit(lambda array: array, out_shardings=self.mesh.sharding(array.ndim))(array)

    def pack(
        self,
        ids: Any,
        weights: Any = None,
        *,
        batch_number: int | None = None,
        all_reduce: AllReduceInterface | None = None,
    ) -> PreprocessedInput:
        """A packed batch, on the devices of the mesh if there is one; traced ids are packed where they are traced.

        Instead of ids it takes what `pack_ahead` returned.
        """
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((ids, weights))):
            return self._pack_traced(ids, weights)
        packed: Any = ids
        if not isinstance(ids, PreprocessedInput | Exception):
            packer = self._packer if all_reduce is None else self._packer_with(all_reduce)
            packed = self._result_of(packer, ids, weights, batch_number)
        if self.mesh is None or isinstance(getattr(packed, "gains", None), jax.Array) or inside_shard_map():
            return packed
        return self.mesh.place(packed)

    def pack_ahead(self, ids: Any, weights: Any = None) -> PreprocessedInput | Exception:
        """What `pack` does without the other processes: with some, the batch is on no device yet, and an error is returned."""
        return self.pack(ids, weights) if self.alone else self._result_of(self._packer, ids, weights, None)

    def _result_of(
        self, packer: Packer, ids: Any, weights: Any, batch_number: int | None
    ) -> PreprocessedInput | Exception:
        """The packed batch, or the error where other processes must get to know it."""
        try:
            return packer(ids, weights, batch_number=batch_number)
        except Exception as error:
            if self.alone:
                raise
            return error

    def _packer_with(self, all_reduce: AllReduceInterface) -> Packer:
        if not self._packing["enable_minibatching"]:
            return self._packer  # Nothing is agreed on.
        if self._agreeing is None or self._agreeing[0] is not all_reduce:
            self._agreeing = (all_reduce, Packer(self.specs, **self._packing, all_reduce=all_reduce))
        return self._agreeing[1]

    def _pack_traced(self, ids: Any, weights: Any) -> PreprocessedInput:
        if self.mesh is None or self.mesh.num_devices == 1 or inside_shard_map():
            return self._packer(ids, weights)
        self._check_divides(ids)
        spec, axis_name = self.mesh.leading, self.mesh.axis_name

        def pack(ids, weights):
            packed = self._packer(ids, weights)
            return packed.replace(invalid_ids=None), jax.lax.psum(packed.invalid_ids, axis_name)

        packed, invalid_ids = self.mesh.shard_map(pack, (spec, spec), (spec, jax.P()))(ids, weights)
        return packed.replace(invalid_ids=invalid_ids)

    def _check_divides(self, ids: Any) -> None:
        """Raises a ValueError unless traced ids can be divided over the devices."""
        flat = jax.tree_util.tree_leaves_with_path(ids, is_leaf=lambda leaf: isinstance(leaf, Ragged | SparseCoo))
        for path, leaf in flat:
            where, num_devices = f"ids{jax.tree_util.keystr(path)}", self.plan.num_devices
            if isinstance(leaf, Ragged | SparseCoo):
                raise ValueError(
                    f"{self.layer}: {where} are a {type(leaf).__name__} inside jit, which cannot be divided over {num_devices} "
                    "devices there. Pack outside jit with preprocess, or give dense ids, in which -1 is padding."
                )
            batch = leaf.shape[0] if getattr(leaf, "shape", ()) else 0
            if batch % num_devices:
                raise ValueError(
                    f"{self.layer}: {where} have a batch of {batch}, which does not divide by the {num_devices} devices; fill it "
                    f"up to {-(-batch // num_devices) * num_devices} samples (ids of -1 contribute nothing)."
                )
        if flat and not any(leaf.shape[0] for _, leaf in flat if getattr(leaf, "shape", ())):
            raise ValueError(
                f"{self.layer}: the ids have no samples to divide over {self.plan.num_devices} devices inside jit. Leave the "
                "batch out, or pack it outside jit with preprocess."
            )

    def wait(self, result: Any) -> None:
        """Bounds the steps in flight where that is needed, given a small result of the last one, an array or a ref."""
        several = self.mesh is not None and self.mesh.mesh.devices.size > 1
        if several and not isinstance(result, Tracer) and (is_ref(result) or not result.is_deleted()):
            self._in_flight(jnp.copy(read(result)))  # The result itself will be donated.

    def lookup(self, variables: Any, lookups: jax.Array, inputs: Any, weights: Any, step: Any) -> tuple[Any, Any]:
        """Activations in the structure of the specs, and the ids that were not valid, of each feature, if they were counted."""
        packed = self._packed(inputs, weights)
        batch = packed.replace(invalid_ids=None)
        features = lookup_and_update(self.settings, float32_variables(variables), lookups, batch, step)
        return self._activations(features), packed.invalid_ids

    def lookup_in_refs(
        self, refs: LayerRefs, token: jax.Array, inputs: Any, weights: Any, step: Any, scale: Any, origin: Any
    ) -> tuple[Any, Any]:
        """Activations and invalid ids as `lookup` returns them, from tables in refs; see `embax._ref_lookup`.

        `origin` stands for the layer where gradients are collected.
        """
        packed = self._packed(inputs, weights)
        batch = packed.replace(invalid_ids=None)
        if collected_gradients.collecting() and not self.settings.all_frozen:
            shapes, stored = collected_gradients.shapes_of(self.settings, batch)
            features = collected_gradients.found_lookup(origin, stored, None, self.small, shapes)
            if features is not None:
                return self._activations(features), packed.invalid_ids
            refs = refs._replace(bin=collected_gradients.next_bin())
        return self._activations(lookup_in_refs(self.settings, refs, token, batch, step, scale)), packed.invalid_ids

    def rows_in_refs(
        self, refs: LayerRefs, token: jax.Array, table: str, ids: Any, step: Any, scale: Any, origin: Any
    ) -> jax.Array:
        """float32[*ids.shape, embedding_dim], rows of a table; arguments as for `lookup_in_refs`."""
        _, stack, planned = place_of_table(table, self.specs)
        rows = valid_ids(ids, table, planned.vocabulary_size)
        if collected_gradients.collecting() and stack.name not in self.settings.frozen:
            result = jax.ShapeDtypeStruct((*rows.shape, planned.embedding_dim), jnp.float32)
            stored = (
                jax.ShapeDtypeStruct((rows.size,), jnp.int32),
                jax.ShapeDtypeStruct((rows.size, stack.shape[1]), jnp.float32),
            )
            values = collected_gradients.found_lookup(origin, stored, stack.name, self.small, result)
            if values is not None:
                return values
            refs = refs._replace(bin=collected_gradients.next_bin())
        return rows_in_refs(self.settings, stack, planned, refs, token, rows, step, scale)

    def _packed(self, inputs: Any, weights: Any) -> PreprocessedInput:
        if not isinstance(inputs, PreprocessedInput):
            return self.pack(inputs, weights)
        if weights is not None:
            raise ValueError(f"{self.layer}: weights come with ids; a packed batch has them in it already.")
        return inputs

    def _activations(self, features: Any) -> Any:
        if self.dtype is not None:
            features = [activations.astype(self.dtype) for activations in features]
        return jax.tree.unflatten(self.structure, features)
