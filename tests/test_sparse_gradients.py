"""Gradients of tables as distinct rows: what they are, and that applying them is what `apply_gradients` does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import embax
from embax._checks import INT32_MAX
from embax._ops.exchange import rows_per_round
from embax._stacking.plan import make_plan

BATCH, VOCABULARY = 16, 40


def place(num_devices=1, sparsecores=4):
    """A table with two features, and one of another optimizer that no native rule is for."""
    tables = [
        oracle.table_spec("a", VOCABULARY, 8, "mean", embax.AdagradOptimizerSpec(0.1)),
        oracle.table_spec("b", VOCABULARY, 5, "sum", embax.RowWiseAdamOptimizerSpec(0.1)),
    ]
    specs = {
        "x": oracle.feature_spec("x", tables[0], BATCH, 3),
        "y": oracle.feature_spec("y", tables[0], BATCH, 1),
        "z": oracle.feature_spec("z", tables[1], BATCH, 2),
    }
    return embax.prepare_feature_specs_for_training(specs, num_devices, sparsecores)


def draw_ids(seed, batch=BATCH):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-1, VOCABULARY, (batch, valency)) for name, valency in (("x", 3), ("y", 1), ("z", 2))}


def draw_gradients(seed, batch=BATCH):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(batch, dim)).astype(np.float32) for name, dim in (("x", 8), ("y", 8), ("z", 5))}


def by_id(sparse, specs):
    """float64[vocabulary, dim] by table, from gradients of distinct rows of one device."""
    dense = {}
    for stack in make_plan(specs).stacks:
        rows, values = np.asarray(sparse[stack.name].rows), np.asarray(sparse[stack.name].values)
        touched = rows != INT32_MAX
        assert np.all(np.diff(rows[touched]) > 0)
        assert not touched[touched.sum() :].any()
        assert not values[~touched].any()
        ids = embax.logical_row_ids(stack.name, rows[touched], specs=specs).ids
        (table,) = stack.tables
        dense[table.name] = np.zeros((VOCABULARY, table.embedding_dim))
        dense[table.name][ids] = values[touched, : table.embedding_dim]
    return dense


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_gradients_of_rows_are_sums_over_samples(backend):
    specs, ids, gradients = place(), draw_ids(0), draw_gradients(1)
    packed = embax.preprocess(ids, specs=specs, limits="grow")
    with embax.use_backend(backend):
        sparse = jax.jit(functools.partial(embax.sparse_gradients, specs=specs))(gradients, packed)
        norm = embax.global_norm(sparse)
    found = by_id(sparse, specs)
    features = {"a": [(ids[name], None, gradients[name]) for name in "xy"], "b": [(ids["z"], None, gradients["z"])]}
    squares = 0.0
    for name, combiner in (("a", "mean"), ("b", "sum")):
        wanted, touched = oracle.row_gradients(VOCABULARY, features[name], combiner)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)
        assert touched.sum() == (np.asarray(sparse[name].rows) != INT32_MAX).sum()
        squares += np.sum(wanted**2)
    np.testing.assert_allclose(norm, np.sqrt(squares), rtol=1e-6)


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_applying_them_is_what_apply_gradients_does(backend):
    specs = place()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess(draw_ids(0), specs=specs, limits="grow")
    gradients, options = draw_gradients(1), {"step": 3, "embedding_var_limits": {"b": (-0.5, 0.5)}}

    @functools.partial(jax.jit, donate_argnums=0)
    def in_two_parts(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        sparse = embax.sparse_gradients(gradients, packed, specs=specs, activations=activations)
        return embax.apply_sparse_gradients(sparse, variables, specs=specs, **options)

    with embax.use_backend(backend):
        direct = functools.partial(embax.apply_gradients, gradients, specs=specs, **options)
        wanted = jax.jit(direct)(packed, variables)
        found = in_two_parts(variables, packed)
    compare = (
        np.testing.assert_array_equal
        if backend == "native"
        else functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    )
    jax.tree.map(compare, found, wanted)


def test_several_batches_in_one_step():
    """Two lookups, and microbatches of a scan, give the step of one batch that holds them all."""
    specs = place()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids, gradients = [draw_ids(seed) for seed in (2, 3)], [draw_gradients(seed) for seed in (4, 5)]
    together = (
        jax.tree.map(lambda *parts: np.concatenate(parts), *ids),
        jax.tree.map(lambda *parts: np.concatenate(parts), *gradients),
    )
    pack = functools.partial(embax.preprocess, specs=specs, limits="grow")
    joint = pack(together[0])
    wanted_sums = by_id(embax.sparse_gradients(together[1], joint, specs=specs), specs)
    wanted = embax.apply_gradients(together[1], joint, variables, specs=specs, step=0)
    pack(together[0])  # So that all batches have one shape.
    packed = [pack(one) for one in ids]

    @jax.jit
    def scanned(variables):
        stacked = jax.tree.map(lambda *parts: jnp.stack([jnp.asarray(part) for part in parts]), *packed)

        def body(carry, batch):
            packed, gradients = batch
            activations = embax.lookup(packed, variables, specs=specs)
            return carry, embax.sparse_gradients(gradients, packed, specs=specs, activations=activations)

        gradients_of_all = jax.tree.map(lambda *parts: jnp.stack(parts), *gradients)
        _, sparse = jax.lax.scan(body, None, (stacked, gradients_of_all))
        return sparse, embax.sum_sparse_gradients([sparse])

    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    each = [embax.sparse_gradients(one, batch, specs=specs) for one, batch in zip(gradients, packed, strict=True)]
    summed = embax.sum_sparse_gradients(each)
    sparse, summed_in_scan = scanned(variables)
    jax.tree.map(close, by_id(summed, specs), wanted_sums)
    jax.tree.map(close, by_id(summed_in_scan, specs), wanted_sums)
    for one in (summed, sparse):
        found = embax.apply_sparse_gradients(one, variables, specs=specs, step=0)
        jax.tree.map(close, found, wanted)
    only_a = embax.apply_sparse_gradients({"a": summed["a"]}, variables, specs=specs)
    close(only_a["a"].table, wanted["a"].table)
    np.testing.assert_array_equal(only_a["b"].table, variables["b"].table)


def test_clipped_by_their_norm():
    specs = place()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess(draw_ids(0), specs=specs, limits="grow")
    sparse = embax.sparse_gradients(draw_gradients(1), packed, specs=specs)
    clipped = {name: one.scale(0.5 / embax.global_norm(sparse)) for name, one in sparse.items()}
    np.testing.assert_allclose(embax.global_norm(clipped), 0.5, rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        embax.apply_sparse_gradients(clipped, variables, specs=specs, step=0)["a"],
        embax.apply_gradients(
            {name: g * np.float32(0.5 / embax.global_norm(sparse)) for name, g in draw_gradients(1).items()},
            packed,
            variables,
            specs=specs,
            step=0,
        )["a"],
    )


def test_several_devices():
    """Each device has the sums of the rows that it owns."""
    ids, gradients = draw_ids(6), draw_gradients(7)
    ids["x"][:, 0] = 4  # One row that all devices name.
    one = place()
    wanted = by_id(embax.sparse_gradients(gradients, embax.preprocess(ids, specs=one, limits="grow"), specs=one), one)
    specs = place(num_devices=4, sparsecores=2)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = PartitionSpec("devices")
    packed = jax.device_put(embax.preprocess(ids, specs=specs, limits="grow"), NamedSharding(mesh, over))
    variables = jax.device_put(
        {
            stack.name: embax.EmbeddingVariables(
                *(stack_of(stack.state_shapes[:1])), stack.optimizer.make_slots(stack_of(stack.state_shapes[1:]))
            )
            for stack in make_plan(specs).stacks
        },
        NamedSharding(mesh, over),
    )

    def step(gradients, packed, variables):
        sparse = embax.sparse_gradients(gradients, packed, specs=specs)
        norm = embax.global_norm(sparse, axis_name="devices")
        applied = embax.apply_sparse_gradients(sparse, variables, specs=specs, step=0)
        direct = embax.apply_gradients(gradients, packed, variables, specs=specs, step=0)
        return sparse, norm, applied, direct

    mapped = jax.shard_map(step, mesh=mesh, in_specs=over, out_specs=(over, PartitionSpec(), over, over))
    sparse, norm, applied, direct = jax.jit(mapped)(gradients, packed, variables)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, applied, direct)
    close(norm, np.sqrt(sum(np.sum(array**2) for array in wanted.values())))
    for stack in make_plan(specs).stacks:
        rows, values = (
            np.asarray(part).reshape(4, -1, *part.shape[1:])
            for part in (sparse[stack.name].rows, sparse[stack.name].values)
        )
        shard = stack.shape[0] // 4
        whole = [np.where(own == INT32_MAX, INT32_MAX, own + device * shard) for device, own in enumerate(rows)]
        found = np.zeros_like(wanted[stack.name])
        for own, value in zip(whole, values, strict=True):
            touched = own != INT32_MAX
            assert np.all(np.diff(own[touched]) > 0)
            ids_of = embax.logical_row_ids(stack.name, own[touched], specs=specs).ids
            found[ids_of] += value[touched][:, : found.shape[1]]
        close(found, wanted[stack.name])


def found_on_two_devices(specs, packed, gradients):
    """The gradients of table "t" on each of two devices."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = PartitionSpec("devices")
    find = functools.partial(embax.sparse_gradients, specs=specs)
    find = jax.jit(jax.shard_map(find, mesh=mesh, in_specs=over, out_specs=over))
    found = find({"f": gradients}, jax.device_put(packed, NamedSharding(mesh, over)))["t"]
    return np.asarray(found.rows).reshape(2, -1), np.asarray(found.values).reshape(2, -1, 8)


