"""Stacking: grouping, padding, rotation, offsets, limits, names, errors."""

import functools
import hashlib
import re

import jax
import numpy as np
import oracle
import pytest

import embax
from embax._stacking.stack import short_stack_name, split_by_activation_memory

INITIALIZER = jax.nn.initializers.normal(1.0)


def tables_and_features(*vocabularies, batch=8, **fields):
    tables = [
        oracle.table_spec(f"table_{'abcdefgh'[k]}", vocabulary, initializer=INITIALIZER, **fields)
        for k, vocabulary in enumerate(vocabularies)
    ]
    return tables, [oracle.feature_spec(f"feature_{table.name}", table, batch=batch) for table in tables]


def test_offsets_rotation_and_limits():
    tables, features = tables_and_features(10, 100, 33)
    seen = []

    def limit(name, samples):
        seen.append((name, samples))
        return 77

    result = embax.stack_tables(features, [t.name for t in tables], 2, 4, stack_to_max_ids_per_partition=limit)
    assert result is features
    stack = tables[0].stacked_table_spec
    assert stack.stack_name == "table_a_table_b_table_c"
    assert stack.stack_vocab_size == 64 + 128 + 64
    assert (stack.max_ids_per_partition, stack.max_unique_ids_per_partition) == (77, 256)
    assert seen == [("table_a_table_b_table_c", 24)]
    assert [t.setting_in_stack.row_offset_in_shard for t in tables] == [0, 8, 24]
    assert [t.setting_in_stack.shard_rotation for t in tables] == [0, 4, 0]  # k * 4 mod 8.
    assert [f.id_transformation.row_offset for f in features] == [0, 8, 16]
    assert [f.id_transformation.col_offset for f in features] == [0, 64, 192]
    assert [f.id_transformation.col_shift for f in features] == [0, 4, 0]


def test_a_stack_of_one_table_keeps_its_limits():
    _, features = tables_and_features(10, max_ids_per_partition=11, max_unique_ids_per_partition=12)
    embax.auto_stack_tables(features)
    stack = features[0].table_spec.stacked_table_spec
    assert (stack.max_ids_per_partition, stack.max_unique_ids_per_partition) == (11, 12)


def test_auto_stacking_groups_by_dimension_optimizer_combiner_and_quantization():
    def table(name, **fields):
        return oracle.table_spec(name, initializer=INITIALIZER, **fields)

    quantization = embax.QuantizationConfig(0.0, 1.0, 4)
    tables = [
        table("z", dim=6),
        table("wide", dim=16),
        table("a", dim=8),
        table("mean", combiner="mean"),
        table("adagrad", optimizer=embax.AdagradOptimizerSpec(0.1)),
        table("other rate", optimizer=embax.SGDOptimizerSpec(0.2)),
        table("quantized", quantization_config=quantization),
    ]
    features = [oracle.feature_spec(f"f{k}", spec) for k, spec in enumerate(tables)]
    embax.auto_stack_tables(features)
    assert list(embax.get_stacked_table_specs(features)) == [
        "z_a",  # In order of first appearance.
        "wide",
        "mean",
        "adagrad",
        "other rate",
        "quantized",
    ]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([1, 1, 1], 3, [[0, 1, 2]]),
        ([1, 1, 1], 2, [[0, 1], [2]]),
        ([2, 2, 1, 1], 3, [[0, 2], [1, 3]]),
        ([9, 1, 1], 3, [[0], [1, 2]]),
        ([1, 9, 1], 3, [[0, 2], [1]]),
        ([], 3, []),
    ],
)
def test_groups_are_cut_first_fit(sizes, limit, expected):
    names = [str(k) for k in range(len(sizes))]
    groups = split_by_activation_memory(names, dict(zip(names, sizes, strict=True)), limit)
    assert groups == [[str(k) for k in group] for group in expected]


def test_the_activation_limit_cuts_stacks():
    _, features = tables_and_features(10, 10, 10, batch=64)
    embax.auto_stack_tables(features, 1, 4, activation_mem_bytes_limit=2 * 8 * 4 * 16)
    assert list(embax.get_stacked_table_specs(features)) == ["table_a_table_b", "table_c"]


def test_long_names_are_shortened():
    name = "x" * 51
    assert short_stack_name("x" * 50) == "x" * 50
    assert short_stack_name(name) == "x" * 50 + "..." + hashlib.sha256(name.encode()).hexdigest()[:12]
    _, features = tables_and_features(*[10] * 8)
    embax.auto_stack_tables(features)
    (stack,) = embax.get_stacked_table_specs(features)
    assert re.fullmatch(r".{50}\.\.\.[0-9a-f]{12}", stack)


