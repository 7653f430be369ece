"""How the features of a stack lie in it."""

from collections.abc import Sequence

from embax._topology import num_sparsecores_per_device


def sparsecores_that_divide(stack: tuple[int, ...], features: Sequence[tuple[int, ...]], given: int | None) -> int:
    """SparseCores of a device, each of which has an equal slice of every feature.

    Args:
        stack: shape of the stack's activations.
        features: shapes of those of its features.
        given: their number; None is that of the device.

    Raises:
        ValueError: the features are no matrices, they do not divide, or do not fit in the stack.
    """
    num = num_sparsecores_per_device() if given is None else given
    if len(stack) != 2 or any(len(shape) != 2 for shape in features):
        raise ValueError(f"The stack has shape {stack}, its features {list(features)}; all must be matrices.")
    batch, columns = stack
    if any(size % num for size, _ in features):
        raise ValueError(f"The batches of {list(features)} must be multiples of {num}, the SparseCores of a device.")
    if batch != sum(size for size, _ in features) or columns < max(dim for _, dim in features):
        raise ValueError(f"Features of the shapes {list(features)} do not fit in a stack of shape {stack}.")
    return num
