"""Statistics of packed batches, kept for later runs."""
