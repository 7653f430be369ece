"""Update of one table by Adagrad."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import AdagradOptimizerSpec

tpu_sparse_dense_matmul_grad_with_adagrad_primitive = update_primitive(
    "sparse_dense_matmul_grad_with_adagrad_primitive",
    AdagradOptimizerSpec,
    "adagrad_optimizer_update",
    slots=("accumulator",),
)
