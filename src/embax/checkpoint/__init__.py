"""Checkpoints of tables, slots and anything else. Needs the extra `embax[checkpoint]`."""

from embax.checkpoint._errors import CheckpointError as CheckpointError
from embax.checkpoint._load import load as load
from embax.checkpoint._save import save as save
