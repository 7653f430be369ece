"""Update of one table by F2A."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import F2AOptimizerSpec

tpu_sparse_dense_matmul_grad_with_f2a_primitive = update_primitive(
    "tpu_sparse_dense_matmul_grad_with_f2a",
    F2AOptimizerSpec,
    "f2a_optimizer_update",
    slots=("accumulator", "local_step"),
    hyperparameters=(
        "learning_rate",
        "rho",
        "l1_regularization_strength",
        "l2_regularization_strength",
        "max_lr_multiplier",
        "global_step",
    ),
)
