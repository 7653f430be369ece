"""Tables sharded over several devices: the results of one device, whatever the number of devices and the skew of the ids."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import embax
from benchmarks.prove_in_place import FOR_MEMORY_ALONE
from embax._ops.exchange import rows_per_round
from embax._stacking.layout import put_table
from embax._stacking.plan import make_plan

BATCH, DIM = 24, 8
OPTIMIZERS = [
    embax.SGDOptimizerSpec(0.1, weight_decay=0.01),
    embax.AdagradOptimizerSpec(0.1, clip_gradient_norm=1.0),
    embax.AdamOptimizerSpec(0.1),
    embax.AdagradMomentumOptimizerSpec(0.1),
    embax.FTRLOptimizerSpec(0.1),
    embax.LaPropOptimizerSpec(0.1),
    embax.F2AOptimizerSpec(0.1),
    embax.RowWiseAdagradOptimizerSpec(0.1),
    embax.RowWiseAdamOptimizerSpec(0.1),
    embax.CustomOptimizerSpec(0.1, custom_computation_fn=lambda gradient, row, rate: row - rate * gradient),
]


def place(optimizers, num_devices, sparsecores, vocabulary=200, **fields):
    """A table of each optimizer; the first has two features."""
    specs = {}
    for number, optimizer in enumerate(optimizers):
        combiner = ("mean", "sum", "sqrtn")[number % 3]
        table = oracle.table_spec(f"t{number}", vocabulary, DIM, combiner, optimizer, **fields)
        specs[f"f{number}"] = oracle.feature_spec(f"f{number}", table, BATCH, 3)
        if number == 0:
            specs["again"] = oracle.feature_spec("again", table, BATCH, 1)
    return embax.prepare_feature_specs_for_training(specs, num_devices, sparsecores)


def spread(tables, specs):
    """Variables that hold these logical arrays, as NumPy."""
    plan, variables = make_plan(specs), {}
    for stack in plan.stacks:
        arrays = [np.zeros(shape, np.float32) for shape in stack.state_shapes]
        for table in stack.tables:
            for array, values in zip(arrays, tables[table.name], strict=True):
                put_table(array, values, table, plan.num_sparsecores)
        variables[stack.name] = embax.EmbeddingVariables(arrays[0], stack.optimizer.make_slots(arrays[1:]))
    return variables


def train(optimizers, num_devices, sparsecores, batches, *, axes=None, check_vma=True, minibatching=False, **fields):
    """Activations of two steps, and the tables after them."""
    specs = place(optimizers, num_devices, sparsecores, **fields)
    first = place(optimizers, 1, 1, **fields)
    variables = spread(oracle.tables_of(embax.init_embedding_variables(jax.random.key(0), first), first), specs)
    axes = axes or {"devices": num_devices}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    names = tuple(axes) if len(axes) > 1 else next(iter(axes))
    over = PartitionSpec(names)
    placed = NamedSharding(mesh, over)

    def step(variables, packed, number):
        activations = embax.lookup(packed, variables, specs=specs, axis_name=names)
        gradients = jax.tree.map(lambda a: 0.5 * a + 0.1, activations)
        new = embax.apply_gradients(
            gradients, packed, variables, specs=specs, step=number, activations=activations, axis_name=names
        )
        return new, activations

    stepped = jax.shard_map(
        step, mesh=mesh, in_specs=(over, over, PartitionSpec()), out_specs=over, check_vma=check_vma
    )
    stepped = jax.jit(stepped, donate_argnums=0)
    variables, found = jax.device_put(variables, placed), []
    packer = functools.partial(embax.preprocess, specs=specs, limits="grow", enable_minibatching=minibatching)
    for number, ids in enumerate(batches):
        packed = jax.device_put(packer(ids), placed)
        variables, activations = stepped(variables, packed, jnp.int32(number))
        found.append(jax.tree.map(np.asarray, activations))
    return found, oracle.tables_of(variables, specs), packed, specs


def draw_batches(optimizers, vocabulary=200, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"f{number}" for number in range(len(optimizers))]
    return [
        {name: rng.integers(-1, vocabulary, (BATCH, 3)) for name in names}
        | {"again": rng.integers(0, vocabulary, (BATCH, 1))}
        for _ in range(2)
    ]


def check_equal(found, wanted):
    """Sums in another order: some units in the last place, of values up to about 10, after two steps."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6), found, wanted)


@pytest.fixture(scope="module")
def one_device():
    batches = draw_batches(OPTIMIZERS)
    found, tables, _, _ = train(OPTIMIZERS, 1, 4, batches)
    return batches, (found, tables)


pytestmark = pytest.mark.filterwarnings("ignore:.*no native row rule:embax.SlowPathWarning")


@pytest.mark.parametrize(
    ("num_devices", "options"),
    [(2, {}), (3, {"sparsecores": 1}), (4, {"minibatching": True}), (8, {"check_vma": False})],
)
def test_several_devices_give_the_results_of_one(one_device, num_devices, options):
    batches, wanted = one_device
    found, tables, _, _ = train(OPTIMIZERS, num_devices, **({"sparsecores": 4} | options), batches=batches)
    check_equal((found, tables), wanted)


def test_portable_gives_the_same(one_device):
    batches, wanted = one_device
    with embax.use_backend("portable"):
        found, tables, _, _ = train(OPTIMIZERS[:3], 4, 2, [select(ids, 3) for ids in batches])
    check_equal(found, [select(activations, 3) for activations in wanted[0]])
    check_equal(tables, {name: arrays for name, arrays in wanted[1].items() if name in tables})


def select(tree, count):
    return {name: tree[name] for name in ("again", *(f"f{number}" for number in range(count)))}


def test_a_tuple_of_axes():
    optimizers = OPTIMIZERS[1:2]
    batches = draw_batches(optimizers)
    wanted = train(optimizers, 1, 4, batches)[:2]
    check_equal(train(optimizers, 4, 2, batches, axes={"hosts": 2, "chips": 2})[:2], wanted)


@pytest.mark.parametrize("sources", ["all devices", "one device"])
def test_rows_of_one_owner_go_in_rounds(sources):
    """All ids are of rows of one device, which are more than a round holds."""
    num_devices, per_device, optimizers = 4, 256, OPTIMIZERS[1:2]
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(2):
        ids = num_devices * rng.permutation(5000)[: num_devices * per_device * 3].reshape(-1, 3)
        if sources == "one device":
            ids[per_device:] = -1
        batches.append({"f0": ids, "again": np.full((len(ids), 1), num_devices)})
    wanted = train(optimizers, 1, 1, batches, vocabulary=20_000)[:2]
    found, tables, packed, _ = train(optimizers, num_devices, 1, batches, vocabulary=20_000)
    check_equal((found, tables), wanted)
    (stack,) = packed.layout.stacks
    assert rows_per_round(stack, num_devices, 1) < 3 * per_device  # So that two rounds are needed at least.


@pytest.mark.parametrize("changed", ["overlapping partitions", "ids in any order"])
def test_arrays_changed_by_hand(changed):
    """They name any rows, and nothing is written where it does not belong; the rounds come to an end."""
    specs = place(OPTIMIZERS[:1], 2, 4, vocabulary=16_384)
    rng = np.random.default_rng(2)
    ids = {"f0": rng.integers(0, 16_384, (512, 3)), "again": rng.integers(0, 16_384, (512, 1))}
    packed = embax.preprocess(ids, specs=specs, limits="grow")
    size, share = packed.embedding_ids.size, packed.layout.stacks[0].capacity // 4
    pointers, entries = np.array(packed.row_pointers), rng.integers(-5, 3000, size).astype(np.int32)
    if changed == "overlapping partitions":  # Those of even numbers have all entries, of which the shares have others.
        pointers[:] = np.tile([2**31 - 1, 0], pointers.size // 2)
        entries = np.arange(size, dtype=np.int32) % (4 * share)
    packed = packed.replace(
        row_pointers=pointers,
        embedding_ids=entries,
        sample_ids=np.zeros_like(entries),
        gains=np.ones(size, np.float32),
    )
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = PartitionSpec("devices")
    gradients = jax.tree.map(lambda spec: np.ones((512, DIM), np.float32), specs)

    def step(gradients, packed):
        return embax.sparse_gradients(gradients, packed, specs=specs)

    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=over, out_specs=over))
    sparse = mapped(gradients, jax.device_put(packed, NamedSharding(mesh, over)))
    rows = np.asarray(sparse["t0"].rows).reshape(2, -1)
    for own in rows:
        assert np.all(np.diff(own[own != 2**31 - 1]) > 0)


