"""Packing inside jit: the format and the results of host packing, for raw ids of any shape, and gradients of weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import embax
from benchmarks import prove_in_place
from embax._lookup_vjp import LookupSettings, lookup_and_update
from embax._matmul import checked_limits
from embax._preprocess.packer import Packer
from embax._stacking.plan import make_plan
from embax.nnx.embed import SparseCoreEmbed

COMBINERS = ("sum", "mean", "sqrtn")
MESH = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
BATCHES = {"dense": 10, "ragged": 7, "single": 5}
"""Batches that 3 and 4 SparseCores do not divide."""


def model(sparsecores=4, devices=1, optimizer=None, batches=BATCHES):
    """Of each combiner a stack of two tables, of which one has two features, and one table has one id a sample."""
    features = {}
    for combiner in COMBINERS:
        big, small = (
            oracle.table_spec(
                f"{combiner}_{v}", v, combiner=combiner, optimizer=optimizer or embax.AdagradOptimizerSpec(0.1)
            )
            for v in (40, 9)
        )
        features[combiner] = {
            "dense": oracle.feature_spec(f"{combiner}_dense", big, batches["dense"], 4),
            "ragged": oracle.feature_spec(f"{combiner}_ragged", small, batches["ragged"], 3),
            "single": oracle.feature_spec(f"{combiner}_single", small, batches["single"], 1),
        }
    return embax.auto_stack_tables(features, devices, sparsecores)


def draw(seed, batches=BATCHES, bad=False):
    """Ids and weights of `model`, and what host packing takes: ragged ids without what lies behind them."""
    rng = np.random.default_rng(seed)
    raw, weights, host, host_weights = {}, {}, {}, {}
    for number, combiner in enumerate(COMBINERS):
        dense = rng.integers(-1, 40, (batches["dense"], 4)).astype(np.int32)
        dense[1, :3] = dense[1, 0]  # Equal ids in a sample.
        dense[2] = -1
        lengths = rng.integers(0, 6, batches["ragged"])
        splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = rng.integers(0, 9, 40).astype(np.int32)  # In all batches as many, so that no sample has the last ones.
        single = rng.integers(-1, 9, batches["single"]).astype(np.int32)
        of_dense = rng.normal(size=dense.shape).astype(np.float32)
        of_values = rng.normal(size=values.shape).astype(np.float32)
        of_dense[3] = 0
        if bad:
            dense[4, 1], dense[5, 2], values[0], single[:3] = 40, -2, -1, (9, -7, 2**31 - 1)
            of_dense[6, :2] = np.nan, np.inf
            of_dense[7], dense[7] = 3e38, 7  # Their sums, and in part merged gains, are not finite.
        used = slice(int(splits[-1]))
        raw[combiner] = {"dense": dense, "ragged": embax.Ragged(values, splits), "single": single}
        host[combiner] = raw[combiner] | {"ragged": embax.Ragged(values[used], splits)}
        weights[combiner] = {"dense": of_dense, "ragged": of_values, "single": None}
        host_weights[combiner] = weights[combiner] | {"ragged": of_values[used]}
        if (seed + number) % 3 == 0:  # Without weights, as most are.
            weights[combiner] = host_weights[combiner] = dict.fromkeys(weights[combiner])
    return raw, weights, host, host_weights


def raw_packer(specs, backend=None):
    """A jitted `embax.preprocess`."""

    def pack(ids, weights):
        return embax.preprocess(ids, weights, specs=specs)

    jitted = jax.jit(pack)

    def call(ids, weights=None):
        if backend is None:
            return jitted(ids, weights)
        with embax.use_backend(backend):
            return jitted(ids, weights)

    return call


def assert_same_entries(packed, host, exact):
    """The arrays of a raw batch are those of one packed on the host for one minibatch, but for the room that they have."""
    layout = packed.layout
    assert layout.max_minibatches == 1
    assert layout.minibatched
    pointers = layout.row_pointers_per_device // len(layout.stacks)
    for ours, theirs in zip(layout.stacks, host.layout.stacks, strict=True):
        of_stack = np.asarray(packed.row_pointers[ours.row_pointers_start :][:pointers])
        np.testing.assert_array_equal(of_stack, host.row_pointers[theirs.row_pointers_start :][:pointers])
        end = int(of_stack[-1])
        assert end <= ours.capacity
        for name in ("embedding_ids", "sample_ids", "gains"):
            array, wanted = np.asarray(getattr(packed, name)), getattr(host, name)
            part = array[ours.entries_start :][: ours.capacity]
            wanted = wanted[theirs.entries_start :][:end]
            if name == "gains" and not exact:
                np.testing.assert_allclose(part[:end], wanted, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(part[:end], wanted)
            filler = part[end:]
            assert np.isnan(filler).all() if name == "gains" else (filler == 2**31 - 1).all()


def host_packed(ids, weights, specs, **options):
    options = {"limits": "grow"} | options
    return embax.preprocess(ids, weights, specs=specs, enable_minibatching=True, validation="drop", **options)


@pytest.mark.parametrize(("backend", "sparsecores"), [("native", 1), ("native", 3), ("native", 4), ("portable", 3)])
def test_the_format_is_that_of_the_host(backend, sparsecores):
    specs = model(sparsecores)
    pack = raw_packer(specs, backend)
    for seed, bad in ((0, False), (3, True), (6, True)):
        raw, weights, host, host_weights = draw(seed, bad=bad)
        packed, wanted = pack(raw, weights), host_packed(host, host_weights, specs)
        assert int(wanted.num_minibatches[0]) == 1
        assert_same_entries(packed, wanted, exact=backend == "native")
        assert packed.num_minibatches is None
        names = [feature.name for feature in jax.tree.leaves(specs)]
        counts = [wanted.stats.invalid_ids[name] for name in names]
        assert packed.invalid_ids.tolist() == counts
        assert (sum(counts) > 12) == bad


def make_step(specs):
    @functools.partial(jax.jit, donate_argnames="variables")
    def step(variables, ids, weights):
        packed = embax.preprocess(ids, weights, specs=specs) if weights is not None else ids
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = jax.tree.map(jnp.sin, activations)
        new = embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)
        return new, activations

    return step


@pytest.mark.parametrize("sparsecores", [1, 4])
def test_steps_are_those_of_host_packing_bit_for_bit(sparsecores):
    specs = model(sparsecores)
    step = make_step(specs)
    ours, theirs = (embax.init_embedding_variables(jax.random.key(0), specs) for _ in range(2))
    for seed in (0, 3):
        raw, weights, host, host_weights = draw(seed)
        packed = embax.preprocess(host, host_weights, specs=specs, limits="grow")
        assert packed.invalid_ids is None
        ours, got = step(ours, raw, weights)
        theirs, wanted = step(theirs, packed, None)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (ours, got), (theirs, wanted)))
    table = oracle.tables_of(theirs, specs)["mean_40"][0]
    got = step(ours, raw, weights)[1]["mean"]["dense"]
    wanted = oracle.lookup(table, raw["mean"]["dense"], "mean", weights["mean"]["dense"])
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def one_feature(combiner="sum", batch=4, valency=3, vocabulary=50, sparsecores=4, devices=1, optimizer=None):
    table = oracle.table_spec(vocabulary=vocabulary, combiner=combiner, optimizer=optimizer)
    specs = {"f": oracle.feature_spec("f", table, batch=batch, valency=valency)}
    return embax.prepare_feature_specs_for_training(specs, devices, sparsecores)


def entries_of(packed):
    """(id, sample) of all entries of a table alone in its stack without rotation, one SparseCore, sorted."""
    valid = packed.sample_ids != 2**31 - 1
    return sorted(zip(packed.embedding_ids[valid].tolist(), packed.sample_ids[valid].tolist(), strict=True))


SPLITS = [
    # Row splits, the ids of each sample, and those that are counted.
    ([0, 2, 4], [[0, 1], [2, 3]], 0),
    ([0, 0, 6], [[], [0, 1, 2, 3, 4, 5]], 0),
    ([1, 2, 4], [[1], [2, 3]], 1),  # The first id is in no sample.
    ([0, 3, 2], [[], []], 3),
    ([0, 3, 9], [[0, 1, 2], []], 6),
    ([0, 9, 4], [[], []], 9),
    ([-1, 2, 4], [[], []], 4),
    ([0, -5, 4], [[], []], 4),
    ([0, -5, -5], [[], []], 1),
    ([9, 9, 9], [[], []], 9),
    ([2**31 - 1, -(2**31), 2**31 - 1], [[], []], 2**31 - 1),
]


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_row_splits_that_are_not_consistent(backend):
    pack = raw_packer(one_feature(sparsecores=1), backend)
    values = np.arange(6, dtype=np.int32)
    for splits, samples, lost in SPLITS:
        packed = pack({"f": embax.Ragged(values, np.array(splits, np.int32))})
        wanted = sorted((id_, sample) for sample, ids in enumerate(samples) for id_ in ids)
        assert entries_of(packed) == wanted, splits
        assert packed.invalid_ids.tolist() == [lost], splits
    # Weights with row splits of their own: samples from where they differ on are empty.
    ragged = [embax.Ragged(array, np.array([0, 2, 4], np.int32)) for array in (values, np.ones(6, np.float32))]
    other = embax.Ragged(ragged[1].values, np.array([0, 3, 4], np.int32))
    assert entries_of(pack({"f": ragged[0]}, {"f": ragged[1]})) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    packed = pack({"f": ragged[0]}, {"f": other})
    assert (entries_of(packed), packed.invalid_ids.tolist()) == ([], [4])


def test_no_id_is_lost_to_a_limit():
    """All ids on one SparseCore and one partition, and limits of the specs that are far smaller."""
    table = oracle.table_spec(vocabulary=4000, max_ids_per_partition=1, max_unique_ids_per_partition=1)
    specs = {"f": oracle.feature_spec("f", table, batch=4)}
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    ids = np.arange(0, 4000, 4, dtype=np.int32)
    packed = raw_packer(specs)({"f": embax.Ragged(ids, np.array([0, 1000, 1000, 1000, 1000], np.int32))})
    assert np.sum(packed.sample_ids != 2**31 - 1) == 1000
    dense = raw_packer(specs)({"f": np.arange(4000, dtype=np.int32).reshape(4, 1000)})
    assert np.sum(dense.sample_ids != 2**31 - 1) == 4000


@pytest.mark.parametrize(
    ("backend", "batch"), [("native", 0), ("native", 1), ("native", 2), ("native", 5), ("portable", 0), ("portable", 5)]
)
def test_any_batch_size(batch, backend):
    specs = one_feature("mean")
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    table = oracle.tables_of(variables, specs)["table"][0]
    with embax.use_backend(backend):
        look_up = jax.jit(lambda ids: embax.lookup(embax.preprocess({"f": ids}, specs=specs), variables, specs=specs))
        dense = np.arange(batch * 3, dtype=np.int32).reshape(batch, 3)
        np.testing.assert_allclose(look_up(dense)["f"], oracle.lookup(table, dense, "mean"), rtol=1e-5, atol=1e-6)
        for shape in ((batch, 0), (batch, 1)):
            empty = np.full(shape, -1, np.int32)
            np.testing.assert_array_equal(look_up(empty)["f"], np.zeros((batch, 8)))
        ragged = embax.Ragged(np.zeros(0, np.int32), np.zeros(batch + 1, np.int32))
        np.testing.assert_array_equal(look_up(ragged)["f"], np.zeros((batch, 8)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integer_types(dtype):
    pack = raw_packer(one_feature(batch=1, sparsecores=1))
    info = np.iinfo(dtype)
    given = [3, 49, 50, info.max, info.max - 1] + ([-1, -2, info.min] if info.min < 0 else [])
    given += [2**32 + 7, 2**33 - 1] if info.max > 2**33 else []
    given += [-(2**32) - 1, -(2**32)] if info.min < -(2**33) else []
    with jax.enable_x64(True):
        packed = pack({"f": np.array([given], dtype)})
        ragged = pack({"f": embax.Ragged(np.array([3, 4], dtype), np.array([0, 2], dtype))}, {"f": np.ones(2)})
    assert entries_of(packed) == [(3, 0), (49, 0)]
    assert packed.invalid_ids.tolist() == [len(given) - 2 - (info.min < 0)]
    assert (entries_of(ragged), ragged.invalid_ids.tolist()) == ([(3, 0), (4, 0)], [0])
    assert ragged.gains.dtype == jnp.float32
    if info.max > 2**33:
        with jax.enable_x64(True):
            beyond = pack({"f": embax.Ragged(np.array([3, 4], dtype), np.array([0, 2**32 + 2], dtype))})
        assert (entries_of(beyond), beyond.invalid_ids.tolist()) == ([], [2**31 - 1])


def test_some_leaves_are_traced():
    """What is not traced may have any form of the host, and its weights may be traced where they are one array."""
    specs = {
        name: oracle.feature_spec(name, oracle.table_spec(name), batch=2)
        for name in ("lists", "coo", "traced", "weights")
    }
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    ids = {
        "lists": [[3, 2**40], [7]],
        "coo": embax.SparseCoo(np.array([[1, 0], [0, 0]]), np.array([4, 5]), (2, 3)),
        "weights": np.array([[1, 2], [3, -1]]),
    }
    dense = {"lists": [[3], [7]], "coo": [[5], [4]], "traced": [[1, 1], [2]], "weights": [[1, 2], [3]]}
    weights = {
        "lists": None,
        "coo": np.array([0.5, 1.5]),
        "traced": None,
        "weights": [np.array([2.0, 3.0]), np.array([4.0])],
    }

    @jax.jit
    def pack(traced, of_weights):
        given = dict.fromkeys(weights) | {"coo": weights["coo"], "weights": of_weights}
        return embax.preprocess(ids | {"traced": traced}, given, specs=specs)

    packed = pack(np.array([[1, 1], [2, -1]], np.int32), np.array([[2.0, 3.0], [4.0, 5.0]], np.float32))
    weights["coo"] = [np.array([1.5]), np.array([0.5])]
    assert_same_entries(packed, host_packed(dense, weights, specs), exact=True)
    by_name = dict(zip(sorted(specs), packed.invalid_ids.tolist(), strict=True))
    assert by_name == {"lists": 1, "coo": 0, "traced": 0, "weights": 0}


def test_inside_scan_cond_and_eval_shape():
    specs = model()
    batches = [draw(seed)[:2] for seed in (0, 3)]
    step = make_step(specs)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    def body(variables, batch):
        return jax.lax.cond(
            batch[0]["sum"]["dense"].size > 0, lambda: step(variables, *batch), lambda: step(variables, *batch)
        )

    scanned, activations = jax.jit(lambda variables: jax.lax.scan(body, variables, stacked))(variables)
    for number, batch in enumerate(batches):
        variables, wanted = step(variables, *batch)
        jax.tree.map(lambda a, b, k=number: np.testing.assert_array_equal(a[k], b), activations, wanted)
    jax.tree.map(np.testing.assert_array_equal, scanned, variables)

    shape = jax.eval_shape(lambda ids, weights: embax.preprocess(ids, weights, specs=specs), *batches[0])
    packed = raw_packer(specs)(*batches[0])
    assert [array.shape for array in jax.tree.leaves(shape)] == [array.shape for array in jax.tree.leaves(packed)]
    assert shape.layout == packed.layout


@pytest.mark.parametrize(("backend", "check_vma"), [("native", True), ("native", False), ("portable", True)])
def test_inside_shard_map(backend, check_vma):
    """Each device packs its part of the batch, for rows on all of them, as the host packs for all devices."""
    specs = model(2, devices=4)
    parts = [draw(seed)[:] for seed in (0, 3, 6, 9)]
    P = jax.sharding.PartitionSpec

    def join(*leaves):
        return np.concatenate(leaves)

    pack = jax.shard_map(
        lambda ids, weights: embax.preprocess(ids, weights, specs=specs),
        mesh=MESH,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=check_vma,
    )
    with embax.use_backend(backend):
        packed = jax.jit(pack)(*(jax.tree.map(join, *(part[k] for part in parts)) for k in (0, 1)))
    for device, (_, _, host, host_weights) in enumerate(parts):
        own = jax.tree.map(lambda array, k=device: np.split(np.asarray(array), 4)[k], packed)
        alone = {"limits": "raise", "num_local_devices": 1, "all_reduce": embax.ThreadAllReduce(1).member(0)}
        wanted = host_packed(host, host_weights, specs, **alone)
        assert_same_entries(own, wanted, exact=backend == "native")
        assert own.invalid_ids.tolist() == [0] * 9
    with pytest.raises(ValueError, match=r"placed for 4 devices: inside jit each packs its own part.*jax\.shard_map"):
        raw_packer(specs)(parts[0][0], parts[0][1])


def test_some_operands_are_the_same_on_all_devices():
    specs = one_feature(devices=4)
    pack = jax.shard_map(
        lambda ids, weights: embax.preprocess({"f": ids}, {"f": weights}, specs=specs).gains,
        mesh=MESH,
        in_specs=(jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()),
        out_specs=jax.sharding.PartitionSpec("x"),
    )
    gains = jax.jit(pack)(np.arange(12, dtype=np.int32).reshape(4, 3), np.full((1, 3), 2.0, np.float32))
    assert np.nansum(gains) == 24.0


def test_a_layer_packs_inside_jit():
    specs = model()
    layer = SparseCoreEmbed(specs, rngs=nnx.Rngs(0), limits="raise")
    raw, weights, host, host_weights = draw(0)
    inside = nnx.jit(lambda layer, ids, weights: layer(layer.preprocess(ids, weights)))(layer, raw, weights)
    jax.tree.map(np.testing.assert_array_equal, inside, layer(Packer(specs)(host, host_weights)))


# Gradients with respect to the weights.


def plain_lookup(table, ids, weights, combiner):
    """The activations of one feature by `jnp.take`; dense ids alone, with padding."""
    valid = ids >= 0
    weights = jnp.where(valid, weights, 0.0)
    norm = {"sum": lambda w: jnp.ones(()), "mean": jnp.sum, "sqrtn": lambda w: jnp.sqrt(jnp.sum(w * w))}[combiner]
    divisor = jax.vmap(norm)(weights)
    zero = jnp.sum(jnp.abs(weights), axis=1) == 0.0
    gains = jnp.where(zero[:, None], 0.0, weights / jnp.where(zero, 1.0, divisor)[:, None])
    rows = jnp.take(table, jnp.where(valid, ids, 0), axis=0)
    return jnp.sum(gains[:, :, None] * rows, axis=1)


def settings_of(plan):
    return LookupSettings(plan, checked_limits(None, plan))


def look_up_and_update(specs, variables, ids, weights):
    """The activations of the differentiable lookup of raw ids, in the structure of the specs."""
    plan = make_plan(specs)
    packed = embax.preprocess(ids, weights, specs=specs)
    activations = lookup_and_update(settings_of(plan), variables, jnp.zeros(()), packed, None)
    return jax.tree.unflatten(jax.tree.structure(specs), activations)


def loss_of(activations):
    return sum(jnp.sum(jnp.sin(a) * (k + 1.0)) for k, a in enumerate(jax.tree.leaves(activations)))


def dense_of(ragged, width=6):
    """Ragged arrays as dense ones, padded with -1."""
    splits = ragged.row_splits
    rows = [ragged.values[begin:end] for begin, end in itertools.pairwise(splits)]
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_weight_gradients(backend):
    specs = model(3)
    raw, weights, *_ = draw(1)
    for combiner in COMBINERS:  # All have weights, all positive: a sum of nearly 0 would amplify rounding.
        of_dense = np.abs(np.random.default_rng(5).normal(size=(10, 4))).astype(np.float32) + 0.1
        of_dense[3] = 0  # Without a gradient.
        of_values = np.linspace(0.5, 1.5, raw[combiner]["ragged"].values.size, dtype=np.float32)
        weights[combiner] = {"dense": of_dense, "ragged": of_values, "single": np.ones(5, np.float32)}
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    tables = {name: arrays[0] for name, arrays in oracle.tables_of(variables, specs).items()}

    def ours(variables, weights):
        return loss_of(look_up_and_update(specs, variables, raw, weights))

    def plain(weights):
        activations = {}
        for combiner, features in raw.items():
            big, small = tables[f"{combiner}_40"], tables[f"{combiner}_9"]
            ragged, of_values = features["ragged"], weights[combiner]["ragged"]
            places = dense_of(embax.Ragged(np.arange(ragged.values.size), ragged.row_splits))
            activations[combiner] = {
                "dense": plain_lookup(big, features["dense"], weights[combiner]["dense"], combiner),
                "ragged": plain_lookup(small, dense_of(ragged), of_values[np.maximum(places, 0)], combiner),
                "single": plain_lookup(
                    small, features["single"][:, None], weights[combiner]["single"][:, None], combiner
                ),
            }
        return loss_of(activations)

    with embax.use_backend(backend):
        new, got = jax.jit(jax.grad(ours, argnums=(0, 1)))(variables, weights)
        if backend == "native":
            jax.tree.map(np.testing.assert_array_equal, got, jax.jit(jax.grad(ours, argnums=1))(variables, weights))
            jax.tree.map(np.testing.assert_array_equal, new, jax.jit(jax.grad(ours))(variables, weights))
    wanted = jax.jit(jax.grad(plain))(weights)
    for combiner in COMBINERS:
        for name in BATCHES:
            of_ours, of_plain = np.asarray(got[combiner][name]), np.array(wanted[combiner][name])
            if name == "dense":
                of_plain[3] = 0 if combiner != "sum" else of_ours[3]
                assert (of_ours[raw[combiner]["dense"] < 0] == 0).all()
            np.testing.assert_allclose(of_ours, of_plain, rtol=1e-3, atol=2e-5, err_msg=f"{combiner} {name}")
    # Zero weights of a sum have gradients as others have.
    dense = raw["sum"]["dense"]
    rows = tables["sum_40"][dense[3]] * (dense[3] >= 0)[:, None]
    factor = 1 + list(jax.tree.leaves(specs)).index(
        specs["sum"]["dense"]
    )  # Of `loss_of`, whose sine has there the slope 1.
    np.testing.assert_allclose(got["sum"]["dense"][3], factor * rows.sum(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_weight_gradients_are_finite_differences(combiner):
    """In float64, of the definition in the oracle; ids that are not valid, and their weights, have gradients of 0."""
    specs = one_feature(combiner, batch=4, valency=4)
    variables = embax.init_embedding_variables(jax.random.key(1), specs)
    table = oracle.tables_of(variables, specs)["table"][0].astype(np.float64)
    ids = np.array([[3, 3, 4, -1], [50, 5, -2, 7], [8, 9, 8, 9], [1, 1, 1, 1]], np.int32)
    weights = np.array([[1, 2, 3, 9], [1, 0.5, 1, -2], [1, np.nan, 2, 3], [-1, 2, 3, 4]], np.float32)
    valid = (ids >= 0) & (ids < 50) & np.isfinite(weights)
    target = np.random.default_rng(0).normal(size=(4, 8))
    got = jax.jit(
        jax.grad(
            lambda w: jnp.sum(
                look_up_and_update(specs, variables, {"f": ids}, {"f": w})["f"] * target.astype(np.float32)
            )
        )
    )(weights)

    def loss(weights):
        return np.sum(oracle.lookup(table, np.where(valid, ids, -1), combiner, weights) * target)

    differences = np.zeros(ids.shape)
    for place in zip(*np.nonzero(valid), strict=True):
        up, down = (weights.astype(np.float64) for _ in range(2))
        up[place] += 1e-5
        down[place] -= 1e-5
        differences[place] = (loss(up) - loss(down)) / 2e-5
    np.testing.assert_allclose(got, differences, rtol=1e-3, atol=1e-4)


def test_weight_gradients_of_a_quantized_table():
    """They are of the rows as they are looked up: with a sum and one id a sample, those rows."""
    config = embax.QuantizationConfig(min_value=-1.0, max_value=1.0, num_buckets=5)
    specs = {"f": oracle.feature_spec("f", oracle.table_spec(quantization_config=config), batch=4, valency=1)}
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids = {"f": np.array([3, 4, 5, 6], np.int32)}

    def loss(weights):
        return jnp.sum(look_up_and_update(specs, variables, ids, {"f": weights})["f"])

    got = jax.jit(jax.grad(loss))(np.ones(4, np.float32))
    rows = oracle.tables_of(variables, specs)["table"][0][3:7]
    np.testing.assert_allclose(
        got, (np.round((np.clip(rows, -1, 1) + 1) * 2) / 2 - 1).sum(axis=1), rtol=1e-5, atol=1e-6
    )


def test_gradients_of_other_types():
    """Weights of a narrow type, one leaf of several perturbed, and gains of a batch that the host packed."""
    specs = one_feature(batch=2, valency=2)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids = {"f": np.array([[1, 2], [3, 3]], np.int32)}

    def loss(weights):
        return jnp.sum(look_up_and_update(specs, variables, ids, {"f": weights})["f"])

    rows = oracle.tables_of(variables, specs)["table"][0].sum(axis=1)
    got = jax.jit(jax.grad(loss))(jnp.ones((2, 2), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), rows[ids["f"]], rtol=1e-2)
    plan, packed = make_plan(specs), embax.preprocess(ids, specs=specs)

    def loss_of_gains(gains):
        given = packed.replace(gains=gains)
        return jnp.sum(lookup_and_update(settings_of(plan), variables, jnp.zeros(()), given, None)[0])

    of_gains = np.asarray(jax.jit(jax.grad(loss_of_gains))(packed.gains))
    np.testing.assert_allclose(sorted(of_gains[of_gains != 0]), sorted(rows[[1, 2, 3]]), rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "loss", "argnums"),
    [
        ("native", prove_in_place.linear_loss, 0),
        ("native", prove_in_place.linear_loss, (0, 2)),
        ("native", prove_in_place.quadratic_loss, (0, 2)),
        ("portable", prove_in_place.linear_loss, (0, 2)),
    ],
)
def test_steps_on_raw_ids_are_in_place(backend, loss, argnums):
    """Also where the gradients of weights read the rows that the update writes."""
    target = np.ones((prove_in_place.BATCH, prove_in_place.DIM), np.float32)
    temporary = set()
    for vocabulary in prove_in_place.VOCABULARIES:
        specs = prove_in_place.feature_specs(vocabulary)
        plan = make_plan(specs)
        shapes = jax.eval_shape(lambda key, specs=specs: embax.init_embedding_variables(key, specs), jax.random.key(0))
        ids, weights = (
            dict.fromkeys(specs, jax.ShapeDtypeStruct((prove_in_place.BATCH, 2), dtype))
            for dtype in (jnp.int32, jnp.float32)
        )

        def total(variables, ids, weights, specs=specs, plan=plan):
            packed = embax.preprocess(ids, weights, specs=specs)
            looked_up = lookup_and_update(settings_of(plan), variables, jnp.zeros(()), packed, jnp.int32(0))
            return loss(dict(enumerate(looked_up)), target)

        with embax.use_backend(backend):
            step = jax.jit(jax.value_and_grad(total, argnums), donate_argnums=0)
            report = step.lower(shapes, ids, weights).compile(prove_in_place.FOR_MEMORY_ALONE).memory_analysis()
        assert report.alias_size_in_bytes >= sum(array.size * 4 for array in jax.tree.leaves(shapes))
        temporary.add(report.temp_size_in_bytes)
    assert len(temporary) == 1


def test_weights_that_are_not_differentiated_cost_nothing():
    specs = one_feature()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids, weights = {"f": np.zeros((4, 3), np.int32)}, {"f": np.ones((4, 3), np.float32)}

    def loss(variables, weights):
        return jnp.sum(look_up_and_update(specs, variables, ids, weights)["f"])

    def operations(argnums):
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(variables, weights))

    assert " gather[" not in operations(0)
    assert "embax_update" in operations(0)
    assert " gather[" in operations((0, 1))
    assert "embax_update" not in operations(1)  # Nothing asks for new tables.


def test_on_a_tpu():
    """Plain JAX packs for the SparseCores; gradients of weights would read their tables as no other operation can."""
    specs = one_feature(optimizer=embax.AdagradOptimizerSpec(0.1))
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids, weights = {"f": np.zeros((4, 3), np.int32)}, {"f": np.ones((4, 3), np.float32)}

    def lower(argnums):
        step = jax.grad(lambda v, w: jnp.sum(look_up_and_update(specs, v, ids, w)["f"]), argnums)
        return jax.jit(step).trace(variables, weights).lower(lowering_platforms=("tpu",)).as_text()

    assert "embax_pack" not in lower(0)
    with pytest.raises(
        ValueError, match="Stack 'table': gradients with respect to sample weights are not there for tables in"
    ):
        lower((0, 1))
    with embax.use_backend("portable"):
        lower((0, 1))


# What shapes and dtypes tell is an error as the step is traced.


@pytest.mark.parametrize(
    ("ids", "weights", "text"),
    [
        (
            np.ones((4, 3), np.float32),
            None,
            "Feature 'f': its ids are a JAX array of shape (4, 3) and dtype float32; they must be",
        ),
        (np.ones((4, 3), bool), None, "dtype bool; they must be integers"),
        (np.ones((4, 3, 1), np.int32), None, "Feature 'f': its ids have shape (4, 3, 1); they must have 2 dimensions"),
        (np.ones(4, np.int32), None, "here it has 3"),
        (np.int32(4), None, "its ids have shape ()"),
        (
            np.ones((4, 3), np.int32),
            np.ones((4, 2), np.float32),
            "dtype float32, its ids have shape (4, 3); weights must be",
        ),
        (
            np.ones((4, 3), np.int32),
            np.ones((4, 3), bool),
            "its weights are a JAX array of shape (4, 3) and dtype bool",
        ),
        (
            embax.Ragged(np.ones((4, 3), np.int32), np.zeros(5, np.int32)),
            None,
            "has values of shape (4, 3) and row_splits",
        ),
        (embax.Ragged(np.ones(4, np.int32), np.zeros(0, np.int32)), None, "must be 1-d, and row_splits one longer"),
        (embax.Ragged(np.ones(4, np.int32), np.zeros(5, np.float32)), None, "its row_splits are a JAX array"),
        (embax.Ragged(np.ones(4, np.int32), np.zeros(5, np.int32)), np.ones(3, np.float32), "but there are 4 ids"),
        (
            embax.Ragged(np.ones(4, np.int32), np.zeros(5, np.int32)),
            embax.Ragged(np.ones(4, np.float32), np.zeros(4, np.int32)),
            "its weights have 3 samples, its ids have 4",
        ),
    ],
)
def test_refused(ids, weights, text):
    with pytest.raises(ValueError) as error:
        raw_packer(one_feature())({"f": ids}, None if weights is None else {"f": weights})
    assert text in str(error.value)


def test_forms_that_only_the_host_takes():
    specs = one_feature(valency=2)
    dense = np.ones((2, 2), np.int32)
    coo = embax.SparseCoo(np.zeros((1, 2), int), np.ones(1, int), (2, 2))
    for make_ids, make_weights in (
        (lambda a: [a[0], a[1]], None),
        (lambda a: embax.SparseCoo(a, a[0], (2, 2)), None),
        (lambda a: embax.Ragged([a[0, 0], 1], [0, 2]), None),
        (lambda a: coo, lambda a: a[0]),
        (lambda a: [[1], [2]], lambda a: a[0]),
        (lambda a: a, lambda a: [[1.0, 1.0], [1.0, 1.0]]),
        (lambda a: embax.Ragged(a[0], a[:, 0]), lambda a: [[1.0, 1.0]]),
    ):
        with pytest.raises(ValueError, match=r"Feature 'f'.*(call it|pack) outside jit"):
            jax.jit(
                lambda a, make_ids=make_ids, make_weights=make_weights: (
                    embax.preprocess({"f": make_ids(a)}, make_weights and {"f": make_weights(a)}, specs=specs).gains
                )
            )(dense)


def test_the_structure_vmap_and_several_devices():
    specs = one_feature()
    with pytest.raises(ValueError, match=r"ids\['f'\] is missing; ids\['g'\] has no place"):
        raw_packer(specs)({"g": np.ones((4, 3), np.int32)})
    with pytest.raises(ValueError, match="embax_pack cannot be mapped by vmap. Make one larger batch"):
        jax.vmap(lambda ids: embax.preprocess({"f": ids}, specs=specs).gains)(np.ones((2, 4, 3), np.int32))
    with pytest.raises(ValueError, match="placed for 4 devices: inside jit each packs its own part"):
        raw_packer(one_feature(devices=4))({"f": np.ones((4, 3), np.int32)})


def test_more_ids_than_row_pointers_count():
    specs = one_feature()
    shape = jax.ShapeDtypeStruct((2**16, 2**15), jnp.int32)
    with pytest.raises(
        ValueError, match=r"Stack 'table': its features have 2147483648 ids in 65536 samples; .*Split the batch"
    ):
        jax.eval_shape(lambda ids: embax.preprocess({"f": ids}, specs=specs), shape)
