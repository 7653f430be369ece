"""Update of one table by LaProp."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import LaPropOptimizerSpec

tpu_sparse_dense_matmul_grad_with_laprop_primitive = update_primitive(
    "sparse_dense_matmul_grad_with_laprop_primitive",
    LaPropOptimizerSpec,
    "laprop_optimizer_update",
    slots=("mu", "nu"),
    hyperparameters=("learning_rate", "b1", "decay_rate", "eps"),
)