def test_a_round_is_sized_by_the_batch():
    def size(max_minibatches=0, **fields):
        return rows_per_round(types.SimpleNamespace(**fields), 8, 4, max_minibatches)

    assert size(capacity=8000, max_unique_ids_per_partition=1000) == 1168  # 1000 + 5 sqrt(1000), and some more
    assert size(capacity=8000, max_unique_ids_per_partition=10) == 160  # 16 pairs of SparseCores send 10 each.
    assert size(capacity=8000, max_unique_ids_per_partition=10, max_minibatches=64) == 1168
    assert size(capacity=0, max_unique_ids_per_partition=0) == 8


def test_a_batch_without_ids():
    optimizers = OPTIMIZERS[1:2]
    empty = {"f0": np.zeros((0, 3), np.int32), "again": np.zeros((0, 1), np.int32)}
    none = {"f0": np.full((BATCH, 3), -1), "again": np.full((BATCH, 1), -1)}
    for batch in (empty, none):
        check_equal(train(optimizers, 2, 4, [batch])[:2], train(optimizers, 1, 4, [batch])[:2])


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_in_place(backend):
    """Temporary bytes of a step whose loss is linear do not depend on the vocabulary, and all of the tables is aliased."""
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = PartitionSpec("devices")

    def shaped(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, over))

    temporary = []
    for vocabulary in (1 << 18, 1 << 20):
        specs = place([OPTIMIZERS[1], OPTIMIZERS[7]], 4, 4, vocabulary=vocabulary)
        packed = embax.preprocess(draw_batches(OPTIMIZERS[:2])[0], specs=specs, limits="grow")
        variables = {}
        for stack in make_plan(specs).stacks:
            table, *slots = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in stack.state_shapes)
            variables[stack.name] = embax.EmbeddingVariables(table, stack.optimizer.make_slots(slots))

        def step(variables, packed, specs=specs):
            activations = embax.lookup(packed, variables, specs=specs)
            ones = jax.tree.map(jnp.ones_like, activations)
            return embax.apply_gradients(ones, packed, variables, specs=specs, activations=activations)

        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(over, over), out_specs=over), donate_argnums=0)
        with embax.use_backend(backend):
            memory = step.lower(*jax.tree.map(shaped, (variables, packed))).compile(FOR_MEMORY_ALONE).memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        assert memory.alias_size_in_bytes == sum(4 * math.prod(a.shape) for a in jax.tree.leaves(variables)) // 4
    assert temporary[0] == temporary[1]


def test_mistakes_are_named():
    specs = place(OPTIMIZERS[:1], 4, 2)
    packed = embax.preprocess(draw_batches(OPTIMIZERS[:1])[0], specs=specs, limits="grow")
    variables = {
        stack.name: embax.EmbeddingVariables(jax.ShapeDtypeStruct(stack.shape, jnp.float32), embax.SGDSlotVariables())
        for stack in make_plan(specs).stacks
    }

    def look_up(axes, **options):
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
        over = PartitionSpec(tuple(axes))
        function = functools.partial(embax.lookup, specs=specs, **options)
        jax.eval_shape(jax.shard_map(function, mesh=mesh, in_specs=(over, over), out_specs=over), packed, variables)

    with pytest.raises(ValueError, match=r"placed for 4 devices and there are 2 manual mesh axes, .*: pass axis_name"):
        look_up({"a": 2, "b": 2})
    with pytest.raises(ValueError, match=r"axis_name is 'c', but \['c'\] are no manual axes"):
        look_up({"a": 4}, axis_name="c")
    with pytest.raises(ValueError, match="Axis 'a' has 2 devices, the specs were placed for 4"):
        look_up({"a": 2, "b": 2}, axis_name="a")
    with pytest.raises(ValueError, match="placed for 4 devices: each looks up .* inside jax.shard_map"):
        embax.lookup(packed, jax.tree.map(lambda a: np.zeros(a.shape, np.float32), variables), specs=specs)
