import functools

import compat_specs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat_specs import feature, of_embax, placed, table
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from embax._ops import geometry
from embax.compat.sparsecore.lib.nn import embedding, embedding_spec, table_stacking
from embax.compat.sparsecore.utils import utils

FIELDS = ("lhs_row_pointers", "lhs_embedding_ids", "lhs_sample_ids", "lhs_gains")

several_devices = pytest.mark.skipif(
    not hasattr(geometry, "axis_of"), reason="embax exchanges nothing between devices yet"
)


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("x",))


def initialized(features, devices=1, spec=None, key=0):
    sharding = NamedSharding(mesh_of(devices), spec or P("x", None))
    tables = embedding.get_table_specs(features)
    return embedding.init_embedding_variables(jax.random.key(key), tables, sharding, 4, bypass_mesh_check=True)


def features_of(batch=16, optimizer=None, **fields):
    """Two tables that share a stack, and one of its own."""
    make = functools.partial(table, **({"optimizer": optimizer} | fields))
    a, b, c = make("a", 50, 6), make("b", 100, 5), make("c", 9, 20, "mean")
    return {
        "x": feature("x", a, batch),
        "y": feature("y", b, 2 * batch),
        "z": feature("z", c, batch),
        "w": feature("w", a, batch),
    }


def stacked(features, devices=1):
    embedding.auto_stack_tables(features, devices, 4)
    return placed(features, devices)


def ids_of(features, seed=0, valency=3):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, one.table_spec.vocabulary_size, (one.output_shape[0], valency))
        for name, one in features.items()
    }


def preprocess(features, ids, devices=1, **options):
    return embedding.preprocess_sparse_dense_matmul_input(
        ids, None, features, devices, devices, num_sc_per_device=4, **options
    )


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("minibatching", [False, True])
def test_packed_arrays_are_those_of_embax(minibatching, leading):
    features, devices = stacked(features_of(max_ids_per_partition=64), 2), 2
    ids = ids_of(features)
    options = {"has_leading_dimension": leading, "enable_minibatching": minibatching}
    packed, stats = preprocess(features, ids, devices, **options)
    theirs = embax.preprocess(ids, specs=of_embax(features, devices), num_local_devices=devices, **options)
    shapes = embedding.eval_preprocess_sparse_dense_matmul_input_shape(
        features, devices, devices, num_sc_per_device=4, **options
    )
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)
    layout = theirs.layout
    pointers = layout.row_pointers_per_device // len(layout.stacks)
    for number, stack in enumerate(layout.stacks):
        for field, array in zip(
            FIELDS, [theirs.row_pointers, theirs.embedding_ids, theirs.sample_ids, theirs.gains], strict=True
        ):
            mine = getattr(packed, field)[stack.name]
            size = pointers if field == "lhs_row_pointers" else stack.capacity
            assert mine.shape == ((devices, size) if leading else (devices * size,))
            assert getattr(shapes, field)[stack.name] == jax.ShapeDtypeStruct((devices * size,), mine.dtype)
            if field == "lhs_row_pointers" and not minibatching:
                part = array.reshape(devices, -1)[:, number * pointers : (number + 1) * pointers]
                np.testing.assert_array_equal(mine.reshape(devices, -1), part)
    np.testing.assert_array_equal(packed.num_minibatches, np.ones((devices, 1) if leading else devices))
    for field in ("max_ids_per_partition", "max_unique_ids_per_partition", "required_buffer_size_per_sc"):
        jax.tree.map(np.testing.assert_array_equal, getattr(stats, field), getattr(theirs.stats, field))
    assert stats.id_drop_counters == {"a_b": 0, "c": 0}


def test_arrays_of_one_device_are_views():
    features = stacked(features_of())
    packed, _ = preprocess(features, ids_of(features))
    assert not any(array.flags.owndata for field in FIELDS for array in getattr(packed, field).values())


