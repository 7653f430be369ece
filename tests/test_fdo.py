"""Statistics that are kept in files, and the limits that follow from them."""

import csv
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, settings

import embax
from embax import SparseDenseMatmulInputStats
from embax.fdo import CSVFileFDOClient, FDOClient, NPZFileFDOClient

CLIENTS = (NPZFileFDOClient, CSVFileFDOClient)
FIELDS = {
    "max_ids_per_partition": "_max_ids",
    "max_unique_ids_per_partition": "_max_unique_ids",
    "required_buffer_size_per_sc": "_required_buffer_size",
    "id_drop_counters": "_id_drop_counters",
}
both = pytest.mark.parametrize("client_class", CLIENTS)


def make_stats(scale=1, stacks=("t",)):
    counts = {
        "max_ids_per_partition": [5, 3],
        "max_unique_ids_per_partition": [4, 3],
        "required_buffer_size_per_sc": [8, 16],
    }
    return SparseDenseMatmulInputStats(
        **{field: {stack: np.array(value, np.int32) * scale for stack in stacks} for field, value in counts.items()},
        id_drop_counters=dict.fromkeys(stacks, 7 * scale),
    )


def assert_same(stats, **expected):
    """Compares the fields by stack: `max_ids_per_partition={"t": [1, 2]}`."""
    for field in FIELDS:
        given, wanted = getattr(stats, field), expected[field]
        assert given.keys() == wanted.keys()
        for stack, values in wanted.items():
            assert given[stack].dtype == np.int64
            np.testing.assert_array_equal(given[stack], np.array(values, np.int64), strict=True)


def publish(client, *recorded):
    for stats in recorded:
        client.record(stats)
    client.publish()
    return client


def files(directory):
    return sorted(path.name for path in directory.iterdir())


@both
def test_one_record(client_class, tmp_path):
    client = publish(client_class(tmp_path), make_stats())
    assert isinstance(client, FDOClient)
    for reader in (client, client_class(str(tmp_path))):
        assert_same(
            reader.load(),
            max_ids_per_partition={"t": [5, 3]},
            max_unique_ids_per_partition={"t": [4, 3]},
            required_buffer_size_per_sc={"t": [8, 16]},
            id_drop_counters={"t": [7]},
        )


@both
def test_records_are_rows(client_class, tmp_path):
    publish(client_class(tmp_path), make_stats(2), make_stats(1), SparseDenseMatmulInputStats({"u": [[1, 2], [3, 0]]}))
    assert_same(
        client_class(tmp_path).load(),
        max_ids_per_partition={"t": [[10, 6], [5, 3]], "u": [[1, 2], [3, 0]]},
        max_unique_ids_per_partition={"t": [[8, 6], [4, 3]]},
        required_buffer_size_per_sc={"t": [[16, 32], [8, 16]]},
        id_drop_counters={"t": [[14], [7]]},
    )


@both
def test_the_names_of_files(client_class, tmp_path):
    extension = client_class.__name__[:3].lower()
    publish(client_class(tmp_path / "new" / "directory"), make_stats())
    publish(client_class(tmp_path / "new" / "directory", process_index=12), make_stats())
    names = files(tmp_path / "new" / "directory")
    assert len(names) == 2
    for name, process in zip(names, (0, 12), strict=True):
        assert re.fullmatch(rf"fdo_stats_{process}_\d{{15,}}\.{extension}", name)


@both
def test_several_processes_give_the_largest(client_class, tmp_path):
    first = SparseDenseMatmulInputStats({"t": [5, 1], "only here": [2, 2]})
    publish(
        client_class(tmp_path, process_index=0), first, SparseDenseMatmulInputStats({"t": [4, 2], "only here": [1, 3]})
    )
    publish(client_class(tmp_path, process_index=1), SparseDenseMatmulInputStats({"t": [0, 9]}))
    publish(client_class(tmp_path, process_index=10), SparseDenseMatmulInputStats({"t": [6, 0]}))
    stats = client_class(tmp_path).load()
    np.testing.assert_array_equal(stats.max_ids_per_partition["t"], np.array([6, 9]))
    np.testing.assert_array_equal(stats.max_ids_per_partition["only here"], np.array([2, 3]))


