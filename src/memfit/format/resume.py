"""Where a run keeps what it would rather not make twice, until it has come to its end."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from memfit.errors import Interrupted, MemfitError, UsageError

_KEY: Final = "key.json"


class WorkDirectory:
    """A hidden directory beside OUT. A run that is stopped leaves it, and the same run finds it again.

        with WorkDirectory(Path("out"), key={"model": "m"}) as work:
            found = work.once("calibrated", lambda: hours())

    Anything else that ends the block removes it, an error of memfit's too: the same run would end so again.

    Args:
        target: OUT.
        key: all that what is kept depends on, as JSON. A directory that another key has left is emptied.
        resume: False: it is emptied whatever has left it.

    Attributes:
        resumed: whether a run before has left something here for this one.
    """

    def __init__(self, target: str | Path, *, key: Mapping[str, Any], resume: bool = True) -> None:
        target = Path(target).resolve()
        self.path = target.parent / f".{target.name}.memfit-work"
        self._resume = resume
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(f"{self.path}: another run is at work on the same output. Choose another.") from error
        same = self._found() == self._key and self._resume
        self.resumed = same and any(file.name != _KEY for file in self.path.iterdir())
        if not same:
            for file in self.path.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            self._write(_KEY, self._key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = kind is None or (issubclass(kind, MemfitError) and not issubclass(kind, Interrupted))
        if ended:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def holds(self, name: str) -> bool:
        """Whether a run before has made it."""
        return (self.path / f"{name}.json").exists()

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gave, here or in a run before that was stopped. It may leave files in `path`, too."""
        file = self.path / f"{name}.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        made = make()
        self._write(file.name, made)
        return made

    def _found(self) -> Any:
        try:
            return json.loads((self.path / _KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, name: str, value: Any) -> None:
        """Whole or not at all: what is there is complete."""
        part = self.path / f"{name}.part"
        part.write_text(json.dumps(value), encoding="utf-8")
        os.replace(part, self.path / name)
