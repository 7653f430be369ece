"""Row rules of the user's as StableHLO."""

from embax.optimizers import CustomOptimizerSpec
from embax.optimizers._clipping import apply_clipping as apply_clipping

lower_to_stablehlo = CustomOptimizerSpec.lower_to_stablehlo


def wrap_stablehlo_with_limits(
    stablehlo: str | bytes,
    embedding_dim: int,
    num_slot_variables: int,
    num_hyperparameters: int,
    min_value: float | None = None,
    max_value: float | None = None,
) -> str:
    """`CustomOptimizerSpec.wrap_stablehlo_with_limits`, which without limits does not read the text."""
    if min_value is None and max_value is None:
        return stablehlo.decode() if isinstance(stablehlo, bytes) else stablehlo
    return CustomOptimizerSpec.wrap_stablehlo_with_limits(
        stablehlo, embedding_dim, num_slot_variables, num_hyperparameters, min_value, max_value
    )
