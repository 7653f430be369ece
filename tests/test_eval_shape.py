"""The shapes of packed batches without data."""

import jax
import numpy as np
import oracle
import pytest

import embax


def specs_of(devices=1, batch=8, **fields):
    tables = [oracle.table_spec(name, 100, **fields) for name in "ab"]
    features = {t.name: oracle.feature_spec(t.name, t, batch=batch * (1 + (t.name == "b"))) for t in tables}
    return embax.prepare_feature_specs_for_training(features, devices, 4)


def ids_for(specs, devices):
    return {
        name: np.arange(feature.output_shape[0] // devices * 3).reshape(-1, 3) % 100 for name, feature in specs.items()
    }


@pytest.mark.parametrize("minibatching", [False, True])
@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize(("devices", "local_devices"), [(1, None), (2, None), (4, 2)])
def test_shapes_are_those_of_packed_batches(devices, local_devices, leading, minibatching):
    specs = specs_of(devices, suggested_coo_buffer_size_per_device=500)
    options = {
        "num_local_devices": local_devices,
        "has_leading_dimension": leading,
        "enable_minibatching": minibatching,
    }
    shapes = embax.eval_preprocess_shape(specs, **options)
    if local_devices is not None and minibatching:
        options["all_reduce"] = embax.ThreadAllReduce(1).member(0)
    packed = embax.preprocess(ids_for(specs, devices // (local_devices or devices)), specs=specs, **options)
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)  # The layout included.
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(packed)
    ]


def test_a_step_compiled_ahead_takes_the_batch():
    specs = specs_of()
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    step = jax.jit(lambda variables, packed: embax.lookup(packed, variables, specs=specs))
    compiled = step.lower(variables, embax.eval_preprocess_shape(specs)).compile()
    packed = embax.preprocess(ids_for(specs, 1), specs=specs)
    assert compiled(variables, packed)["b"].shape == (16, 8)


def test_a_batch_that_does_not_divide():
    specs = specs_of(4, batch=6)
    with pytest.raises(ValueError, match=r"Feature 'a' has a batch of 6 by its output_shape.*4 devices.*make it 8\."):
        embax.eval_preprocess_shape(specs)
