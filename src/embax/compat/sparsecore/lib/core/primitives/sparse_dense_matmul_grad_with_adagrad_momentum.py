"""Update of one table by Adagrad with momentum."""

from embax.compat.sparsecore.lib.core.primitives._update import update_primitive
from embax.optimizers import AdagradMomentumOptimizerSpec

tpu_sparse_dense_matmul_grad_with_adagrad_momentum_primitive = update_primitive(
    "sparse_dense_matmul_grad_with_adagrad_momentum",
    AdagradMomentumOptimizerSpec,
    "adagrad_momentum_optimizer_update",
    slots=("accumulator", "momentum"),
    hyperparameters=("learning_rate", "momentum_param", "beta2", "epsilon", "exponent", "use_nesterov"),
)
