"""What becomes of large blocks that a step frees: they go back to the system, or wait in the heap to be used again.

A block that goes back is pages that the system has to clear when the next one asks, some thousand blocks a step: a
third of the time of Gemma 3 270M's step on a virtual machine. A block that waits may lie where the next does not fit: 1
to 13 % more was resident. So where a budget leaves room, blocks of more and more bytes wait, a level after each step
that shows the room; where a peak comes near the budget, or memory runs out, fewer do. Nothing that is learned depends
on it.
"""

import ctypes
import os
from typing import Final

from memfit.account.meter import trim

LEVELS: Final = (1 << 20, 4 << 20, 12 << 20, 32 << 20)
"""Blocks of fewer bytes wait (mallopt(3), M_MMAP_THRESHOLD): from what `worker.QUIET` sets to the most glibc takes."""
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_ROOM: Final = (1.02, 1.04, 1.10)
"""What a level's next asks for, of the peak measured, and twice the size of its largest blocks beside that. Seen were
1.02, 1.05 and 1.10 of large models, and half as much again of one of few such blocks."""
_NEAR: Final = 0.98
"""Of what is allowed; a peak above that is too near to it."""


class Freed:
    """The level in use. It stays at the first where the process's malloc sets its thresholds itself.

    Args:
        allowed_nbytes: what the process may grow by, all in all; None: as much as it likes.
        active: whether this process's malloc can be told; default: if its threshold was set when it began.
    """

    def __init__(self, allowed_nbytes: int | None, *, active: bool | None = None) -> None:
        self.allowed_nbytes = allowed_nbytes
        self.level = 0
        fixed = "MALLOC_MMAP_THRESHOLD_" in os.environ and hasattr(ctypes.CDLL(None), "mallopt")
        self._most = len(LEVELS) - 1 if (fixed if active is None else active) else 0

    @property
    def waiting_nbytes(self) -> int:
        """Blocks of fewer bytes wait in the heap."""
        return LEVELS[self.level]

    def watch(self, measured_nbytes: int) -> bool:
        """After a step, with what the process grew by: a level up or down. True: it went down."""
        allowed = self.allowed_nbytes
        if self.level and allowed is not None and measured_nbytes > _NEAR * allowed:
            self._most = self.level - 1
            self._set(self.level - 1)
            return True
        if self.level < self._most:
            asked = measured_nbytes * _ROOM[self.level] + 2 * LEVELS[self.level + 1]
            if allowed is None or asked <= _NEAR * allowed:
                self._set(self.level + 1)
        return False

    def give_back(self) -> bool:
        """From here on all goes back at once; False: it does already."""
        self._most = 0
        if not self.level:
            return False
        self._set(0)
        return True

    def free_nbytes(self) -> int:
        """What waits now: there for this process, though it counts as taken."""
        if not self.level or not hasattr(ctypes.CDLL(None), "mallinfo2"):
            return 0
        call = ctypes.CDLL(None).mallinfo2
        call.restype = _Mallinfo
        return int(call().fordblks)

    def _set(self, level: int) -> None:
        _tell(level)
        if level < self.level:
            trim()
        self.level = level


def _tell(level: int) -> None:
    """Have malloc do so."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, LEVELS[level])
    # Twice as much at the heap's end, as glibc's own rule has it; at the first level as `worker.QUIET` does.
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * LEVELS[level] if level else LEVELS[0])


class _Mallinfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip
