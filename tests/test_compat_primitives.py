import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax
from embax.compat.sparsecore.lib.nn import custom_optimizer_lowering

PACKAGE = "embax.compat.sparsecore.lib.core.primitives"
PADDING = 2**31 - 1
LIMITS = {"max_ids_per_partition": 16, "max_unique_ids_per_partition": 16}

OPTIMIZERS = {
    "sgd": embax.SGDOptimizerSpec(0.1),
    "adagrad": embax.AdagradOptimizerSpec(0.1),
    "adagrad_momentum": embax.AdagradMomentumOptimizerSpec(0.1, use_nesterov=True, exponent=3.0, beta2=0.9),
    "adam": embax.AdamOptimizerSpec(0.1),
    "ftrl": embax.FTRLOptimizerSpec(0.1, l1_regularization_strength=0.01, multiply_linear_by_learning_rate=True),
    "laprop": embax.LaPropOptimizerSpec(0.1),
    "f2a": embax.F2AOptimizerSpec(0.1, l1_regularization_strength=0.01),
}
PRIMITIVES = (
    *(f"sparse_dense_matmul_grad_with_{name}" for name in OPTIMIZERS),
    "sparse_dense_matmul_csr",
    "sparse_dense_matmul_optimizer_grad",
    "sparse_dense_matmul_activation_unstack",
    "sparse_dense_matmul_gradient_stack",
    "local_sparse_dense_matmul",
)


def primitive(module):
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), f"tpu_{module}_primitive")


def grad_with(name):
    return primitive(f"sparse_dense_matmul_grad_with_{name}")


csr = primitive("sparse_dense_matmul_csr")
optimizer_grad = primitive("sparse_dense_matmul_optimizer_grad")


def test_names():
    names = {module: primitive(module).name for module in PRIMITIVES}
    assert names["sparse_dense_matmul_csr"] == "sparse_dense_matmul_csr"
    assert all(name.removeprefix("tpu_").startswith(module) for module, name in names.items())
    assert len(set(names.values())) == len(names)


# What is checked while a primitive is traced.

ROW = jax.ShapeDtypeStruct((32, 8), jnp.float32)
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
PACKED = {
    "pointers": jax.ShapeDtypeStruct((32,), jnp.int32),
    "ids": jax.ShapeDtypeStruct((64,), jnp.int32),
    "samples": jax.ShapeDtypeStruct((64,), jnp.int32),
    "gains": jax.ShapeDtypeStruct((64,), jnp.float32),
    "minibatches": jax.ShapeDtypeStruct((), jnp.int32),
}
UPDATE_PARAMETERS = {**LIMITS, "computation_name": "update", "sharding_strategy": 1}
TEXT = custom_optimizer_lowering.lower_to_stablehlo(lambda g, w, a, lr: (w - lr * g, a + g), 8, 1)


def call_of(name):
    """The primitive, its operands as shapes by name, and its parameters."""
    if name == "csr":
        return csr, {**PACKED, "table": ROW}, {**LIMITS, "device_batch_size": 16, "sharding_strategy": 1}
    gradient = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    if name == "optimizer_grad":
        operands = {**PACKED, "gradient": gradient, "lr": SCALAR, "table": ROW, "slot": ROW}
        return optimizer_grad, operands, {**UPDATE_PARAMETERS, "num_hyperparameters": 1, "stablehlo": TEXT}
    spec = OPTIMIZERS[name]
    scalars = {f"scalar_{k}": SCALAR for k in range(len(spec.get_hyperparameters(0)))}
    parameters = dict(UPDATE_PARAMETERS)
    if name == "adagrad_momentum":
        scalars["scalar_5"] = jax.ShapeDtypeStruct((), jnp.bool_)
    if name == "ftrl":
        del scalars["scalar_5"]
        parameters["multiply_linear_by_learning_rate"] = True
    slots = {f"slot_{k}": ROW for k in range(spec.slot_variables_count())}
    return grad_with(name), {**PACKED, "table": ROW, **slots, "gradient": gradient, **scalars}, parameters


