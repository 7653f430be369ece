"""The version of jax-tpu-embedding whose names and behaviour these modules have."""

__version__ = "0.2.0"