def test_errors():
    tables, features = tables_and_features(10, 10, 10)
    with pytest.raises(
        ValueError, match=r"there are no tables \['x'\]; name some of \['table_a', 'table_b', 'table_c'\]"
    ):
        embax.stack_tables(features, ["x"])
    with pytest.raises(ValueError, match="Table table_a is repeated in group"):
        embax.stack_tables(features, ["table_a", "table_a"])
    embax.stack_tables(features, ["table_a", "table_b"], stack_name="stack")
    with pytest.raises(ValueError, match=r"Table table_b is already stacked\. It is in stack 'stack'"):
        embax.stack_tables(features, ["table_b", "table_c"])
    with pytest.raises(
        ValueError, match="stack name 'stack' is already used by the stack of table 'table_a'; choose another"
    ):
        embax.stack_tables(features, ["table_c"], stack_name="stack")
    assert not tables[2].is_stacked()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": embax.SGDOptimizerSpec(0.3)}, "different optimizers: {'table_a': SGDOptimizerSpec"),
        ({"combiner": "mean"}, "different combiners: {'table_a': 'sum', 'other': 'mean'}"),
        ({"quantization_config": embax.QuantizationConfig(0.0, 1.0, 4)}, "different quantization configs"),
    ],
)
def test_only_like_tables_are_stacked(fields, message):
    _, features = tables_and_features(10)
    features.append(oracle.feature_spec("other", oracle.table_spec("other", initializer=INITIALIZER, **fields)))
    with pytest.raises(ValueError, match=message):
        embax.stack_tables(features, ["table_a", "other"])


def test_different_dimensions_warn_or_fail():
    _, features = tables_and_features(10)
    features.append(oracle.feature_spec("other", oracle.table_spec("other", dim=20)))
    with pytest.raises(
        ValueError, match="different padded dimensions: {'table_a': 8, 'other': 24}; all are padded to 24"
    ):
        embax.stack_tables(features, ["table_a", "other"], fail_on_excess_padding=True)
    with pytest.warns(UserWarning, match="all are padded to 24 columns"):
        embax.stack_tables(features, ["table_a", "other"])
    assert features[0].table_spec.setting_in_stack.padded_embedding_dim == 24


@pytest.mark.parametrize("num_sparsecores", [1, 3, 4])
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_stacked_tables_train_as_they_do_alone(num_sparsecores, backend):
    rng = np.random.default_rng(0)
    vocabularies = (40, 7, 100)
    ids = [rng.integers(-1, vocabulary, (8, 3)).astype(np.int32) for vocabulary in vocabularies]
    results = []
    for place in (embax.prepare_feature_specs_for_training, embax.auto_stack_tables):
        _, features = tables_and_features(*vocabularies, optimizer=embax.AdagradOptimizerSpec(0.1), combiner="mean")
        place(features, 1, num_sparsecores)
        variables = embax.init_embedding_variables(jax.random.key(0), features)
        packed = embax.preprocess(ids, specs=features)
        with embax.use_backend(backend):
            activations = embax.lookup(packed, variables, specs=features)
            variables = embax.apply_gradients(activations, packed, variables, specs=features)
        results.append((len(variables), activations, oracle.tables_of(variables, features)))
    (alone, activations, tables), (stacked, other_activations, other_tables) = results
    assert (alone, stacked) == (3, 1)
    # The portable backend sums in blocks, which begin elsewhere in a stack.
    tolerance = {"rtol": 0, "atol": 0} if backend == "native" else {"rtol": 1e-5, "atol": 1e-6}
    same = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(same, (activations, tables), (other_activations, other_tables))


def several_features(dim, narrow, quantization):
    """Features of three tables: some share one, samples and tables are in different orders, batches of different sizes."""
    tables = {
        name: oracle.table_spec(
            name, vocabulary, dim, optimizer=embax.AdagradOptimizerSpec(0.1), quantization_config=quantization
        )
        for name, vocabulary in (("a", 40), ("b", 7), ("c", 100))
    }
    batches = {"b1": ("b", 9), "c3": ("c", 5), "c1": ("c", 1), "a1": ("a", 8), "c2": ("c", 13), "b2": ("b", 2)}
    features = {
        name: oracle.feature_spec(name, tables[table], batch=batch, valency=6)
        for name, (table, batch) in batches.items()
    }
    if narrow:
        features["a1"] = oracle.feature_spec("a1", tables["a"], 8, 6, output_shape=(8, dim - 3))
    return features