def cases():
    """(primitive, operand or parameter, what it is instead) of every check."""
    for name in (*OPTIMIZERS, "csr", "optimizer_grad"):
        _, operands, parameters = call_of(name)
        for operand, given in operands.items():
            other = jnp.float32 if given.dtype in (jnp.int32, jnp.bool_) else jnp.int32
            yield name, operand, jax.ShapeDtypeStruct(given.shape, other)
        yield name, "pointers", jax.ShapeDtypeStruct((4, 8), jnp.int32)
        yield name, "ids", jax.ShapeDtypeStruct((56,), jnp.int32)
        yield name, "samples", jax.ShapeDtypeStruct((8, 8), jnp.int32)
        yield name, "gains", jax.ShapeDtypeStruct((63,), jnp.float32)
        yield name, "minibatches", jax.ShapeDtypeStruct((1,), jnp.int32)
        yield name, "table", jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)
        if "gradient" in operands:
            yield name, "gradient", jax.ShapeDtypeStruct((16, 16), jnp.float32)
            yield name, "gradient", jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)
            yield name, "computation_name", ""
        for slot in (operand for operand in operands if operand.startswith("slot")):
            yield name, slot, jax.ShapeDtypeStruct((64, 8), jnp.float32)
        for limit in LIMITS:
            yield name, limit, 0
            yield name, limit, -1
        yield name, "sharding_strategy", 2
        if "min_value" not in parameters and name in OPTIMIZERS:
            yield name, "limits", {"min_value": 1.0, "max_value": -1.0}
    for config in ((0.0, 1.0, 1), (1.0, 1.0, 256), (2.0, 1.0, 256)):
        yield "csr", "limits", {"quantization_config": config}
    yield "optimizer_grad", "lr", jax.ShapeDtypeStruct((2,), jnp.float32)
    yield "optimizer_grad", "stablehlo", 3
    yield "optimizer_grad", "num_hyperparameters", 3


def shapes_of(name, changed=None, value=None):
    bound, operands, parameters = call_of(name)
    if changed == "limits":
        parameters |= value
    elif changed in operands:
        operands |= {changed: value}
    elif changed is not None:
        assert changed in parameters
        parameters |= {changed: value}
    return jax.eval_shape(functools.partial(bound.bind, **parameters), *operands.values())


@pytest.mark.parametrize(("name", "changed", "value"), list(cases()))
def test_bad_operands_and_parameters_are_refused(name, changed, value):
    with pytest.raises(ValueError, match=r"must|takes"):
        shapes_of(name, changed, value)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "csr", "optimizer_grad"])
def test_shapes_of_the_results(name):
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes_of(name))]
    if name == "csr":
        assert shapes == [((16, 8), jnp.float32)]
    else:
        slots = 1 if name == "optimizer_grad" else OPTIMIZERS[name].slot_variables_count()
        assert shapes == [((32, 8), jnp.float32)] * (1 + slots)
    assert isinstance(shapes_of(name), list | tuple) == (name not in ("csr", "sgd"))


def test_a_python_int_is_no_learning_rate():
    bound, operands, parameters = call_of("sgd")
    *arrays, _ = operands.values()
    assert jax.eval_shape(lambda *a: bound.bind(*a, 0.5, **parameters), *arrays).shape == (32, 8)
    with pytest.raises(ValueError, match="learning_rate is int32"):
        jax.eval_shape(lambda *a: bound.bind(*a, 1, **parameters), *arrays)


# What they compute.


def packed_batch(optimizer=None, dim=8, minibatching=False, **fields):
    """Specs, variables, packed batch and gradient of one table of 4 SparseCores."""
    rng = np.random.default_rng(7)
    table = oracle.table_spec(vocabulary=60, dim=dim, optimizer=optimizer, combiner="mean", **fields)
    features = {"f": oracle.feature_spec("f", table, batch=16, valency=6)}
    specs = embax.prepare_feature_specs_for_training(features, 1, 4)
    ids = {"f": rng.integers(0, 60, (16, 6))}
    packed = embax.preprocess(
        ids, specs=specs, limits="grow", **({"enable_minibatching": True} if minibatching else {})
    )
    variables = embax.init_embedding_variables(jax.random.key(1), specs)
    gradient = {"f": rng.normal(size=(16, dim)).astype(np.float32)}
    return specs, variables, packed, gradient, ids


