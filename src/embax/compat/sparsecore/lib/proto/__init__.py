"""Protocol buffers of specs."""
