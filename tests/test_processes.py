"""Several processes train as one does, go on from its checkpoints and it from theirs, and fail together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import processes_worker as worker
import pytest

import embax

PATIENCE_S = 240


class Started:
    """Processes that run `processes_worker.py`. They meet at a port that was free a moment ago."""

    def __init__(self, processes, what, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        self.logs = [folder / f"{what}{process}.log" for process in range(processes)]
        self.running = []
        for process, log in enumerate(self.logs):
            command = [sys.executable, "-W", "error", worker.__file__, coordinator, str(processes), str(process)]
            with open(log, "w") as file:
                environment = os.environ | {"JAX_PLATFORMS": "cpu"}
                self.running.append(
                    subprocess.Popen([*command, what, folder], stdout=file, stderr=subprocess.STDOUT, env=environment)
                )

    def wait(self, process):
        """The exit status of one of them and what it printed."""
        status = self.running[process].wait(PATIENCE_S)
        return status, self.logs[process].read_text()

    def end(self):
        """Ends those that still run."""
        for process in self.running:
            process.kill()
            process.wait()


def loaded(path, like):
    with np.load(path) as arrays:
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[str(number)] for number in range(len(arrays))])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results and tables of one process and of two of which one dies, and those of one and of four that go on from there."""
    folder, one, started = tmp_path_factory.mktemp("processes"), tmp_path_factory.mktemp("one"), []
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            started.append(Started(2, "train_and_die", folder))
            alone, end = {}, {}
            for name, kind in worker.KINDS.items():
                model = kind()
                alone[name] = {"results": jax.tree.map(np.asarray, model.train(range(worker.SAVED_AT)))}
                model.save(one / name)
                alone[name]["tables"] = model.tables()
                model.train(range(worker.SAVED_AT, worker.STEPS))
                end[name] = model.tables()
            died = started[0].wait(1)
            if died[0] != -signal.SIGKILL:
                pytest.fail(died[1] + started[0].wait(0)[1])

            started.append(Started(4, "resume", folder))
            resumed = {}
            for name, kind in worker.KINDS.items():
                model = kind()
                model.load(folder / name)
                model.train(range(worker.SAVED_AT, worker.STEPS))
                resumed[name] = model.tables()
            for process in range(4):
                status, log = started[1].wait(process)
                assert status == 0, log
            survivor = started[0].wait(0)
    finally:
        for processes in started:
            processes.end()
    return {
        "alone": alone,
        "two": loaded(folder / "results.npz", alone),
        "end": end,
        "from two to one": resumed,
        "from two to four": loaded(folder / "resumed.npz", end),
        "mistakes": [json.loads((folder / f"mistakes{process}.json").read_text()) for process in range(2)],
        "survivor": survivor,
        "folder": folder,
        "one": one,
    }


def check_equal(found, wanted):
    """Sums in another order: some units in the last place, of values of about 1, after some steps."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, wanted)


@pytest.mark.parametrize("kind", worker.KINDS)
def test_two_processes_train_as_one(runs, kind):
    check_equal(runs["two"][kind], runs["alone"][kind])
    if kind == "nnx":
        assert runs["two"][kind]["results"][1] == runs["alone"][kind]["results"][1]
        assert runs["two"][kind]["results"][1] > 1  # Minibatches.


@pytest.mark.parametrize("processes", ["one", "four"])
@pytest.mark.parametrize("kind", worker.KINDS)
def test_training_goes_on_with_another_number_of_processes(runs, kind, processes):
    check_equal(runs[f"from two to {processes}"][kind], runs["end"][kind])
    for name, arrays in runs["alone"][kind]["tables"].items():
        assert (arrays[0] != runs["end"][kind][name][0]).any()


def without_checksums(described):
    if isinstance(described, list):
        return list(map(without_checksums, described))
    if not isinstance(described, dict):
        return described
    return {name: without_checksums(value) for name, value in described.items() if name != "checksum"}


@pytest.mark.parametrize("kind", worker.KINDS)
def test_checkpoints_do_not_depend_on_the_processes(runs, kind):
    texts = [(runs[folder] / kind / "embax.json").read_text() for folder in ("folder", "one")]
    two, one = (without_checksums(json.loads(text)["content"]) for text in texts)
    assert {**two, "files": ()} == {**one, "files": ()}


def test_a_process_that_dies_ends_the_others(runs):
    status, log = runs["survivor"]
    assert status != 0
    assert re.search(
        r"RuntimeError: Another process has died or does not answer .* start again from the last checkpoint", log
    )


SIZES = (
    "ValueError: The batches of the processes differ in the samples a device of feature 'adam': 4 on process 0; 3 on process 1. "
    "All must be alike. .* fill smaller ones up"
)
BAD_ID = "ValueError: Feature 'adam', sample .*, position .: id -.* is outside the vocabulary"


MISTAKES = {
    "size": (SIZES, SIZES),
    "bad id": (f"RuntimeError: Process 1 could not pack a batch: {BAD_ID}", BAD_ID),
    "missing": ("RuntimeError: Process 1 could not pack a batch: ValueError: The ids must", "ValueError: The ids must"),
    "limits": 2
    * ("ValueError: .* differ in the max_ids_per_partition of stack 'adam': 64 on process 0; 72 on process 1",),
    "limit exceeded": (
        "RuntimeError: Process 1 could not .*: LimitExceededError: Stack",
        "LimitExceededError: Stack 'adam'",
    ),
    "grow": 2 * ('ValueError: SparseCoreEmbed: limits="grow" with devices of several processes.* Use limits="raise"',),
    "ahead": ("no error", "no error"),
    "ahead, bad id": (f"RuntimeError: Process 1 could not pack a batch: {BAD_ID}", BAD_ID),
    "thread": 2 * ("RuntimeError: Thread 'prefetch' would run a collective operation.* only the main thread may",),
    "minibatches, bad id": ("RuntimeError: Batch .* not on another host", BAD_ID),
    "minibatches, size": (SIZES, SIZES),
    "out of step": 2 * ("OutOfStepError: .*: pack a batch on process 0; agree on minibatches on process 1",),
    "afterwards": ("no error", "no error"),
    "disk full": (
        "CheckpointError: Saving .* No space",
        "CheckpointError: Saving .* Process 0 could not save .* No space",
    ),
    "left on the disk": ("$", "$"),
    "not storable": ("ValueError: extra: leaf", "ValueError: Process 0 could not save .*: ValueError: extra: leaf"),
    "taken": ("FileExistsError: .* is no embax", "FileExistsError: Process 0 could not save .* is no embax"),
    "nothing there": ("FileNotFoundError: Process 1 could not load .* no checkpoint", "FileNotFoundError: There is no"),
    "good": ("no error", "no error"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_of_one_is_an_error_of_all(runs, mistake):
    """Process 1 does something wrong, or process 0 where it alone writes."""
    for process, wanted in enumerate(MISTAKES[mistake]):
        assert re.match(wanted, runs["mistakes"][process][mistake])


def test_placing_a_batch_in_one_process():
    specs = embax.prepare_feature_specs_for_training(worker.make_specs(("adam",)), 4, 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    ids = worker.draw(("adam",), 0)[0]
    packed = embax.preprocess(ids, specs=specs)
    placed = embax.place_batch(packed, mesh, sharding_axis=("a", "b"))
    assert placed.gains.sharding == jax.sharding.NamedSharding(mesh, jax.P(("a", "b")))
    np.testing.assert_array_equal(placed.row_pointers, packed.row_pointers)
    with pytest.raises(
        ValueError, match="The batch was packed for 4 of 4 devices; the mesh has 2 of 2 in this process. Place"
    ):
        embax.place_batch(packed, mesh, sharding_axis="a")
    with pytest.raises(KeyError, match="as it was"):
        embax.place_batch(KeyError("as it was"), mesh, sharding_axis="a")
    with pytest.raises(ValueError, match="A dict is to be put on the devices; it must be a packed batch"):
        embax.place_batch(ids, mesh, sharding_axis="a")
    with pytest.raises(ValueError, match="place_batch needs a mesh that has devices of this process"):
        embax.place_batch(packed, None)
