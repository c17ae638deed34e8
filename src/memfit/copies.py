"""Copies of this process, which share with it all that neither of them writes (fork(2)).

Two processes that each bring libraries in hold what these make of themselves twice: some 210 MiB of anonymous pages.
"""

import ctypes
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO, TypeVar

import numpy as np

_PRESENT, _OF_A_FILE = 1 << 63, 1 << 61
"""Bits of an entry of /proc/PID/pagemap, eight bytes a page (proc(5))."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG: Final = 1
_Given = TypeVar("_Given")


def may_be_copied() -> bool:
    """Whether a copy would be whole: no thread runs beside this one, which the copy would lack. It wants Linux's /proc,
    which a sandbox may not show."""
    streams = all(stream is not None for stream in (sys.stdin, sys.stdout, sys.stderr))
    threads = Path("/proc/self/task")
    seen = threads.is_dir() and os.access("/proc/self/pagemap", os.R_OK)
    return streams and seen and len(list(threads.iterdir())) == 1


def copy_that(does: Callable[[], object]) -> int:
    """Begin a copy of this process that does so and ends, with exit code 1 and a traceback on stderr if it raises; its
    id. What this process is to do at its end is not done by it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        does()
        sys.stdout.flush()
        code = 0
    except BaseException:  # whatever it is, the copy ends here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def aside(does: Callable[[], _Given]) -> _Given:
    """What `does` gives, done in a copy of this process that ends with it: what else it has made ends too, and of what
    it has changed only files stay. What it gives, or raises, must be such that pickle takes it.

    Raises:
        ChildProcessError: the copy ended before it gave anything.
    """
    given, giving = os.pipe()
    parent = os.getpid()

    def give() -> None:
        end_with(parent)
        os.close(given)
        with suppress(KeyboardInterrupt):  # the process that asked is interrupted, too, and tells of it
            try:
                answer = pickle.dumps((does(), None))
            except Exception as error:
                error.add_note(traceback.format_exc())  # pickle leaves the traceback behind
                answer = pickle.dumps((None, error))
            with open(giving, "wb") as pipe:
                pipe.write(answer)

    copy = copy_that(give)
    os.close(giving)
    try:
        with open(given, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        os.kill(copy, signal.SIGKILL)  # there is nobody to do it for
        raise
    finally:
        _, status = os.waitpid(copy, 0)
    if not answer:
        raise ChildProcessError(f"a copy of this process ended with {os.waitstatus_to_exitcode(status)} and no answer")
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


class Copied:
    """A copy of this process as it is now, with pipes to its stdin and from its stdout; as `subprocess.Popen` is.

    It begins by looking at the pages of files that are resident here, which fork(2) leaves out: so it is as resident
    as a process that has brought the same libraries in itself.
    """

    def __init__(self, does: Callable[[], object], *, errors: TextIO) -> None:
        """does: what it does; errors: its stderr."""
        gc.collect()
        gc.freeze()  # to look through objects is to write to them, and what is written is no longer shared
        pages, parent = _pages_of_files(), os.getpid()
        asked, asking = os.pipe()
        answering, answers = os.pipe()

        def begin() -> None:
            end_with(parent)
            for standard, own in enumerate((asked, answers, errors.fileno())):
                os.dup2(own, standard)
            for other in (asked, asking, answering, answers):
                os.close(other)
            _look_at(pages)
            does()

        self._code: int | None = None
        self._pid = copy_that(begin)
        os.close(asked)
        os.close(answers)
        self.stdin, self.stdout = open(asking, "w"), open(answering)  # noqa: SIM115 (`__exit__` closes them)

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        try:
            self.stdin.close()
        finally:
            self.wait()

    def kill(self) -> None:
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code when it has ended, as `subprocess.Popen` has it: minus a signal's number."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code


def end_with(parent: int) -> None:
    """Let the system kill this process when `parent` ends, however that ends (prctl(2), PR_SET_PDEATHSIG): the same
    command, run again, is not to meet a job that still writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# -- parts --------------------------------------------------------------------------------------------


def _pages_of_files() -> list[tuple[int, int]]:
    """Runs of pages of files that are resident here and could be read again: address and number of pages."""
    runs: list[tuple[int, int]] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, rights, _, _, inode, *_ = line.split(None, 5)
            if inode == "0" or not rights.startswith("r"):
                continue
            start, stop = (int(address, 16) for address in span.split("-"))
            pagemap.seek(start // _PAGE * 8)
            entries = np.frombuffer(pagemap.read((stop - start) // _PAGE * 8), dtype=np.uint64)
            wanted = np.uint64(_PRESENT | _OF_A_FILE)
            edges = np.flatnonzero(np.diff((entries & wanted) == wanted, prepend=False, append=False))
            runs += [(start + int(a) * _PAGE, int(b - a)) for a, b in edges.reshape(-1, 2)]
    return runs


def _look_at(pages: list[tuple[int, int]]) -> None:
    """Make pages resident, by a byte of each."""
    for address, count in pages:
        for page in range(count):
            ctypes.string_at(address + page * _PAGE, 1)
