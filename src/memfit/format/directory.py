"""A directory that appears whole or not at all."""

import ctypes
import fcntl
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from memfit.errors import MemfitError, UsageError, disk_full

_MARK: Final = ".memfit-partial-"
# A partial directory is locked a moment after it is made; a younger one may be another run about to lock it.
_STALE_SECONDS: Final = 5
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100


class OutputDirectory:
    """Builds OUT in a hidden directory beside it and renames it into place at the end of the block.

        with OutputDirectory(Path("out")) as out:
            out.write_json("plan.json", plan.to_json())

    Whatever ends the block early, an interrupt included, removes what was built; what a killed run left
    behind is removed by the next run to the same place. `path` is where the files go meanwhile.

    Raises:
        UsageError: OUT exists and `overwrite` is off, or it is no model directory, which is never
        overwritten. MemfitError: the disk is full.
    """

    def __init__(self, target: str | Path, *, overwrite: bool = False) -> None:
        # Resolved, so that a link to a directory keeps pointing to what it points to.
        self.target = Path(target).resolve()
        self.told = target
        """As the caller named it, for messages."""
        self.overwrite = overwrite
        self._path: Path | None = None
        self._lock: int | None = None
        self._check()

    @property
    def path(self) -> Path:
        """The partial directory; only inside the block."""
        if self._path is None:
            raise RuntimeError("OutputDirectory.path is only there inside its `with` block")
        return self._path

    def _check(self) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise UsageError(f"{self.told} is a file, and the output is a directory. Choose another place (--out).")
        if not self.overwrite:
            raise UsageError(f"{self.told} exists. Choose another place (--out), or overwrite it (--overwrite).")
        if any(self.target.iterdir()) and not (self.target / "config.json").is_file():
            raise UsageError(
                f"{self.told} holds other things than a model (no config.json), and is not overwritten. "
                "Choose another place (--out) or empty it."
            )

    def write_json(self, name: str, data: Any) -> None:
        """Write `data` as `name`, keys in their order, so that the same data gives the same bytes."""
        write_json(self.path / name, data)

    def write_text(self, name: str, text: str) -> None:
        """Write `text` as `name`, UTF-8, `\\n` at line ends."""
        _write_text(self.path / name, text)

    def __enter__(self) -> Self:
        parent, name = self.target.parent, self.target.name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(parent, name)
            self._path = Path(tempfile.mkdtemp(prefix=f".{name}{_MARK}", dir=parent))
        except OSError as error:
            raise MemfitError(
                f"{parent}: cannot write here ({error.strerror}). Choose another place."
            ) from error
        # mkdtemp makes it private; the finished directory is as public as any that the user makes.
        mask = os.umask(0)
        os.umask(mask)
        self._path.chmod(0o777 & ~mask)
        self._lock = os.open(self._path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as late:
            error = late
            raise disk_full(late, self.target.parent) or late from late
        finally:
            if self._lock is not None:
                os.close(self._lock)
            if error is not None and self._path is not None:
                shutil.rmtree(self._path, ignore_errors=True)
            self._path = self._lock = None
        if isinstance(error, OSError) and (clear := disk_full(error, self.target.parent)):
            raise clear from error

    def _finish(self) -> None:
        """Make the bytes durable, then the name: a crash leaves the old directory or the new one."""
        for folder, _, files in os.walk(self.path):
            for name in files:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        if self.target.exists():
            # Something may have appeared while the model was made.
            self._check()
            self._swap()
        else:
            os.rename(self.path, self.target)
        _fsync(self.target.parent)
        # Once more: what a run left that was killed a moment before this one began was too young then.
        _remove_stale(self.target.parent, self.target.name)

    def _swap(self) -> None:
        if _exchange(self.path, self.target):
            shutil.rmtree(self.path, ignore_errors=True)
            return
        # No exchange on this system: for a moment there is no OUT, but never a partial one.
        old = Path(tempfile.mkdtemp(prefix=f".{self.target.name}{_MARK}", dir=self.target.parent))
        os.rename(self.target, old)
        try:
            os.rename(self.path, self.target)
        except OSError:
            os.rename(old, self.target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, data: Any) -> None:
    """Keys in their order, so that the same data gives the same bytes."""
    _write_text(file, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step (Linux's renameat2); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_stale(parent: Path, name: str) -> None:
    """Remove partial directories of `name` that no living run holds locked."""
    for path in parent.iterdir():
        if not (path.name.startswith(f".{name}{_MARK}") and path.is_dir() and not path.is_symlink()):
            continue
        if time.time() - path.stat().st_mtime < _STALE_SECONDS:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)
