"""The layer for Flax NNX, and gradients of models that hold it. Needs the extra `embax[flax]`."""

from embax.nnx import embed as embed
from embax.nnx._gradients import apply_sparse_gradients as apply_sparse_gradients
from embax.nnx._gradients import global_norm as global_norm
from embax.nnx._gradients import sum_sparse_gradients as sum_sparse_gradients
from embax.nnx._gradients import value_and_grad as value_and_grad
