"""The protocol between a benchmark and the processes of its sides, and the check that all compute the same."""

import dataclasses

import numpy as np
import pytest

from benchmarks import targets
from benchmarks.processes import EMBAX, PEERS, known_fault, running
from benchmarks.targets import Target
from benchmarks.trials import Ratio, compare, compare_with_peers, groups_of, in_turns, observed
from benchmarks.workloads import HOT_ID, HUGE, Workload

TINY = Workload("tiny", 3, 50, 16, 32, 2, 1.05)


def test_embax_and_plain_jax_take_turns_and_a_side_that_computes_something_else_is_found(tmp_path):
    (trial,) = compare_with_peers(TINY, "adagrad", [PEERS["jax"]], tmp_path, rounds=2).values()
    assert trial.equal
    assert len(trial.embax) == len(trial.peer) == 2
    assert min(trial.embax + trial.peer) > 0

    ids = TINY.write(tmp_path)
    other = tmp_path / "other"
    TINY.write(other)
    np.save(other / "targets.npy", np.load(other / "targets.npy") + np.float32(0.1))
    ours, theirs = TINY.setting("adagrad", str(tmp_path)), TINY.setting("adagrad", str(other))
    with running((EMBAX, ours), (PEERS["jax"], theirs)) as sides:
        expected, found = (observed(side, ids) for side in sides)
        times = sides[0].time(3, count=4, part="lookup")
        assert len(times) == 4
        assert sides[0].memory()["peak"] >= 0
    with pytest.raises(AssertionError, match="plain JAX"):
        compare("plain JAX", expected, found)
    # Nor may one row alone differ.
    rows = [array.copy() for array in expected.rows]
    rows[-1][3] += 1e-4
    with pytest.raises(AssertionError, match="rows of plain JAX"):
        compare("plain JAX", expected, expected._replace(rows=rows))
    # In columns that a side is known to get wrong, it may; that is told.
    rows = [array.copy() for array in expected.rows]
    rows[-1][3, -1] += 1e-4
    fault = known_fault(PEERS["ipex"], ours)
    assert not compare("IPEX", expected, expected._replace(rows=rows), fault)
    rows[-1][3, 0] += 1e-4
    with pytest.raises(AssertionError, match="rows of IPEX"):
        compare("IPEX", expected, expected._replace(rows=rows), fault)


def test_processes_take_turns_where_memory_is_short(tmp_path):
    ids = TINY.write(tmp_path)
    (trial,) = in_turns([EMBAX], TINY.setting("sgd", str(tmp_path)), ids, rounds=1).values()
    assert trial.equal
    assert len(trial.embax) == len(trial.peer) == 1


def test_a_side_that_ends_says_why(tmp_path):
    setting = dataclasses.replace(TINY.setting("sgd", str(tmp_path / "missing")))
    with pytest.raises(RuntimeError, match="No such file"), running((EMBAX, setting)):
        pass


def test_what_runs_at_once_follows_from_bytes():
    peers = list(PEERS.values())
    together, in_turns, left_out = groups_of(peers, HUGE, "sgd", 22e9)
    assert sorted(peer.module for group in together for peer in group) == ["fbgemm", "ipex", "torch_bags"]
    assert all(len(group) == 1 for group in together)
    assert (in_turns, left_out) == ([], [PEERS["jax"]])
    together, in_turns, left_out = groups_of(peers, HUGE, "adagrad", 22e9)
    assert (together, len(in_turns[0]), left_out) == ([], 3, [PEERS["jax"]])
    assert len(groups_of(peers, HUGE, "sgd", 1e12)[0]) == 1


def test_a_hot_id_is_in_every_sample():
    for ids in dataclasses.replace(TINY, hot=True).batches(1)[0].values():
        assert (ids[:, 0] == HOT_ID).all()
        assert (ids[:, 1] != HOT_ID).any()


def test_ratios_and_targets():
    assert Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, 1.0, 3.0)
    old = targets.table([Target("one", "1", True), Target("two", "2", True)])
    new = targets.table([Target.at_most("two", "{:.1f}", 3.0, 2.0)], old)
    assert new.splitlines()[2:] == ["| one | 1 | yes |", "| two | 3.0 | **no** |"]
    assert Target.at_least("three", "{:.0f}, {:.0f}", (5.0, 4.0), (1.0, 2.0)) == ("three", "5, 1", False)
