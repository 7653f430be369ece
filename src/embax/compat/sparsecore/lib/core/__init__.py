"""Input processing and primitives."""
