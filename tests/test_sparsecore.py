"""The custom calls for TPUs, as JAX lowers them on any machine, and the row rules inside them, run on CPU."""

import dataclasses
import json
import math
import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import mlir
from jax.sharding import PartitionSpec
from test_optimizers import OPTIMIZERS

import embax
from embax._ops import sparsecore
from embax._ops.row_update import hyperparameters_of, new_rows
from embax._stacking.plan import make_plan

DIM, BATCH, VOCABULARY = 24, 16, 100
MINIBATCHED = ("SparseDenseMatmulWithMinibatchingOp", "SparseDenseMatmulGradOptimizerUpdateWithMinibatchingOp")
WHOLE = ("SparseDenseMatmulOp", "SparseDenseMatmulGradOpWithOptimizerUpdate")

SPECS = {name: spec for name, (spec, _) in OPTIMIZERS.items()}
ELEMENTWISE = [name for name, spec in SPECS.items() if not any(spec.row_wise_slots()) and spec.elementwise]
ELEMENTWISE = [name for name in ELEMENTWISE if SPECS[name].clip_gradient_norm is None]


class CustomCall(NamedTuple):
    target: str
    config: dict[str, Any]
    operands: list[str]
    computations: list[str]


def place(optimizer, num_devices=1, **fields):
    """Specs of one table of two features, a packed batch, and variables as shapes."""
    table = oracle.table_spec("table", VOCABULARY, DIM, optimizer=optimizer, **fields)
    specs = {name: oracle.feature_spec(name, table, BATCH, 2) for name in ("a", "b")}
    specs = embax.prepare_feature_specs_for_training(specs, num_devices, 4)
    (stack,) = make_plan(specs).stacks
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in stack.state_shapes]
    slots = type(optimizer.slot_variables_initializers())(*arrays[1:])
    return specs, {stack.name: embax.EmbeddingVariables(arrays[0], slots)}


def pack(specs, **options):
    ids = dict.fromkeys(specs, np.arange(2 * BATCH, dtype=np.int32).reshape(BATCH, 2))
    return embax.preprocess(ids, specs=specs, limits="grow", **options)


def a_step(specs, **options):
    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = jax.tree.map(lambda a: 2.0 * a, activations)
        return embax.apply_gradients(
            gradients, packed, variables, specs=specs, step=jnp.int32(3), activations=activations, **options
        )

    return step


def lowered_for_tpu(step, *arguments):
    """The StableHLO module of a step. The file's one knowledge of JAX's stages."""
    return jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",)).compiler_ir("stablehlo")


def operations(block_of):
    for region in block_of.regions:
        for block in region.blocks:
            for operation in block.operations:
                yield operation
                yield from operations(operation)


def custom_calls(module):
    calls = []
    for operation in operations(module.operation):
        if operation.operation.name == "stablehlo.custom_call" and "backend_config" in operation.attributes:
            config = json.loads(ir.StringAttr(operation.attributes["backend_config"]).value)
            assert config.pop("device_type") == "DEVICE_TYPE_SPARSECORE"
            has_called = "called_computations" in operation.attributes  # Its `get` is not in the oldest JAX.
            called = operation.attributes["called_computations"] if has_called else ()
            calls.append(
                CustomCall(
                    ir.StringAttr(operation.attributes["call_target_name"]).value,
                    config["sparse_dense_matmul_config"],
                    [str(operand.type).removeprefix("tensor<").removesuffix(">") for operand in operation.operands],
                    [name.value for name in called],
                )
            )
    return calls


def functions(module):
    """The text of each private function of a module, by name."""
    found = {}
    for operation in module.body.operations:
        name = ir.StringAttr(operation.attributes["sym_name"]).value
        if name != "main":
            found[name] = str(operation)
    return found


# Runs a function of a module, with all that it calls; it returns a tuple.
run_p = Primitive("run_function")
run_p.multiple_results = True
run_p.def_abstract_eval(lambda *rows, texts, name, num_results: [row.update() for row in rows[:num_results]])


def lower_run(context, *rows, texts, name, num_results):
    for operation in ir.Module.parse("\n".join(texts)).body.operations:
        operation.operation.clone(context.module_context.ip)
    row = rows[0].type
    call = func.CallOp([ir.TupleType.get_tuple([row] * num_results)], ir.FlatSymbolRefAttr.get(name), list(rows))
    return [stablehlo.GetTupleElementOp(call.result, number).result for number in range(num_results)]


mlir.register_lowering(run_p, lower_run)


def run(module, name, rows, num_results):
    texts = tuple(text for other, text in functions(module).items() if not other.startswith("embax") or other == name)
    return jax.jit(lambda *rows: run_p.bind(*rows, texts=texts, name=name, num_results=num_results))(*rows)


