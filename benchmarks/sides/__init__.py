"""The sides that are compared: each runs in a process, and an environment, of its own."""
