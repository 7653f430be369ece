"""The low level of packing in `embax.compat`, how its hosts agree, and what keeps its statistics."""

import concurrent.futures
import gc
import socket
import threading
import time

import jax
import numpy as np
import pytest
from compat_specs import feature, placed, table

from embax.compat import _peers
from embax.compat.sparsecore.lib.core import constants, input_preprocessing
from embax.compat.sparsecore.lib.core import pybind_input_preprocessing as pybind
from embax.compat.sparsecore.lib.fdo import csv_file_fdo_client, fdo_client, file_fdo_client
from embax.compat.sparsecore.lib.nn import embedding


def test_the_low_level_takes_any_id():
    features = placed([feature("f", table(vocabulary=20, max_ids_per_partition=64))])
    ids, options = (
        np.arange(16).reshape(16, 1),
        {"local_device_count": 1, "global_device_count": 1, "num_sc_per_device": 4},
    )
    *small, number, stats = pybind.preprocess_sparse_dense_matmul_input([ids], None, features, **options)
    *large, _, _ = pybind.preprocess_sparse_dense_matmul_input(
        [ids + 4000], [np.full((16, 1), 2.0)], features, **options
    )
    assert number == 1
    assert stats.dropped_id_count == {"table": 0}
    used = small[1]["table"] < 20
    ends = small[0]["table"].reshape(4, 8)[:, :4]
    used = np.concatenate([np.arange(256) < end[-1] for end in ends])
    real = used & (np.arange(1024) % 8 == 0)
    np.testing.assert_array_equal(large[0]["table"], small[0]["table"])
    np.testing.assert_array_equal(large[1]["table"][real], small[1]["table"][real] + 1000)
    np.testing.assert_array_equal(large[3]["table"][real], 2 * small[3]["table"][real])
    *sparse, _, _ = pybind.preprocess_sparse_dense_matmul_sparse_coo_input(
        [np.stack([np.arange(16), np.zeros(16, int)], 1)], [ids[:, 0]], [(16, 1)], features, **options
    )
    for mine, other in zip(sparse, small, strict=True):
        part = slice(None) if mine is sparse[0] else real
        np.testing.assert_array_equal(mine["table"][part], other["table"][part])
    sizes = 1, 4
    assert pybind.compute_row_pointers_size_per_device(*sizes) == small[0]["table"].size
    assert pybind.compute_theoretical_max_coo_buffer_size(64, *sizes) == small[1]["table"].size
    assert pybind.compute_coo_buffer_size_per_device(features, *sizes) == {"table": small[1]["table"].size}
    for message, changes in {
        "num_sc_per_device must be greater than 0": {"num_sc_per_device": 0},
        r"Total number of SparseCores \(12\) must be a power of 2": {"global_device_count": 3},
        "it must be ShardingStrategy.MOD": {"sharding_strategy": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            pybind.preprocess_sparse_dense_matmul_input([ids], None, features, **(options | changes))


class FourDevices:
    devices = np.arange(4)


def test_whole_buffers():
    ids, ones = [[0, 16, 16], [1], [], [17]], [[1.0, 2.0, 3.0], [1.0], [], [1.0]]
    arguments = {"max_ids_per_partition": 3, "max_unique_ids_per_partition": 3, "num_sc_per_device": 4}
    pack = input_preprocessing.preprocess_sparse_dense_matmul_input
    pointers, rows, samples, gains = pack(ids, ones, FourDevices, **arguments)
    assert pointers.shape == (64,)
    np.testing.assert_array_equal(pointers.reshape(4, 16)[:, :2], [[2, 8], [0, 1], [0, 0], [0, 1]])
    assert rows.shape == samples.shape == gains.shape == (8 * 4 * 16,)
    used = [0, 1, 128, 384]
    np.testing.assert_array_equal(rows[used], [0, 1, 0, 1])
    np.testing.assert_array_equal(gains[used], [1, 5, 1, 1])
    others = np.delete(np.arange(512), used)
    assert (rows[others] == constants.PADDING_VALUE).all()
    assert (samples[others] == constants.PADDING_VALUE).all()
    assert np.isnan(gains[others]).all()
    # Rows of one length, which NumPy makes one object array of.
    rows_of_one = np.array([np.array([5]), np.array([3]), np.array([2]), np.array([1])], dtype=object)
    assert rows_of_one.ndim == 2
    objects = pack(rows_of_one, np.ones((4, 1), object), FourDevices, **arguments)
    jax.tree.map(
        np.testing.assert_array_equal, objects, pack([[5], [3], [2], [1]], [[1.0]] * 4, FourDevices, **arguments)
    )
    # Minibatches follow one another, SparseCore by SparseCore.
    pointers, rows, _, _ = pack([ids, ids], [ones, ones], FourDevices, enable_minibatching=True, **arguments)
    ends = pointers.reshape(4, 2, 16)[..., :2]
    np.testing.assert_array_equal(ends[0], [[2, 8], [10, 16]])
    np.testing.assert_array_equal(ends[1], [[16, 17], [24, 25]])
    np.testing.assert_array_equal(rows[[8, 9, 16, 24]], [0, 1, 0, 0])
    for message, changes in {
        "max_ids_per_partition must be positive": {"max_ids_per_partition": 0},
        "2 ids for the rows": {"max_ids_per_partition": 1},
        "2 distinct ids": {"max_unique_ids_per_partition": 1},
        "only MOD is supported": {"sharding_strategy": "DIV"},
    }.items():
        with pytest.raises(ValueError, match=message):
            pack(ids, ones, FourDevices, **(arguments | changes))
    with pytest.raises(ValueError, match="4 features and 3 weights"):
        pack(ids, ones[:3], FourDevices, **arguments)
    with pytest.raises(ValueError, match="an array of rank 1"):
        pack(np.arange(4), np.ones(4), FourDevices, **arguments)


def free_ports(number):
    servers = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def run_hosts(hosts, call):
    with concurrent.futures.ThreadPoolExecutor(hosts) as pool:
        futures = [pool.submit(call, host) for host in range(hosts)]
    return [future.exception() or future.result() for future in futures]


def peers_of(ports, host):
    return [f"localhost:{port}" for port in ports if port != ports[host]]


def test_hosts_agree_on_minibatches():
    hosts, ports = 4, free_ports(4)
    features = placed([feature("f", table(max_ids_per_partition=2, max_unique_ids_per_partition=2), 64)], 4)
    ids = np.random.default_rng(0).integers(0, 50, (4, 16, 4))
    ids[0] = -1  # This host alone would need no minibatches.
    before = threading.active_count()

    def call(host):
        interface = embedding.get_all_reduce_interface(peers_of(ports, host), ports[host], host, hosts)
        return [
            embedding.preprocess_sparse_dense_matmul_input(
                *([ids[host]], None, features, 1, hosts),
                num_sc_per_device=4,
                enable_minibatching=True,
                all_reduce_interface=interface,
                batch_number=batch,
                allow_id_dropping=True,
            )[0].num_minibatches.tolist()
            for batch in (0, 1, 1)
        ]

    results = run_hosts(hosts, call)
    assert len({str(result) for result in results}) == 1
    assert results[0][0][0] > 1
    # Connections end with what holds them.
    gc.collect()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_host_that_is_gone_is_told_of(monkeypatch):
    ports = free_ports(2)

    def call(host):
        interface = pybind.MinibatchingNode(host, 2, peers_of(ports, host), ports[host]).get_all_reduce_interface()
        first = interface.bitwise_or(0, 1 << (host + 40))
        if host:
            interface.close()
            return first
        with pytest.raises(RuntimeError, match="closed"):
            list(map(interface.bitwise_or, range(1, 1000), [1] * 999))
        return first

    assert run_hosts(2, call) == [3 << 40] * 2
    monkeypatch.setattr(_peers, "TIMEOUT_S", 0.1)
    with pytest.raises(TimeoutError, match=r"localhost:\d+ cannot be reached"):
        embedding.get_all_reduce_interface(peers_of(ports, 0), 0, 0, 2).bitwise_or(0, 1)
    with pytest.raises(ValueError, match="1 peer addresses for 3 hosts"):
        embedding.get_all_reduce_interface(peers_of(ports, 0), 0, 0, 3).bitwise_or(0, 1)
    for address in ("nowhere", "host:port", ":80", "host:70000"):
        with pytest.raises(ValueError, match="it must be 'host:port'"):
            embedding.get_all_reduce_interface([address], 0, 0, 2)
    assert _peers._host_and_port("ipv4:10.0.0.1:80") == ("10.0.0.1", 80)
    assert _peers._host_and_port("dns:///host:80") == ("host", 80)
    assert _peers._host_and_port("[::1]:80") == ("::1", 80)
    assert embedding.get_all_reduce_interface([], 0).bitwise_or(5, 7) == 7  # One process.


@pytest.mark.parametrize("make", [file_fdo_client.NPZFileFDOClient, csv_file_fdo_client.CSVFileFDOClient])
def test_clients_of_statistics(make, tmp_path, monkeypatch):
    features = placed([feature("f", table())])
    _, stats = embedding.preprocess_sparse_dense_matmul_input([np.zeros((16, 3), int)], None, features, 1, 1)
    assert issubclass(make, fdo_client.FDOClient)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        client = make(str(tmp_path))
        client.record(data=stats)
        client.publish()
    loaded = make(str(tmp_path)).load()
    assert isinstance(loaded, embedding.SparseDenseMatmulInputStats)
    np.testing.assert_array_equal(loaded.max_ids_per_partition["table"], stats.max_ids_per_partition["table"])
    paths = sorted(map(str, tmp_path.iterdir()))
    assert len(paths) == 2
    assert client._get_latest_files_by_process(paths) == paths
    embedding.update_preprocessing_parameters(features, loaded, 4)
    assert features[0].table_spec.stacked_table_spec.suggested_coo_buffer_size_per_device == 32