@pytest.mark.parametrize(
    ("num_sparsecores", "dim", "options"),
    [
        (1, 8, {}),
        (4, 8, {}),
        (3, 128, {}),  # Looked up in the order of samples.
        (3, 8, {"narrow": True}),
        (4, 8, {"backend": "portable"}),
        (4, 8, {"minibatching": True}),
        (4, 8, {"quantization": embax.QuantizationConfig(-1.0, 1.0, 9)}),
    ],
)
def test_features_of_a_stack_train_as_they_do_alone(num_sparsecores, dim, options):
    narrow, quantization = options.get("narrow", False), options.get("quantization")
    backend, minibatching = options.get("backend", "native"), options.get("minibatching", False)
    rng = np.random.default_rng(0)
    ids = {
        name: rng.integers(-1, spec.table_spec.vocabulary_size, spec.input_shape)
        for name, spec in several_features(8, False, None).items()
    }
    ids["c3"] = ids["c3"][:0]
    results = []
    for place in (embax.prepare_feature_specs_for_training, embax.auto_stack_tables):
        specs = several_features(dim, narrow, quantization)
        place(specs, 1, num_sparsecores)
        variables = embax.init_embedding_variables(jax.random.key(0), specs)
        before = oracle.tables_of(variables, specs)
        packed = embax.preprocess(ids, specs=specs, enable_minibatching=minibatching)
        with embax.use_backend(backend):
            activations = embax.lookup(packed, variables, specs=specs)
            variables = embax.apply_gradients(activations, packed, variables, specs=specs)
        results.append((activations, oracle.tables_of(variables, specs)))
        assert len(variables) == (3 if place is embax.prepare_feature_specs_for_training else 1)
    for name, spec in specs.items():
        rows = before[spec.table_spec.name][0]
        if quantization is not None:
            rows = np.round((np.clip(rows, -1, 1) + 1) * 4) / 4 - 1
        wanted = oracle.lookup(rows, ids[name], "sum")[:, : spec.output_shape[1]]
        np.testing.assert_allclose(activations[name], wanted, rtol=1e-5, atol=1e-5)
    # The portable backend sums in blocks, which begin elsewhere in a stack.
    tolerance = {"rtol": 0, "atol": 0} if backend == "native" else {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), *results)


def test_activations_and_gradients_of_stacked_features_are_not_copied():
    temporary = []
    for place in (embax.prepare_feature_specs_for_training, embax.auto_stack_tables):
        _, specs = tables_and_features(40, 7, 100, batch=4096)
        place(specs, 1, 4)
        variables = embax.init_embedding_variables(jax.random.key(0), specs)
        packed = embax.preprocess([np.zeros((4096, 3), np.int32)] * 3, specs=specs, limits="grow")

        @functools.partial(jax.jit, donate_argnames="variables")
        def step(variables, packed, specs=specs):
            activations = embax.lookup(packed, variables, specs=specs)
            gradients = jax.tree.map(lambda activation: activation * 2, activations)
            return embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)

        compiled = step.lower(variables, packed).compile()
        assert re.search(r"= f32\[[0-9,]*\d{4}\S* (concatenate|copy|slice)\(", compiled.as_text()) is None
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] <= temporary[0] + 1024


def test_limits_of_stacks_name_the_remedy_that_works():
    _, features = tables_and_features(4000, 4000, batch=2000)
    embax.auto_stack_tables(features)
    ids = np.arange(6000, dtype=np.int32).reshape(2000, 3) % 4000
    with pytest.raises(ValueError, match="pass stack_to_max_ids_per_partition= to the stacking function, for at least"):
        embax.preprocess([ids, ids], specs=features)


def test_a_name_that_is_taken_gets_a_longer_one():
    _, features = tables_and_features(10, 10)
    features.append(oracle.feature_spec("f", oracle.table_spec("table_a_table_b", dim=16)))
    embax.auto_stack_tables(features)
    assert list(embax.get_stacked_table_specs(features)) == ["table_a_table_b", "table_a_table_b_"]