@both
def test_the_latest_file_of_a_process_counts(client_class, tmp_path, monkeypatch):
    """Also within one tick of the clock, when the clock goes back, and when a time gets another digit."""
    times = iter([99, 99, 98, 5])
    monkeypatch.setattr("time.time_ns", lambda: next(times))
    client = client_class(tmp_path)
    for scale in (30, 20, 10):
        client.record(SparseDenseMatmulInputStats({"t": [scale]}))
        client.publish()
    assert [name.split(".")[0] for name in files(tmp_path)] == ["fdo_stats_0_100", "fdo_stats_0_101", "fdo_stats_0_99"]
    publish(client_class(tmp_path, process_index=1), SparseDenseMatmulInputStats({"t": [4]}))
    assert client_class(tmp_path).load().max_ids_per_partition["t"] == [30]
    (tmp_path / f"fdo_stats_0_100.{client._extension}").write_bytes(b"an earlier file is not read")
    np.testing.assert_array_equal(client_class(tmp_path).load().max_ids_per_partition["t"], np.array([30]))


@both
def test_latest_files_by_process(client_class):
    client, extension = client_class("base"), client_class._extension
    names = ["0_9", "0_10", "10_3", "1_3", "1_2"]
    paths = [f"/x/fdo_stats_{name}.{extension}" for name in names]
    others = [f"/x/fdo_stats_final.{extension}", "/x/fdo_stats_0_11.txt", f"/x/.fdo_stats_0_99.{extension}.tmp"]
    assert client._get_latest_files_by_process(paths + others) == [paths[1], paths[3], paths[2]]
    assert client._get_latest_files_by_process(others) == []


@both
def test_what_was_loaded_is_known(client_class, tmp_path):
    publish(client_class(tmp_path / "a"), make_stats(3))
    client = client_class(tmp_path / "a")
    client.load()
    publish(client, make_stats(1))
    np.testing.assert_array_equal(
        client_class(tmp_path / "a").load().max_ids_per_partition["t"], np.array([[15, 9], [5, 3]])
    )


def test_a_maximum_in_place_of_the_history(tmp_path):
    client = CSVFileFDOClient(tmp_path, retain_history=False)
    publish(client, SparseDenseMatmulInputStats({"t": [5, 1]}), SparseDenseMatmulInputStats({"t": [[4, 2], [0, 3]]}))
    np.testing.assert_array_equal(CSVFileFDOClient(tmp_path).load().max_ids_per_partition["t"], np.array([5, 3]))
    assert len((tmp_path / files(tmp_path)[0]).read_text().splitlines()) == 2


def test_the_lines_of_a_csv_file(tmp_path):
    publish(CSVFileFDOClient(tmp_path), make_stats(1), make_stats(2))
    with open(tmp_path / files(tmp_path)[0], newline="") as file:
        lines = list(csv.reader(file))
    assert lines == [
        ["key", "values"],
        ["t_max_ids", "5 3"],
        ["t_max_ids", "10 6"],
        ["t_max_unique_ids", "4 3"],
        ["t_max_unique_ids", "8 6"],
        ["t_required_buffer_size", "8 16"],
        ["t_required_buffer_size", "16 32"],
        ["t_id_drop_counters", "7"],
        ["t_id_drop_counters", "14"],
    ]


def test_the_arrays_of_an_npz_file(tmp_path):
    publish(NPZFileFDOClient(tmp_path), make_stats(1), make_stats(2))
    with np.load(tmp_path / files(tmp_path)[0]) as archive:
        assert {key: archive[key].tolist() for key in archive.files} == {
            "t_max_ids": [[5, 3], [10, 6]],
            "t_max_unique_ids": [[4, 3], [8, 6]],
            "t_required_buffer_size": [[8, 16], [16, 32]],
            "t_id_drop_counters": [[7], [14]],
        }
        assert {archive[key].dtype for key in archive.files} == {np.dtype(np.int64)}


ODD = [
    "a,b",
    'say "x"',
    "a_max_ids",
    "_max_unique_ids",
    "a/b",
    "/root",
    "../up",
    "line\nbreak",
    "a\rb",
    " blank ",
    "file",
    "é",
    "x.npy",
]


@both
def test_odd_names_of_stacks(client_class, tmp_path):
    publish(client_class(tmp_path), make_stats(stacks=ODD), make_stats(2, stacks=ODD))
    stats = client_class(tmp_path).load()
    for field in FIELDS:
        assert sorted(getattr(stats, field)) == sorted(ODD)
    for name in ODD:
        np.testing.assert_array_equal(stats.max_ids_per_partition[name], np.array([[5, 3], [10, 6]]))
    assert len(files(tmp_path)) == 1


@both
@settings(max_examples=15)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        st.integers(0, 2**63 - 1),
    )
)
def test_any_name_and_count(client_class, tmp_path_factory, counts):
    if counts:
        directory = tmp_path_factory.mktemp("any")
        stats = publish(client_class(directory), SparseDenseMatmulInputStats(counts)).load()
        assert {stack: value.tolist() for stack, value in stats.max_ids_per_partition.items()} == {
            stack: [value] for stack, value in counts.items()
        }


def test_counts_of_very_many_sparsecores(tmp_path):
    before = csv.field_size_limit()
    counts = np.arange(50_000)
    stats = publish(CSVFileFDOClient(tmp_path), SparseDenseMatmulInputStats({"t": counts})).load()
    np.testing.assert_array_equal(stats.max_ids_per_partition["t"], counts)
    assert csv.field_size_limit() == before


@both
def test_limits_of_the_next_run(client_class, tmp_path):
    """Record, publish, load, update: what was seen fits into the limits of specs that were placed anew."""

    def place():
        return embax.prepare_feature_specs_for_training([oracle.feature_spec("f", oracle.table_spec(), batch=8)], 1, 2)

    batches = [[np.random.default_rng(seed).integers(0, 50, (8, 1 + seed))] for seed in range(4)]
    publish(client_class(tmp_path), *(embax.preprocess(ids, specs=place(), limits="grow").stats for ids in batches))
    specs = embax.update_preprocessing_parameters(place(), client_class(tmp_path).load())
    for ids in batches:
        embax.preprocess(ids, specs=specs)
    assert specs[0].table_spec.stacked_table_spec.max_ids_per_partition < 256


@both
def test_threads_may_record(client_class, tmp_path):
    client = client_class(tmp_path)

    def record():
        for _ in range(20):
            client.record(SparseDenseMatmulInputStats({"t": [1, 2]}))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.publish()
    assert client.load().max_ids_per_partition["t"].shape == (80, 2)


@both
def test_nothing_to_publish(client_class, tmp_path):
    client = client_class(tmp_path / "new")
    client.record(SparseDenseMatmulInputStats())
    with pytest.raises(ValueError, match=f"{client_class.__name__} has nothing to publish in .*record the stats"):
        client.publish()
    assert not (tmp_path / "new").exists()


@both
def test_nothing_to_load(client_class, tmp_path):
    extension = client_class._extension
    (tmp_path / f"fdo_stats_best.{extension}").write_text("not by a client")
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            FileNotFoundError, match=re.escape(f"There are no files '{directory}/fdo_stats*.{extension}'")
        ):
            client_class(directory).load()


@both
def test_a_file_that_fails_to_be_written_leaves_nothing(client_class, tmp_path, monkeypatch):
    client = publish(client_class(tmp_path), make_stats(1))
    before = files(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    client.record(make_stats(2))
    with pytest.raises(OSError, match="disk full"):
        client.publish()
    assert files(tmp_path) == before
    np.testing.assert_array_equal(client_class(tmp_path).load().max_ids_per_partition["t"], np.array([5, 3]))


@both
def test_files_cut_short(client_class, tmp_path):
    publish(client_class(tmp_path), make_stats(1), make_stats(2))
    path = tmp_path / files(tmp_path)[0]
    content = path.read_bytes()
    ends_of_lines = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for size in range(0, len(content), 1 + len(content) // 200):
        path.write_bytes(content[:size])
        if client_class is CSVFileFDOClient and size in ends_of_lines[1:]:
            continue
        with pytest.raises(
            ValueError, match=re.escape(f"'{path}' is not a complete file of {client_class.__name__} (")
        ):
            client_class(tmp_path).load()


@both
def test_damaged_files(client_class, tmp_path):
    """Whatever the bytes, there are counts or a ValueError that names the file."""
    publish(client_class(tmp_path), make_stats(1), make_stats(2))
    path = tmp_path / files(tmp_path)[0]
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            client_class(tmp_path).load()
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the last line has no end"),
        (b"stack,counts\r\n", "the header is ['stack', 'counts'], not ['key', 'values']"),
        (b"key,values\r\n", "it holds no statistics"),
        (b"key,values\r\nt_max_ids,5,3\r\n", "the line 't_max_ids,5,3' is not a key and counts separated by blanks"),
        (b"key,values\r\nt_max_ids,5 -3\r\n", "the line 't_max_ids,5 -3' is not"),
        (b"key,values\r\nt_max_ids,5.5\r\n", "the line 't_max_ids,5.5' is not"),
        (b"key,values\r\nt_max_ids,\r\n", "the line 't_max_ids,' is not"),
        (b"key,values\r\n\r\n", "the line '' is not"),
        (b"key,values\r\nt_max_ids,5 3\r\nt_max_ids,5\r\n", "the lines of 't_max_ids' differ in the number of counts"),
        (b"key,values\r\nt_max_ids,99999999999999999999\r\n", "OverflowError"),
        (b'key,values\r\n"t_max_ids,5\r\n', "Error: unexpected end of data"),
        (b"key,values\r\n\xff,5\r\n", "UnicodeDecodeError"),
    ],
)
def test_text_that_is_no_csv_of_ours(content, why, tmp_path):
    path = tmp_path / "fdo_stats_0_1.csv"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=re.escape(f"'{path}' is not a complete file") + ".*" + re.escape(why) + ".*remove it"
    ):
        CSVFileFDOClient(tmp_path).load()


def write(client_class, directory, process=0, **arrays):
    """A file as a client names it, with other content."""
    content = client_class(directory)._encode({key: np.array(value) for key, value in arrays.items()})
    path = directory / f"fdo_stats_{process}_1.{client_class._extension}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("value", [[1.5], [-1], ["x"], [], [[[1]]], [np.nan], [2.0**63]])
def test_arrays_that_are_no_counts(value, tmp_path):
    path = write(NPZFileFDOClient, tmp_path, t_max_ids=value)
    with pytest.raises(
        ValueError, match=re.escape(f"'{path}': t_max_ids is ") + ".* integers of at least 0 and below .*, in an array"
    ):
        NPZFileFDOClient(tmp_path).load()


def test_objects_are_not_unpickled(tmp_path):
    with open(tmp_path / "fdo_stats_0_1.npz", "wb") as file:
        np.savez(file, t_max_ids=np.array([Path("x")], object))
    with pytest.raises(ValueError, match="is not a complete file .*'t_max_ids' is no whole array of numbers") as error:
        NPZFileFDOClient(tmp_path).load()
    assert "allow_pickle" not in str(error.value) + str(error.value.__cause__)
    assert error.value.__cause__.__suppress_context__


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY", b"\x80\x04]."])
def test_what_is_no_archive_is_not_to_be_unpickled(content, tmp_path):
    (tmp_path / "fdo_stats_0_1.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not a complete file .*it is no zip archive.; remove it") as error:
        NPZFileFDOClient(tmp_path).load()
    assert "allow_pickle" not in str(error.value) + str(error.value.__cause__)