def test_bad_arguments_of_packing():
    features = stacked({"f": feature("f", table())})
    ids = np.zeros((16, 2), np.int32)

    def pack(ids=ids, weights=None, local=1, devices=1, specs=features, **options):
        ids = ids if isinstance(ids, dict) else {"f": ids}
        options = {"num_sc_per_device": 4} | options
        embedding.preprocess_sparse_dense_matmul_input(ids, weights, specs, local, devices, **options)

    for message, arguments in {
        "local_device_count must be greater than 0": {"local": 0},
        "global_device_count must be greater than 0": {"devices": 0},
        "global_device_count must be greater than or equal to local_device_count": {"local": 2},
        "must be a power of 2": {"devices": 3},
        "Invalid num_sc_per_device": {"num_sc_per_device": 3},
        "Only MOD is supported": {"sharding_strategy": "DIV"},
        "all_reduce_interface must be given": {"devices": 2, "enable_minibatching": True},
        "structures of features and feature_specs do not match": {"ids": {"g": ids}},
        "structures of features_weights and feature_specs do not match": {"weights": {"f": ids, "g": ids}},
        "does not divide by 1 local devices of 4 SparseCores": {"ids": ids[:15]},
        "exceeds the maximum limit supported by the SparseCore CooFormat": {
            "ids": np.broadcast_to(ids[:1, :1], (2**26, 1))
        },
        "id 50 is outside the vocabulary": {"ids": ids + 50},
        "was not called": {"specs": {"f": feature("f", table())}},
    }.items():
        with pytest.raises(ValueError, match=message):
            pack(**arguments)
    with pytest.raises(ValueError, match="input_batches cannot be empty"):
        embedding.preprocess_sparse_dense_matmul_input([], None, [], 1, 1)
    embedding._assert_same_structure([1, {"a": 2}], (1, {"a": 3}))  # By paths.
    with pytest.raises(ValueError, match="structures of a and b do not match"):
        embedding._assert_same_structure([1, 2], [1, 2, 3])


def test_limits_raise_or_drop():
    features = placed([feature("f", table(max_ids_per_partition=2))])
    ids = [np.arange(48).reshape(16, 3)]
    with pytest.raises(embax.LimitExceededError, match="above max_ids_per_partition=2"):
        preprocess(features, ids)
    _, stats = preprocess(features, ids, allow_id_dropping=True)
    assert stats.id_drop_counters == {"table": 16}
    assert stats.get_required_buffer_size_per_device(table_name="table") == 32 * 4
    embedding.update_preprocessing_parameters(features, stats, 4)
    stack = features[0].table_spec.stacked_table_spec
    assert (stack.max_ids_per_partition, stack.suggested_coo_buffer_size_per_device) == (3, 128)
    preprocess(features, ids)
    stats.set_required_buffer_size_per_device("other", required_buffer_size_per_device=64, num_sc_per_device=4)
    stats.required_buffer_size_per_sc.pop("table")
    stats.max_ids_per_partition["table"] = np.array([[9, 8]])
    embedding.update_preprocessing_parameters(features, stats, 4)
    assert features[0].table_spec.stacked_table_spec == stack.replace(max_ids_per_partition=9)


def test_specs_made_by_hand():
    """What the low level is given need not have been placed, nor agree with itself: the transformation of ids decides."""
    stack = embedding_spec.StackedTableSpec("s", 64, 8, embedding_spec.SGDOptimizerSpec(), "sum", 32)
    one = table("t", 20, _stacked_table_spec=stack)
    features = [feature("f", one), feature("g", one)]
    features[1]._id_transformation = embedding_spec.FeatureIdTransformation(row_offset=16, col_offset=32, col_shift=1)
    packed, _ = preprocess(features, [np.full((16, 1), 5)] * 2)
    pointers = packed.lhs_row_pointers["s"][:8]
    # Of 4 samples each on SparseCore 0: id 5 lies there at row 1 of SparseCore 1, and at row 8 + 1 of SparseCore 2.
    np.testing.assert_array_equal(pointers, [0, 4, 12, 16, 16, 16, 16, 16])
    np.testing.assert_array_equal(packed.lhs_embedding_ids["s"][[0, 3, 8, 11]], [1, 1, 9, 9])
    features[1]._id_transformation = embedding_spec.FeatureIdTransformation(16, 33, 1)
    with pytest.raises(ValueError, match="col_offset is 33, no multiple of the 4 SparseCores"):
        preprocess(features, [np.full((16, 1), 5)] * 2)


def look_up(packed, variables, *, features, devices=1, **options):
    return embedding.tpu_sparse_dense_matmul(
        packed, variables, features, global_device_count=devices, num_sc_per_device=4, **options
    )


def update(gradients, packed, variables, *, features, devices=1, **options):
    return embedding.tpu_sparse_dense_matmul_grad(
        gradients, packed, variables, features, global_device_count=devices, num_sc_per_device=4, **options
    )


def gradients_of(features, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=one.output_shape).astype(np.float32) for name, one in features.items()}