def is_untouched(features):
    return all(f._id_transformation is None and not f.table_spec.is_stacked() for f in features)


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"stack_to_max_ids_per_partition": 256},
            "stack_to_max_ids_per_partition is 256; it must be a function from a stack's",
        ),
        (
            {"stack_to_max_unique_ids_per_partition": None},
            "stack_to_max_unique_ids_per_partition is None; it must be a function",
        ),
        (
            {"rotation": "x"},
            "rotation is 'x'; it must be a number of SparseCores, an integer from -2147483647 to 2147483647",
        ),
        ({"rotation": True}, "rotation is True; it must be a number of SparseCores"),
        ({"rotation": 1.0}, "rotation is 1.0; it must be a number of SparseCores"),
        ({"rotation": 2**31}, "rotation is 2147483648; it must be"),
        (
            {"activation_mem_bytes_limit": "2 MiB"},
            "activation_mem_bytes_limit is '2 MiB'; it must be an integer from 1",
        ),
        ({"activation_mem_bytes_limit": 0}, "activation_mem_bytes_limit is 0; it must be an integer from 1"),
        ({"global_device_count": "2"}, "global_device_count is '2'; it must be an integer from 1"),
        ({"num_sc_per_device": 0}, "num_sc_per_device is 0; it must be an integer from 1"),
    ],
)
def test_bad_arguments(auto, arguments, message):
    _, features = tables_and_features(10, 10)
    function = "auto_stack_tables" if auto else "stack_tables"
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        getattr(embax, function)(features, **({} if auto else {"table_names": ["table_a", "table_b"]}), **arguments)
    assert is_untouched(features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"table_names": None},
            r"table_names is None; it must be a sequence of names of tables, some of \['table_a', 'table_b'\]",
        ),
        ({"table_names": "table_a"}, "table_names is 'table_a'; it must be a sequence of names"),
        ({"table_names": []}, r"table_names is \[\]; it must be a sequence of names"),
        ({"table_names": [1, []]}, r"there are no tables \[1, \[\]\]; name some of \['table_a', 'table_b'\]"),
        ({"stack_name": 3}, "stack_name is 3; it must be a non-empty string, or None"),
        ({"stack_name": ""}, "stack_name is ''; it must be a non-empty string, or None"),
        ({"activation_mem_bytes_limit": None}, "activation_mem_bytes_limit is None; it must be an integer from 1"),
    ],
)
def test_bad_arguments_of_one_stack(arguments, message):
    _, features = tables_and_features(10, 10)
    with pytest.raises(ValueError, match=f"^stack_tables: {message}"):
        embax.stack_tables(features, **({"table_names": ["table_a", "table_b"]} | arguments))
    assert is_untouched(features)


@pytest.mark.parametrize("value", [-1, 0, 2.0, "256", None, 2**31])
@pytest.mark.parametrize("argument", ["stack_to_max_ids_per_partition", "stack_to_max_unique_ids_per_partition"])
def test_limit_functions_that_return_no_limit_for_the_second_stack(argument, value):
    _, features = tables_and_features(10, 10)
    features += [oracle.feature_spec(f"f{k}", oracle.table_spec(f"wide{k}", dim=16)) for k in range(2)]
    with pytest.raises(
        ValueError,
        match=f"Stack 'wide0_wide1': the limit that {argument} returns is {value!r}; it must be an integer from 1 to",
    ):
        embax.auto_stack_tables(features, **{argument: lambda name, _: 9 if name == "table_a_table_b" else value})
    assert is_untouched(features)
    embax.auto_stack_tables(features, 2, **{argument: lambda *_: np.int64(9)})
    assert list(embax.get_stacked_table_specs(features)) == ["table_a_table_b", "wide0_wide1"]


def test_a_limit_function_that_fails_changes_nothing():
    _, features = tables_and_features(10, 10)
    with pytest.raises(ZeroDivisionError):
        embax.auto_stack_tables(features, stack_to_max_ids_per_partition=lambda *_: 1 // 0)
    assert is_untouched(features)


def test_a_warning_that_is_an_error_changes_nothing():
    _, features = tables_and_features(10)
    features.append(oracle.feature_spec("other", oracle.table_spec("other", dim=20)))
    with pytest.raises(UserWarning, match="all are padded to 24 columns"):
        embax.stack_tables(features, ["table_a", "other"])
    assert is_untouched(features)


def test_rotations_of_numpy():
    rotations = []
    for rotation in (2, np.int64(2), np.uint8(2)):
        tables, features = tables_and_features(10, 10)
        embax.stack_tables(features, ["table_a", "table_b"], 1, 4, rotation)
        rotations.append(tables[1].setting_in_stack.shard_rotation)
        assert type(rotations[-1]) is int
    assert rotations == [2, 2, 2]
