"""Specs, stacking, and the functional API."""
