"""glibc's malloc, as arithmetic: what the C heap and whole pages add to the bytes that were asked for.

After malloc/malloc.c of glibc 2.36, as memfit's measured processes set it up (`memfit_command.QUIET`: no caches of
small chunks, thresholds that stay): a block is cut from the smallest hole that it fits into, else from the heap's end,
and holes beside each other are one. Which of several holes of one size is taken decides what can join later, so its
order is kept: fresh holes wait, the oldest that fits to the byte is taken, and the others join those of their size.
Where neither a hole nor the end serves, a block of `waiting_nbytes` or more is pages of its own, which go back when it
ends; the heap gives back its end alone. So a small block that stays keeps all that lies below it.
torch asks for blocks at multiples of 64 bytes (posix_memalign): malloc looks for a hole larger by that, and gives
back what it does not need of it.

Left out: what is not a tensor. Objects that lie in the way of two holes that could have been one make some more; those
belong to the calibrated runtime.
"""

from bisect import bisect_left, insort
from typing import Final

from .ledger import Ledger
from .malloc import LEVELS, trim_threshold

_TOP_PAD: Final = 128 << 10
"""What it grows by beyond what is asked for, and keeps when it is given back (M_TOP_PAD)."""
_PAGE: Final = 4096
_ALIGNMENT: Final = 64
_LEAST: Final = 32
"""The smallest chunk."""
_HEADER: Final = 16
"""From a chunk's start to its block."""


class Heap:
    """The heap while blocks come and go; `resident_nbytes` is what the process holds of it.

    Args:
        waiting_nbytes: blocks from here on are pages of their own where no hole is large enough.
    """

    def __init__(self, waiting_nbytes: int = LEVELS[0]) -> None:
        self._waiting, self._trim = waiting_nbytes, trim_threshold(waiting_nbytes)
        self._sizes: list[int] = []
        """Of the holes in order, each once."""
        self._of_size: dict[int, list[int]] = {}
        """Where the holes of a size begin: the first that came, then the others, the last first (malloc's bins)."""
        self._fresh: dict[int, None] = {}
        """Holes that no request has looked at yet, the oldest first."""
        self._size_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        """Of the hole that begins, or ends, at an address."""
        self._used = self._end = self._touched = self._pages = 0
        """Where the last chunk ends; where the heap ends; how far it has been written; bytes of pages."""
        self._held: dict[int, tuple[int, int] | int] = {}
        """Of each block its chunk, start and size; or the bytes of its pages."""

    @property
    def resident_nbytes(self) -> int:
        return self._touched + self._pages

    def begin(self, number: int, nbytes: int) -> None:
        """A block is asked for."""
        needed = _chunk(nbytes)
        asked = _chunk(needed + _ALIGNMENT + _LEAST)
        start = self._hole_for(asked)
        if start is not None:
            size = self._take(start)
            if size - asked >= _LEAST:
                self._put(start + asked, size - asked)
                size = asked
        elif self._end - self._used < asked + _LEAST and asked >= self._waiting:
            pages = _whole_pages(asked + 8)
            self._pages += pages
            self._held[number] = pages
            return
        else:
            if self._end - self._used < asked + _LEAST:
                self._end += _whole_pages(asked + _TOP_PAD + _LEAST - (self._end - self._used))
            start, size = self._used, asked
            self._used += asked
        self._place(number, start, size, needed)

    def end(self, number: int) -> None:
        """A block is given back."""
        chunk = self._held.pop(number)
        if isinstance(chunk, int):
            self._pages -= chunk
        else:
            self._give_back(*chunk)

    def _place(self, number: int, start: int, size: int, needed: int) -> None:
        """Put an aligned block into a chunk, and give back what is before and behind it."""
        first, last = start, start + size
        if (start + _HEADER) % _ALIGNMENT:
            first = -(-(start + _HEADER) // _ALIGNMENT) * _ALIGNMENT - _HEADER
            if first - start < _LEAST:
                first += _ALIGNMENT
        if last - first > needed + _LEAST:
            last = first + needed
        self._held[number] = (first, last - first)
        self._touched = max(self._touched, last)
        if first > start:
            self._give_back(start, first - start)
        if last < start + size:
            self._give_back(last, start + size - last)

    def _give_back(self, start: int, size: int) -> None:
        """A chunk ends: one hole with those beside it, or part of the heap's free end."""
        first, last = start, start + size
        if first in self._start_of:
            first = self._start_of[first]
            self._take(first)
        if last == self._used:
            self._used = first
            if self._end - first > self._trim:
                self._end -= (self._end - first - _LEAST - 1 - _TOP_PAD) // _PAGE * _PAGE
                self._touched = min(self._touched, self._end)
            return
        if last in self._size_of:
            last += self._take(last)
        self._put(first, last - first)

    def _hole_for(self, asked: int) -> int | None:
        """Where the hole begins that malloc takes for a chunk, if there is one."""
        while self._fresh:
            start = next(iter(self._fresh))
            if self._size_of[start] == asked:
                return start
            del self._fresh[start]
            size = self._size_of[start]
            if size in self._of_size:
                self._of_size[size].insert(1, start)
            else:
                insort(self._sizes, size)
                self._of_size[size] = [start]
        at = bisect_left(self._sizes, asked)
        return self._of_size[self._sizes[at]][:2][-1] if at < len(self._sizes) else None

    def _put(self, start: int, size: int) -> None:
        self._fresh[start] = None
        self._size_of[start] = size
        self._start_of[start + size] = start

    def _take(self, start: int) -> int:
        """The size of a hole that is one no more."""
        size = self._size_of.pop(start)
        del self._start_of[start + size]
        if start in self._fresh:
            del self._fresh[start]
        else:
            self._of_size[size].remove(start)
            if not self._of_size[size]:
                del self._of_size[size]
                self._sizes.remove(size)
        return size


def heap_nbytes(ledger: Ledger, waiting_nbytes: int = LEVELS[0]) -> int:
    """What the C heap and whole pages add to the allocated peak at the worst moment, less what is never written."""
    heap = Heap(waiting_nbytes)
    allocated = unwritten = peak = worst = 0
    for number, sign in ledger.events:
        storage = ledger.storages[number]
        nbytes = storage.nbytes
        if nbytes == 0:
            continue
        allocated += sign * nbytes
        unwritten += sign * storage.unwritten
        if sign > 0:
            heap.begin(number, nbytes)
            peak, worst = max(peak, allocated), max(worst, heap.resident_nbytes - unwritten)
        else:
            heap.end(number)
    return worst - peak


def _chunk(nbytes: int) -> int:
    """Bytes of the chunk that serves a request."""
    return max(_LEAST, -(-(nbytes + 8) // 16) * 16)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
