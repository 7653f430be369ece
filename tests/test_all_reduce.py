"""Hosts that agree on a value: threads of one process, and real processes."""

import concurrent.futures
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import all_reduce_process
import pytest

import embax
from embax import AllReduceInterface, DistributedAllReduce, ThreadAllReduce

PATIENCE_S = 30.0
"""Longer than anything here takes; a test that fails waits for it, but never hangs."""


def run_hosts(hosts, call):
    """What `call(host)` returns or raises in a thread of each host."""
    pool = concurrent.futures.ThreadPoolExecutor(hosts)
    futures = [pool.submit(call, host) for host in range(hosts)]
    pool.shutdown(wait=False)
    done, _ = concurrent.futures.wait(futures, PATIENCE_S)
    assert len(done) == hosts, "a host still waits"
    return [future.exception() or future.result() for future in futures]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_threads_get_the_or_of_all():
    hosts = ThreadAllReduce(4, PATIENCE_S)
    assert run_hosts(4, lambda host: hosts.member(host).bitwise_or(7, 1 << (16 * host))) == [0x0001_0001_0001_0001] * 4
    assert run_hosts(4, lambda host: hosts.member(host).bitwise_or(8, 0)) == [0] * 4
    assert run_hosts(4, lambda host: hosts.member(host).bitwise_or(9, 2**64 - 1)) == [2**64 - 1] * 4


def test_one_host_gets_its_own_value():
    host = ThreadAllReduce(1, PATIENCE_S).member(0)
    assert isinstance(host, AllReduceInterface)
    assert [host.bitwise_or(key, key) for key in (3, 3, 5)] == [3, 3, 5]


def test_keys_in_any_order_at_once():
    """Each host has a thread a key, started in an order of its own, and no key waits for another."""
    hosts, keys = ThreadAllReduce(3, PATIENCE_S), 12

    def call(host):
        order = list(range(keys))
        random.Random(host).shuffle(order)
        with concurrent.futures.ThreadPoolExecutor(keys) as pool:
            return dict(
                zip(order, pool.map(lambda key: hosts.member(host).bitwise_or(key, key << host), order), strict=True)
            )

    assert run_hosts(3, call) == [{key: key | key << 1 | key << 2 for key in range(keys)}] * 3


def test_finished_keys_leave_nothing_behind():
    hosts = ThreadAllReduce(2, PATIENCE_S)
    for value in (1, 2):  # A key that is forgotten may be used again.
        assert run_hosts(2, lambda host, value=value: hosts.member(host).bitwise_or(4, value)) == [value] * 2
        assert not hosts._rounds


def test_a_missing_host_fails_all_that_wait_and_itself():
    hosts = ThreadAllReduce(3, 0.2)
    errors = run_hosts(2, lambda host: hosts.member(host).bitwise_or(6, 1))
    with pytest.raises(TimeoutError) as late:
        hosts.member(2).bitwise_or(6, 1)
    for error in (*errors, late.value):
        assert isinstance(error, TimeoutError)
        assert re.search(r"key 6: hosts \[2\] of 3 did not call it within 0.2 s.*raise timeout_s", str(error))
    assert len({*map(id, errors), id(late.value)}) == 3
    assert not hosts._rounds


def test_a_host_that_calls_twice_fails_all():
    hosts = ThreadAllReduce(3, PATIENCE_S)

    def call(host):
        if host == 1:  # After host 0, in place of host 2.
            wait_until(lambda: hosts._rounds)
            return hosts.member(0).bitwise_or(6, 1)
        if host == 2:
            wait_until(lambda: hosts._rounds and hosts._rounds[6].failure)
        return hosts.member(host).bitwise_or(6, 1)

    for error in run_hosts(3, call):
        assert isinstance(error, ValueError)
        assert re.search(
            r"key 6: host 0 called it twice, before hosts \[1, 2\] called it once. .* every key once", str(error)
        )
    # The other host learns it too, at once.
    with pytest.raises(ValueError, match="host 0 called it twice"):
        hosts.member(1).bitwise_or(6, 1)
    assert not hosts._rounds


def test_an_error_of_one_key_leaves_others_alone():
    hosts = ThreadAllReduce(2, 0.2)
    with pytest.raises(TimeoutError):
        hosts.member(0).bitwise_or(1, 1)
    assert run_hosts(2, lambda host: hosts.member(host).bitwise_or(2, host)) == [1, 1]


