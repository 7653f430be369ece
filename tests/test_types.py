import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import shapes_example

import embax._types

TABLE = jnp.zeros((6, 4))
IDS = jnp.array([1, 2, 3])


def test_right_shapes_pass():
    assert shapes_example.take(TABLE, IDS).shape == (3, 4)
    assert jax.jit(shapes_example.take)(TABLE, IDS).shape == (3, 4)


@pytest.mark.parametrize(
    ("table", "ids"),
    [
        pytest.param(TABLE[0], IDS, id="rank of the table"),
        pytest.param(TABLE, IDS[None], id="rank of the ids"),
        pytest.param(TABLE.astype(jnp.int32), IDS, id="dtype of the table"),
        pytest.param(TABLE, IDS.astype(jnp.float32), id="dtype of the ids"),
    ],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_wrong_argument_is_caught(transform, table, ids):
    with pytest.raises(jaxtyping.TypeCheckError, match=r"shapes_example\.take"):
        transform(shapes_example.take)(table, ids)


def test_wrong_result_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"return value of shapes_example\.take_first"):
        shapes_example.take_first(TABLE, IDS)


def test_annotations_without_shape_are_not_checked():
    assert shapes_example.ones(1, 3).shape == (1, 3)


def test_embax_imports_its_shapes_from_jaxtyping():
    for name in ("Bool", "Float", "Float32", "Int", "Int32", "PyTree", "Shaped", "UInt32"):
        assert getattr(embax._types, name) is getattr(jaxtyping, name)


def test_hook_covers_embax():
    assert "jaxtyping" in type(embax._types.__spec__.loader).__module__
