"""Minibatches: what must hold of their buffers, that results do not depend on them, and that hosts agree."""

import concurrent.futures
import threading

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from test_pack import batches, make_feature, make_table, place

import embax
from embax._preprocess.buffers import PADDING_VALUE
from embax._preprocess.packer import Packer


def bucket_of(column):
    """The bucket of an id of a stack."""
    mask = 2**32 - 1
    column = (column ^ (column >> 16)) * 0x85EBCA6B & mask
    column = (column ^ (column >> 13)) * 0xC2B2AE35 & mask
    return (column ^ (column >> 16)) >> 26


def segments(packed):
    """Yields (device, stack, SparseCore, minibatch, partition, rows, samples, gains), checking the row pointers."""
    layout = packed.layout
    S, N = layout.num_sparsecores_per_device, layout.num_sparsecores
    number = int(packed.num_minibatches[0])
    assert (packed.num_minibatches == number).all()
    for device in range(layout.num_local_devices):
        for stack in layout.stacks:
            first = device * layout.entries_per_device + stack.entries_start
            pointer = device * layout.row_pointers_per_device + stack.row_pointers_start
            end = 0
            for sparsecore in range(S):
                for minibatch in range(number):
                    pointers = packed.row_pointers[pointer : pointer + max(N, 8)]
                    pointer += max(N, 8)
                    for partition in range(N):
                        begin, stop = end, int(pointers[partition])
                        assert begin <= stop <= stack.capacity
                        end = -(-stop // 8) * 8
                        part = slice(first + begin, first + stop)
                        gap = slice(first + stop, first + end)
                        assert (packed.embedding_ids[gap] == PADDING_VALUE).all()
                        assert (packed.sample_ids[gap] == PADDING_VALUE).all()
                        assert np.isnan(packed.gains[gap]).all()
                        arrays = (packed.embedding_ids[part], packed.sample_ids[part], packed.gains[part])
                        yield device, stack, sparsecore, minibatch, partition, *arrays
                    assert (pointers[N:] == end).all()


def entries(packed):
    """All entries, and in which minibatches each id of a stack is."""
    everything, minibatches = [], {}
    for device, stack, sparsecore, minibatch, partition, rows, samples, gains in segments(packed):
        for row, sample, gain in zip(rows.tolist(), samples.tolist(), gains.tolist(), strict=True):
            everything.append((device, stack.name, sparsecore, partition, row, sample, gain))
            minibatches.setdefault((stack.name, partition, row), set()).add(minibatch)
    return sorted(everything), minibatches


@settings(deadline=None, max_examples=150)
@given(batches(), st.integers(1, 9), st.integers(1, 9))
def test_properties_of_the_buffers(batch, max_ids, max_unique_ids):
    options = {"limits": "grow", "enable_minibatching": True, "num_local_devices": None}
    devices = batch.local_devices
    specs = batch.specs
    packer = Packer(specs, **options)
    assume(packer.plan.num_devices == devices)  # Other batches hold the samples of some devices only.
    packer._limits.current[:, :2] = max_ids, max_unique_ids
    packed = packer(batch.ids, batch.weights)
    plain = Packer(specs)(batch.ids, batch.weights)
    for field in ("max_ids_per_partition", "max_unique_ids_per_partition", "required_buffer_size_per_sc"):
        for name, counts in getattr(plain.stats, field).items():
            np.testing.assert_array_equal(getattr(packed.stats, field)[name], counts)
    needed = any(
        (plain.stats.max_ids_per_partition[s.name] > max_ids).any()
        or (plain.stats.max_unique_ids_per_partition[s.name] > max_unique_ids).any()
        for s in plain.layout.stacks
    )
    assert int(packed.num_minibatches[0]) == 1 or needed
    # The same packer again, told to see no need: one minibatch holds what plain packing holds.
    whole = Packer(specs, **options)
    whole._limits.current[:, :2] = 10**6
    single = whole(batch.ids, batch.weights)
    assert single.num_minibatches.tolist() == [1] * devices
    everything, minibatches = entries(packed)
    assert everything == entries(single)[0]
    assert all(len(numbers) == 1 for numbers in minibatches.values())
    N = packer.plan.num_sparsecores
    for *_, partition, rows, samples, _ in segments(packed):
        order = np.lexsort((samples, rows))
        assert (order == np.arange(len(rows))).all()
        distinct = np.unique(rows)
        if len(rows) > max_ids or len(distinct) > max_unique_ids:
            assert len({bucket_of(int(row) * N + partition) for row in distinct}) == 1


def skewed(rng, vocabulary, shape):
    return (rng.zipf(1.3, shape) - 1) % vocabulary


def model(max_ids, batch=40, sparsecores=4, optimizer=None, **fields):
    tables = [
        oracle.table_spec(
            name,
            vocabulary,
            combiner="mean",
            optimizer=optimizer or embax.AdagradOptimizerSpec(0.1),
            max_ids_per_partition=max_ids,
            max_unique_ids_per_partition=max_ids,
            **fields,
        )
        for name, vocabulary in (("a", 3000), ("b", 50))
    ]
    features = {t.name: oracle.feature_spec(t.name, t, batch=batch, valency=6) for t in tables}
    return embax.prepare_feature_specs_for_training(features, 1, sparsecores)


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("sparsecores", [1, 3, 4, 9])
def test_results_do_not_depend_on_minibatches(backend, sparsecores):
    rng = np.random.default_rng(0)
    specs = model(4, sparsecores=sparsecores)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids = {"a": skewed(rng, 3000, (40, 6)), "b": skewed(rng, 50, (40, 6))}
    gradients = {name: jnp.asarray(rng.normal(size=(40, 8)), jnp.float32) for name in ids}
    results = []
    for minibatching in (False, True):
        packed = embax.preprocess(ids, specs=specs, limits="grow", enable_minibatching=minibatching)
        with embax.use_backend(backend):
            activations = embax.lookup(packed, variables, specs=specs)
            new = embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)
        results.append((activations, new))
    assert int(packed.num_minibatches[0]) > 3
    for plain, minibatched in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(results[1][0]), strict=True):
        np.testing.assert_allclose(plain, minibatched, rtol=1e-5, atol=1e-6)
    for plain, minibatched in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        if backend == "native":  # A row is in one minibatch, so its gradient is summed in the same order.
            np.testing.assert_array_equal(plain, minibatched)
        else:
            np.testing.assert_allclose(plain, minibatched, rtol=1e-5, atol=1e-6)


def test_the_number_of_minibatches_does_not_recompile():
    specs = model(4, suggested_coo_buffer_size_per_device=4096)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    traces, numbers = 0, set()

    @jax.jit
    def predict(variables, packed):
        nonlocal traces
        traces += 1
        return embax.lookup(packed, variables, specs=specs)

    for distinct in (1, 5, 60, 200):
        ids = np.arange(240).reshape(40, 6) % distinct
        packed = embax.preprocess({"a": ids, "b": ids % 3}, specs=specs, limits="drop", enable_minibatching=True)
        numbers.add(int(packed.num_minibatches[0]))
        got = predict(variables, packed)
        if distinct >= 60:  # Fewer ids are in one bucket too often, and were dropped in part.
            rows = oracle.tables_of(variables, specs)["a"][0]
            np.testing.assert_allclose(got["a"], oracle.lookup(rows, ids, "mean"), rtol=1e-5, atol=1e-5)
    assert len(numbers) > 1
    assert traces == 1


def test_sizes():
    table = make_table(vocabulary=64, max_ids_per_partition=16)
    specs = place({"f": make_feature("f", table)}, 1, 4)
    packed = embax.preprocess({"f": [[1]]}, specs=specs, enable_minibatching=True)
    assert (packed.row_pointers.size, packed.embedding_ids.size) == (2048, 16384)
    assert packed.num_minibatches.tolist() == [1]
    assert packed.num_minibatches.dtype == np.int32
    assert embax.preprocess({"f": [[1]]}, specs=specs).num_minibatches is None


def test_all_stacks_share_the_number():
    specs = place(
        {n: make_feature(n, make_table(n, 64, max_ids_per_partition=m)) for n, m in (("a", 2), ("b", 99))}, 1, 1
    )
    ids = {"a": [list(range(10))], "b": [list(range(10))]}
    packed = embax.preprocess(ids, specs=specs, limits="drop", enable_minibatching=True)
    used = {name: set() for name in "ab"}
    for _, stack, _, minibatch, _, rows, *_ in segments(packed):
        if len(rows):
            used[stack.name].add(minibatch)
    assert len(used["b"]) > 1
    assert len(used["a"] | used["b"]) == int(packed.num_minibatches[0])


HOT = [[5], [5], [5], [5], [5, 6]]


