"""Slots of one value a row, and tables of rank 1, wherever tables and slots go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax
import embax.checkpoint
from embax._ops.geometry import make_geometry
from embax._ops.lookup import lookup_stacks
from embax._ops.update import update_stacks
from embax._stacking.plan import make_plan


def stacked_specs(optimizer, num_sparsecores=4, rotation=1):
    """Two tables of 6 columns in one stack of 8."""
    tables = [oracle.table_spec(name, rows, 6, optimizer=optimizer) for name, rows in (("a", 37), ("b", 9))]
    features = {table.name: oracle.feature_spec(table.name, table, 5, 2) for table in tables}
    return embax.stack_tables(features, ["a", "b"], 1, num_sparsecores, rotation=rotation, stack_name="all")


def with_slots(initializer):
    """A custom optimizer with one slot of one value a row, and one of one value an element."""
    return embax.CustomOptimizerSpec(
        0.1,
        lambda g, w, a, b, lr: (w, a, b),
        slot_variable_initializers_tuple=(initializer, jax.nn.initializers.zeros),
        slots_of_one_value=(True, False),
    )


@pytest.mark.parametrize(
    "initializer",
    [
        jax.nn.initializers.constant(0.5),
        jax.nn.initializers.normal(),
        jax.nn.initializers.lecun_normal(),
        lambda key, shape, dtype: jnp.ones(shape, dtype),
    ],
)
def test_first_values(initializer):
    specs = stacked_specs(with_slots(initializer))
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    shapes = [array.shape for array in jax.tree.leaves(variables["all"])]
    assert shapes == [(96, 8), (96,), (96, 8)]
    values = oracle.tables_of(variables, specs)
    assert [array.shape for array in values["b"]] == [(9, 6), (9,), (9, 6)]
    other = embax.init_embedding_variables(jax.random.key(0), stacked_specs(with_slots(initializer), 3, 2))
    other = oracle.tables_of(other, stacked_specs(with_slots(initializer), 3, 2))
    for name, arrays in values.items():
        for array, same in zip(arrays, other[name], strict=True):
            np.testing.assert_array_equal(array, same)
    if initializer is jax.nn.initializers.normal():
        assert len(np.unique(values["a"][1])) == 37


def random_tables(rng):
    slots = embax.RowWiseAdagradSlotVariables
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {name: embax.EmbeddingVariables(draw(rows, 6), slots(draw(rows))) for name, rows in (("a", 37), ("b", 9))}


@pytest.mark.parametrize("as_jax", [False, True])
@pytest.mark.parametrize("num_sparsecores", [1, 3, 4])
def test_whole_tables_go_to_stacks_and_back(as_jax, num_sparsecores):
    specs = stacked_specs(embax.RowWiseAdagradOptimizerSpec(), num_sparsecores)
    tables = random_tables(np.random.default_rng(0))
    given = jax.tree.map(jnp.asarray, tables) if as_jax else tables
    stacks = embax.stack_and_shard_tables(given, specs=specs)
    assert stacks["all"].slot.accumulator.shape == stacks["all"].table.shape[:1]
    back = embax.unshard_and_unstack_tables(stacks, specs=specs)
    jax.tree.map(np.testing.assert_array_equal, back, tables)
    for name, table in tables.items():  # A slot's value lies where its row does.
        rows = embax.physical_row_ids(name, np.arange(len(table.table)), specs=specs)
        np.testing.assert_array_equal(np.asarray(stacks["all"].slot.accumulator)[rows], table.slot.accumulator)
        np.testing.assert_array_equal(np.asarray(stacks["all"].table)[rows, :6], table.table)


def test_tables_of_a_stack_must_have_slots_of_one_rank():
    specs = stacked_specs(embax.RowWiseAdagradOptimizerSpec())
    tables = {"a": np.zeros(37, np.float32), "b": np.zeros((9, 6), np.float32)}
    with pytest.raises(
        ValueError, match="one value a row in some of its tables, .* 'a' 1, 'b' 2. Pass arrays of one rank"
    ):
        embax.stack_and_shard_tables(tables, specs=specs)


def test_a_checkpoint_holds_them_for_any_placement(tmp_path):
    optimizer = embax.RowWiseAdagradOptimizerSpec()
    tables = random_tables(np.random.default_rng(0))
    specs = stacked_specs(optimizer)
    variables = jax.tree.map(jnp.asarray, embax.stack_and_shard_tables(tables, specs=specs, pad_value=0.0))
    embax.checkpoint.save(tmp_path / "step", variables, specs=specs)
    other = stacked_specs(optimizer, 3, 2)
    loaded, _ = embax.checkpoint.load(tmp_path / "step", specs=other)
    jax.tree.map(np.testing.assert_array_equal, embax.unshard_and_unstack_tables(loaded, specs=other), tables)
    with pytest.raises(
        embax.checkpoint.CheckpointError,
        match="stored with the optimizer RowWiseAdagradOptimizerSpec .*slots: accumulator, one value a row",
    ):
        embax.checkpoint.load(tmp_path / "step", specs=stacked_specs(embax.AdagradOptimizerSpec()))


def test_a_slot_of_another_shape_is_refused():
    specs = stacked_specs(embax.RowWiseAdagradOptimizerSpec())
    packed = embax.preprocess({"a": np.zeros((5, 2), int), "b": np.zeros((5, 2), int)}, specs=specs)
    slots = embax.RowWiseAdagradSlotVariables(jnp.zeros((96, 8)))
    variables = {"all": embax.EmbeddingVariables(jnp.zeros((96, 8)), slots)}
    gradients = {"a": jnp.zeros((5, 6)), "b": jnp.zeros((5, 6))}
    message = (
        r"'all' has as slot 'accumulator' an array float32\[96, 8\]; RowWiseAdagradOptimizerSpec needs float32\[96\]"
    )
    with pytest.raises(ValueError, match=message):
        embax.apply_gradients(gradients, packed, variables, specs=specs)


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_memory_does_not_grow_with_rows(backend):
    def memory(rows):
        table = oracle.table_spec(vocabulary=rows, optimizer=embax.RowWiseAdamOptimizerSpec())
        specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, 16, 2)}, 1, 4)
        variables = jax.eval_shape(lambda: embax.init_embedding_variables(jax.random.key(0), specs))
        packed = embax.preprocess({"f": np.zeros((16, 2), int)}, specs=specs)

        @functools.partial(jax.jit, donate_argnames="variables")
        def step(variables, packed):
            activations = embax.lookup(packed, variables, specs=specs)
            gradients = jax.grad(lambda a: a["f"].sum())(activations)
            return embax.apply_gradients(gradients, packed, variables, specs=specs, step=0, activations=activations)

        with embax.use_backend(backend):
            analysis = step.lower(variables, packed).compile().memory_analysis()
        return analysis.temp_size_in_bytes, analysis.alias_size_in_bytes

    small, large = memory(2**16), memory(2**18)
    assert small[0] == large[0]
    assert large[1] == 4 * 2**18 * (8 + 8 + 1)


RANK_1 = {
    "sgd": embax.SGDOptimizerSpec(0.1),
    "adagrad": embax.AdagradOptimizerSpec(0.1),
    "adam": embax.AdamOptimizerSpec(0.1),
    "laprop": embax.LaPropOptimizerSpec(0.1),
    "f2a": embax.F2AOptimizerSpec(0.1),
    "ftrl": embax.FTRLOptimizerSpec(0.1),
    "row_wise_adagrad": embax.RowWiseAdagradOptimizerSpec(0.1),
}


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_tables_of_rank_1_are_columns(backend):
    tables = {name: oracle.table_spec(name, 20, 1, optimizer=optimizer) for name, optimizer in RANK_1.items()}
    features = {name: oracle.feature_spec(name, table, 8, 2) for name, table in tables.items()}
    specs = embax.prepare_feature_specs_for_training(features, 1, 2)
    plan = make_plan(specs)
    packed = embax.preprocess(dict.fromkeys(specs, np.random.default_rng(0).integers(0, 20, (8, 2))), specs=specs)
    geometry = make_geometry(plan, packed).without_features()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    states = [tuple(jax.tree.leaves(variables[stack.name])) for stack in plan.stacks]
    vectors = [tuple(array[:, 0] if array.ndim == 2 else array.copy() for array in state) for state in states]
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal(8), jnp.float32)
    matrix = jnp.zeros((8, 8)).at[:, 0].set(gradient)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(packed, states, gradient):
        found = [array for (array,) in lookup_stacks(packed, [state[0] for state in states], geometry)]
        return found, update_stacks(packed, [[gradient]] * len(states), states, found, geometry, jnp.int32(1))

    with embax.use_backend(backend):
        memory = step.lower(packed, vectors, gradient).compile().memory_analysis()
        wanted, wanted_states = step(packed, states, matrix)
        found, new = step(packed, vectors, gradient)
    assert memory.alias_size_in_bytes == sum(4 * array.size for state in vectors for array in state)
    for stack, got, want in zip(plan.stacks, found, wanted, strict=True):
        assert got.shape == (8,)
        np.testing.assert_allclose(got, want[:, 0], rtol=1e-6, err_msg=stack.name)
    for stack, got, want in zip(plan.stacks, new, wanted_states, strict=True):
        for one, other in zip(got, want, strict=True):
            assert one.ndim == 1
            other = other[:, 0] if other.ndim == 2 else other
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=stack.name)


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("optimizer", [embax.RowWiseAdagradOptimizerSpec, embax.RowWiseAdamOptimizerSpec])
def test_what_padding_holds_does_not_matter(backend, optimizer):
    """The stack has 8 columns, its tables 6; the others are NaN."""
    options = {"weight_decay": 0.2, "weight_decay_mode": "l2", "clip_gradient_norm": 1.5}
    specs = stacked_specs(optimizer(0.1, **options))
    rng = np.random.default_rng(0)
    table = {name: rng.standard_normal((rows, 6)).astype(np.float32) for name, rows in (("a", 37), ("b", 9))}
    slots = embax.init_embedding_variables(jax.random.key(0), specs)["all"].slot
    variables = {"all": embax.EmbeddingVariables(embax.stack_and_shard_tables(table, specs=specs)["all"], slots)}
    assert np.isnan(variables["all"].table[:, 6:]).all()
    ids = {name: rng.integers(0, 9, (5, 2)) for name in specs}
    gradients = {name: jnp.asarray(rng.standard_normal((5, 6)), jnp.float32) for name in specs}
    packed = embax.preprocess(ids, specs=specs)
    limits = {"all": (-2.0, 2.0)}
    with embax.use_backend(backend):
        new = embax.apply_gradients(gradients, packed, variables, specs=specs, step=0, embedding_var_limits=limits)
    got = oracle.tables_of(new, specs)
    for name, feature_ids in ids.items():
        gradient, touched = oracle.row_gradients(len(table[name]), [(feature_ids, None, gradients[name])], "sum")
        norm = np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-30)
        gradient = gradient * np.minimum(1, 1.5 / norm) + 0.2 * table[name]
        square = (gradient**2).mean(axis=1)
        accumulator = got[name][-1]
        share = 1 if optimizer is embax.RowWiseAdagradOptimizerSpec else 0.001
        np.testing.assert_allclose(accumulator[touched], share * square[touched], rtol=1e-4)
        assert np.isfinite(got[name][0]).all()
        np.testing.assert_array_equal(got[name][0][~touched], table[name][~touched])
