"""Specs, stacking, packing, lookups and updates."""
