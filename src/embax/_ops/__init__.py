"""The two primitives, lookup and update, and their lowerings."""
