import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import embax
from embax import _blocks, checkpoint
from embax._rows import read_rows
from embax._stacking.layout import take_table
from embax._stacking.plan import make_plan
from embax._variables import EmbeddingVariables
from embax.checkpoint import CheckpointError, _directory, _format, _load, _orbax, _save

SIZES = {"movie": (137, 5), "user/é": (101, 16)}


def table(name, vocabulary_size=None, embedding_dim=None, optimizer=None):
    return embax.TableSpec(
        name=name,
        vocabulary_size=vocabulary_size or SIZES[name][0],
        embedding_dim=embedding_dim or SIZES[name][1],
        initializer=jax.nn.initializers.normal(),
        optimizer=optimizer or (embax.AdagradOptimizerSpec() if name == "movie" else embax.SGDOptimizerSpec()),
        combiner="sum",
    )


def features_of(*tables):
    return {
        t.name: embax.FeatureSpec(name=t.name, table_spec=t, input_shape=(8, 2), output_shape=(8, t.embedding_dim))
        for t in tables
    }


def place(*tables, num_sc=4):
    return embax.prepare_feature_specs_for_training(features_of(*tables), 1, num_sc)


def place_together(*tables, num_sc):
    """All tables in one stack, rotated and one after another on each SparseCore."""
    with pytest.warns(UserWarning, match="different padded dimensions"):
        return embax.stack_tables(
            features_of(*tables), [t.name for t in tables], 1, num_sc, rotation=3, stack_name="all"
        )


def random_variables(specs, seed=0):
    """Variables whose every element, of padding and slots too, is another random number."""
    numbers = np.random.default_rng(seed)
    variables = {}
    for stack in make_plan(specs).stacks:
        arrays = [jnp.array(numbers.normal(size=shape).astype(np.float32)) for shape in stack.state_shapes]
        slots = type(stack.optimizer.slot_variables_initializers())
        variables[stack.name] = EmbeddingVariables(arrays[0], slots(*arrays[1:]))
    return variables


def logical(variables, specs):
    """Tables and slots by row, as NumPy arrays: by the definition of the layout, not by the code under test."""
    plan = make_plan(specs)
    return {
        planned.name: [
            take_table(np.array(array), planned, plan.num_sparsecores)
            for array in jax.tree.leaves(variables[stack.name])
        ]
        for stack in plan.stacks
        for planned in stack.tables
    }


def assert_same(one, other):
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, int | float):
            assert repr(a) == repr(b)
            continue
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


EXTRA = {"dense": (np.random.default_rng(7).normal(size=(20, 30)).astype(np.float32),), "step": 7}


@pytest.fixture
def specs():
    return place(table("movie"), table("user/é"))


@pytest.fixture
def variables(specs):
    return random_variables(specs)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("once") / "checkpoint"
    specs = place(table("movie"), table("user/é"))
    checkpoint.save(path, random_variables(specs), specs=specs, extra=EXTRA)
    return path


@pytest.fixture
def saved(tmp_path, saved_once):
    """A checkpoint of `variables` and `EXTRA`."""
    return Path(shutil.copytree(saved_once, tmp_path / "checkpoint"))


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


# What comes back


@pytest.mark.parametrize("num_sc", [1, 3, 4, 8])
def test_loads_for_another_number_of_sparsecores(saved, specs, variables, num_sc):
    other = place(table("movie"), table("user/é"), num_sc=num_sc)
    loaded, _ = checkpoint.load(saved, specs=other)
    assert_same(logical(loaded, other), logical(variables, specs))
    for name, (rows, _) in SIZES.items():
        ids = np.arange(rows)
        assert_same(read_rows(loaded, name, ids, specs=other), read_rows(variables, name, ids, specs=specs))