@pytest.mark.parametrize("reduce", [ThreadAllReduce(2, 0.2).member(0), DistributedAllReduce()])
@pytest.mark.parametrize("value", [-1, 2**64, 1.0, None, "1"])
def test_values_out_of_range(reduce, value):
    with pytest.raises(ValueError, match=re.escape(f"value is {value!r}; it must be an integer from 0 to 2**64 - 1")):
        reduce.bitwise_or(0, value)
    with pytest.raises(ValueError, match=re.escape(f"key is {value!r}; it must be an integer from 0 to 2**63 - 1")):
        reduce.bitwise_or(value, 0)


def test_bad_hosts_and_timeouts():
    with pytest.raises(ValueError, match="ThreadAllReduce: num_hosts is 0"):
        ThreadAllReduce(0)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"timeout_s is {timeout}; it must be positive"):
            ThreadAllReduce(2, timeout)
    for host in (-1, 2, 1.0, True):
        with pytest.raises(ValueError, match=f"host is {host}; it must be from 0 to 1"):
            ThreadAllReduce(2).member(host)


def test_one_process_gets_its_own_value():
    reduce = DistributedAllReduce()
    assert isinstance(reduce, AllReduceInterface)
    assert reduce.bitwise_or(0, 2**64 - 1) == 2**64 - 1


def test_only_the_main_thread_may_reduce_over_processes():
    with concurrent.futures.ThreadPoolExecutor(1, "prefetch") as pool:
        future = pool.submit(DistributedAllReduce().bitwise_or, 12, 1)
        with pytest.raises(
            RuntimeError, match=r"key 12 in thread 'prefetch_0'\. .* only the main thread may: pack there"
        ):
            future.result(PATIENCE_S)


def test_reducing_in_one_process_starts_no_backend():
    code = (
        "import embax, jax; embax.DistributedAllReduce().bitwise_or(0, 1); jax.config.update('jax_num_cpu_devices', 3)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def start(coordinator, processes):
    """Runs `all_reduce_process.py` in each process; the results, or the output of those that failed."""
    script = Path(__file__).with_name("all_reduce_process.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, coordinator, str(processes), str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for process in range(processes)
    ]
    try:
        with concurrent.futures.ThreadPoolExecutor(processes) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=120), running))
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        return None, "\n".join(error for _, error in outputs)
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs], ""


@pytest.fixture(scope="module")
def two_processes():
    """What two processes got; they meet at a port that was free a moment ago, so another one is tried if it no longer is."""
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results, errors = start(f"127.0.0.1:{port}", 2)
        if results is not None:
            return results
        if not re.search("address already in use|failed to bind|could not bind", errors, re.IGNORECASE):
            break
    pytest.fail(errors)


def test_processes_get_the_or_of_all(two_processes):
    for results in two_processes:
        assert results["small"] == 3
        assert results["large"] == (1 << 63) | (3 << 32) | 1
        assert results["zero"] == 0
        assert results["many"] == [2 * key + 1 for key in range(2, 12)]


def test_processes_with_different_keys_all_get_an_error(two_processes):
    for results in two_processes:
        assert re.match(
            rf"OutOfStepError: The processes reduce different keys: {{0: 100, 1: {100 + 2**40}}} by process. .* same order",
            results["keys differ"],
        )
        assert results["afterwards"] == 5


def test_processes_pack_as_one_would(two_processes):
    """The second process alone is beyond a limit, and both get the minibatches of one process with four devices."""
    specs, ids = all_reduce_process.problem()
    packed = embax.preprocess(ids, specs=specs, enable_minibatching=True)
    assert int(packed.num_minibatches[0]) > 1
    alone = embax.preprocess([ids[0][:128]], specs=specs, num_local_devices=2)
    assert alone.stats.max_ids_per_partition["t"].max() <= 16
    got = [device for results in two_processes for device in results["packed"]]
    assert got == [all_reduce_process.summary(packed, device) for device in range(4)]


def test_processes_reduce_in_their_main_thread_only(two_processes):
    for results in two_processes:
        assert results["thread"].startswith(
            "RuntimeError: DistributedAllReduce was called with key 200 in thread 'prefetch'"
        )


def test_threads_of_a_process_are_freed_by_a_late_host():
    """A host that comes within the time releases all that wait."""
    hosts = ThreadAllReduce(2, PATIENCE_S)
    results = []
    waiting = threading.Thread(target=lambda: results.append(hosts.member(0).bitwise_or(0, 1)))
    waiting.start()
    wait_until(lambda: hosts._rounds)
    assert hosts.member(1).bitwise_or(0, 2) == 3
    waiting.join(PATIENCE_S)
    assert results == [3]
    assert embax.ThreadAllReduce is ThreadAllReduce