def operands_of(packed):
    minibatches = 1 if packed.num_minibatches is None else np.int32(packed.num_minibatches[0])
    return packed.row_pointers, packed.embedding_ids, packed.sample_ids, packed.gains, minibatches


def state_of(variables):
    (one,) = variables.values()
    return jax.tree.leaves(one)


def hyperparameters_of(name, spec):
    """The operands and the parameters that the primitive takes beside the arrays."""
    scalars = [float(scalar) for scalar in spec.get_hyperparameters(3)]
    if name == "adagrad_momentum":
        scalars[-1] = bool(scalars[-1])
    if name == "ftrl":
        return scalars[:-1], {"multiply_linear_by_learning_rate": bool(scalars[-1])}
    return scalars, {}


@pytest.mark.parametrize("minibatching", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_that_of_the_optimizer(name, minibatching):
    fields = {"max_ids_per_partition": 3, "max_unique_ids_per_partition": 3} if minibatching else {}
    specs, variables, packed, gradient, _ = packed_batch(OPTIMIZERS[name], minibatching=minibatching, **fields)
    if minibatching:
        assert packed.num_minibatches[0] > 1
    wanted = embax.apply_gradients(
        gradient,
        packed,
        variables,
        specs=specs,
        step=3,
        embedding_var_limits={next(iter(variables)): (-1.0, 1.2)},
    )
    scalars, parameters = hyperparameters_of(name, OPTIMIZERS[name])
    update = functools.partial(
        grad_with(name).bind,
        **LIMITS,
        **parameters,
        computation_name="update",
        enable_minibatching=minibatching,
        min_value=-1.0,
        max_value=1.2,
    )
    operands = (*operands_of(packed), *state_of(variables), gradient["f"])
    for bound in (update, jax.jit(update)):
        for got, want in zip(jax.tree.leaves(bound(*operands, *scalars)), state_of(wanted), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("minibatching", [False, True])
def test_lookup(backend, minibatching):
    fields = {"max_ids_per_partition": 3, "max_unique_ids_per_partition": 3} if minibatching else {}
    specs, variables, packed, _, ids = packed_batch(minibatching=minibatching, **fields)
    with embax.use_backend(backend):
        got = csr.bind(
            *operands_of(packed),
            state_of(variables)[0],
            device_batch_size=16,
            enable_minibatching=minibatching,
            **LIMITS,
        )
    table = oracle.tables_of(variables, specs)["table"][0]
    np.testing.assert_allclose(got, oracle.lookup(table, ids["f"], "mean"), rtol=1e-5, atol=1e-6)


def test_lookup_in_shard_map():
    specs, variables, packed, _, _ = packed_batch()
    look_up = functools.partial(csr.bind, device_batch_size=16, **LIMITS)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    *arrays, minibatches = operands_of(packed)
    spec = jax.sharding.PartitionSpec("x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def mapped(table, *arrays):
        return look_up(*arrays, minibatches, table)

    table = state_of(variables)[0]
    np.testing.assert_array_equal(mapped(table, *arrays), embax.lookup(packed, variables, specs=specs)["f"])


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "laprop", "f2a"])
def test_tables_of_one_value_a_row(name):
    """Give what the first column of a table gives."""
    _, variables, packed, gradient, _ = packed_batch(OPTIMIZERS[name])
    scalars, _ = hyperparameters_of(name, OPTIMIZERS[name])
    columns = [np.asarray(array)[:, :1] for array in state_of(variables)]

    @jax.jit
    def run(states, gradient):
        batch = operands_of(packed)
        activations = csr.bind(*batch, states[0], device_batch_size=16, **LIMITS)
        return activations, grad_with(name).bind(*batch, *states, gradient, *scalars, **LIMITS)

    wanted = run(columns, gradient["f"][:, :1])
    column = [array[:, 0] for array in columns]
    for flat in (gradient["f"][:, 0], gradient["f"][:, :1]):
        for got, want in zip(jax.tree.leaves(run(column, flat)), jax.tree.leaves(wanted), strict=True):
            assert got.ndim == 1
            np.testing.assert_allclose(got, want[:, 0], rtol=1e-6)


def test_quantized_rows_are_bytes():
    """Each row is clipped and rounded to 256 levels before it is added."""
    specs, variables, packed, _, ids = packed_batch()
    low, high = -0.5, 1.0
    look_up = jax.jit(
        lambda table: csr.bind(
            *operands_of(packed), table, device_batch_size=16, quantization_config=(low, high, 256), **LIMITS
        )
    )
    table = state_of(variables)[0]
    assert "u8" in look_up.lower(table).compile().as_text()
    step = (high - low) / 255
    levels = np.round((np.clip(oracle.tables_of(variables, specs)["table"][0], low, high) - low) / step)
    np.testing.assert_allclose(
        look_up(table), oracle.lookup(levels * step + low, ids["f"], "mean"), rtol=1e-4, atol=step / 100
    )


def hand_made(minibatches):
    """Buffers of 4 SparseCores in which each minibatch holds row 1 on SparseCore 2, once for each of two samples of each."""
    pointers, ids, samples, gains = [], [], [], []
    for _sparsecore in range(4):
        for _minibatch in range(minibatches):
            end = len(ids) + 2
            pointers += [len(ids), len(ids), end, *[len(ids) + 8] * 5]
            ids += [1, 1, *[PADDING] * 6]
            samples += [0, 1, *[PADDING] * 6]
            gains += [1.0, 1.0, *[np.nan] * 6]
    return np.int32(pointers), np.int32(ids), np.int32(samples), np.float32(gains)


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_minibatches_are_applied_one_after_another(backend, count):
    """Also where an id is in several, as happens in buffers made by hand; the first segments are those that are read."""
    table, gradient = np.ones((16, 8), np.float32), np.arange(8.0, dtype=np.float32)[:, None] * np.ones(8, np.float32)
    with embax.use_backend(backend):
        bound = functools.partial(grad_with("adagrad").bind, enable_minibatching=True, **LIMITS)
        new, accumulator = jax.jit(bound)(*hand_made(3), count, table, 0 * table, gradient, 0.5)
    row, squares, total = 1.0, 0.0, gradient[:, 0].sum(dtype=np.float64)
    for _ in range(count):
        squares += total**2
        row -= 0.5 * total / np.sqrt(squares)
    assert np.allclose(new[2 * 4 + 1], row)
    assert np.allclose(accumulator[2 * 4 + 1], squares)
    others = np.delete(np.arange(16), 2 * 4 + 1)
    np.testing.assert_array_equal(np.asarray(new)[others], 1.0)


@pytest.mark.parametrize("minibatching", [False, True])
def test_on_a_tpu_sparsecores_do_it(minibatching):
    """Also the minibatches, one after another."""
    pointers = jax.ShapeDtypeStruct((256,), jnp.int32) if minibatching else PACKED["pointers"]
    batch = [pointers, *list(PACKED.values())[1:]]
    parameters = {"enable_minibatching": minibatching, **LIMITS}

    def step(table, slot, rate, *batch):
        activations = csr.bind(*batch, table, device_batch_size=16, **parameters)
        update = functools.partial(grad_with("adagrad").bind, min_value=-2.0, **parameters)
        text = functools.partial(optimizer_grad.bind, num_hyperparameters=1, stablehlo=TEXT, **parameters)
        table, slot = update(*batch, table, slot, activations, rate)
        return text(*batch, activations, rate, table, slot)

    lowered = jax.jit(step).trace(ROW, ROW, SCALAR, *batch).lower(lowering_platforms=("tpu",)).as_text()
    lookup, update = "SparseDenseMatmulOp", "SparseDenseMatmulGradOpWithOptimizerUpdate"
    if minibatching:
        lookup, update = "SparseDenseMatmulWithMinibatchingOp", "SparseDenseMatmulGradOptimizerUpdateWithMinibatchingOp"
    assert lowered.count(f"custom_call @{lookup}(") == 1
    assert lowered.count(f"custom_call @{update}(") == 2
    assert "stablehlo.while" not in lowered


def test_an_update_is_in_place():
    """Aliased bytes are those of table and slot, temporary ones do not depend on the vocabulary."""
    for backend in ("native", "portable"):
        temporary = []
        for rows in (4096, 16384):
            batch = (
                np.zeros(256, np.int32),
                np.zeros(64, np.int32),
                np.zeros(64, np.int32),
                np.zeros(64, np.float32),
                np.int32(1),
            )
            state = [jax.ShapeDtypeStruct((rows, 8), jnp.float32)] * 2

            def step(table, slot, batch=batch):
                parameters = {"enable_minibatching": True, **LIMITS}
                activations = csr.bind(*batch, table, device_batch_size=16, **parameters)
                return grad_with("adagrad").bind(*batch, table, slot, activations**2, 0.5, **parameters)

            with embax.use_backend(backend):
                memory = jax.jit(step, donate_argnums=(0, 1)).lower(*state).compile().memory_analysis()
            assert memory.alias_size_in_bytes == 2 * rows * 8 * 4
            temporary.append(memory.temp_size_in_bytes)
        assert temporary[0] == temporary[1], backend


def adagrad(gradient, table, accumulator, learning_rate):
    accumulator = accumulator + gradient * gradient
    return table - learning_rate * gradient / jnp.sqrt(accumulator), accumulator


def test_text_is_run():
    _, variables, packed, gradient, _ = packed_batch(OPTIMIZERS["adagrad"])
    row = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    text = jax.jit(adagrad).lower(row, row, row, row).as_text(dialect="stablehlo")
    states = state_of(variables)
    wanted = grad_with("adagrad").bind(*operands_of(packed), *states, gradient["f"], 0.1, **LIMITS)
    with embax.use_backend("portable"):
        for rate, stablehlo in ((0.1, text), (np.float32([0.1]), text.encode())):
            got = optimizer_grad.bind(
                *operands_of(packed),
                gradient["f"],
                rate,
                *states,
                num_hyperparameters=1,
                stablehlo=stablehlo,
                **LIMITS,
            )
            for one, want in zip(got, wanted, strict=True):
                np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-6)