def test_a_hot_id_cannot_be_divided():
    specs = place({"f": make_feature("f", make_table(vocabulary=64, max_ids_per_partition=2))}, 1, 1)
    with pytest.raises(
        embax.LimitExceededError, match="has 5 ids for the rows of SparseCore 0 in one minibatch, above"
    ):
        embax.preprocess({"f": HOT}, specs=specs, enable_minibatching=True)
    dropped = embax.preprocess({"f": HOT}, specs=specs, enable_minibatching=True, limits="drop")
    assert dropped.stats.id_drop_counters == {"t": 3}
    assert len(entries(dropped)[0]) == 3
    grown = embax.preprocess({"f": HOT}, specs=specs, enable_minibatching=True, limits="grow")
    assert len(entries(grown)[0]) == 6


def test_a_shared_buffer_that_is_too_small():
    table = make_table(vocabulary=64, max_ids_per_partition=16, suggested_coo_buffer_size_per_device=16)
    specs = place({"f": make_feature("f", table)}, 1, 2)
    ids = {"f": [list(range(24)), [0]]}
    with pytest.raises(
        embax.LimitExceededError, match="local device 0 needs 40 entries of the packed buffer, above the 16"
    ):
        embax.preprocess(ids, specs=specs, enable_minibatching=True)
    packed = embax.preprocess(ids, specs=specs, enable_minibatching=True, limits="drop")
    assert packed.stats.id_drop_counters == {"t": 25 - 12}
    assert packed.row_pointers[:16].tolist() == [12, *[16] * 15]


def test_leading_dimension():
    specs = place({"f": make_feature("f", make_table(vocabulary=64))}, 2, 2)
    ids = {"f": np.arange(8).reshape(4, 2)}
    flat = embax.preprocess(ids, specs=specs, enable_minibatching=True)
    packed = embax.preprocess(ids, specs=specs, enable_minibatching=True, has_leading_dimension=True)
    for name in ("row_pointers", "embedding_ids", "sample_ids", "gains", "num_minibatches"):
        assert getattr(packed, name).shape == (2, getattr(flat, name).size // 2)
    assert packed.num_minibatches.shape == (2, 1)
    np.testing.assert_array_equal(packed.row_pointers[:, :16].reshape(-1)[:8], flat.row_pointers[:8])
    assert packed.layout == flat.layout


class Hosts:
    """Packs the parts of a batch in threads that stand for hosts."""

    def __init__(self, specs, num_hosts, all_reduce, **options):
        self.packers = [
            Packer(specs, num_local_devices=1, enable_minibatching=True, all_reduce=all_reduce.member(host), **options)
            for host in range(num_hosts)
        ]

    def pack(self, parts):
        results = [None] * len(parts)

        def run(host):
            try:
                results[host] = self.packers[host](parts[host])
            except Exception as error:
                results[host] = error

        threads = [threading.Thread(target=run, args=(host,)) for host in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return results


def four_hosts():
    table = make_table(vocabulary=4000, max_ids_per_partition=8, max_unique_ids_per_partition=8)
    other = make_table("u", vocabulary=50, max_ids_per_partition=64, max_unique_ids_per_partition=8)
    specs = place({"f": make_feature("f", table), "g": make_feature("g", other)}, 4, 4)
    return specs, Hosts(specs, 4, embax.ThreadAllReduce(4), limits="drop")


def test_hosts_agree_with_one_process():
    specs, hosts = four_hosts()
    rng = np.random.default_rng(0)
    for batch in range(5):
        # Only the last host's part is beyond the limits, or none is.
        ids = np.arange(256 * 4).reshape(256, 4)
        if batch % 2:
            ids[192:] = rng.integers(0, 250, (64, 4)) * 16
        whole = {"f": ids, "g": ids % 5}
        together = embax.preprocess(whole, specs=specs, limits="drop", enable_minibatching=True)
        parts = [{name: leaf[64 * host : 64 * host + 64] for name, leaf in whole.items()} for host in range(4)]
        packed = hosts.pack(parts)
        assert (int(together.num_minibatches[0]) > 1) == bool(batch % 2)
        assert {int(p.num_minibatches[0]) for p in packed} == {int(together.num_minibatches[0])}
        got = sorted((host, *entry[1:]) for host, p in enumerate(packed) for entry in entries(p)[0])
        assert got == entries(together)[0]


def assert_only_host_2_tells_why(results, kind):
    assert isinstance(results[2], kind)
    for host in (0, 1, 3):
        assert type(results[host]) is RuntimeError
        assert "could be packed here, but not on another host" in str(results[host])


def test_a_host_that_fails_ends_the_others():
    _, hosts = four_hosts()
    good = {"f": np.zeros((4, 1), int), "g": np.zeros((4, 1), int)}
    bad = {"f": np.full((4, 1), 4000), "g": np.zeros((4, 1), int)}
    assert_only_host_2_tells_why(hosts.pack([good, good, bad, good]), ValueError)
    assert all(isinstance(result, embax.PreprocessedInput) for result in hosts.pack([good] * 4))


@pytest.mark.parametrize(
    ("ids", "minibatched"),
    [
        pytest.param([[0], [16], [32]] * 4 + [[0]] * 20, True, id="one id too often"),
        pytest.param(np.arange(0, 1600).reshape(-1, 16) % 16, False, id="a buffer too small"),
    ],
)
def test_a_host_beyond_its_limits_ends_the_others(ids, minibatched):
    limit = 4 if minibatched else 256
    table = make_table(
        vocabulary=4000,
        max_ids_per_partition=limit,
        max_unique_ids_per_partition=limit,
        suggested_coo_buffer_size_per_device=None if minibatched else 512,
    )
    specs = place({"f": make_feature("f", table)}, 4, 4)
    hosts = Hosts(specs, 4, embax.ThreadAllReduce(4), limits="raise")
    good = {"f": np.zeros((4, 1), int)}
    assert_only_host_2_tells_why(hosts.pack([good, good, {"f": ids}, good]), embax.LimitExceededError)
    assert all(isinstance(result, embax.PreprocessedInput) for result in hosts.pack([good] * 4))


def test_packers_that_share_an_all_reduce_count_their_batches_together():
    specs, _ = four_hosts()
    all_reduce = embax.ThreadAllReduce(4, timeout_s=30)
    members = [all_reduce.member(host) for host in range(4)]
    options = {"num_local_devices": 1, "enable_minibatching": True, "limits": "drop"}
    train, evaluate = ([Packer(specs, all_reduce=member, **options) for member in members] for _ in range(2))
    ids = {"f": np.zeros((4, 1), int), "g": np.zeros((4, 1), int)}

    def run(host):
        # Hosts go on to the next batch, of another packer, before all have finished the last one.
        for packers in (train, evaluate, train, evaluate) * 5:
            packers[host](ids)
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))
    assert members[0].next_batch_number() == 20


def test_distributed_all_reduces_are_one():
    assert embax.DistributedAllReduce() == embax.DistributedAllReduce()
    specs = place({"f": make_feature("f", make_table(vocabulary=5000))}, 1, 1)
    layouts = set()
    for _ in range(5):
        options = {"all_reduce": embax.DistributedAllReduce(), "enable_minibatching": True, "limits": "grow"}
        size = 100 if layouts else 200
        layouts.add(embax.preprocess({"f": np.arange(size).reshape(-1, 1)}, specs=specs, **options).layout)
    assert len(layouts) == 2  # One for each batch size: the limits that have grown stay.
    assert {stack.capacity for layout in layouts for stack in layout.stacks} == {288}


@pytest.mark.parametrize("number", ["x", -1, 2**60, 1.0, True])
def test_batch_numbers(number):
    specs = place({"f": make_feature("f", make_table())}, 1, 1)
    with pytest.raises(ValueError, match=r"batch_number is .*; it must be an integer from 0 to 2\*\*60 - 1, or None"):
        embax.preprocess({"f": [[1]]}, specs=specs, batch_number=number)


@pytest.mark.parametrize("option", ["enable_minibatching", "has_leading_dimension"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_options_are_true_or_false(option, value):
    specs = place({"f": make_feature("f", make_table())}, 1, 1)
    for good in (True, False, np.True_):
        embax.preprocess({"f": [[1]]}, specs=specs, **{option: good})
    with pytest.raises(ValueError, match=f"Packer: {option} is {value!r}; it must be True or False."):
        embax.preprocess({"f": [[1]]}, specs=specs, **{option: value})


def test_several_processes_need_a_way_to_agree():
    specs = place({"f": make_feature("f", make_table())}, 2, 1)
    with pytest.raises(ValueError, match=r"enable_minibatching with 1 of 2 devices .* Pass all_reduce, such as"):
        embax.preprocess({"f": [[1]]}, specs=specs, num_local_devices=1, enable_minibatching=True)
    with pytest.raises(ValueError, match="pass enable_minibatching=True with it"):
        embax.preprocess({"f": [[1]]}, specs=specs, num_local_devices=1, all_reduce=embax.DistributedAllReduce())
    with pytest.raises(ValueError, match="all_reduce is a ThreadAllReduce; it must be .* a member of"):
        embax.preprocess({"f": [[1]]}, specs=specs, enable_minibatching=True, all_reduce=embax.ThreadAllReduce(1))
