"""Placement of tables in stacks."""
