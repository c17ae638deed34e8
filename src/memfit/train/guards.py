"""What surrounds a run: a place that can be written, memory for what is done once, signals that end it in order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memfit.errors import MemfitError, UsageError, disk_full
from memfit.technique.checkpoint import is_out_of_memory


@contextmanager
def written_in(run: Path) -> Iterator[None]:
    """Inside, a place where nothing can be written is told as such."""
    try:
        yield
    except OSError as error:
        full = disk_full(error, run)
        raise full or UsageError(f"{run}: cannot be written ({error.strerror}). Choose another place (-o).") from error


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Inside, memory that runs out is told as such."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemfitError(
            f"memory ran out while {what} ({str(error).strip() or type(error).__name__}). Free some memory, or plan "
            "again with another budget."
        ) from error


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGINT end the run after its step, saved; the function tells whether one came."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = {number: signal.signal(number, lambda *_: came.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
