"""CUDA's driver. Needs no torch."""

import ctypes


def has_driver() -> bool:
    """Returns whether CUDA's driver is installed: without its library, which torch opens too, there is no CUDA device.

    torch takes seconds to import, so import it for CUDA devices only where this is true.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
