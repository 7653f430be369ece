"""Row rules as StableHLO text: read into JAX operations, so that every backend runs them, over all rows at once."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.mlir import ir
from jax.interpreters import mlir

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
    "chlo.erf": lax.erf,
    "chlo.square": lax.square,
}
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


def _constant(operation: Any) -> Any:
    attribute, result = operation.attributes["value"], operation.results[0]
    if attribute.is_splat:
        element = attribute.get_splat_value().value
        return jnp.full(_shape(result), element, _dtype(result))
    return jnp.asarray(np.array(attribute), _dtype(result)).reshape(_shape(result))


@contextlib.contextmanager
def _opened(text: str) -> Iterator[dict[str, Any]]:
    """The functions of a module by name; they live as long as the `with` block."""
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        yield {ir.StringAttr(f.attributes["sym_name"]).value: f.operation for f in module.body.operations}


class _Evaluator:
    """Evaluates blocks of operations on JAX arrays; `functions` are those of the module, by name."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self.functions = functions

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
                return [_constant(operation)]
            case "stablehlo.compare":
                direction = str(attributes["comparison_direction"]).rstrip(">").split()[-1]
                return [_COMPARISONS[direction](*_aligned(operands))]
            case "stablehlo.convert":
                return [operands[0].astype(_dtype(operation.results[0]))]
            case "stablehlo.broadcast_in_dim" | "stablehlo.reshape":
                shape = _shape(operation.results[0])
                if operands[0].shape != _shape(operation.operands[0]):
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
        raise ValueError(
            f"CustomOptimizerSpec: the StableHLO text has the operation {name}, which embax does not read. Write the row rule as "
            "a function of JAX operations, custom_computation_fn."
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A row rule as StableHLO: a function of arrays [1, dim], to be traced."""

    text: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the arguments of `main`."""

    @classmethod
    def parse(cls, stablehlo: str | bytes) -> "Program":
        """The program of a text, or of its bytes.

        Raises:
            ValueError: it is not StableHLO, or has no `main` whose first argument is of shape [1, dim].
        """
        try:
            text = stablehlo.decode() if isinstance(stablehlo, bytes) else stablehlo
            with _opened(text) as functions:
                shapes = tuple(_shape(argument) for argument in functions["main"].regions[0].blocks[0].arguments)
        except (ir.MLIRError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
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
        return cls(text, shapes)

    @property
    def dim(self) -> int:
        """The columns of the rows that it is for."""
        return self.shapes[0][1]

    def __call__(self, *arguments: jax.Array) -> list[jax.Array]:
        """What `main` returns.

        Args:
            *arguments: arrays [1, dim], or scalars; either stands for arguments of one element too.

        Raises:
            ValueError: the number of arguments or their shapes are others than those of `main`, or an operation is unknown.
        """
        if len(arguments) != len(self.shapes):
            raise ValueError(
                f"CustomOptimizerSpec: the StableHLO text takes {len(self.shapes)} arguments; the optimizer has "
                f"{len(arguments)}: gradient, table, slots and the learning rate."
            )
        row, given = (1, self.dim), []
        for argument, shape in zip(arguments, self.shapes, strict=True):
            if argument.ndim == 0:
                argument = jnp.broadcast_to(argument, shape)
            elif argument.shape not in (shape, row) or (argument.shape == row and shape not in (row, (), (1,), (1, 1))):
                raise ValueError(
                    f"CustomOptimizerSpec: the StableHLO text is for arguments of the shapes {list(self.shapes)}; a row of the "
                    f"stack, or a slot of it, has {list(argument.shape)}. Make the text for that many columns."
                )
            given.append(argument)
        with _opened(self.text) as functions:
            return _Evaluator(functions).call("main", given)
