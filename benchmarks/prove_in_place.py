"""Proves that training steps update tables and slots in place, without a clock.

Compiles steps at two vocabularies and compares what XLA reports of their memory: the temporary bytes must not depend on
the vocabulary, and the aliased bytes (inputs whose memory an output takes over) must be those of all tables and slots.
Exits with 1 if any step fails this.

Run it with: python -m benchmarks.prove_in_place
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import embax
import embax.nnx.embed

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


def table_bytes(vocabulary: int) -> int:
    """Bytes of all tables and slots of `feature_specs`."""
    return 5 * vocabulary * DIM * 4


def linear_loss(activations: dict[str, jax.Array], target: jax.Array) -> jax.Array:
    """Linear in the activations, so that the gradient does not depend on the lookup."""
    return sum((jnp.sum(a * target) for a in activations.values()), start=jnp.zeros(()))


def quadratic_loss(activations: dict[str, jax.Array], target: jax.Array) -> jax.Array:
    """Quadratic in the activations."""
    return sum((jnp.sum((a - target) ** 2) for a in activations.values()), start=jnp.zeros(()))


def packed_batch(specs: Any) -> embax.PreprocessedInput:
    """One packed batch."""
    ids = np.arange(BATCH, dtype=np.int32)[:, None]
    return embax.preprocess(dict.fromkeys(specs, ids), specs=specs, limits="grow")


def repeat(tree: Any) -> Any:
    """`STEPS` copies of every array along a new first axis."""
    return jax.tree.map(lambda array: jnp.stack([array] * STEPS), tree)


def compile_explicit(vocabulary: int, loss: Callable, *, scan: bool) -> Any:
    """A step of `embax.lookup` and `embax.apply_gradients`, or a `lax.scan` over several."""
    specs = feature_specs(vocabulary)
    target = jnp.ones((BATCH, DIM))

    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        value, gradients = jax.value_and_grad(loss)(activations, target)
        new = embax.apply_gradients(gradients, packed, variables, specs=specs, step=0, activations=activations)
        return new, value

    def steps(variables, packed):
        return jax.lax.scan(step, variables, packed)

    packed = packed_batch(specs)
    variables = jax.eval_shape(lambda key: embax.init_embedding_variables(key, specs), jax.random.key(0))
    if scan:
        return jax.jit(steps, donate_argnames="variables").lower(variables, repeat(packed)).compile()
    return jax.jit(step, donate_argnames="variables").lower(variables, packed).compile()


class Model(nnx.Module):
    """Embeddings and one dense layer."""

    def __init__(self, vocabulary: int):
        self.embed = embax.nnx.embed.SparseCoreEmbed(feature_specs(vocabulary), rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(1))


def make_model(vocabulary: int) -> tuple[Model, embax.nnx.embed.PartitionedOptimizer]:
    """A model and its optimizer."""
    model = Model(vocabulary)
    return model, embax.nnx.embed.PartitionedOptimizer(model, optax.adam(1e-3))


def compile_nnx(vocabulary: int, loss: Callable, *, scan: bool) -> Any:
    """A step of the NNX layer and `PartitionedOptimizer`, or an `nnx.scan` over several."""
    model, optimizer = nnx.eval_shape(lambda: make_model(vocabulary))
    target = jnp.ones((BATCH, DIM))

    def step(model, optimizer, packed):
        def loss_of(model):
            return loss(model.embed(packed, step=0), model.dense(target))

        value, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return value

    def steps(model, optimizer, packed):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def body(carry, packed):
            model, optimizer = carry
            return carry, step(model, optimizer, packed)

        return body((model, optimizer), packed)[1]

    packed = packed_batch(model.embed.feature_specs)
    if scan:
        compiled = (
            nnx.jit(steps, donate_argnames=("model", "optimizer")).lower(model, optimizer, repeat(packed)).compile()
        )
    else:
        compiled = nnx.jit(step, donate_argnames=("model", "optimizer")).lower(model, optimizer, packed).compile()
    return compiled.compiled


class Memory(NamedTuple):
    """What XLA reports of one compiled step, at each of `VOCABULARIES`."""

    backend: str
    form: str
    loss: str
    temporary: list[int]
    aliased: list[int]

    @property
    def in_place(self) -> bool:
        """Whether no temporary memory grows with the vocabulary and all tables and slots are aliased."""
        wanted = [table_bytes(vocabulary) for vocabulary in VOCABULARIES]
        whole = all(aliased >= bytes_ for aliased, bytes_ in zip(self.aliased, wanted, strict=True))
        return whole and len(set(self.temporary)) == 1


def measure(backends: tuple[str, ...] = ("native", "portable")) -> Iterator[Memory]:
    """The memory of every combination of backend, form of the step, and loss."""
    forms = {
        "explicit": functools.partial(compile_explicit, scan=False),
        "explicit in lax.scan": functools.partial(compile_explicit, scan=True),
        "nnx": functools.partial(compile_nnx, scan=False),
        "nnx in nnx.scan": functools.partial(compile_nnx, scan=True),
    }
    for backend in backends:
        for form, compile_step in forms.items():
            for loss in (linear_loss, quadratic_loss):
                with embax.use_backend(backend):
                    reports = [compile_step(vocabulary, loss).memory_analysis() for vocabulary in VOCABULARIES]
                yield Memory(
                    backend,
                    form,
                    loss.__name__.removesuffix("_loss"),
                    [report.temp_size_in_bytes for report in reports],
                    [report.alias_size_in_bytes for report in reports],
                )


def main() -> int:
    """Prints the table; 1 if a step is not in place."""
    small, large = VOCABULARIES
    print(f"jax {jax.__version__}; temporary bytes at {small} and {large} rows, aliased share of tables and slots")
    print(f"{'backend':9} {'form':21} {'loss':10} {'temporary':>10} {'temporary':>10} {'aliased':>8}")
    ok = True
    for memory in measure():
        share = memory.aliased[1] / table_bytes(large)
        verdict = "in place" if memory.in_place else "COPIES"
        print(
            f"{memory.backend:9} {memory.form:21} {memory.loss:10} {memory.temporary[0]:10} {memory.temporary[1]:10} "
            f"{share:8.1%} {verdict}"
        )
        ok &= memory.in_place
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
