"""The library part of the module tree."""