@both
def test_an_unknown_suffix(client_class, tmp_path):
    path = write(client_class, tmp_path, t_max_ids=[1], t_mean_ids=[2])
    with pytest.raises(
        ValueError,
        match=re.escape(f"'{path}' holds the key 't_mean_ids'; a key must be the name of a stack and one of the suff"),
    ):
        client_class(tmp_path).load()


@both
def test_files_of_other_topologies(client_class, tmp_path):
    publish(client_class(tmp_path, process_index=0), SparseDenseMatmulInputStats({"t": [1, 2]}))
    publish(client_class(tmp_path, process_index=1), SparseDenseMatmulInputStats({"t": [1, 2, 3, 4]}))
    with pytest.raises(
        ValueError, match="t_max_ids: the files differ in the number of counts: .*: 2, .*: 4.*remove those"
    ):
        client_class(tmp_path).load()
    client = client_class(tmp_path, process_index=0)
    client.record(SparseDenseMatmulInputStats({"t": [1, 2]}))
    with pytest.raises(ValueError, match="t_max_ids: 3 counts are recorded after 2 in earlier batches"):
        client.record(SparseDenseMatmulInputStats({"s": [1], "t": [1, 2, 3]}))
    (tmp_path / "new").mkdir()
    client._base_dir = tmp_path / "new"
    assert list(publish(client).load().max_ids_per_partition) == ["t"]  # Nothing of the refused statistics was kept.


@both
def test_bad_records(client_class, tmp_path):
    client = client_class(tmp_path)
    with pytest.raises(ValueError, match=f"{client_class.__name__}.record was given a NoneType; it takes"):
        client.record(None)
    for name in ("", "a\0b", 5):
        with pytest.raises(
            ValueError, match=f"max_ids_per_partition has a stack named {re.escape(repr(name))}; a name must be"
        ):
            client.record(SparseDenseMatmulInputStats({name: [1]}))
    for value in ([-1], [0.5], [float("inf")], [], "7", [[[1]]], [True]):
        with pytest.raises(
            ValueError, match="max_unique_ids_per_partition of stack 't' is .*; it must be integers of at least 0"
        ):
            client.record(SparseDenseMatmulInputStats({"t": [1]}, {"t": value}))
    for value, text in (
        (
            [[1], [2, 3]],
            "its counts are not an array of numbers but a list whose parts differ in length.*They must be integ",
        ),
        (
            np.ma.masked_array([1, 2]),
            "its counts are a masked array, whose mask would be lost. Pass counts without a mask",
        ),
        ([1, np.ma.masked], "its counts are a masked array"),
        ([2**70], "is .*; it must be integers of at least 0 and below"),
    ):
        with pytest.raises(ValueError, match=f"^max_ids_per_partition of stack 't'.*{text}"):
            client.record(SparseDenseMatmulInputStats({"t": value}))
    with pytest.raises(
        ValueError, match="max_ids_per_partition of the stats is a list; it must map names of stacks to"
    ):
        client.record(SparseDenseMatmulInputStats([1]))
    with pytest.raises(ValueError, match="of stack 't': its counts are traced by JAX"):
        jax.jit(lambda a: client.record(SparseDenseMatmulInputStats({"t": [a]})))(1)
    with pytest.raises(ValueError, match="nothing to publish"):
        client.publish()
    for process in (-1, "0", True):
        with pytest.raises(
            ValueError, match=f"process_index is {process!r}; it must be an integer of at least 0, or None"
        ):
            client_class(tmp_path, process_index=process)


def test_publishing_starts_no_backend(tmp_path):
    code = """
import sys, jax
from embax import SparseDenseMatmulInputStats
from embax.fdo import NPZFileFDOClient
client = NPZFileFDOClient(sys.argv[1])
client.record(SparseDenseMatmulInputStats({"t": [1]}))
client.publish()
client.load()
jax.config.update("jax_num_cpu_devices", 3)
assert "flax" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], check=True, timeout=120)