def test_minibatches_on_several_devices():
    """Limits are those of a minibatch; all of them together name more rows."""
    table = oracle.table_spec("t", 1000, 8, max_ids_per_partition=64, max_unique_ids_per_partition=8)
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, BATCH, 8)}, 2, 1)
    ids = np.random.default_rng(8).integers(0, 1000, (BATCH, 8))
    packed = embax.preprocess({"f": ids}, specs=specs, limits="raise", enable_minibatching=True)
    assert int(packed.num_minibatches[0]) > 2
    rows, values = found_on_two_devices(specs, packed, np.ones((BATCH, 8), np.float32))
    assert np.sum(rows != INT32_MAX) == len(np.unique(ids))
    assert np.sum(values) == ids.size * 8


def test_rows_of_one_owner_come_in_rounds():
    """All rows are those of the first device, more than a round holds; half of them are named by both."""
    table = oracle.table_spec("t", 4000, 8)
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, 256, 3)}, 2, 1)
    rng = np.random.default_rng(9)
    first, second = (2 * (rng.permutation(768) + start).reshape(256, 3) for start in (0, 384))
    ids, gradients = np.concatenate([first, second]), rng.normal(size=(512, 8)).astype(np.float32)
    embax.preprocess({"f": ids}, specs=specs, limits="grow")
    packed = embax.preprocess({"f": ids}, specs=specs, limits="grow")
    (stack,) = packed.layout.stacks
    assert rows_per_round(stack, 2, 1) < 768
    rows, values = found_on_two_devices(specs, packed, gradients)
    wanted, touched = oracle.row_gradients(4000, [(ids, None, gradients)], "sum")
    (touched,) = np.nonzero(touched)
    np.testing.assert_array_equal(rows[0][: len(touched)], touched // 2)
    assert (rows[0][len(touched) :] == INT32_MAX).all()
    assert (rows[1] == INT32_MAX).all()
    np.testing.assert_allclose(values[0][: len(touched)], wanted[touched], rtol=1e-5, atol=1e-6)


def stack_of(shapes):
    return [np.ones(shape, np.float32) for shape in shapes]


def test_mistakes_are_named():
    specs = place()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess(draw_ids(0), specs=specs, limits="grow")
    sparse = embax.sparse_gradients(draw_gradients(1), packed, specs=specs)
    apply = functools.partial(embax.apply_sparse_gradients, variables=variables, specs=specs)
    with pytest.raises(ValueError, match=r"The sparse gradients have \['c'\]; .* the stacks are \['a', 'b'\]"):
        apply({"c": sparse["a"]})
    with pytest.raises(ValueError, match="The sparse gradients have SparseGradient; they must be a dict by stack"):
        apply(sparse["a"])
    with pytest.raises(ValueError, match=r"Stack 'b': the gradient is a SparseGradient .* float32\[..., n, 8\]"):
        apply({"b": embax.SparseGradient(sparse["b"].rows, sparse["b"].values[:, :4])})
    with pytest.raises(ValueError, match="Stack 'b': the gradient is a tuple"):
        apply({"b": (sparse["b"].rows, sparse["b"].values)})
    with pytest.raises(ValueError, match="RowWiseAdamOptimizerSpec: the formula needs the number of the step"):
        apply({"b": sparse["b"]})
    with pytest.raises(ValueError, match=r"are of the stacks \[\['a', 'b'\], \['a'\]\]; give at least one"):
        embax.sum_sparse_gradients([sparse, {"a": sparse["a"]}])
    with pytest.raises(ValueError, match="at least one"):
        embax.sum_sparse_gradients([])
