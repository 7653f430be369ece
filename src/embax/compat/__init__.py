"""The module tree of jax-tpu-embedding, on embax: `embax.compat.sparsecore` mirrors `jax_tpu_embedding.sparsecore`."""

from embax.compat._install import install as install
