"""The module tree below `jax_tpu_embedding.sparsecore`."""
