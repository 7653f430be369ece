"""Steps that libtpu compiles, on any machine: every optimizer, in place, on one chip and on four."""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_optimizers import OPTIMIZERS

import embax
from embax._first_values import _in_format
from embax._ops.sparsecore import why_not
from embax._stacking.plan import make_plan
from embax._topology import num_sparsecores_per_device

BATCH, DIM = 64, 30
SPARSECORE = {name: spec for name, (spec, _) in OPTIMIZERS.items() if why_not(spec, DIM) is None}
OTHERS = {name: spec for name, (spec, _) in OPTIMIZERS.items() if name not in SPARSECORE}
ADAGRAD = embax.AdagradOptimizerSpec(0.1)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a step on one chip: bytes, and its custom calls."""

    temporary: int
    aliased: int
    state: int
    text: str


def spread(array: Any) -> PartitionSpec:
    return PartitionSpec("chips", *[None] * (array.ndim - 1))


def format_of(mesh, optimizer, spec):
    return embax.table_format(NamedSharding(mesh, spec), optimizer)


def compile_step(
    mesh, vocabulary, *optimizers, linear=False, backend=None, minibatching=False, quantized=False, combiner="sum"
):
    """A lookup and an update of one stack an optimizer, the first of them shared by two features."""
    quantization = embax.QuantizationConfig(-1.0, 1.0, 256) if quantized else None
    tables = [
        oracle.table_spec(f"table{k}", vocabulary, DIM, combiner, optimizer, quantization_config=quantization)
        for k, optimizer in enumerate(optimizers)
    ]
    features = {table.name: table for table in tables} | {"friend": tables[0]}
    specs = {name: oracle.feature_spec(name, table, BATCH, 2) for name, table in features.items()}
    chip = mesh.devices.flat[0]
    specs = embax.prepare_feature_specs_for_training(specs, mesh.size, num_sparsecores_per_device(chip))
    ids = dict.fromkeys(specs, np.arange(2 * BATCH, dtype=np.int32).reshape(BATCH, 2))
    packed = embax.preprocess(ids, specs=specs, limits="grow", enable_minibatching=minibatching)
    variables = {}
    for stack in make_plan(specs).stacks:
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in stack.state_shapes]
        slots = type(stack.optimizer.slot_variables_initializers())
        variables[stack.name] = embax.EmbeddingVariables(arrays[0], slots(*arrays[1:]))

    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = jax.tree.map(lambda a: jnp.ones_like(a) if linear else 2.0 * a, activations)
        new = embax.apply_gradients(
            gradients,
            packed,
            variables,
            specs=specs,
            step=jnp.int32(1),
            activations=activations,
            embedding_var_limits=dict.fromkeys(variables, (-1.0, None)),
        )
        return new, activations

    shards = jax.tree.map(spread, variables)
    batches = PartitionSpec("chips")
    if mesh.size > 1:
        step = jax.shard_map(step, mesh=mesh, in_specs=(shards, batches), out_specs=(shards, batches))

    def placed(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with embax.use_backend(backend) if backend else contextlib.nullcontext():
        formats = {
            stack.name: jax.tree.map(functools.partial(format_of, mesh, stack.optimizer), shards[stack.name])
            for stack in make_plan(specs).stacks
        }
        outputs = (formats, dict.fromkeys(specs, NamedSharding(mesh, batches)))
        arguments = (
            jax.tree.map(placed, variables, formats),
            jax.tree.map(lambda array: placed(array, NamedSharding(mesh, batches)), packed),
        )
        lowered = jax.jit(step, donate_argnums=0, out_shardings=outputs).trace(*arguments).lower()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    state = sum(4 * math.prod(array.shape) for array in jax.tree.leaves(variables)) // mesh.size
    return Report(memory.temp_size_in_bytes, memory.alias_size_in_bytes, state, compiled.as_text())


def check_in_place(small, large):
    for report in (small, large):
        assert report.aliased == report.state
    # The order of operations is not always the same, and with it the temporary bytes; of a table they would be four times.
    assert large.temporary < 1.25 * small.temporary
    assert large.temporary < small.state // 8


def on_sparsecores(report):
    return "SparseDenseMatmul" in report.text or "sparse_core" in report.text or "sparsecore" in report.text


def test_every_elementwise_optimizer_compiles_in_place(mesh):
    report = compile_step(mesh, 1 << 20, *SPARSECORE.values())
    assert report.aliased == report.state
    assert report.temporary < report.state // (8 * len(SPARSECORE))
    assert on_sparsecores(report)


@pytest.mark.parametrize("linear", [False, True], ids=["quadratic", "linear"])
def test_memory_does_not_depend_on_the_vocabulary(mesh, linear):
    check_in_place(*(compile_step(mesh, vocabulary, ADAGRAD, linear=linear) for vocabulary in (1 << 20, 1 << 22)))


def test_minibatches_and_quantization(mesh):
    optimizers = ADAGRAD, embax.AdamOptimizerSpec(0.1)
    report = compile_step(mesh, 1 << 20, *optimizers, minibatching=True, quantized=True, combiner="mean")
    assert report.aliased == report.state
    assert on_sparsecores(report)
    assert report.temporary < report.state // 8


@pytest.mark.filterwarnings("ignore:.*SparseCores cannot run:embax.SlowPathWarning")
def test_other_optimizers_compile_in_place(mesh):
    report = compile_step(mesh, 1 << 20, *OTHERS.values())
    assert report.aliased == report.state
    # Around the loop of exchanges the compiler converts the tables to a layout of their own.
    assert report.temporary < report.state // 8 or mesh.size > 1
    assert not on_sparsecores(report)


def test_portable(mesh):
    report = compile_step(mesh, 1 << 20, ADAGRAD, backend="portable")
    assert report.aliased == report.state
    assert report.temporary < report.state // 8 or mesh.size > 1
    assert not on_sparsecores(report)


def test_initializers_return_the_format_of_tables(chips):
    from embax import _first_values

    sharding = jax.sharding.SingleDeviceSharding(chips[0])
    format = embax.table_format(sharding, ADAGRAD)
    row = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=sharding)
    table = jax.ShapeDtypeStruct((1 << 20, 32), jnp.float32, sharding=format)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding)
    place = _first_values.RowPlacement(1 << 20, 0, 0)
    filled = _in_format(_first_values._fill, format, (("num_rows", 1 << 20),)).trace(row).lower().compile()
    drawn = {"initializer": _first_values._ByValue.of(jax.nn.initializers.normal(1.0)), "chunk_rows": 1024, "dim": 30}
    drawn = (*drawn.items(), ("num_sparsecores", 4), ("here", 4))
    drawn = _in_format(_first_values._draw_by_chunks, format, drawn).trace(table, key, place).lower().compile()
    for compiled in (filled, drawn):
        assert compiled.output_formats.layout == format.layout
    # XLA makes the array in the default format, in which a row of 32 columns takes 128, and converts it.
    assert filled.memory_analysis().temp_size_in_bytes <= 4 * 128 << 20
    assert drawn.memory_analysis().alias_size_in_bytes == 4 * 32 << 20
