"""What `jax_tpu_embedding.sparsecore` offers."""

from embax.compat.sparsecore.version import __version__ as __version__
