"""Update of one table by SGD."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import SGDOptimizerSpec

tpu_sparse_dense_matmul_grad_with_sgd_primitive = update_primitive(
    "sparse_dense_matmul_grad_with_sgd", SGDOptimizerSpec, "sgd_optimizer_update"
)