@pytest.mark.parametrize("minibatching", [False, True], ids=["whole", "minibatches"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_custom_calls_of_a_step(name, minibatching):
    optimizer = SPECS[name]
    specs, variables = place(optimizer)
    packed = pack(specs, enable_minibatching=minibatching)
    module = lowered_for_tpu(a_step(specs), variables, packed)
    lookup, update = custom_calls(module)
    ((rows, dim),) = {array.shape for array in jax.tree.leaves(variables)}
    num_states, num_hyperparameters = len(jax.tree.leaves(variables)), len(hyperparameters_of(optimizer, jnp.int32(3)))
    (stack,) = packed.layout.stacks
    limits = {
        "max_ids_per_partition": stack.max_ids_per_partition,
        "max_unique_ids_per_partition": stack.max_unique_ids_per_partition,
        "pad_value": 2**31 - 1,
        "sharding_strategy": 1,
    }
    pointers = 4 * 8 * (64 if minibatching else 1)
    entries = [f"{pointers}xi32", *[f"{stack.capacity}xi32"] * 2, f"{stack.capacity}xf32"]
    entries += ["i32"] if minibatching else []
    table, samples = f"{rows}x{dim}xf32", f"{2 * BATCH}x{dim}xf32"
    gradient_and_states = [samples, *[table] * num_states]
    if minibatching:
        gradient_and_states = [*gradient_and_states[1:], samples]
    targets = MINIBATCHED if minibatching else WHOLE
    assert lookup == CustomCall(targets[0], limits, [*entries, table, samples], [])
    assert update == CustomCall(
        targets[1],
        {**limits, "num_slot_variables": num_states - 1, "num_hyperparameters": num_hyperparameters},
        [*entries, *gradient_and_states, *["f32"] * num_hyperparameters],
        update.computations,
    )
    (computation,) = update.computations
    row = f"tensor<1x{dim}xf32>"
    signature = re.search(r"func.func private @\w+\((.*?)\) -> (.*?) {", functions(module)[computation])
    assert signature is not None
    assert re.findall(r"tensor<[^>]*>", signature[1]) == [row] * (1 + num_states + num_hyperparameters)
    assert signature[2] == f"tuple<{', '.join([row] * num_states)}>"
    assert str(module).count('_xla_compute_type = "sparse"') == num_states


@pytest.mark.parametrize("limits", [(None, None), (-0.25, 0.5)], ids=["unlimited", "limited"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_called_computation_is_the_row_rule(name, limits):
    optimizer = SPECS[name]
    specs, variables = place(optimizer)
    packed = pack(specs)
    (stack,) = variables
    module = lowered_for_tpu(a_step(specs, embedding_var_limits={stack: limits}), variables, packed)
    (computation,) = custom_calls(module)[-1].computations
    rng = np.random.default_rng(0)
    hyperparameters = [jnp.full((1, DIM), value) for value in hyperparameters_of(optimizer, jnp.int32(3))]
    num_slots = optimizer.slot_variables_count()
    gradient, table = (jnp.asarray(rng.normal(size=(1, DIM)), jnp.float32) for _ in range(2))
    slots = tuple(jnp.asarray(rng.uniform(0.1, 2, size=(1, DIM)), jnp.float32) for _ in range(num_slots))
    # Where a zero gradient meets an accumulator of zero.
    gradient, slots = gradient.at[0, 0].set(0.0), tuple(slot.at[0, 0].set(0.0) for slot in slots)
    got = run(module, computation, (gradient, table, *slots, *hyperparameters), 1 + num_slots)
    table, slots = new_rows(optimizer, limits, gradient, table, slots, tuple(hyperparameters))
    for wanted, given in zip((table, *slots), got, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-6, atol=1e-7)


def test_quantization():
    config = embax.QuantizationConfig(min_value=-1.0, max_value=2.0, num_buckets=16)
    specs, variables = place(SPECS["sgd"], quantization_config=config)
    lookup, update = custom_calls(lowered_for_tpu(a_step(specs), variables, pack(specs)))
    assert lookup.config["quantization_config"] == {"min_value": -1.0, "max_value": 2.0, "num_buckets": 16}
    assert "quantization_config" not in update.config


def test_two_stacks_have_a_computation_each_and_their_own_entries():
    tables = [
        oracle.table_spec(name, VOCABULARY, dim, optimizer=SPECS["adagrad"]) for name, dim in (("x", 8), ("y", 16))
    ]
    specs = {table.name: oracle.feature_spec(table.name, table, BATCH, 2) for table in tables}
    specs = embax.prepare_feature_specs_for_training(specs, 1, 4)
    variables = jax.eval_shape(lambda key: embax.init_embedding_variables(key, specs), jax.random.key(0))
    packed = pack(specs)
    module = lowered_for_tpu(a_step(specs), variables, packed)
    calls = custom_calls(module)
    assert [call.target for call in calls] == [WHOLE[0]] * 2 + [WHOLE[1]] * 2
    names = [name for call in calls for name in call.computations]
    assert len(set(names)) == 2
    for name, dim in zip(names, (8, 16), strict=True):
        assert f"tensor<1x{dim}xf32>" in functions(module)[name]
    second = packed.layout.stacks[1]
    begin, end = second.entries_start, second.entries_start + second.capacity
    assert begin > 0
    for what, times in ((f"[{begin}:{end}]", 3), ("[32:64]", 1)):  # Ids, samples and gains; row pointers.
        assert str(module).count(f"{what} : ") == 2 * times


def test_an_update_waits_for_the_lookup():
    specs, variables = place(SPECS["sgd"])

    def step(variables, packed, after):
        gradients = {name: jnp.ones((BATCH, DIM)) for name in specs}
        activations = gradients if after is None else dict.fromkeys(specs, after)
        chosen = None if after is None else activations
        return embax.apply_gradients(gradients, packed, variables, specs=specs, activations=chosen)

    shape = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32)
    assert "popcnt" in str(lowered_for_tpu(step, variables, pack(specs), shape))
    assert "popcnt" not in str(lowered_for_tpu(lambda v, p: step(v, p, None), variables, pack(specs)))


class NoSlots(NamedTuple):
    pass


@dataclasses.dataclass(frozen=True)
class Custom(embax.OptimizerSpec):
    """A rule of the test's own, by name."""

    kind: str = "elementwise"
    Slots: ClassVar = NoSlots

    def slot_variables_initializers(self):
        return NoSlots()

    def get_hyperparameters(self, step=None):
        return ()

    def update_rows(self, gradient, table, slots, hyperparameters):
        return table - RULES[self.kind](gradient, table), slots


RULES = {
    "elementwise": lambda g, w: jnp.where(g > 0, jnp.tanh(g), jax.nn.softplus(w)),
    "round": lambda g, w: jnp.round(g),
    "is_finite": lambda g, w: jnp.where(jnp.isfinite(g), g, 0.0),
    "reduce_sum": lambda g, w: g * jnp.sum(g, axis=1, keepdims=True),
    "dot_general": lambda g, w: g * jax.lax.dot_general(g, w, (((1,), (1,)), ((), ()))),
    "slice": lambda g, w: jnp.concatenate([g[:, :4], w[:, 4:]], axis=1),
    "while": lambda g, w: jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x + g, w),
    "an array": lambda g, w: g * jnp.asarray(np.arange(g.shape[1], dtype=np.float32)[None]),
    "other numbers": lambda g, w: g.astype(jnp.bfloat16).astype(jnp.float32),
}


def test_what_sparsecores_can_run():
    assert sparsecore.why_not(Custom(kind="elementwise"), 8) is None
    for kind in RULES:
        reason = sparsecore.why_not(Custom(kind=kind), 8)
        assert (reason is None) == (kind == "elementwise")
        assert reason is None or kind in reason, reason
    for name, spec in SPECS.items():
        assert (sparsecore.why_not(spec, DIM) is None) == (name in ELEMENTWISE), name
    assert "clip_gradient_norm" in str(sparsecore.why_not(embax.SGDOptimizerSpec(0.1, clip_gradient_norm=1.0), DIM))
    assert "one value a row" in str(sparsecore.why_not(embax.RowWiseAdagradOptimizerSpec(0.1), DIM))


def test_a_result_that_does_not_depend_on_the_row():
    @dataclasses.dataclass(frozen=True)
    class Reset(Custom):
        def update_rows(self, gradient, table, slots, hyperparameters):
            return jnp.zeros_like(table), slots

    assert "does not depend" in str(sparsecore.why_not(Reset(), 8))


def test_a_rule_without_hyperparameters_gets_one():
    optimizer = Custom(kind="elementwise")
    specs, variables = place(optimizer)
    module = lowered_for_tpu(a_step(specs), variables, pack(specs))
    update = custom_calls(module)[-1]
    assert update.config["num_hyperparameters"] == 1
    assert update.operands[-1] == "f32"
    rows = [jnp.full((1, DIM), value, jnp.float32) for value in (0.5, 2.0, math.nan)]
    (got,) = run(module, update.computations[0], rows, 1)
    np.testing.assert_allclose(got, np.full((1, DIM), 2 - np.tanh(0.5)), rtol=1e-6)


def test_other_optimizers_run_in_plain_jax_on_one_device():
    specs, variables = place(embax.RowWiseAdagradOptimizerSpec(0.1))
    with pytest.warns(embax.SlowPathWarning, match="SparseCores cannot run RowWiseAdagrad.*one value a row"):
        assert custom_calls(lowered_for_tpu(a_step(specs), variables, pack(specs))) == []


def test_the_portable_backend_on_a_tpu():
    specs, variables = place(SPECS["adagrad"])
    for backend in ("portable", "native"):
        with embax.use_backend(backend):
            assert custom_calls(lowered_for_tpu(a_step(specs), variables, pack(specs))) == []
    with embax.use_backend("sparsecore"):
        assert len(custom_calls(lowered_for_tpu(a_step(specs), variables, pack(specs)))) == 2


@pytest.mark.parametrize("check_vma", [True, False])
def test_several_devices_inside_shard_map(check_vma):
    specs, variables = place(SPECS["adam"], num_devices=4)
    packed = pack(specs)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = PartitionSpec("x")
    step = jax.shard_map(a_step(specs), mesh=mesh, in_specs=(spread, spread), out_specs=spread, check_vma=check_vma)
    lookup, update = custom_calls(lowered_for_tpu(step, variables, packed))
    (stack,) = packed.layout.stacks
    (rows, dim) = jax.tree.leaves(variables)[0].shape
    entries = [f"{4 * 16}xi32", *[f"{stack.capacity}xi32"] * 2, f"{stack.capacity}xf32"]
    samples = f"{2 * BATCH // 4}x{dim}xf32"
    assert lookup.operands == [*entries, f"{rows // 4}x{dim}xf32", samples]
    assert update.operands[:8] == [*entries, samples, *[f"{rows // 4}x{dim}xf32"] * 3]
    with pytest.raises(ValueError, match="placed for 4 devices: each .* inside jax.shard_map. Use a layer with mesh="):
        lowered_for_tpu(a_step(specs), variables, packed)
    with embax.use_backend("portable"):
        exchanging = lowered_for_tpu(step, variables, packed)
    assert not custom_calls(exchanging)
    assert "all_to_all" in str(exchanging)


@pytest.mark.filterwarnings("ignore:.*SparseCores cannot run:embax.SlowPathWarning")
def test_other_optimizers_exchange_rows_on_several_devices():
    specs, variables = place(embax.RowWiseAdagradOptimizerSpec(0.1), num_devices=4)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = PartitionSpec("x")
    step = jax.shard_map(a_step(specs), mesh=mesh, in_specs=(spread, spread), out_specs=spread)
    exchanging = lowered_for_tpu(step, variables, pack(specs))
    assert not custom_calls(exchanging)
    assert "all_to_all" in str(exchanging)


def test_the_format_of_tables_off_tpus_is_their_sharding():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert embax.table_format(sharding, SPECS["adagrad"]) is sharding


@pytest.mark.filterwarnings("ignore:.*SparseCores cannot run:embax.SlowPathWarning")
def test_rules_of_ones_own_run_where_they_can():
    """Columns that are no multiple of 8 are padded; a rule that such columns would change does not see them."""
    text = embax.CustomOptimizerSpec.lower_to_stablehlo(lambda g, w, rate: w - rate * g, 12)
    row = jax.ShapeDtypeStruct((1, 12), jnp.float32)
    warming = jax.jit(lambda g, w, rate: jax.lax.cond(rate > 0.5, lambda: w - g, lambda: w - rate * g))
    warming = warming.lower(row, row, jax.ShapeDtypeStruct((), jnp.float32)).as_text()
    for optimizer, targets in (
        (embax.CustomOptimizerSpec(0.1, stablehlo=text), WHOLE),
        (embax.CustomOptimizerSpec(0.1, lambda g, w, rate: w - rate * g), WHOLE),
        (embax.CustomOptimizerSpec(0.1, stablehlo=warming), ()),
        (embax.CustomOptimizerSpec(0.1, lambda g, w, rate: w - rate * g / g.shape[1]), ()),
    ):
        table = oracle.table_spec("table", VOCABULARY, 12, optimizer=optimizer)
        specs = {name: oracle.feature_spec(name, table, BATCH, 2) for name in ("a", "b")}
        specs = embax.prepare_feature_specs_for_training(specs, 1, 4)
        (stack,) = make_plan(specs).stacks
        variables = {stack.name: embax.EmbeddingVariables(jax.ShapeDtypeStruct(stack.shape, jnp.float32), ())}
        module = lowered_for_tpu(a_step(specs), variables, pack(specs))
        assert tuple(call.target for call in custom_calls(module)) == targets
