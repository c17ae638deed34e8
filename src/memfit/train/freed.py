"""Freed blocks wait in the heap to be used again, as far as the budget has room (see `account.malloc`).

That is faster, and takes more: 1 to 13 % was seen of large models. So blocks of more and more bytes wait, a level after
each step whose peak shows the room; where a peak comes near the budget, or memory runs out, fewer do. Nothing that is
learned depends on it.
"""

from typing import Final

from memfit.account import malloc
from memfit.account.malloc import LEVELS

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
        self._steps = 0
        self._most = len(LEVELS) - 1 if (malloc.is_told() if active is None else active) else 0

    @property
    def waiting_nbytes(self) -> int:
        """Blocks of fewer bytes wait in the heap."""
        return LEVELS[self.level]

    def watch(self, measured_nbytes: int) -> bool:
        """After a step, with what the process grew by: a level up or down. True: it went down."""
        self._steps += 1
        if self._steps == 1:
            return False  # the optimizer's states have come in it: the next takes more
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
        return malloc.free_nbytes() if self.level else 0

    def _set(self, level: int) -> None:
        malloc.tell(LEVELS[level])
        self.level = level
