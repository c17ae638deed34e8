"""What glibc's malloc does with a block that is freed: the system's again, or a hole in the heap that waits to be used.

Blocks of `waiting_nbytes` and more are pages of their own, which go back when they end and have to be cleared by the
system when the next one asks: a third of the time of a step or of a walk through a model's blocks on a virtual machine.
A smaller block waits, and may lie where the next does not fit.
"""

import ctypes
import os
from typing import Final

from .meter import trim

LEVELS: Final = (1 << 20, 4 << 20, 12 << 20, 32 << 20)
"""Blocks of fewer bytes wait (mallopt(3), M_MMAP_THRESHOLD): from what `memfit_command.QUIET` sets to the most that
glibc takes."""
FAST: Final = LEVELS[2]
"""Where no budget is near: most of the time is won there, and the heap told to some per cent (see `heap`)."""
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def is_told() -> bool:
    """Whether this process's malloc has thresholds that stay until it is told others."""
    return "MALLOC_MMAP_THRESHOLD_" in os.environ and hasattr(ctypes.CDLL(None), "mallopt")


def tell(waiting_nbytes: int) -> None:
    """From here on freed blocks of fewer bytes wait; what waits now goes back."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, waiting_nbytes)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold(waiting_nbytes))
    trim()


def trim_threshold(waiting_nbytes: int) -> int:
    """Free bytes at the heap's end from which on it is given back: twice as many, as glibc's own rule has it; at the
    first level as `memfit_command.QUIET` sets it."""
    return waiting_nbytes if waiting_nbytes <= LEVELS[0] else 2 * waiting_nbytes


def free_nbytes() -> int:
    """What waits in the heap: there for this process, though it counts as taken."""
    call = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if call is None:
        return 0
    call.restype = _Mallinfo
    return int(call().fordblks)


class _Mallinfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip
