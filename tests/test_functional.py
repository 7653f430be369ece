"""The functional core: lookup, update, reading rows; what it refuses; that it is deterministic."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax
from embax import _native

IDS = {"f": np.array([[1, 2, 2], [0, -1, 49]], np.int32)}


def model(num_sparsecores=4, **fields):
    specs = {"f": oracle.feature_spec("f", oracle.table_spec(**fields), batch=2)}
    embax.prepare_feature_specs_for_training(specs, 1, num_sparsecores)
    return specs, embax.init_embedding_variables(jax.random.key(0), specs)


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 17])
def test_any_batch_size(backend, batch):
    specs, variables = model()
    ids = np.random.default_rng(0).integers(-1, 50, (batch, 3))
    table = oracle.tables_of(variables, specs)["table"][0]
    with embax.use_backend(backend):
        activations = embax.lookup(embax.preprocess({"f": ids}, specs=specs), variables, specs=specs)
    assert activations["f"].shape == (batch, 8)
    np.testing.assert_allclose(activations["f"], oracle.lookup(table, ids, "sum"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_sparsecores", [1, 4])
def test_updates_of_so_many_entries_that_threads_share_a_partition(num_sparsecores):
    batch, rows = 20_000, 6_000
    specs, variables = model(num_sparsecores, vocabulary=rows, optimizer=embax.AdagradOptimizerSpec(0.1))
    ids = np.random.default_rng(0).integers(0, rows, (batch, 3))
    ids[:, 0] = 7  # More entries of a row than a part has.
    gradients = {"f": jnp.asarray(np.random.default_rng(1).standard_normal((batch, 8)), jnp.float32)}
    packed = embax.preprocess({"f": ids}, specs=specs, limits="grow")
    updated = []
    for backend in ("native", "portable"):
        with embax.use_backend(backend):
            updated.append(embax.apply_gradients(gradients, packed, variables, specs=specs))
    for native, portable in zip(*map(jax.tree.leaves, updated), strict=True):
        np.testing.assert_allclose(native, portable, rtol=1e-4, atol=1e-5)
    before, after = (oracle.tables_of(one, specs)["table"][0] for one in (variables, updated[0]))
    np.testing.assert_array_equal(np.flatnonzero((before != after).any(axis=1)), np.unique(ids))


@pytest.mark.parametrize("structure", [dict, tuple, list])
def test_activations_have_the_structure_of_the_specs(structure):
    tables = [oracle.table_spec("a", dim=8), oracle.table_spec("b", dim=16)]
    leaves = [oracle.feature_spec(f"f{k}", tables[k % 2]) for k in range(3)]
    specs = {"x": leaves[0], "y": leaves[1:]} if structure is dict else structure(leaves)
    embax.prepare_feature_specs_for_training(specs)
    ids = jax.tree.map(
        lambda spec: np.zeros((10, 3), np.int32), specs, is_leaf=lambda x: isinstance(x, embax.FeatureSpec)
    )
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess(ids, specs=specs)
    activations = embax.lookup(packed, variables, specs=specs)
    assert jax.tree.structure(activations) == jax.tree.structure(ids)
    assert [a.shape for a in jax.tree.leaves(activations)] == [(10, 8), (10, 16), (10, 8)]
    new = embax.apply_gradients(activations, packed, variables, specs=specs)
    assert jax.tree.structure(new) == jax.tree.structure(variables)


def test_a_narrow_feature_takes_the_first_columns_and_updates_only_them():
    table = oracle.table_spec(dim=8)
    specs = {"f": oracle.feature_spec("f", table, batch=2, output_shape=(2, 3))}
    embax.prepare_feature_specs_for_training(specs)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    before = oracle.tables_of(variables, specs)["table"][0]
    packed = embax.preprocess({"f": np.array([[4], [5]])}, specs=specs)
    activations = embax.lookup(packed, variables, specs=specs)["f"]
    np.testing.assert_array_equal(activations, before[4:6, :3])
    new = embax.apply_gradients({"f": jnp.ones((2, 3))}, packed, variables, specs=specs)
    after = oracle.tables_of(new, specs)["table"][0]
    np.testing.assert_allclose(after[4:6, :3], before[4:6, :3] - 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after[4:6, 3:], before[4:6, 3:])


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_quantized_lookup(backend):
    config = embax.QuantizationConfig(0.0, 15.0, 256)
    specs, variables = model(quantization_config=config, initializer=jax.nn.initializers.normal(10.0))
    table = oracle.tables_of(variables, specs)["table"][0].astype(np.float64)
    step = 15.0 / 255
    quantized = np.round((np.clip(table, 0, 15)) / step) * step
    with embax.use_backend(backend):
        activations = embax.lookup(embax.preprocess(IDS, specs=specs), variables, specs=specs)["f"]
    np.testing.assert_allclose(activations, oracle.lookup(quantized, IDS["f"], "sum"), rtol=1e-4)
    assert (table < 0).any()
    assert (table > 15).any()


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_a_nan_gradient_reaches_its_rows_and_no_other(backend):
    specs, variables = model(optimizer=embax.AdagradOptimizerSpec(0.1))
    packed = embax.preprocess({"f": np.array([[1], [2]])}, specs=specs)
    gradient = jnp.ones((2, 8)).at[0, 3].set(jnp.nan)
    with embax.use_backend(backend):
        new = embax.apply_gradients({"f": gradient}, packed, variables, specs=specs)
    isnan = np.isnan(oracle.tables_of(new, specs)["table"][0])
    assert isnan[1, 3]
    assert isnan.sum() == 1


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_damaged_buffers_touch_no_row_of_others_and_nothing_out_of_bounds(backend):
    specs, variables = model()
    packed = embax.preprocess(IDS, specs=specs)
    rng = np.random.default_rng(0)
    extremes = np.array([-(2**31), -5, -1, 0, 3, 200, 2**31 - 1], np.int32)
    step = jax.jit(functools.partial(embax.apply_gradients, specs=specs))
    with embax.use_backend(backend):
        for _ in range(50):
            damaged = packed.replace(
                row_pointers=rng.choice(extremes, packed.row_pointers.shape),
                embedding_ids=rng.choice(extremes, packed.embedding_ids.shape),
                sample_ids=rng.choice(extremes, packed.sample_ids.shape),
                gains=np.ones_like(packed.gains),
            )
            activations = embax.lookup(damaged, variables, specs=specs)
            new = step({"f": jnp.ones((2, 8))}, damaged, variables)
            assert activations["f"].shape == (2, 8)
            same = np.asarray(new["table"].table == variables["table"].table).all(axis=1)
            # Only ids 0 and 3 of each of the 4 SparseCores are rows.
            assert set(np.flatnonzero(~same) % (len(same) // 4)) <= {0, 3}


def test_reading_rows():
    specs, variables = model(num_sparsecores=3)
    table = oracle.tables_of(variables, specs)["table"][0]
    ids = np.array([[0, 49], [7, 7]])
    np.testing.assert_array_equal(embax.read_rows(variables, "table", ids, specs=specs), table[ids])
    inside = jax.jit(lambda ids: embax.read_rows(variables, "table", ids, specs=specs))(jnp.array([3, 50, -1]))
    np.testing.assert_array_equal(inside[0], table[3])
    assert np.isnan(inside[1:]).all()
    for dtype in (np.int8, np.uint8, np.int16, np.uint64):
        few = np.arange(50).astype(dtype)
        np.testing.assert_array_equal(embax.read_rows(variables, "table", few, specs=specs), table)
        inside = jax.jit(lambda ids: embax.read_rows(variables, "table", ids, specs=specs))(few.astype(np.uint8))
        np.testing.assert_array_equal(inside, table)
    assert embax.read_rows(variables, "table", [], specs=specs).shape == (0, 8)
    for bad in (50, -1, 2**32 + 5, 2**63 - 1):
        with pytest.raises(
            ValueError, match=rf"'table': id {bad} at position \(1,\) is outside the vocabulary, 0 to 49"
        ):
            embax.read_rows(variables, "table", np.array([1, bad]), specs=specs)
    with pytest.raises(ValueError, match="There is no table 'x'; the tables are .'table'."):
        embax.read_rows(variables, "x", [1], specs=specs)
    with pytest.raises(ValueError, match="Table 'table': ids are float64; they must be integers"):
        embax.read_rows(variables, "table", [1.0], specs=specs)
    for bad, text in (
        (
            [[1], [2, 3]],
            "its ids are not an array of numbers but a list whose parts differ in length.* Make lists of one",
        ),
        ([1, np.ma.masked], "its ids are a masked array, whose mask would be lost"),
        ([1, 2**70], rf"id {2**70} at position \(1,\) is outside the vocabulary, 0 to 49"),
        ([2**63, 1], rf"id {2**63} at position \(0,\) is outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=f"^Table 'table': {text}"):
            embax.read_rows(variables, "table", bad, specs=specs)
    with pytest.raises(ValueError, match="Table 'table': ids are a list of values traced by JAX; make one array of it"):
        jax.jit(lambda id_: embax.read_rows(variables, "table", [id_], specs=specs))(1)
    with pytest.raises(ValueError, match=r"There is no table \['table'\]"):
        embax.read_rows(variables, ["table"], [1], specs=specs)


def test_mismatches_are_named():
    specs, variables = model()
    packed = embax.preprocess(IDS, specs=specs)
    gradients = {"f": jnp.ones((2, 8))}
    with pytest.raises(ValueError, match=r"gradients have the structure PyTreeDef\(\{'g': \*\}\), the feature specs"):
        embax.apply_gradients({"g": gradients["f"]}, packed, variables, specs=specs)
    with pytest.raises(
        ValueError, match=r"Feature 'f': the gradient has shape \(3, 8\); that of its activations is \(2, 8\)"
    ):
        embax.apply_gradients({"f": jnp.ones((3, 8))}, packed, variables, specs=specs)
    with pytest.raises(ValueError, match=r"variables are of the stacks \['other'\], the specs have \['table'\]"):
        embax.lookup(packed, {"other": variables["table"]}, specs=specs)
    narrow = embax.EmbeddingVariables(jnp.zeros((64, 4)), embax.SGDSlotVariables())
    with pytest.raises(
        ValueError, match=r"has as table an array float32\[64, 4\]; SGDOptimizerSpec needs float32\[64, 8\]"
    ):
        embax.lookup(packed, {"table": narrow}, specs=specs)
    slot = embax.AdagradSlotVariables(variables["table"].table)
    with pytest.raises(ValueError, match="Stack 'table' has 2 arrays; SGDOptimizerSpec needs 1"):
        embax.lookup(packed, {"table": embax.EmbeddingVariables(variables["table"].table, slot)}, specs=specs)
    for arguments in ({"g": 1.0}, None):
        with pytest.raises(ValueError, match="variables are|The variables are a NoneType"):
            embax.lookup(packed, arguments, specs=specs)
    with pytest.raises(ValueError, match="The batch is a dict; it must be what embax.preprocess returned"):
        embax.lookup(IDS, variables, specs=specs)
    with pytest.raises(
        ValueError, match=r"Feature 'f': the activation has shape \(2, 2\); that of its activations is \(2, 8\)"
    ):
        embax.apply_gradients(gradients, packed, variables, specs=specs, activations={"f": jnp.ones((2, 2))})
    with pytest.raises(
        ValueError, match="Feature 'f': the gradient is complex64; it must be a real floating point array"
    ):
        embax.apply_gradients({"f": jnp.ones((2, 8), jnp.complex64)}, packed, variables, specs=specs)
    with pytest.raises(ValueError, match="'f': the gradient has shape None"):
        embax.apply_gradients({"f": 1.0}, packed, variables, specs=specs)


def test_a_batch_for_other_specs_is_refused():
    packed = embax.preprocess(IDS, specs=model()[0])
    for options, message in (
        (
            {"num_sparsecores": 2},
            r"packed for \(devices, SparseCores a device\) \(1, 4\), the specs were placed for \(1, 2\)",
        ),
        ({"vocabulary": 51}, "Stack 'table': the batch was packed for other specs. Their features"),
        ({"combiner": "mean"}, "Stack 'table': the batch was packed for other specs. Their combiner: sum; .* mean"),
        ({"name": "other"}, r"packed for the stacks \['table'\], the specs have \['other'\]"),
    ):
        specs, variables = model(**options)
        with pytest.raises(ValueError, match=message):
            embax.lookup(packed, variables, specs=specs)


def test_arrays_and_layouts_that_lie_are_refused_before_the_tables_are_donated():
    specs, variables = model()
    packed = embax.preprocess(IDS, specs=specs)
    step = jax.jit(lambda v, p: embax.apply_gradients({"f": jnp.ones((2, 8))}, p, v, specs=specs), donate_argnums=0)
    for changes in (
        {"embedding_ids": packed.embedding_ids[:8]},
        {"gains": np.zeros(packed.gains.shape, np.int32)},
        {"row_pointers": packed.row_pointers[:, None]},
    ):
        with pytest.raises(ValueError, match=f"packed batch has {next(iter(changes))} of shape .*; its layout says"):
            step(variables, packed.replace(**changes))
    (stack,) = packed.layout.stacks
    for changes in (
        {"entries_start": 2**62 + 2**40, "capacity": 2**62},
        {"entries_start": 2**63 - 64},
        {"row_pointers_start": 2**63 - 8},
        {"batch_sizes": (2**61,)},
        {"batch_sizes": (-40,)},
        {"batch_sizes": ()},
    ):
        layout = dataclasses.replace(packed.layout, stacks=(dataclasses.replace(stack, **changes),))
        with pytest.raises(ValueError, match="The layout of the packed batch contradicts itself"):
            step(variables, packed.replace(layout=layout))
    assert not variables["table"].table.is_deleted()


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_an_empty_batch_changes_nothing(backend):
    specs, variables = model(optimizer=embax.AdagradOptimizerSpec(0.1))
    for limits in ("raise", "grow"):
        packed = embax.preprocess({"f": np.zeros((0, 3), np.int32)}, specs=specs, limits=limits)
        with embax.use_backend(backend):
            activations = embax.lookup(packed, variables, specs=specs)
            new = embax.apply_gradients(activations, packed, variables, specs=specs, activations=activations)
        assert activations["f"].shape == (0, 8)
        jax.tree.map(np.testing.assert_array_equal, new, variables)


def test_masked_arrays_are_refused():
    specs, _ = model()
    masked = np.ma.masked_array(IDS["f"], mask=IDS["f"] == 2)
    with pytest.raises(ValueError, match=r"Feature 'f': its ids are a masked array.*ids.filled\(-1\)"):
        embax.preprocess({"f": masked}, specs=specs)
    weights = np.ma.masked_array(np.ones((2, 3)), mask=IDS["f"] == 2)
    with pytest.raises(ValueError, match=r"Feature 'f': its weights are a masked array.*weights.filled\(0\)"):
        embax.preprocess(IDS, {"f": weights}, specs=specs)


def test_what_jax_transformations_may_not_do_is_said():
    specs, variables = model()
    packed = embax.preprocess(IDS, specs=specs)
    with pytest.raises(
        ValueError, match="embax_lookup cannot be differentiated. Differentiate with respect to the activations"
    ):
        jax.grad(lambda v: jnp.sum(embax.lookup(packed, v, specs=specs)["f"]))(variables)
    stacked = jax.tree.map(lambda array: jnp.stack([array] * 2), packed)
    with pytest.raises(ValueError, match="embax_lookup cannot be mapped by vmap. Make one larger batch"):
        jax.vmap(lambda p: embax.lookup(p, variables, specs=specs))(stacked)


def test_specs_placed_for_several_devices_are_refused():
    specs = {"f": oracle.feature_spec("f", oracle.table_spec())}
    embax.prepare_feature_specs_for_training(specs, 2, 4)
    with pytest.raises(ValueError, match="placed for 2 devices"):
        embax.init_embedding_variables(jax.random.key(0), specs)


def test_unknown_backends_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match="backend is 'cuda'; it must be one of 'native', 'portable'"),
        embax.use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("EMBAX_BACKEND", "fast")
    specs, variables = model()
    with pytest.raises(ValueError, match="variable EMBAX_BACKEND is 'fast'; it must be one of"):
        embax.lookup(embax.preprocess(IDS, specs=specs), variables, specs=specs)


def test_the_backend_is_part_of_jits_cache_key():
    specs, variables = model()
    packed = embax.preprocess(IDS, specs=specs)
    lookup = jax.jit(functools.partial(embax.lookup, specs=specs))
    texts = []
    for backend in ("native", "portable"):
        with embax.use_backend(backend):
            lookup(packed, variables)
            texts.append(lookup.lower(packed, variables).as_text())
    assert "embax_lookup" in texts[0]
    assert "embax_lookup" not in texts[1]
    assert lookup._cache_size() == 2


def test_limits_that_change_retrace_and_others_do_not():
    specs, variables = model()
    traces = 0

    @jax.jit
    def lookup(packed, variables):
        nonlocal traces
        traces += 1
        return embax.lookup(packed, variables, specs=specs)

    for ids in ([[1], [2]], [[3], [4]]):
        lookup(embax.preprocess({"f": np.array(ids)}, specs=specs), variables)
    assert traces == 1
    lookup(embax.preprocess({"f": np.array([[1], [2], [3]])}, specs=specs), variables)  # Another batch size.
    assert traces == 2


PROGRAM = """
import sys, zlib
import jax, numpy as np
import embax
table = embax.TableSpec(name="t", vocabulary_size=20_000, embedding_dim=24, combiner="mean",
                        initializer=jax.nn.initializers.normal(1.0), optimizer=embax.AdagradOptimizerSpec(0.1))
specs = {"f": embax.FeatureSpec(name="f", table_spec=table, input_shape=(4096, 8), output_shape=(4096, 24))}
embax.prepare_feature_specs_for_training(specs, 1, 4)
variables = embax.init_embedding_variables(jax.random.key(0), specs)
rng = np.random.default_rng(0)
digest = 0
for _ in range(3):
    packed = embax.preprocess({"f": rng.zipf(1.3, (4096, 8)) % 20_000}, specs=specs, limits="grow")
    activations = embax.lookup(packed, variables, specs=specs)
    variables = embax.apply_gradients(activations, packed, variables, specs=specs)
    for array in jax.tree.leaves((activations, variables)):
        digest = zlib.crc32(np.asarray(array).tobytes(), digest)
print(digest)
"""


def run_program(**environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True, text=True).stdout


def test_the_same_bits_for_any_number_of_threads_and_on_repetition():
    results = {run_program(EMBAX_NUM_THREADS=threads) for threads in ("1", "2", "2")}
    assert len(results) == 1


def test_slower_instruction_sets_can_be_asked_for():
    program = "from embax import _native; print(_native.simd())"
    for simd in ("baseline", "avx2"):
        env = {**os.environ, "EMBAX_SIMD": simd}
        out = subprocess.run(
            [sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True
        ).stdout
        assert out.strip() in {simd, "baseline"}
    assert _native.simd() in {"baseline", "avx2", "avx512"}
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_program(EMBAX_SIMD="AVX2")
    assert "variable EMBAX_SIMD is 'AVX2'; it must be one of 'baseline', 'avx2', 'avx512'" in error.value.stderr


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_gradients_that_depend_on_activations_give_the_order_and_take_over_their_memory(backend):
    """Of a lookup and an update, without `activations`: no table is copied."""
    table = oracle.table_spec(vocabulary=1 << 20, dim=16)
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, batch=8192, valency=1)})
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": np.zeros((8192, 1), np.int32)}, specs=specs, limits="grow")

    @functools.partial(jax.jit, donate_argnames="variables")
    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = {"f": activations["f"] * 2}
        return embax.apply_gradients(gradients, packed, variables, specs=specs)

    with embax.use_backend(backend):
        memory = step.lower(variables, packed).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in jax.tree.leaves(variables))
    activations = 4 * 8192 * 16
    assert memory.temp_size_in_bytes < (1.1 if backend == "native" else 20) * activations
