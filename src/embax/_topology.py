"""How many SparseCores a device has, real ones on a TPU and virtual ones elsewhere."""

import jax

from embax._types import Device

VIRTUAL_SPARSECORES_PER_DEVICE = 4
"""SparseCores of a CPU or a GPU: slices of a device's table and batch that one thread can own."""

TPU_SPARSECORES = {"TPU v5": 4, "TPU v5p": 4, "TPU v6e": 2, "TPU v6 lite": 2, "TPU7x": 2}


def num_sparsecores_per_device(device: Device | None = None) -> int:
    """The number of SparseCores of `device` (of the first device when None): a TPU's own, else 4 virtual ones.

    Raises:
        ValueError: the device is a TPU whose kind is not known.
    """
    one = jax.devices()[0] if device is None else device
    if one.platform != "tpu":
        return VIRTUAL_SPARSECORES_PER_DEVICE
    try:
        return TPU_SPARSECORES[one.device_kind]
    except KeyError:
        raise ValueError(
            f"The number of SparseCores of a {one.device_kind!r} is not known; known are {sorted(TPU_SPARSECORES)}. "
            "Pass num_sc_per_device."
        ) from None
