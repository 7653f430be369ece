"""Update of one table by Adam."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import AdamOptimizerSpec

tpu_sparse_dense_matmul_grad_with_adam_primitive = update_primitive(
    "sparse_dense_matmul_grad_with_adam_primitive",
    AdamOptimizerSpec,
    "adam_optimizer_update",
    slots=("momentum", "velocity"),
    hyperparameters=("alpha_t", "beta_1", "beta_2", "epsilon_hat"),
)
