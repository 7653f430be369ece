"""Proves that training steps update tables and slots in place, without a clock.

Compiles steps at two vocabularies and compares what XLA reports of their memory: the temporary bytes must not depend on
the vocabulary, and the aliased bytes (inputs whose memory an output takes over) must be those of all tables and slots.
Exits with 1 if any step fails this.

Run it with: python -m benchmarks.prove_in_place
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import embax
import embax.nnx.embed
from embax.nnx._ref_variables import RefVariable

FOR_MEMORY_ALONE = {"xla_backend_optimization_level": 0}
"""Options for programs that are not run: XLA assigns memory before it makes code, and CPU code is slow to optimize."""

BATCH, DIM, STEPS = 64, 16, 3
VOCABULARIES = (1 << 20, 1 << 22)


def feature_specs(vocabulary: int) -> dict[str, embax.FeatureSpec]:
    """Two features that share an Adagrad table and one with an Adam table: five arrays of `vocabulary` x `DIM`."""

    def table(name: str, optimizer: embax.OptimizerSpec) -> embax.TableSpec:
        return embax.TableSpec(
            name=name,
            vocabulary_size=vocabulary,
            embedding_dim=DIM,
            initializer=jax.nn.initializers.zeros,
            optimizer=optimizer,
            combiner="sum",
        )

    tables = [table("adagrad", embax.AdagradOptimizerSpec(0.1)), table("adam", embax.AdamOptimizerSpec(0.1))]
    features = {
        name: embax.FeatureSpec(name=name, table_spec=spec, input_shape=(BATCH, 1), output_shape=(BATCH, DIM))
        for name, spec in (("user", tables[0]), ("item", tables[0]), ("context", tables[1]))
    }
    return embax.prepare_feature_specs_for_training(features)


def linear_loss(activations: dict[str, jax.Array], target: jax.Array) -> jax.Array:
    """Linear in the activations, so that the gradient does not depend on the lookup."""
    return sum((jnp.sum(a * target) for a in activations.values()), start=jnp.zeros(()))


def quadratic_loss(activations: dict[str, jax.Array], target: jax.Array) -> jax.Array:
    """Quadratic in the activations."""
    return sum((jnp.sum((a - target) ** 2) for a in activations.values()), start=jnp.zeros(()))


def packed_batch(specs: Any, minibatching: bool = False) -> embax.PreprocessedInput:
    """One packed batch."""
    ids = np.arange(BATCH, dtype=np.int32)[:, None]
    return embax.preprocess(dict.fromkeys(specs, ids), specs=specs, limits="grow", enable_minibatching=minibatching)


def abstract(tree: Any, device: Any = None, steps: int | None = None) -> Any:
    """The shapes of a tree's arrays on a device, which may be one that is only described: `steps` of each if given."""
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    leading = () if steps is None else (steps,)
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(leading + array.shape, array.dtype, sharding=sharding), tree)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step is compiled for.

    Args:
        specs_of: the features, for a vocabulary.
        minibatching: whether the batch is packed for minibatches.
        device: None for the first device of this process; another may be one that is only described.
    """

    specs_of: Callable[[int], dict[str, embax.FeatureSpec]] = feature_specs
    minibatching: bool = False
    device: Any = None

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """What the step is compiled with."""
        return FOR_MEMORY_ALONE if self.device is None and jax.default_backend() == "cpu" else None

    def arrays(self, vocabulary: int) -> list[jax.ShapeDtypeStruct]:
        """All tables and slots."""
        specs = self.specs_of(vocabulary)
        variables = jax.eval_shape(lambda key: embax.init_embedding_variables(key, specs), jax.random.key(0))
        return jax.tree.leaves(variables)

    def table_bytes(self, vocabulary: int) -> int:
        """Bytes of all tables and slots."""
        return sum(array.size * array.dtype.itemsize for array in self.arrays(vocabulary))


def compile_explicit(vocabulary: int, loss: Callable, setting: Setting, *, scan: bool) -> Any:
    """A step of `embax.lookup` and `embax.apply_gradients`, or a `lax.scan` over several."""
    specs = setting.specs_of(vocabulary)
    target = np.ones((BATCH, DIM), np.float32)

    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        value, gradients = jax.value_and_grad(loss)(activations, target)
        new = embax.apply_gradients(
            gradients, packed, variables, specs=specs, step=jnp.int32(0), activations=activations
        )
        return new, value

    def steps(variables, packed):
        return jax.lax.scan(step, variables, packed)

    variables = jax.eval_shape(lambda key: embax.init_embedding_variables(key, specs), jax.random.key(0))
    packed = abstract(packed_batch(specs, setting.minibatching), setting.device, STEPS if scan else None)
    jitted = jax.jit(steps if scan else step, donate_argnames="variables")
    return jitted.lower(abstract(variables, setting.device), packed).compile(setting.compiler_options)


class Model(nnx.Module):
    """Embeddings and one dense layer."""

    def __init__(self, specs: Any):
        self.embed = embax.nnx.embed.SparseCoreEmbed(specs, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(1))


def make_model(specs: Any) -> tuple[Model, nnx.Optimizer]:
    """A model and its optimizer."""
    model = Model(specs)
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def abstract_model(specs: Any, device: Any) -> tuple[Model, nnx.Optimizer]:
    """A model and its optimizer without values, whose tables are abstract refs."""
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    nodes = abstract(nnx.eval_shape(lambda: make_model(specs)), device)
    for _, variable in nnx.to_flat_state(nnx.state(nodes[0])):
        if isinstance(variable, RefVariable):
            variable.make_abstract_ref(sharding)
    return nodes


def _once(loss: Callable) -> Callable:
    return lambda model, packed, target: loss(model.embed(packed), model.dense(target))


def _twice(loss: Callable) -> Callable:
    once = _once(loss)
    return lambda model, packed, target: once(model, packed, target) + once(model, packed, 2 * target)


def _checkpointed(loss: Callable) -> Callable:
    once = _once(loss)
    return lambda model, packed, target: jax.checkpoint(lambda packed: once(model, packed, target))(packed)


def _with_rows(loss: Callable) -> Callable:
    once, ids = _once(loss), np.arange(BATCH, dtype=np.int32)

    def with_rows(model, packed, target):
        return once(model, packed, target) + jnp.sum(model.embed.rows("adagrad", jnp.asarray(ids)) * target)

    return with_rows


def _scanned(loss: Callable) -> Callable:
    once = _once(loss)

    def scanned(model, packed, target):
        graph, state = nnx.split(model)

        def body(total, scale):
            return total + once(nnx.merge(graph, state, copy=True), packed, scale * target), None

        return jax.lax.scan(body, jnp.zeros(()), jnp.arange(1.0, STEPS + 1))[0]

    return scanned


def compile_nnx(
    vocabulary: int,
    loss: Callable,
    setting: Setting,
    *,
    scan: bool = False,
    form: Callable[[Callable], Callable] = _once,
) -> Any:
    """A step of the NNX layer and `nnx.Optimizer`, or an `nnx.scan` over several."""
    specs, loss_of = setting.specs_of(vocabulary), form(loss)
    model, optimizer = abstract_model(specs, setting.device)
    target = np.ones((BATCH, DIM), np.float32)

    def step(model, optimizer, packed):
        value, gradients = nnx.value_and_grad(loss_of)(model, packed, target)
        optimizer.update(model, gradients)
        return value

    def steps(model, optimizer, packed):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def body(carry, packed):
            model, optimizer = carry
            return carry, step(model, optimizer, packed)

        return body((model, optimizer), packed)[1]

    packed = packed_batch(model.embed.feature_specs, setting.minibatching)
    packed = abstract(packed, setting.device, STEPS if scan else None)
    return nnx.jit(steps if scan else step).lower(model, optimizer, packed).compile(setting.compiler_options).compiled


FORMS = {
    "explicit": functools.partial(compile_explicit, scan=False),
    "explicit in lax.scan": functools.partial(compile_explicit, scan=True),
    "nnx": compile_nnx,
    "nnx in nnx.scan": functools.partial(compile_nnx, scan=True),
    "nnx, two lookups": functools.partial(compile_nnx, form=_twice),
    "nnx, lookup and rows": functools.partial(compile_nnx, form=_with_rows),
    "nnx, jax.checkpoint": functools.partial(compile_nnx, form=_checkpointed),
    "nnx, lax.scan in loss": functools.partial(compile_nnx, form=_scanned),
}
PLAIN_FORMS = ("explicit", "explicit in lax.scan", "nnx", "nnx in nnx.scan")
"""Forms of a step that update each table once."""

LOSSES = (linear_loss, quadratic_loss)


class Memory(NamedTuple):
    """What XLA reports of one compiled step, at each of `VOCABULARIES`: bytes."""

    tables: list[int]
    temporary: list[int]
    aliased: list[int]

    def in_place(self, slack: int = 0) -> bool:
        """Whether all tables and slots are aliased, and temporary bytes differ by no more than `slack` between vocabularies."""
        whole = all(aliased >= bytes_ for aliased, bytes_ in zip(self.aliased, self.tables, strict=True))
        return whole and max(self.temporary) - min(self.temporary) <= slack


def memory_of(compiled: list[Any], setting: Setting) -> Memory:
    """The memory of a step that was compiled at each of `VOCABULARIES`."""
    reports = [step.memory_analysis() for step in compiled]
    return Memory(
        [setting.table_bytes(vocabulary) for vocabulary in VOCABULARIES],
        [report.temp_size_in_bytes for report in reports],
        [report.alias_size_in_bytes for report in reports],
    )


def measure(backend: str, forms: Collection[str] = tuple(FORMS)) -> Iterator[tuple[str, str, Memory]]:
    """Form, loss and memory of every combination of form of the step and loss."""
    setting = Setting()
    for form in forms:
        compile_step = FORMS[form]
        for loss in LOSSES:
            with embax.use_backend(backend):
                compiled = [compile_step(vocabulary, loss, setting) for vocabulary in VOCABULARIES]
            yield form, loss.__name__.removesuffix("_loss"), memory_of(compiled, setting)


def main() -> int:
    """Prints the table; 1 if a step is not in place."""
    small, large = VOCABULARIES
    print(f"jax {jax.__version__}; temporary bytes at {small} and {large} rows, aliased share of tables and slots")
    print(f"{'backend':9} {'form':21} {'loss':10} {'temporary':>10} {'temporary':>10} {'aliased':>8}")
    ok = True
    for backend in ("native", "portable"):
        for form, loss, memory in measure(backend):
            share = memory.aliased[1] / memory.tables[1]
            verdict = "in place" if memory.in_place() else "COPIES"
            print(
                f"{backend:9} {form:21} {loss:10} {memory.temporary[0]:10} {memory.temporary[1]:10} {share:8.1%} {verdict}"
            )
            ok &= memory.in_place()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
