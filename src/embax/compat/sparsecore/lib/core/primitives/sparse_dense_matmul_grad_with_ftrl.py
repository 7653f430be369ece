"""Update of one table by FTRL."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import FTRLOptimizerSpec

tpu_sparse_dense_matmul_grad_with_ftrl_primitive = update_primitive(
    "sparse_dense_matmul_grad_with_ftrl",
    FTRLOptimizerSpec,
    "ftrl_optimizer_update",
    slots=("accumulator", "linear"),
    hyperparameters=(
        "learning_rate",
        "learning_rate_power",
        "l1_regularization_strength",
        "l2_regularization_strength",
        "beta",
    ),
    parameters=("multiply_linear_by_learning_rate",),
)
