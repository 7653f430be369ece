"""Shape annotations: jaxtyping's where it is installed, else names that cost nothing and mean nothing.

`Float[Array, "vocab dim"]` documents a shape. Nothing checks it while running; the tests install jaxtyping's import
hook, which checks it at every call.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

from jax import Array as Array
from jax.typing import ArrayLike as ArrayLike

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Int as Int
    from jaxtyping import Int32 as Int32
    from jaxtyping import PyTree as PyTree
    from jaxtyping import Shaped as Shaped
    from jaxtyping import UInt32 as UInt32

    Device: TypeAlias = Any  # JAX's names of these two are variables to a type checker
    PyTreeDef: TypeAlias = Any
else:
    from jax import Device as Device
    from jax.tree_util import PyTreeDef as PyTreeDef

    try:
        from jaxtyping import Bool, Float, Float32, Int, Int32, PyTree, Shaped, UInt32
    except ImportError:

        class _Unchecked:
            """Stands for a type of jaxtyping: `Float[Array, "vocab dim"]` is `Array`."""

            def __class_getitem__(cls, item):
                return item[0] if isinstance(item, tuple) else item

        class PyTree:
            """Stands for jaxtyping's: `PyTree[leaf]` is any tree."""

            def __class_getitem__(cls, item):
                return object

        Bool = Float = Float32 = Int = Int32 = Shaped = UInt32 = _Unchecked

Rows: TypeAlias = Float[Array, "rows dim"]
"""Rows of a table or of a slot."""
RowSlots: TypeAlias = tuple[Float[Array, "rows _"], ...]
"""Rows of slots: as wide as those of the table, or one value each."""
Scalars: TypeAlias = tuple[Float[Array, "..."], ...]
"""Hyperparameters of a rule."""