def a_step(features, devices=1, minibatching=False):
    """Activations and new variables, of one step on several devices."""
    options = {"features": features, "devices": devices, "enable_minibatching": minibatching}

    def on_device(packed, variables, gradients, step):
        return look_up(packed, variables, **options), update(gradients, packed, variables, step=step, **options)

    if devices == 1:
        return jax.jit(on_device)
    return jax.jit(
        jax.shard_map(on_device, mesh=mesh_of(devices), in_specs=(P("x"), P("x"), P("x"), P()), out_specs=P("x"))
    )


def by_sparsecore(variables, num_sparsecores):
    def cut(array):
        return array.reshape(num_sparsecores, -1, array.shape[1])

    return {name: jax.tree.map(cut, state) for name, state in variables.items()}


OPTIMIZERS = [
    embedding_spec.SGDOptimizerSpec(0.1),
    embedding_spec.AdamOptimizerSpec(lambda step: 0.1 / (step + 1)),
    embedding_spec.FTRLOptimizerSpec(0.1, l1_regularization_strength=0.01),
    embedding_spec.CustomOptimizerSpec(
        0.1, lambda g, w, m, lr: (w - lr * (m + g), m + g), None, (jax.nn.initializers.zeros,)
    ),
]


@pytest.mark.filterwarnings("ignore:.*has no native row rule")
@pytest.mark.parametrize(
    ("optimizer", "minibatching"),
    [(OPTIMIZERS[0], True), *((optimizer, False) for optimizer in OPTIMIZERS)],
    ids=lambda parameter: getattr(parameter, "short_name", lambda: str(parameter))(),
)
def test_a_step_is_that_of_embax(optimizer, minibatching, standard_promotion):
    features = features_of(optimizer=optimizer)
    if isinstance(optimizer, embedding_spec.CustomOptimizerSpec):
        features = {"z": features["z"]}  # Its steps take longest to compile.
    features = stacked(features)
    specs, ids, gradients = of_embax(features), ids_of(features), gradients_of(features)
    variables = initialized(features)
    packed, _ = preprocess(features, ids, enable_minibatching=minibatching)
    activations, new = a_step(features, minibatching=minibatching)(packed, variables, gradients, 3)
    theirs = embax.preprocess(ids, specs=specs, enable_minibatching=minibatching)
    expected = embax.lookup(theirs, variables, specs=specs)
    updated = jax.jit(functools.partial(embax.apply_gradients, specs=specs, step=3))(gradients, theirs, variables)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), (activations, new), (expected, updated)
    )
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    before = jax.tree.leaves(variables)
    assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(new), before, strict=True))


@several_devices
@pytest.mark.filterwarnings("ignore:.*has no native row rule")
@pytest.mark.parametrize("minibatching", [False, True])
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_give_what_one_gives(devices, minibatching, standard_promotion):
    optimizer = embedding_spec.AdagradOptimizerSpec(0.1)
    results = []
    ids = gradients = tables = None
    for number in (1, devices):
        features = stacked(features_of(32, optimizer), number)
        specs = embedding.get_table_specs(features)
        if tables is None:
            ids, gradients, variables = ids_of(features), gradients_of(features), initialized(features)
            tables = table_stacking.unshard_and_unstack_tables(specs, by_sparsecore(variables, 4), 4)
        shards = table_stacking.stack_and_shard_tables(specs, tables, 4 * number, 0.0)
        variables = jax.tree.map(lambda a: np.asarray(a).reshape(-1, a.shape[2]), shards)
        packed, stats = preprocess(features, ids, number)
        if minibatching:
            tight = {"a_b": stats.max_ids_per_partition["a_b"] - 1}
            embedding.update_preprocessing_parameters(features, embedding.SparseDenseMatmulInputStats(tight), 4)
            packed, _ = preprocess(features, ids, number, enable_minibatching=True)
        assert (packed.num_minibatches[0] > 1) == minibatching
        activations, new = a_step(features, number, minibatching)(packed, variables, gradients, 3)
        shards = by_sparsecore(new, 4 * number)
        results.append((activations, table_stacking.unshard_and_unstack_tables(specs, shards, 4 * number)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


@several_devices
def test_tables_over_two_axes():
    features = stacked({"f": feature("f", table(vocabulary=200), 64)}, 4)
    ids, variables = ids_of(features), initialized(features, 4)
    packed, _ = preprocess(features, ids, 4)
    results = []
    for mesh, axes in ((mesh_of(4), "x"), (Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("p", "q")), ("p", "q"))):
        call = functools.partial(look_up, features=features, devices=4)
        results.append(jax.jit(jax.shard_map(call, mesh=mesh, in_specs=P(axes), out_specs=P(axes)))(packed, variables))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=several_devices)])
