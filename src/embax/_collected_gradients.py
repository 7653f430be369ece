"""Gradients that the lookups of a layer store, instead of updating its tables."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from embax._lookup_vjp import LookupSettings
from embax._matmul import all_finite, gradients_of_stacks
from embax._mesh import on_devices
from embax._preprocess.buffers import PreprocessedInput
from embax._ref_lookup import GradientBin, LayerRefs, own_rows, update_stacks
from embax._refs import read
from embax._sparse_gradients import SparseGradient, sum_sparse_gradients

# Part of jit's cache key, so that functions that were jitted before are traced anew while gradients are collected.
_collecting = jax.make_user_context(default_value=None)
_MARK = "embax_lookup_"


@dataclasses.dataclass(eq=False)
class _Call:
    """A lookup of one layer, found while the loss was traced.

    Args:
        layer: what stands for the layer.
        shapes: pytree of `jax.ShapeDtypeStruct`, what its backward pass stores.
        stack: name of the stack of a lookup of rows; None for a lookup of packed features.
        place: puts an array on the devices of the layer.
        times: how often it runs: more than once inside `jax.lax.scan`.
        bin: where its backward pass stores gradients.
    """

    layer: Any
    shapes: Any
    stack: str | None
    place: Callable[[jax.Array], jax.Array]
    times: int = 0
    bin: GradientBin | None = None


class _Collection:
    """The lookups of one differentiated loss: first they are found, then their gradients are stored. Compared by identity."""

    def __init__(self, found: "Sequence[_Call] | None" = None):
        self.calls: list[_Call] = [] if found is None else list(found)
        self._stores = found is not None
        self._next = 0

    def find(self, layer: Any, shapes: Any, stack: str | None, place: Callable[[jax.Array], jax.Array]) -> str | None:
        """The mark of a lookup that is found, None where gradients are stored."""
        if self._stores:
            return None
        self.calls.append(_Call(layer, shapes, stack, place))
        return f"{_MARK}{len(self.calls) - 1}"

    def next_bin(self) -> GradientBin:
        """Where the next lookup stores its gradients: lookups come in the order in which they were found."""
        self._next += 1
        if self._next > len(self.calls):
            raise ValueError(
                "embax.nnx.value_and_grad traced the loss twice, and the second time it looked a layer up more often. Let the "
                "loss do the same each time that it is called."
            )
        return self.calls[self._next - 1].bin  # type: ignore[return-value]


def collecting() -> bool:
    """Whether lookups store their gradients."""
    return _collecting.value is not None


def found_lookup(
    layer: Any, shapes: Any, stack: str | None, place: Callable[[jax.Array], jax.Array], results: Any
) -> Any:
    """Zeros of the shapes of `results` where lookups are found; None where gradients are stored.

    Args:
        layer: what stands for the layer.
        shapes: see `_Call`.
        stack: see `_Call`.
        place: see `_Call`.
        results: pytree of `jax.ShapeDtypeStruct`.
    """
    mark = _collecting.value.find(layer, shapes, stack, place)
    if mark is None:
        return None
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), results)
    return jax.tree.map(lambda array: checkpoint_name(array, mark), zeros)


def next_bin() -> GradientBin:
    """Where the lookup that is traced stores its gradients."""
    return _collecting.value.next_bin()


@contextlib.contextmanager
def finding() -> Iterator[_Collection]:
    """Traces a loss to find its lookups."""
    collection = _Collection()
    with _collecting(collection):
        yield collection


@contextlib.contextmanager
def storing(calls: Sequence[_Call]) -> Iterator[None]:
    """Differentiates a loss whose lookups store their gradients in the bins of `calls`."""
    with _collecting(_Collection(calls)):
        yield


def make_bins(calls: Sequence[_Call], jaxpr: Any) -> None:
    """Gives each lookup that was found a bin, of as many places as it runs in the jaxpr of the loss."""
    _count(jaxpr.jaxpr, 1, calls)
    for call in calls:

        def empty(shape, dtype, call=call):
            return jax.new_ref(call.place(jnp.zeros(shape, dtype)))

        gradients = jax.tree.map(lambda one, n=call.times: empty((n, *one.shape), one.dtype), call.shapes)
        call.bin = GradientBin(empty((), jnp.int32), gradients)


def _count(jaxpr: Jaxpr, times: int, calls: Sequence[_Call]) -> None:
    marked = set()
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name", ""))
        if equation.primitive.name == "name" and name.startswith(_MARK) and name not in marked:
            marked.add(name)
            calls[int(name.removeprefix(_MARK))].times += times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        before = [call.times for call in calls]
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                _count(getattr(part, "jaxpr", part), inner, calls)
        if equation.primitive.name == "while" and before != [call.times for call in calls]:
            raise ValueError(
                "embax.nnx.value_and_grad: a layer is looked up in a while loop, and it is not known how often. Look up outside "
                "of the loop, or use jax.lax.scan."
            )


def _is_jaxpr(part: Any) -> bool:
    return isinstance(part, ClosedJaxpr | Jaxpr)


def collected(settings: LookupSettings, calls: Sequence[_Call]) -> dict[str, SparseGradient]:
    """The gradients of the tables of a layer: the sum of all its lookups, each row once. Frozen stacks are left out.

    On a mesh each device has the rows that it owns, by their number on the device.
    """
    spec = None if settings.mesh is None else settings.mesh.leading
    plan = settings.plan
    stacks = [stack for stack in plan.stacks if stack.name not in settings.frozen]
    parts: list[dict[str, SparseGradient]] = []
    for call in calls:
        if call.bin is None or not call.times:
            continue
        for number in range(call.times):
            stored = jax.tree.map(lambda ref, number=number: ref[number], call.bin.gradients)
            if call.stack is None:
                gradients, packed = stored

                def of_batch(gradients, packed):
                    return gradients_of_stacks(gradients, packed, plan, settings.axis_name)

                found = on_devices(settings.mesh, of_batch, (spec, spec), spec)(gradients, packed)
                parts.append({name: SparseGradient(*found[name]) for name in found if name not in settings.frozen})
            else:
                stack = next(stack for stack in stacks if stack.name == call.stack)
                parts.append({call.stack: own_rows(settings, stack, *stored)})
    return summed(settings, parts)


def summed(settings: LookupSettings, parts: Sequence[Mapping[str, SparseGradient]]) -> dict[str, SparseGradient]:
    """The sum of gradients of a layer, each row once, on the device that owns it. Gradients have no leading dimensions."""
    spec = None if settings.mesh is None else settings.mesh.leading
    totals = {}
    for stack in settings.plan.stacks:
        of_stack = [part[stack.name] for part in parts if stack.name in part]
        if of_stack:

            def total(of_stack, name=stack.name):
                return sum_sparse_gradients([{name: part} for part in of_stack])[name]

            totals[stack.name] = on_devices(settings.mesh, total, (spec,), spec)(of_stack)
    return totals


def apply_collected(
    refs: LayerRefs, parts: Mapping[str, SparseGradient], step: Any, *, settings: LookupSettings
) -> None:
    """Takes one optimizer step on the rows of some stacks of a layer; gradients have no leading dimensions."""
    step = read(refs.step).reshape(-1)[0] if step is None else step
    finite = all_finite([part.values for part in parts.values()], None) if settings.skip_nonfinite else None
    update_stacks(settings, refs, dict(parts), step, finite)


def shapes_of(settings: LookupSettings, packed: PreprocessedInput) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """The shapes of the activations of a batch, in the order of the feature leaves, and of what its backward pass stores."""
    devices = packed.layout.num_devices
    features: list[Any] = [None] * settings.plan.num_features
    for stack in packed.layout.stacks:
        for feature, batch in zip(stack.features, stack.batch_sizes, strict=True):
            features[feature.leaf] = jax.ShapeDtypeStruct((devices * batch, feature.output_dim), jnp.float32)
    of_packed = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), packed)
    return features, (features, of_packed)
