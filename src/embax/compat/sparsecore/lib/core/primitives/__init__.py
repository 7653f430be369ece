"""The primitives, one module each."""