def test_pmap(devices):
    features = stacked(features_of(), devices)
    ids, variables = ids_of(features), initialized(features, devices, P("x", None, None))
    packed, _ = preprocess(features, ids, devices, has_leading_dimension=True)
    call = functools.partial(look_up, features=features, devices=devices)
    activations = jax.pmap(call, devices=jax.devices()[:devices])(packed, variables)
    flat, _ = preprocess(features, ids, devices)
    tables = jax.tree.map(lambda a: a.reshape(-1, a.shape[2]), variables)
    if devices == 1:
        expected = call(flat, tables)
    else:
        expected = jax.jit(jax.shard_map(call, mesh=mesh_of(devices), in_specs=P("x"), out_specs=P("x")))(flat, tables)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), activations, expected)


def test_stacks_and_features():
    features = stacked(features_of())
    ids, variables = ids_of(features), initialized(features)
    packed, _ = preprocess(features, ids)
    by_feature = look_up(packed, variables, features=features)
    by_stack = look_up(packed.sparse_dense_matmul_input, variables, features=features, perform_unstacking=False)
    assert {name: array.shape for name, array in by_stack.items()} == {"a_b": (64, 8), "c": (16, 24)}
    unstacked = embedding.unstack_embedding_activations(by_stack, features, 1, 4)
    jax.tree.map(np.testing.assert_array_equal, unstacked, by_feature)
    # Stacking is the transpose of unstacking.
    gradients = embedding.stack_embedding_gradients(unstacked, features, 4)
    for name, columns in {"a_b": 6, "c": 20}.items():
        np.testing.assert_array_equal(gradients[name][:, :5], by_stack[name][:, :5])
        assert not np.asarray(gradients[name][:, columns:]).any()
    plain = {name: (state.table, *state.slot) for name, state in variables.items()}
    results = [
        update(unstacked, packed, variables, features=features),
        update(gradients, packed, plain, features=features, perform_stacking=False, label="named"),
        update(jax.tree.map(lambda g: g[:, None], unstacked), packed, variables, features=features),
    ]
    assert jax.tree.structure(results[1]) == jax.tree.structure(plain)
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(results[0]), jax.tree.leaves(other))


@pytest.mark.parametrize("sparsecores", [2, 4])
def test_the_primitives_stack_as_the_functions_do(sparsecores):
    features = features_of()
    embedding.auto_stack_tables(features, 1, sparsecores)
    rng = np.random.default_rng(0)
    sizes = {name: (spec.total_sample_count, spec.stack_embedding_dim) for name, spec in specs_of(features).items()}
    by_stack = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    unstack = functools.partial(embedding.unstack_embedding_activations, by_stack, features, 1, sparsecores)
    plain, bound = unstack(), unstack(use_activation_unstack_primitive=True)
    widths = jax.tree.map(lambda array: array.shape[-1], plain)
    jax.tree.map(lambda a, b, width: np.testing.assert_array_equal(a, b[:, :width]), plain, bound, widths)
    stack = functools.partial(embedding.stack_embedding_gradients, plain, features, sparsecores, 1)
    jax.tree.map(np.testing.assert_array_equal, stack(), stack(use_gradient_stacking_primitive=True))


def specs_of(features):
    return embedding.get_stacked_table_specs(features)


def test_bad_lookups_and_updates():
    features = stacked(features_of())
    variables = initialized(features)
    packed, _ = preprocess(features, ids_of(features))
    gradients = gradients_of(features)
    with pytest.raises(ValueError, match=r"embedding variables are of the stacks \['c'\]"):
        look_up(packed, {"c": variables["c"]}, features=features)
    with pytest.raises(ValueError, match="structures of activation_gradients and feature_specs do not match"):
        update({"x": gradients["x"]}, packed, variables, features=features)
    with pytest.raises(KeyError):
        update(gradients, packed, variables, features=features, embedding_var_limits={"c": (0, 1)})
    wide = placed([feature("f", table("t", dim=8))])
    wide[0].output_shape = (16, 9)
    packed, _ = preprocess(wide, [np.zeros((16, 1), int)])
    with pytest.raises(ValueError, match=r"output_shape is \(16, 9\), wider than the 8 columns"):
        look_up(packed, initialized(wide), features=wide)
    without = placed([feature("f", table("t", optimizer=embedding_spec.CustomOptimizerSpec()))])
    packed, _ = preprocess(without, [np.zeros((16, 1), int)])
    activations = look_up(packed, initialized(without), features=without)
    with pytest.raises(ValueError, match="custom_computation_fn is None, and stablehlo is None"):
        update(activations, packed, initialized(without), features=without)
    with pytest.raises(ValueError, match="global_device_count must be given"):
        embedding.stack_embedding_gradients(activations, without, 4, use_gradient_stacking_primitive=True)


