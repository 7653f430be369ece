"""The error of a checkpoint that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, unfinished, of a newer format, or does not fit what it is loaded into."""


DAMAGED = "Load an earlier checkpoint, or fetch an intact copy of this one."
"""What to do about bytes that are not those that were saved."""
