"""Row rules as StableHLO text: read into JAX operations, so that every backend runs them, over all rows at once.

Text with an operation that is not read here is compiled as it is, and runs over one row after another.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import batching, mlir

from embax._warnings import warn_slow_path

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "stablehlo.abs": lax.abs,
    "stablehlo.add": lax.add,
    "stablehlo.and": lax.bitwise_and,
    "stablehlo.atan2": lax.atan2,
    "stablehlo.cbrt": lax.cbrt,
    "stablehlo.ceil": lax.ceil,
    "stablehlo.clamp": lax.clamp,
    "stablehlo.cosine": lax.cos,
    "stablehlo.divide": lax.div,
    "stablehlo.exponential": lax.exp,
    "stablehlo.exponential_minus_one": lax.expm1,
    "stablehlo.floor": lax.floor,
    "stablehlo.is_finite": lax.is_finite,
    "stablehlo.log": lax.log,
    "stablehlo.log_plus_one": lax.log1p,
    "stablehlo.logistic": lax.logistic,
    "stablehlo.maximum": lax.max,
    "stablehlo.minimum": lax.min,
    "stablehlo.multiply": lax.mul,
    "stablehlo.negate": lax.neg,
    "stablehlo.not": lax.bitwise_not,
    "stablehlo.or": lax.bitwise_or,
    "stablehlo.power": lax.pow,
    "stablehlo.remainder": lax.rem,
    "stablehlo.round_nearest_afz": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "stablehlo.round_nearest_even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "stablehlo.rsqrt": lax.rsqrt,
    "stablehlo.select": lambda condition, yes, no: lax.select(condition, yes, no),
    "stablehlo.sign": lax.sign,
    "stablehlo.sine": lax.sin,
    "stablehlo.sqrt": lax.sqrt,
    "stablehlo.subtract": lax.sub,
    "stablehlo.tan": lax.tan,
    "stablehlo.tanh": lax.tanh,
    "stablehlo.xor": lax.bitwise_xor,
    "stablehlo.shift_left": lax.shift_left,
    "stablehlo.shift_right_arithmetic": lax.shift_right_arithmetic,
    "stablehlo.shift_right_logical": lax.shift_right_logical,
    "chlo.acos": lax.acos,
    "chlo.acosh": lax.acosh,
    "chlo.asin": lax.asin,
    "chlo.asinh": lax.asinh,
    "chlo.atan": lax.atan,
    "chlo.atanh": lax.atanh,
    "chlo.cosh": lax.cosh,
    "chlo.digamma": lax.digamma,
    "chlo.erf": lax.erf,
    "chlo.erf_inv": lax.erf_inv,
    "chlo.erfc": lax.erfc,
    "chlo.lgamma": lax.lgamma,
    "chlo.sinh": lax.sinh,
    "chlo.square": lax.square,
    "chlo.tan": lax.tan,
}
# fmt: off
_OTHERS = {"func.call", "func.return", "func.func"} | {f"stablehlo.{name}" for name in (
    "bitcast_convert", "broadcast_in_dim", "case", "compare", "concatenate", "constant", "convert", "dot_general",
    "dynamic_slice", "dynamic_update_slice", "if", "iota", "optimization_barrier", "pad", "reduce", "reshape", "return",
    "reverse", "slice", "transpose", "while",
)}
# fmt: on
"""What `_Evaluator.results` reads beside the operations above."""
_COMPARISONS = {"EQ": lax.eq, "NE": lax.ne, "LT": lax.lt, "LE": lax.le, "GT": lax.gt, "GE": lax.ge}


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(ir.RankedTensorType(value.type).shape)


def _dtype(value: Any) -> Any:
    element = str(ir.RankedTensorType(value.type).element_type)
    names = {"i1": "bool", "f": "float", "i": "int", "ui": "uint", "bf": "bfloat"}
    letters = element.rstrip("0123456789")
    return jnp.dtype(names.get(element) or names[letters] + element[len(letters) :])


def _integers(attributes: Any, name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in attributes[name])


def _aligned(arrays: Sequence[Any]) -> list[Any]:
    """The arrays, with scalars, and learning rates of one element, as wide as the others."""
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    return [array if array.shape == shape else jnp.broadcast_to(array, shape) for array in arrays]


@contextlib.contextmanager
def _opened(text: str) -> Iterator[dict[str, Any]]:
    """The functions of a module by name; they live as long as the `with` block."""
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        yield {ir.StringAttr(f.attributes["sym_name"]).value: f.operation for f in module.body.operations}


class _Evaluator:
    """Evaluates blocks of operations on JAX arrays.

    `functions` are those of the module, by name. Values of the shape `row` are made `wanted`.
    """

    def __init__(self, functions: dict[str, Any], row: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        self.functions, self.row, self.wanted = functions, row, wanted

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of a value: that of a row is the wanted one."""
        shape = _shape(value)
        return self.wanted if shape == self.row else shape

    def call(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        """The results of a function of the module."""
        return self.block(self.functions[name].regions[0], arguments, {})

    def block(self, region: Any, arguments: Sequence[Any], outer: dict[Any, Any]) -> list[Any]:
        """What the one block of a region returns; `outer` are the values that it may refer to."""
        block = region.blocks[0]
        values = outer | dict(zip(block.arguments, arguments, strict=True))
        for operation in block.operations:
            operation = operation.operation
            operands = [values[operand] for operand in operation.operands]
            if operation.name in ("func.return", "stablehlo.return"):
                return operands
            values.update(zip(operation.results, self.results(operation, operands, values), strict=True))
        raise ValueError("The StableHLO text has a block that returns nothing.")

    def results(self, operation: Any, operands: list[Any], values: dict[Any, Any]) -> Sequence[Any]:
        """The results of one operation."""
        name, attributes, regions = operation.name, operation.attributes, operation.regions
        if name in _ELEMENTWISE:
            return [_ELEMENTWISE[name](*_aligned(operands))]
        match name:
            case "stablehlo.constant":
                attribute, result = attributes["value"], operation.results[0]
                if attribute.is_splat:
                    return [jnp.full(self.shape(result), attribute.get_splat_value().value, _dtype(result))]
                return [jnp.asarray(np.array(attribute), _dtype(result)).reshape(_shape(result))]
            case "stablehlo.compare":
                compare: Any = _COMPARISONS[str(attributes["comparison_direction"]).rstrip(">").split()[-1]]
                return [compare(*_aligned(operands))]
            case "stablehlo.convert":
                return [operands[0].astype(_dtype(operation.results[0]))]
            case "stablehlo.broadcast_in_dim" | "stablehlo.reshape":
                shape = self.shape(operation.results[0])
                if operands[0].shape != self.shape(operation.operands[0]):
                    return operands  # A learning rate that is as wide as the row already.
                if name == "stablehlo.reshape":
                    return [operands[0].reshape(shape)]
                return [lax.broadcast_in_dim(operands[0], shape, _integers(attributes, "broadcast_dimensions"))]
            case "func.call":
                return self.call(ir.FlatSymbolRefAttr(attributes["callee"]).value, operands)
            case "stablehlo.reduce":
                half = len(operands) // 2

                def combine(left: Any, right: Any) -> Any:
                    return tuple(self.block(regions[0], (*left, *right), values))

                dimensions = _integers(attributes, "dimensions")
                reduce: Any = lax.reduce
                if half > 1:
                    return reduce(tuple(operands[:half]), tuple(operands[half:]), combine, dimensions)
                return [reduce(*operands, lambda x, y: combine((x,), (y,))[0], dimensions)]
            case "stablehlo.iota":
                result = operation.results[0]
                dimension = int(attributes["iota_dimension"])
                return [lax.broadcasted_iota(_dtype(result), _shape(result), dimension)]
            case "stablehlo.bitcast_convert":
                return [lax.bitcast_convert_type(operands[0], _dtype(operation.results[0]))]
            case "stablehlo.optimization_barrier":
                return operands
            case "stablehlo.pad":
                keys = ("edge_padding_low", "edge_padding_high", "interior_padding")
                operand, padding = operands
                widths: Any = tuple(zip(*(_integers(attributes, key) for key in keys), strict=True))
                return [lax.pad(operand, padding, widths)]
            case "stablehlo.dynamic_slice":
                dynamic_slice: Any = lax.dynamic_slice
                return [dynamic_slice(operands[0], operands[1:], _integers(attributes, "slice_sizes"))]
            case "stablehlo.dynamic_update_slice":
                return [lax.dynamic_update_slice(operands[0], operands[1], operands[2:])]
            case "stablehlo.reverse":
                return [lax.rev(operands[0], _integers(attributes, "dimensions"))]
            case "stablehlo.dot_general":
                numbers: Any = stablehlo.DotDimensionNumbers(attributes["dot_dimension_numbers"])
                contracting = (numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions)
                batch = (numbers.lhs_batching_dimensions, numbers.rhs_batching_dimensions)
                dtype = _dtype(operation.results[0])
                left, right = operands
                return [lax.dot_general(left, right, (contracting, batch), preferred_element_type=dtype)]
            case "stablehlo.transpose":
                return [lax.transpose(operands[0], _integers(attributes, "permutation"))]
            case "stablehlo.slice":
                bounds = (_integers(attributes, key) for key in ("start_indices", "limit_indices", "strides"))
                return [lax.slice(operands[0], *bounds)]
            case "stablehlo.concatenate":
                return [lax.concatenate(operands, int(attributes["dimension"]))]
            case "stablehlo.if":
                branches = [lambda region=region: self.block(region, (), values) for region in regions]
                return lax.cond(operands[0], *branches)
            case "stablehlo.case":
                branches = [lambda region=region: self.block(region, (), values) for region in regions]
                return lax.switch(operands[0], branches)
            case "stablehlo.while":
                return lax.while_loop(
                    lambda carry: self.block(regions[0], carry, values)[0],
                    lambda carry: self.block(regions[1], carry, values),
                    operands,
                )
        raise ValueError(f"CustomOptimizerSpec: the StableHLO text has the operation {name}, which is not read.")


# What is not read: `main` of a text on one row, and on many one after another.
_main_p = Primitive("embax_stablehlo_main")
_main_p.multiple_results = True


@_main_p.def_abstract_eval
def _main_shapes(*arguments: Any, text: str, results: tuple[tuple[int, ...], ...]) -> Any:
    del text
    one: Any = arguments[0]
    return [one.update(shape=shape) for shape in results]


@_main_p.def_impl
def _run_main(*arguments: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(_main_p.bind, **params))(*arguments)


def _lower_main(context: Any, *arguments: Any, text: str, results: tuple[tuple[int, ...], ...]) -> Any:
    module = context.module_context.module
    name = mlir.merge_mlir_modules(module, "embax_row_rule", ir.Module.parse(text))
    types: list[ir.Type] = [ir.RankedTensorType.get(list(shape), ir.F32Type.get()) for shape in results]
    return func.CallOp(types, ir.FlatSymbolRefAttr.get(name), list(arguments)).results


def _main_of_rows(arguments: Any, axes: Any, **params: Any) -> Any:
    size = next(a.shape[axis] for a, axis in zip(arguments, axes, strict=True) if axis is not None)
    rows = [
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(arguments, axes, strict=True)
    ]
    results = lax.map(lambda row: tuple(_main_p.bind(*row, **params)), tuple(rows))
    return results, (0,) * len(results)


mlir.register_lowering(_main_p, _lower_main)
batching.primitive_batchers[_main_p] = _main_of_rows


@dataclasses.dataclass(frozen=True)
class Program:
    """A row rule as StableHLO: a function of arrays [1, dim], to be traced."""

    text: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the arguments of `main`."""
    results: tuple[tuple[int, ...], ...]
    """Of what it returns."""
    unread: str | None
    """The name of an operation that is not read, if there is one."""

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, stablehlo: str | bytes) -> "Program":
        """The program of a text, or of its bytes.

        Raises:
            ValueError: it is not StableHLO, or has no `main` whose first argument is of shape [1, dim].
        """
        try:
            text = stablehlo.decode() if isinstance(stablehlo, bytes) else stablehlo
            with _opened(text) as functions:
                block = functions["main"].regions[0].blocks[0]
                shapes = tuple(_shape(argument) for argument in block.arguments)
                *_, last = block.operations
                results = tuple(_shape(result) for result in last.operation.operands)
                unread = min((name for function in functions.values() for name in _unread(function)), default=None)
                for value in (*block.arguments, *last.operation.operands):
                    if str(ir.RankedTensorType(value.type).element_type) != "f32" or min(_shape(value), default=1) < 1:
                        raise ValueError(
                            f"main takes or returns a {value.type}, and must do float32 of fixed shapes alone"
                        )
        except (ir.MLIRError, UnicodeDecodeError, TypeError, KeyError, IndexError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"CustomOptimizerSpec: stablehlo cannot be read ({reason}); it must be StableHLO text with a function main, as "
                'CustomOptimizerSpec.lower_to_stablehlo or jax.jit(rule).lower(...).as_text(dialect="stablehlo") return it.'
            ) from error
        if not shapes or len(shapes[0]) != 2 or shapes[0][0] != 1:
            raise ValueError(
                f"CustomOptimizerSpec: the arguments of the StableHLO text have the shapes {list(shapes)}; the first, the "
                "gradient, must be of one row, [1, dim]."
            )
        return cls(text, shapes, results, unread)

    @property
    def dim(self) -> int:
        """The columns of the rows that it is for."""
        return self.shapes[0][1]

    def __call__(self, *arguments: jax.Array, any_width: bool = False) -> Sequence[jax.Array]:
        """What `main` returns.

        Args:
            *arguments: arrays [1, dim], or scalars; either stands for arguments of one element too.
            any_width: whether rows may have another number of columns, since `main` is elementwise.

        Raises:
            ValueError: the number of arguments or their shapes are others than those of `main`.
        """
        if len(arguments) != len(self.shapes):
            raise ValueError(
                f"CustomOptimizerSpec: the StableHLO text takes {len(self.shapes)} arguments; the optimizer has "
                f"{len(arguments)}: gradient, table, slots and the learning rate. jax.jit drops what a function does not use: "
                "give it keep_unused=True, or use CustomOptimizerSpec.lower_to_stablehlo."
            )
        row, given = (1, arguments[0].shape[-1] if any_width else self.dim), []
        for argument, shape in zip(arguments, self.shapes, strict=True):
            shape = row if shape == (1, self.dim) else shape
            if argument.ndim == 0:
                argument = jnp.broadcast_to(argument, shape)
            elif argument.shape not in (shape, row) or (argument.shape == row and shape not in (row, (), (1,), (1, 1))):
                raise ValueError(
                    f"CustomOptimizerSpec: the StableHLO text is for arguments of the shapes {list(self.shapes)}; a row of the "
                    f"stack, or a slot of it, has {list(argument.shape)}. Make the text for that many columns."
                )
            given.append(argument)
        if self.unread is not None:
            warn_slow_path(
                f"The StableHLO text of a row rule has the operation {self.unread}, which embax does not read: it runs over "
                "one row after another. A function of JAX operations, custom_computation_fn, runs over all at once."
            )
            # A learning rate that is as wide as the row is one number all the same.
            narrow = (
                a if a.shape == shape else jnp.broadcast_to(a.reshape(-1)[0], shape)
                for a, shape in zip(given, self.shapes, strict=True)
            )
            return _main_p.bind(*narrow, text=self.text, results=self.results)
        with _opened(self.text) as functions:
            return _Evaluator(functions, (1, self.dim), row).call("main", given)


def _unread(operation: Any) -> Iterator[str]:
    """What in an operation and in all of its regions `_Evaluator` does not read."""
    if operation.name not in _OTHERS and operation.name not in _ELEMENTWISE:
        yield operation.name
    for value in operation.results if operation.name != "func.func" else ():
        try:
            dtype = _dtype(value)
        except (KeyError, TypeError, ValueError):
            yield f"{operation.name} of {value.type}"
            continue
        if (
            operation.name == "stablehlo.constant"
            and dtype == jnp.bfloat16
            and not operation.attributes["value"].is_splat
        ):
            yield f"{operation.name} of {value.type}"
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _unread(inner.operation)