def test_limits_of_rows():
    features = placed([feature("f", table(vocabulary=32, initializer=jax.nn.initializers.zeros))])
    packed, _ = preprocess(features, [np.full((16, 1), 3)])
    new = update(
        [jnp.full((16, 8), -100.0)],
        packed,
        initialized(features),
        features=features,
        embedding_var_limits={"table": (None, 0.5)},
    )
    assert set(np.unique(new["table"].table).tolist()) == {0.0, 0.5}


def test_quantized_rows_have_8_bits():
    config = embedding_spec.QuantizationConfig(min_value=0.0, max_value=15.0, num_buckets=256)
    features = placed([feature("f", table(quantization_config=config, initializer=jax.nn.initializers.normal(10.0)))])
    ids, variables = ids_of(dict(enumerate(features))), initialized(features)
    packed, _ = preprocess(features, [ids[0]])
    compiled = jax.jit(functools.partial(look_up, features=features)).lower(packed, variables).compile()
    assert "u8[" in compiled.as_text()
    rows = np.asarray(variables["table"].table).reshape(4, -1, 8).transpose(1, 0, 2).reshape(-1, 8)
    np.testing.assert_allclose(compiled(packed, variables)[0], np.clip(rows, 0, 15)[ids[0]].sum(1), atol=0.1)


def test_initial_values():
    features = stacked(features_of(optimizer=embedding_spec.AdamOptimizerSpec()), 4)
    flat, by_device = (initialized(features, 4, spec) for spec in (P("x", None), P("x", None, None)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(4, -1, a.shape[1]), b), flat, by_device)
    assert flat["a_b"].table.sharding.spec == P("x", None)
    assert isinstance(flat["c"].slot, embedding_spec.AdamSlotVariables)
    # One key a SparseCore, those of the second stack after those of the first; all tables and slots of a stack share them.
    keys = jax.random.split(jax.random.key(0), 32)
    for stack, number, shapes in (("a_b", 0, [(8, 8), (8, 8)]), ("c", 16, [(8, 24)])):
        for sparsecore in (0, 7):
            values = [compat_specs.NORMAL(keys[number + sparsecore], shape) for shape in shapes]
            rows = sum(shape[0] for shape in shapes)
            found = flat[stack].table[sparsecore * rows : (sparsecore + 1) * rows]
            np.testing.assert_array_equal(found, np.concatenate(values))
    assert initialized({"f": feature("f", table("t", 64))}, 4)["t"].table.shape == (64, 8)
    with pytest.raises(ValueError, match="PartitionSpec of the global sharding either needs to be in the format"):
        initialized(features, 4, P(None, "x"))
    with pytest.raises(ValueError, match="global_sharding needs to be created with default device order from"):
        embedding.init_embedding_variables(
            jax.random.key(0), {"t": table("t", 64)}, NamedSharding(mesh_of(2), P("x", None)), 4
        )
    assert utils.embedding_table_format(mesh_of(4), P("x", None)) == NamedSharding(mesh_of(4), P("x", None))


def test_updates_are_in_place():
    bytes_of = {}
    for vocabulary in (10_000, 40_000):
        features = placed([feature("f", table(vocabulary=vocabulary, optimizer=embedding_spec.AdagradOptimizerSpec()))])
        packed, _ = preprocess(features, [np.zeros((16, 1), int)])

        def step(variables, packed, features=features):
            activations = look_up(packed, variables, features=features)
            return update(jax.tree.map(jnp.square, activations), packed, variables, features=features)

        shape = jax.ShapeDtypeStruct((features[0].table_spec.stacked_table_spec.stack_vocab_size, 8), jnp.float32)
        variables = {"table": embedding.EmbeddingVariables(shape, embedding_spec.AdagradSlotVariables(shape))}
        memory = jax.jit(step, donate_argnums=0).lower(variables, packed).compile().memory_analysis()
        bytes_of[vocabulary] = memory.temp_size_in_bytes
        assert memory.alias_size_in_bytes == 2 * 4 * shape.size
    assert bytes_of[10_000] == bytes_of[40_000]
