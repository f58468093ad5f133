"""How the C library allocates memory on the CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt, from malloc.h


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse the memory of freed batches and activations, for the rest of the process.

    By default it returns large blocks to the kernel, and each of their pages (4 kB) costs a page fault when it is
    allocated again. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
