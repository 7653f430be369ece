"""Measurements of embax beside the alternatives."""