@pytest.mark.parametrize("num_sc", [1, 4])
def test_loads_into_another_stacking_and_back(tmp_path, num_sc):
    both = [table(name, optimizer=embax.AdagradOptimizerSpec()) for name in SIZES]
    apart = place(*both, num_sc=3)
    variables = random_variables(apart)
    checkpoint.save(tmp_path / "apart", variables, specs=apart)
    together = place_together(*(table(name, optimizer=embax.AdagradOptimizerSpec()) for name in SIZES), num_sc=num_sc)
    loaded, _ = checkpoint.load(tmp_path / "apart", specs=together)
    assert set(loaded) == {"all"}
    assert_same(logical(loaded, together), logical(variables, apart))
    checkpoint.save(tmp_path / "together", loaded, specs=together)
    again, _ = checkpoint.load(tmp_path / "together", specs=apart)
    assert_same(logical(again, apart), logical(variables, apart))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_tables_on_several_devices(tmp_path, kind, monkeypatch):
    """From four devices to two of a mesh of two axes, and to one."""
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 1000)

    def place(num_devices):
        optimizers = (embax.AdagradOptimizerSpec(), embax.RowWiseAdagradOptimizerSpec())
        tables = [table(name, optimizer=optimizer) for name, optimizer in zip(SIZES, optimizers, strict=True)]
        return embax.prepare_feature_specs_for_training(features_of(*tables), num_devices, 2)

    four, two = (
        jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(shape), names, axis_types=(kind,) * len(names))
        for shape, names in (((4,), ("x",)), ((2, 2), ("x", "y")))
    )
    on_four = jax.device_put(random_variables(place(4)), jax.sharding.NamedSharding(four, jax.P("x")))
    wanted = logical(on_four, place(4))
    checkpoint.save(tmp_path / "c", on_four, specs=place(4))
    on_two, _ = checkpoint.load(tmp_path / "c", specs=place(2), mesh=two, sharding_axis="y")
    assert_same(logical(on_two, place(2)), wanted)
    for array in jax.tree.leaves(on_two):
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {array.shape[0] // 2}
    checkpoint.save(tmp_path / "again", on_two, specs=place(2))
    assert_same(logical(checkpoint.load(tmp_path / "again", specs=place(1))[0], place(1)), wanted)
    with pytest.raises(
        ValueError, match="The specs were placed for 1 devices, and tables are to be made on 4. Pass a mesh"
    ):
        checkpoint.load(tmp_path / "c", specs=place(1), mesh=four)


def test_no_device_holds_a_whole_table():
    """Rows go in and out of sharded tables in place, and with the memory of a block."""
    temporary = []
    sharding = jax.sharding.NamedSharding(jax.make_mesh((4,), ("x",), axis_types=AUTO), jax.P("x"))
    for vocabulary in (1 << 16, 1 << 18):
        stacked = jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32, sharding=sharding)
        place, rows = _blocks.RowPlacement(vocabulary, 0, 0), np.zeros((512, 8), np.float32)
        put = _blocks._put.lower(stacked, rows, np.int32(0), place, num_sparsecores=8).compile().memory_analysis()
        assert put.alias_size_in_bytes == vocabulary * 8 * 4 // 4
        options = {"count": 512, "columns": (8,), "num_sparsecores": 8, "everywhere": None}
        take = _blocks._take.lower(stacked, np.int32(0), place, **options).compile().memory_analysis()
        temporary.append((put.temp_size_in_bytes, take.temp_size_in_bytes))
    assert temporary[0] == temporary[1]


AUTO = (jax.sharding.AxisType.Auto,)


def test_padding_is_zero(saved, specs):
    loaded, _ = checkpoint.load(saved, specs=specs)
    assert np.count_nonzero(loaded["movie"].slot.accumulator) == 137 * 5


def test_tables_larger_than_a_block(tmp_path, specs, variables, monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 700)
    checkpoint.save(tmp_path / "c", variables, specs=specs)
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 1000)
    assert_same(logical(checkpoint.load(tmp_path / "c", specs=specs)[0], specs), logical(variables, specs))


def test_variables_may_be_numpy(tmp_path, specs, variables):
    checkpoint.save(tmp_path / "c", jax.tree.map(np.array, variables), specs=specs)
    assert_same(logical(checkpoint.load(tmp_path / "c", specs=specs)[0], specs), logical(variables, specs))


def test_no_bit_of_a_float_is_lost(tmp_path):
    specs = place(table("movie", 4, 2))
    bits = np.array([[0x7FC12345, 0xFF800001], [0x80000000, 1], [0x7F800000, 0xFF800000], [0xFFFFFFFF, 0]], np.uint32)
    stacked = np.zeros((32, 8), np.float32)
    for row in range(4):
        stacked[8 * row, :2] = bits[row].view(np.float32)
    variables = {"movie": EmbeddingVariables(jnp.array(stacked), embax.AdagradSlotVariables(jnp.array(stacked)))}
    checkpoint.save(tmp_path / "c", variables, specs=specs)
    for values in logical(checkpoint.load(tmp_path / "c", specs=specs)[0], specs)["movie"]:
        np.testing.assert_array_equal(values.view(np.uint32), bits)


def test_every_kind_of_leaf(tmp_path, specs, variables):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    dtypes = [np.bool_, np.int8, np.uint32, np.int64, np.float16, np.float64, np.complex64]
    dtypes += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4]
    extra = {
        "numpy": [np.arange(4).reshape(2, 2).astype(dtype) for dtype in dtypes],
        "scalars": (3, -(2**80), 0.1, float("inf"), True, np.float32(0.5), np.array(2)),
        "empty": np.zeros((0, 3), np.int32),
        "jax": {"weak": jnp.asarray(2.0), "half": jnp.ones((3, 1), jnp.bfloat16), "none": None},
        "split": jax.device_put(jnp.arange(8.0), split),
        "keys": (jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), 3), jax.random.PRNGKey(5)),
    }
    checkpoint.save(tmp_path / "c", variables, specs=specs, extra=extra)
    _, loaded = checkpoint.load(tmp_path / "c", specs=specs, extra=extra)
    assert jax.tree.structure(loaded) == jax.tree.structure(extra)
    for a, b in zip(jax.tree.leaves(extra), jax.tree.leaves(loaded), strict=True):
        assert type(a) is type(b)
        if hasattr(a, "dtype") and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_same(a, b)
        if isinstance(a, jax.Array):
            assert a.sharding == b.sharding
            assert a.weak_type == b.weak_type
    abstract = jax.eval_shape(lambda: {key: extra[key] for key in ("jax", "keys")})
    checkpoint.save(tmp_path / "d", variables, specs=specs, extra={key: extra[key] for key in ("jax", "keys")})
    _, loaded = checkpoint.load(tmp_path / "d", specs=specs, extra=abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(abstract)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_extra_may_be_left_out_when_loading(saved, specs):
    assert checkpoint.load(saved, specs=specs)[1] is None


def test_hyperparameters_may_differ(tmp_path, specs, variables):
    schedule = place(
        table("movie", optimizer=embax.AdagradOptimizerSpec(lambda step: 0.1 / step, 0.5)),
        table("user/é", optimizer=embax.SGDOptimizerSpec(1.0)),
    )
    checkpoint.save(tmp_path / "c", variables, specs=schedule)
    assert_same(logical(checkpoint.load(tmp_path / "c", specs=specs)[0], specs), logical(variables, specs))
    optimizer = json.loads((tmp_path / "c" / "embax.json").read_text())["content"]["tables"]["movie"]["optimizer"]
    assert optimizer == {
        "class": "AdagradOptimizerSpec",
        "slots": ["accumulator"],
        "row_wise_slots": [],
        "fields": {
            "clip_gradient_norm": None,
            "clip_gradient_value": None,
            "weight_decay": 0.0,
            "weight_decay_mode": "decoupled",
            "initial_accumulator_value": 0.5,
            "learning_rate": {"function": "test_hyperparameters_may_differ.<locals>.<lambda>"},
        },
    }


# The form on disk


def test_orbax_reads_the_directory(saved, specs, variables):
    expected = logical(variables, specs)
    names = {"movie.table": ("movie", 0), "movie.slot.accumulator": ("movie", 1), "user%2F%C3%A9.table": ("user/é", 0)}
    assert {path.name for path in saved.iterdir()} == {*names, "extra", "embax.json"}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = checkpointer.restore(saved, ocp.args.Composite(**dict.fromkeys(names, ocp.args.PyTreeRestore())))
    for item, (name, number) in names.items():
        assert_same(items[item]["value"], expected[name][number])
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(saved / "extra"), {"0": EXTRA["dense"][0]})


def test_metadata(saved):
    document = json.loads((saved / "embax.json").read_text())
    assert (document["format"], document["version"]) == ("embax checkpoint", 1)
    movie = document["content"]["tables"]["movie"]
    assert (movie["vocabulary_size"], movie["embedding_dim"], movie["combiner"]) == (137, 5, "sum")
    assert set(movie["arrays"]) == {"table", "slot.accumulator"}
    assert {"name": "movie", "table": "movie", "input_shape": [8, 2], "output_shape": [8, 5]} in document["content"][
        "features"
    ]
    listed = document["content"]["files"]
    assert {file.relative_to(saved).as_posix() for file in files_of(saved)} == {*listed, "embax.json"}


def test_long_and_odd_names(tmp_path):
    names = ["x" * 500, ".", "..", "extra", "embax.json", "a\nb", "x" * 501]
    specs = place(*(table(name, 9, 3, embax.SGDOptimizerSpec()) for name in names))
    variables = random_variables(specs)
    checkpoint.save(tmp_path / "c", variables, specs=specs)
    assert_same(logical(checkpoint.load(tmp_path / "c", specs=specs)[0], specs), logical(variables, specs))


# Buffers belong to one side


def address(x):
    return x.unsafe_buffer_pointer()


def add_one(tree):
    return jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(tree)


def test_a_donated_step_stays_in_place_after_saving(tmp_path, specs, variables):
    dense = jnp.ones((64, 64))
    checkpoint.save(tmp_path / "c", variables, specs=specs, extra=dense)
    before = list(map(address, jax.tree.leaves((variables, dense))))
    assert list(map(address, jax.tree.leaves(add_one((variables, dense))))) == before


def test_a_donated_step_after_loading_writes_into_no_numpy_array(tmp_path, specs, variables, monkeypatch):
    dense = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    checkpoint.save(tmp_path / "c", variables, specs=specs, extra={"a": dense, "b": jnp.asarray(dense)})
    read, held = _orbax.read_arrays, []
    monkeypatch.setattr(_load, "read_arrays", lambda *args: held.append(read(*args)) or held[-1])
    loaded, extra = checkpoint.load(tmp_path / "c", specs=specs, extra={"a": dense, "b": jnp.asarray(dense)})
    copies = [{name: array.copy() for name, array in arrays.items()} for arrays in held]
    jax.block_until_ready(add_one((loaded, extra["b"])))
    assert len(held) == 4
    assert_same(held, copies)
    assert_same(extra["a"], dense)


# Damage


def test_one_flipped_bit_anywhere_is_refused(saved, specs, variables):
    numbers, messages = random.Random(0), []
    for file in files_of(saved):
        content = file.read_bytes()
        for position in numbers.sample(range(8 * len(content)), 3):
            damaged = bytearray(content)
            damaged[position // 8] ^= 1 << position % 8
            file.write_bytes(damaged)
            try:
                loaded, extra = checkpoint.load(saved, specs=specs, extra=EXTRA)
            except CheckpointError as error:
                messages.append(str(error))
            else:  # a byte without meaning, such as white space
                assert file.name == "embax.json"
                assert_same((logical(loaded, specs), extra), (logical(variables, specs), EXTRA))
        file.write_bytes(content)
    assert len(messages) >= 3 * len(files_of(saved)) - 3
    assert all(str(saved) in message and "Load an earlier checkpoint" in message for message in messages)
    checkpoint.load(saved, specs=specs, extra=EXTRA)


def test_flipped_bits_of_the_metadata(saved, specs, variables):
    """Refused, or no difference: read_metadata never lets a changed content pass."""
    file = saved / "embax.json"
    content, expected = file.read_bytes(), _format.read_metadata(saved)
    passed = 0
    for position in range(0, 8 * len(content), 101):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            passed += 1
            assert _format.read_metadata(saved) == expected
        except CheckpointError:
            passed -= 1
    assert passed < 8 * len(content) / 101 / 10


@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied", "longer", "a directory"])
def test_half_written(saved, specs, how):
    for file in files_of(saved):
        content = file.read_bytes()
        file.unlink()
        if how == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif how == "emptied":
            file.touch()
        elif how == "longer":
            file.write_bytes(content + b"{")
        elif how == "a directory":
            file.mkdir()
        with pytest.raises(CheckpointError, match=file.name) as raised:
            checkpoint.load(saved, specs=specs, extra=EXTRA)
        assert str(saved) in str(raised.value)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(content)
    checkpoint.load(saved, specs=specs, extra=EXTRA)


def flip_in_values(saved, values):
    """Flips a bit of the array `values` wherever Orbax stored it, uncompressed; returns the number of places."""
    piece, count = values[:2].tobytes(), 0
    for file in files_of(saved):
        content = file.read_bytes()
        if (at := content.find(piece)) >= 0:
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            count += 1
    return count


@pytest.mark.parametrize("which", ["table", "slot", "extra"])
def test_values_have_a_checksum_of_their_own(saved, specs, variables, monkeypatch, which):
    """What was damaged on its way to the disk has files with the right checksums: Orbax reads it without a word."""
    values = logical(variables, specs)["movie"]
    values = {"table": values[0], "slot": values[1], "extra": EXTRA["dense"][0]}[which]
    assert flip_in_values(saved, values) > 0
    monkeypatch.setattr(_load, "check_files", lambda stored: None)
    what = {"table": "table of table 'movie'", "slot": "slot accumulator of table 'movie'", "extra": "dense"}[which]
    with pytest.raises(CheckpointError, match=f"{what}.* is not as it was saved .*checksum crc32:.*earlier checkpoint"):
        checkpoint.load(saved, specs=specs, extra=EXTRA)


def test_errors_of_orbax_when_reading(saved, specs, monkeypatch):
    (saved / "movie.table" / "manifest.ocdbt").write_bytes(b"damaged")
    monkeypatch.setattr(_load, "check_files", lambda stored: None)
    with pytest.raises(CheckpointError, match=r"movie\.table: Orbax .* cannot read it.*Use the version of Orbax"):
        checkpoint.load(saved, specs=specs)


def rewrite_metadata(path, change):
    document = json.loads((path / "embax.json").read_text())
    del document["checksum"]
    change(document)
    document["checksum"] = _format._checksum_of(document)
    (path / "embax.json").write_text(json.dumps(document))


def test_newer_format(saved, specs):
    rewrite_metadata(saved, lambda document: document.update(version=2))
    with pytest.raises(CheckpointError, match=r"format version 2; this embax reads versions up to 1. Update embax"):
        checkpoint.load(saved, specs=specs)


# What does not fit


def test_nothing_there(tmp_path, specs):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*/nothing"):
        checkpoint.load(tmp_path / "nothing", specs=specs)
    with pytest.raises(CheckpointError, match=r"no complete embax checkpoint: embax.json cannot be read"):
        checkpoint.load(tmp_path, specs=specs)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no complete embax checkpoint"):
        checkpoint.load(tmp_path / "file", specs=specs)


ADAGRAD = embax.AdagradOptimizerSpec()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([("movie",)], r"holds table 'user/é', which the specs do not have; they have \['movie'\]"),
        ([("movie",), ("user/é",), ("genre", 3, 4)], r"table 'genre' of the specs is not in it; it holds \['movie', "),
        (
            [("movie", 38), ("user/é",)],
            "table 'movie' is stored with vocabulary_size=137, and the specs say 38. Give its ",
        ),
        (
            [("movie",), ("user/é", 101, 8)],
            "'user/é' is stored with embedding_dim=16, and the specs say 8. Give its Tab",
        ),
        (
            [("movie",), ("user/é", 101, 16, ADAGRAD)],
            r"'user/é' is stored with the optimizer SGDOptimizerSpec \(slots: none\), and the specs say "
            r"AdagradOptimizerSpec \(slots: accumulator\). Give its TableSpec an SGDOptimizerSpec; its hyperparameters",
        ),
    ],
)
def test_other_specs(saved, tables, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.load(saved, specs=place(*(table(*arguments) for arguments in tables)))
    assert str(saved) in str(raised.value)


def test_other_slots(saved):
    import dataclasses
    from typing import NamedTuple

    class Slots(NamedTuple):
        momentum: object

    @dataclasses.dataclass(frozen=True)
    class AdagradOptimizerSpec(embax.AdagradOptimizerSpec):
        def slot_variables_initializers(self):
            return Slots(jax.nn.initializers.zeros)

    specs = place(table("movie", optimizer=AdagradOptimizerSpec()), table("user/é"))
    with pytest.raises(CheckpointError, match=r"\(slots: accumulator\), and the specs say .*\(slots: momentum\)"):
        checkpoint.load(saved, specs=specs)


DENSE = EXTRA["dense"][0]
KEY = jax.eval_shape(lambda: jax.random.key(0))  # no array: importing this module must start no backend


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"dense": (DENSE,)}, r"has a leaf \['step'\], which the template has not"),
        ({**EXTRA, "bias": DENSE}, r"has no leaf \['bias'\], which the template has"),
        (
            {**EXTRA, "dense": (DENSE.T,)},
            r"leaf \['dense'\]\[0\] is stored as array float32\[20, 30\], and the template has arr",
        ),
        (
            {**EXTRA, "dense": (DENSE.astype(np.int32),)},
            r"is stored as array float32\[20, 30\], .* array int32\[20, 30\]",
        ),
        (
            {**EXTRA, "dense": (1.0,)},
            "is stored as array float32.*has a Python float. Restore into the structure that was",
        ),
        ({**EXTRA, "step": 7.0}, "is stored as a Python int, and the template has a Python float"),
        ({**EXTRA, "step": "7"}, "is stored as a Python int, and the template has no array or number"),
        ({**EXTRA, "dense": (KEY,)}, r"and the template has PRNG key key<fry>\[\]"),
    ],
)
def test_other_extra(saved, specs, extra, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.load(saved, specs=specs, extra=extra)
    assert str(saved) in str(raised.value)


def test_no_extra(tmp_path, specs, variables):
    checkpoint.save(tmp_path / "c", variables, specs=specs)
    with pytest.raises(CheckpointError, match=r"was saved without extra. Load it with extra=None"):
        checkpoint.load(tmp_path / "c", specs=specs, extra=EXTRA)


def test_64_bits_are_not_cut(tmp_path, specs, variables):
    wide = {"wide": np.arange(3)}
    checkpoint.save(tmp_path / "c", variables, specs=specs, extra=wide)
    with jax.enable_x64(True):
        template = {"wide": jax.ShapeDtypeStruct((3,), np.int64)}
    with pytest.raises(CheckpointError, match=r"Leaf \['wide'\] is int64, which JAX would cut to 32 bits. Enable"):
        checkpoint.load(tmp_path / "c", specs=specs, extra=template)


@pytest.mark.parametrize("leaf", ["text", np.array(["text"]), np.array([object()]), jax.ShapeDtypeStruct((), np.int32)])
def test_leaves_that_cannot_be_stored(tmp_path, specs, variables, leaf):
    with pytest.raises(ValueError, match=r"extra: leaf \['a'\]\[0\] is .*a checkpoint holds arrays.*Leave it out"):
        checkpoint.save(tmp_path / "c", variables, specs=specs, extra={"a": [leaf]})
    assert not list(tmp_path.iterdir())


# Atomicity


def test_what_may_be_overwritten(tmp_path, saved, specs, variables):
    with pytest.raises(FileExistsError, match=r"There is a checkpoint at .*checkpoint already. Pass overwrite=True"):
        checkpoint.save(saved, variables, specs=specs)
    other = random_variables(specs, 1)
    checkpoint.save(saved, other, specs=specs, overwrite=True)
    assert_same(logical(checkpoint.load(saved, specs=specs)[0], specs), logical(other, specs))
    (tmp_path / "mine").mkdir()
    checkpoint.save(tmp_path / "mine", variables, specs=specs)  # an empty directory
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").touch()
    (tmp_path / "file").touch()
    for path in (tmp_path / "photos", tmp_path / "file"):
        with pytest.raises(
            FileExistsError, match=r"exists and is no embax checkpoint. Choose another path, or remove it"
        ):
            checkpoint.save(path, variables, specs=specs, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "mine", "photos", "file"}


def test_a_link_stays_a_link(tmp_path, saved, specs):
    (tmp_path / "latest").symlink_to(saved)
    other = random_variables(specs, 1)
    checkpoint.save(tmp_path / "latest", other, specs=specs, overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert_same(logical(checkpoint.load(saved, specs=specs)[0], specs), logical(other, specs))


def test_remote_paths(specs, variables):
    with pytest.raises(ValueError, match=r"gs://bucket/step: embax saves to local directories only"):
        checkpoint.save("gs://bucket/step", variables, specs=specs)


@pytest.mark.parametrize("where", ["tables", "extra", "metadata", "publish"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_changes_nothing(tmp_path, specs, variables, monkeypatch, where, overwrite):
    path = tmp_path / "checkpoint"
    if overwrite:
        checkpoint.save(path, variables, specs=specs)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = _orbax.write_arrays
    fail_at = {"tables": "user", "extra": "extra"}.get(where)
    if fail_at:
        monkeypatch.setattr(
            _save, "write_arrays", lambda at, x: (fail if at.name.startswith(fail_at) else write)(at, x)
        )
    else:
        monkeypatch.setattr(*{"metadata": (_save, "write_metadata"), "publish": (_directory, "_publish")}[where], fail)
    with pytest.raises(
        CheckpointError, match=r"Saving the checkpoint .* failed: .*No space left.*check the free space"
    ):
        checkpoint.save(path, random_variables(specs, 1), specs=specs, extra=EXTRA, overwrite=overwrite)
    assert [child.name for child in tmp_path.iterdir()] == (["checkpoint"] if overwrite else [])
    if overwrite:
        assert_same(logical(checkpoint.load(path, specs=specs)[0], specs), logical(variables, specs))


def test_errors_of_orbax_when_writing(tmp_path, specs, variables):
    with pytest.raises(CheckpointError, match=r"Saving the checkpoint .* failed: .*uint4"):
        checkpoint.save(tmp_path / "c", variables, specs=specs, extra=np.zeros(2, ml_dtypes.uint4))
    assert not list(tmp_path.iterdir())


class TestFileSystemsThatCannotExchange:
    @pytest.fixture(autouse=True)
    def no_exchange(self, monkeypatch):
        monkeypatch.setattr(_directory, "_exchange", lambda one, other: False)

    def test_overwrite(self, tmp_path, saved, specs):
        other = random_variables(specs, 1)
        checkpoint.save(saved, other, specs=specs, overwrite=True)
        assert_same(logical(checkpoint.load(saved, specs=specs)[0], specs), logical(other, specs))
        assert list(tmp_path.iterdir()) == [saved]

    def test_second_rename_fails(self, tmp_path, saved, specs, variables, monkeypatch):
        rename = os.rename

        def fail_once(source, target):
            if "partial" in str(source) and Path(target) == saved:
                monkeypatch.setattr(os, "rename", rename)
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail_once)
        with pytest.raises(CheckpointError, match="Input/output error"):
            checkpoint.save(saved, random_variables(specs, 1), specs=specs, overwrite=True)
        assert list(tmp_path.iterdir()) == [saved]
        assert_same(logical(checkpoint.load(saved, specs=specs)[0], specs), logical(variables, specs))

    def test_killed_between_the_renames(self, tmp_path, saved, specs, variables):
        aside = _directory.previous_path(saved)
        saved.rename(aside)
        with pytest.raises(FileNotFoundError, match=f"about to be replaced lies at {aside}: rename it"):
            checkpoint.load(saved, specs=specs)
        with pytest.raises(FileExistsError):  # the next save finds it again
            checkpoint.save(saved, variables, specs=specs)
        assert list(tmp_path.iterdir()) == [saved]


KILLED_SAVES = """
import os, shutil, signal, sys, warnings
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
from embax import checkpoint
from embax.checkpoint import _directory, _orbax, _save

path, overwrite, moments = sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
kill_at, moment = None, 0

def passing():
    global moment
    if moment == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    moment += 1

def watch(owner, name):
    function = getattr(owner, name)
    def watched(*args, **kwargs):
        passing()
        result = function(*args, **kwargs)
        passing()
        return result
    setattr(owner, name, watched)

for owner, name in [(os, "rename"), (os, "fsync"), (_directory, "_exchange"), (_save, "write_arrays"),
                    (_save, "write_metadata"), (shutil, "rmtree")]:
    watch(owner, name)

def save():
    specs = t.place(t.table("movie"), t.table("user/é"))
    checkpoint.save(path, t.random_variables(specs, 1), specs=specs, overwrite=overwrite)

def in_child(number):
    global kill_at, moment
    pid = os.fork()
    if pid == 0:
        kill_at, moment = number, 0
        try:
            save()
            os._exit(min(moment, 255))
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(0)
    return os.waitpid(pid, 0)[1]

shutil.copytree(path, path + ".copy") if overwrite else None
total = os.waitstatus_to_exitcode(in_child(None))
assert total > 20, total
shutil.rmtree(path)
if overwrite:
    os.rename(path + ".copy", path)
print(total, flush=True)
for number in sorted({*range(0, total, max(1, total // moments)), *range(total - 6, total)}):
    status = in_child(number)
    assert os.WTERMSIG(status) == signal.SIGKILL, (number, status)
    print(number, flush=True)
    assert input() == "next"
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_9(tmp_path, specs, variables, overwrite):
    path = tmp_path / "checkpoint"
    if overwrite:
        checkpoint.save(path, variables, specs=specs)
    old, new = logical(variables, specs), logical(random_variables(specs, 1), specs)
    command = [sys.executable, "-W", "error", "-c", KILLED_SAVES, Path(__file__).parent, path, str(overwrite), "3"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as process:
        total = int(process.stdout.readline())
        for _ in iter(process.stdout.readline, ""):
            if path.exists():
                values = logical(checkpoint.load(path, specs=specs)[0], specs)
                found.append("new" if values["movie"][0][0, 0] == new["movie"][0][0, 0] else "old")
                assert_same(values, new if found[-1] == "new" else old)
            else:
                found.append("none")
            if found[-1] == "new":  # the next one starts from the old state again
                shutil.rmtree(path)
                if overwrite:
                    checkpoint.save(path, variables, specs=specs)
            process.stdin.write("next\n")
    assert process.returncode == 0
    before = "old" if overwrite else "none"
    assert set(found) == {before, "new"}, (found, total)
    assert found == sorted(found, key=[before, "new"].index)
    checkpoint.save(path, variables, specs=specs, overwrite=True)
    assert list(tmp_path.iterdir()) == [path], "what killed saves left behind is removed by the next save"


def test_a_running_save_is_not_taken_for_a_killed_one(tmp_path, specs, variables):
    with _directory.atomic_directory(tmp_path / "checkpoint") as running:
        (running / "half").touch()
        checkpoint.save(tmp_path / "checkpoint", variables, specs=specs)
        assert (running / "half").exists()


def test_exchange(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if _directory._exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        _directory._exchange(tmp_path / "a", tmp_path / "c")


def test_import_without_orbax():
    code = (
        "import sys; sys.modules['orbax'] = sys.modules['orbax.checkpoint'] = None\n"
        "import embax\n"
        "try:\n    import embax.checkpoint\n"
        "except ImportError as error:\n    print(error)"
    )
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "embax.checkpoint needs Orbax: pip install embax[checkpoint]"
