"""The errors memfit raises, and the exit code each one ends a command with.

    MemfitError
    ├── UsageError        2   the call itself is off
    ├── DoesNotFit        3   no plan fits the budget
    ├── BrokenInput       4   a file is unsafe, broken or not what it says
    ├── QualityMissed     5   done, but worse than the gate allows
    ├── OverBudget        6   done, but measured over the budget
    └── Interrupted      75   stopped half-way; running the same command again resumes

Each message says what, the numbers, and the next move.
"""

import errno
from typing import Final

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MemfitError(Exception):
    """Base of all errors that memfit raises on purpose."""

    exit_code = 1

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as it is: not made anew, for which it may want more than its message."""
        return _as_it_was, (type(self), self.args), self.__dict__


def _as_it_was(kind: type[MemfitError], args: tuple[object, ...]) -> MemfitError:
    return kind.__new__(kind, *args)


class UsageError(MemfitError):
    """The call cannot be carried out as written."""

    exit_code = 2


class DoesNotFit(MemfitError):
    """Nothing that may be chosen fits. `smallest_nbytes` is the smallest budget that would, or with `of_cap` the
    smallest cap on resident memory."""

    exit_code = 3

    def __init__(
        self, message: str, *, smallest_nbytes: int, levers: dict[str, int] | None = None, of_cap: bool = False
    ) -> None:
        super().__init__(message)
        self.of_cap = of_cap
        self.smallest_nbytes = smallest_nbytes
        self.levers = dict(levers or {})


class BrokenInput(MemfitError):
    """A file was refused. The message names the file, the tensor or key, and the reason."""

    exit_code = 4


class _Done(MemfitError):
    """The work is done and kept, and not as it should be. `report` is the `Report` of it."""

    def __init__(self, message: str, *, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class QualityMissed(_Done):
    """The fitted model is worse than the quality gate allows."""

    exit_code = 5


class OverBudget(_Done):
    """The measured peak is over the budget."""

    exit_code = 6


class Interrupted(MemfitError):
    """Stopped before the end; what was done is kept and the same command resumes."""

    exit_code = 75


def disk_full(error: OSError, place: object, *, kept: bool = False) -> MemfitError | None:
    """What to tell where a write failed for want of room: of the disk, a quota, or a limit on files; else None.

    `kept`: what is done stays beside the output, and the same command goes on.
    """
    if error.errno not in _FULL:
        return None
    then = (
        "what is done is kept beside it. Free some space and run the same command again"
        if kept
        else "nothing half-written is left. Free some space or write to another disk"
    )
    return MemfitError(f"{place}: the disk is full ({error.strerror}). The output is as it was before, and {then}.")