def test_text_with_several_hyperparameters():
    _, variables, packed, gradient, _ = packed_batch()
    text = custom_optimizer_lowering.lower_to_stablehlo(lambda g, w, a, b, c: w - a * g + b * c, 8, 0, 3)
    (table,) = state_of(variables)
    with embax.use_backend("portable"):
        (got,) = optimizer_grad.bind(
            *operands_of(packed), gradient["f"], 0.1, 2.0, 3.0, table, num_hyperparameters=3, stablehlo=text, **LIMITS
        )
    sgd = grad_with("sgd").bind(*operands_of(packed), table, gradient["f"], 0.1, **LIMITS)
    touched = np.asarray(sgd != table)
    np.testing.assert_allclose(got, np.where(touched, sgd + 6.0, table), rtol=1e-6)


def test_limits_in_text():
    text = custom_optimizer_lowering.lower_to_stablehlo(lambda g, w, lr: w - lr * g, 8)
    wrap = functools.partial(custom_optimizer_lowering.wrap_stablehlo_with_limits, embedding_dim=8)
    counts = {"num_slot_variables": 0, "num_hyperparameters": 1}
    assert wrap(text, **counts) == wrap(text.encode(), **counts) == text
    assert "module" in text
    assert "stablehlo" in text
    _, variables, packed, gradient, _ = packed_batch()
    (table,) = state_of(variables)
    with embax.use_backend("portable"):
        (got,) = optimizer_grad.bind(
            *operands_of(packed),
            gradient["f"],
            0.1,
            table,
            num_hyperparameters=1,
            stablehlo=wrap(text, min_value=-0.1, max_value=0.2, **counts),
            **LIMITS,
        )
    update = grad_with("sgd").bind
    wanted = update(*operands_of(packed), table, gradient["f"], 0.1, min_value=-0.1, max_value=0.2, **LIMITS)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    clipped = custom_optimizer_lowering.apply_clipping(jnp.float32([-1, 0, 1]), max_value=0.5)
    np.testing.assert_array_equal(clipped, np.float32([-1, 0, 0.5]))


def test_local_lookup():
    rng = np.random.default_rng(0)
    local = primitive("local_sparse_dense_matmul")
    ids, samples = rng.integers(0, 30, 40, np.int32), rng.integers(0, 10, 40, np.int32)
    samples[::7] = PADDING
    gains, table = rng.normal(size=40).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    wanted = np.zeros((10, 8))
    for i, sample, gain in zip(ids, samples, gains, strict=True):
        if sample != PADDING:
            wanted[sample] += np.float64(gain) * table[i]
    bound = functools.partial(local.bind, device_batch_size=10)
    with jax.enable_x64(True):
        np.testing.assert_allclose(bound(ids, samples, gains, table), wanted, rtol=1e-5, atol=1e-6)
        for bad in (
            (np.int64(ids), samples, gains, table),
            (ids, samples, np.float64(gains), table),
            (ids, samples[:5], gains, table),
            (ids, samples, gains, table[:, 0]),
            (ids, samples, gains),
        ):
            with pytest.raises(ValueError, match=r"must|takes"):
                bound(*bad)


def test_features_of_a_stack():
    """Interleave: each SparseCore has a slice of every feature."""
    rng = np.random.default_rng(0)
    unstack = primitive("sparse_dense_matmul_activation_unstack")
    stack = primitive("sparse_dense_matmul_gradient_stack")
    features = [rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), (4, 8), (16, 3))]
    by_sparsecore = [
        [np.pad(one[k * len(one) // 4 : (k + 1) * len(one) // 4], ((0, 0), (0, 8 - one.shape[1]))) for one in features]
        for k in range(4)
    ]
    wanted = np.concatenate([part for parts in by_sparsecore for part in parts])
    sizes = {"per_feature_batch_sizes": (8, 4, 16), "per_feature_dims": (4, 8, 3)}
    stacked = stack.bind(*features, stacked_batch_size=28, stacked_feature_dim=8)
    np.testing.assert_array_equal(stacked, wanted)
    for got, want in zip(unstack.bind(stacked, **sizes), features, strict=True):
        np.testing.assert_array_equal(got, want)
    shapes = jax.eval_shape(lambda x: unstack.bind(x, **sizes), stacked)
    assert [one.shape for one in shapes] == [(8, 4), (4, 8), (16, 3)]
    for bad in ((28, 2), (24, 8)):
        with pytest.raises(ValueError, match="do not fit"):
            stack.bind(*features, stacked_batch_size=bad[0], stacked_feature_dim=bad[1])
    with pytest.raises(ValueError, match="multiples of 4"):
        unstack.bind(stacked, per_feature_batch_sizes=(8, 6, 14), per_feature_dims=(4, 8, 3))


def test_implementations_can_be_replaced(monkeypatch):
    stack = primitive("sparse_dense_matmul_gradient_stack")
    monkeypatch.setattr(stack, "impl", stack.impl)
    stack.def_impl(lambda *gradients, stacked_batch_size, stacked_feature_dim: "replaced")
    assert stack.bind(np.ones((4, 4), np.float32), stacked_batch_size=4, stacked_feature_dim=4) == "replaced"


def test_shapes_that_no_topology_explains_are_refused():
    _, variables, packed, _, _ = packed_batch()
    *arrays, minibatches = operands_of(packed)
    (table,) = state_of(variables)
    look_up = functools.partial(csr.bind, device_batch_size=16, **LIMITS)
    with pytest.raises(ValueError, match="33 elements, which no number"):
        look_up(np.zeros(33, np.int32), *arrays[1:], minibatches, table)
    with pytest.raises(ValueError, match="16 elements; 4 SparseCores a device"):
        look_up(np.zeros(16, np.int32), *arrays[1:], minibatches, table, enable_minibatching=True)
    with pytest.raises(ValueError, match="batch of a device, 15, must be a multiple of 4"):
        csr.bind(*arrays, minibatches, table, device_batch_size=15, **LIMITS)
    with pytest.raises(ValueError, match="rows of the table on a device, 30"):
        look_up(*arrays, minibatches, table[:30])


def test_transformations_are_refused():
    _, variables, packed, _, _ = packed_batch()
    (table,) = state_of(variables)
    look_up = functools.partial(csr.bind, *operands_of(packed), device_batch_size=16, **LIMITS)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda table: look_up(table).sum())(table)
    with pytest.raises(ValueError, match="cannot be mapped by vmap"):
        jax.vmap(look_up)(table[None])
