"""The CUDA caching allocator, as arithmetic: what a run reserves, told on a machine without a GPU.

After c10/cuda/CUDACachingAllocator.cpp with its default settings (no expandable segments):
blocks are rounded up to 512 bytes; requests up to 1 MiB are cut from segments of 2 MiB, requests under
10 MiB from segments of 20 MiB, larger ones get a segment rounded up to 2 MiB. A free block is taken by
best fit, split when what is left is worth keeping (512 bytes in the small pool, over 1 MiB in the
large), and joined with free neighbours when it is given back.

Beside the allocator stand the context and the code of the kernels, which are outside. Inside it, but not
told here: cuDNN's workspaces of recurrent layers and convolutions, the partial sums of attention split over few
queries, and cub's scratch for sorting.
"""

import bisect
from dataclasses import dataclass, field
from typing import Final

_MIN_BLOCK: Final = 512
_SMALL: Final = 1 << 20
_SMALL_SEGMENT: Final = 2 << 20
_LARGE_SEGMENT: Final = 20 << 20
_MIN_LARGE: Final = 10 << 20
_ROUND_LARGE: Final = 2 << 20

CUBLAS_WORKSPACE: Final = 8 * (4096 << 10)
"""33,554,432 bytes that cuBLAS takes at a thread's first product and keeps, on Hopper and later (CUDABlas.cpp); before,
8,519,680. Autograd's backward pass runs in a thread of its own, and so takes them once more."""
CUBLASLT_WORKSPACE: Final = 1 << 20
"""Bytes that cuBLASLt takes likewise at a thread's first product with a bias."""


@dataclass(eq=False, slots=True)
class _Block:
    size: int
    small: bool
    order: int
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None

    @property
    def key(self) -> tuple[int, int]:
        return (self.size, self.order)


@dataclass(slots=True)
class Segments:
    """The allocator's segments while storages come and go; `reserved_nbytes` is what they hold in all.

    Segments are never given back here: that happens only when the device runs out.
    """

    reserved_nbytes: int = 0
    allocated_nbytes: int = 0
    """Bytes of all blocks in use: of a large one not split, what is left belongs to it."""
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(default_factory=lambda: {True: [], False: []})
    _held: dict[int, _Block] = field(default_factory=dict)
    _next: int = 0

    def step(self, number: int, nbytes: int, sign: int) -> int:
        """Storage `number` of `nbytes` is born (+1) or ends (−1): bytes of its block. Empty storages take none."""
        if nbytes == 0:
            return 0
        if sign > 0:
            block = self._held[number] = self._take(-(-nbytes // _MIN_BLOCK) * _MIN_BLOCK)
        else:
            block = self._held.pop(number)
        size = block.size
        self.allocated_nbytes += sign * size
        if sign < 0:
            self._give_back(block)
        return size

    def _take(self, size: int) -> _Block:
        small = size <= _SMALL
        pool = self._free[small]
        place = bisect.bisect_left(pool, (size, -1))
        block = pool.pop(place)[2] if place < len(pool) else self._new_segment(size, small)
        block.free = False
        left = block.size - size
        if left >= _MIN_BLOCK if small else left > _SMALL:
            rest = _Block(size=left, small=small, order=self._number(), before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        return block

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = _SMALL_SEGMENT
        elif size < _MIN_LARGE:
            segment = _LARGE_SEGMENT
        else:
            segment = -(-size // _ROUND_LARGE) * _ROUND_LARGE
        self.reserved_nbytes += segment
        return _Block(size=segment, small=small, order=self._number())

    def _give_back(self, block: _Block) -> None:
        before, after = block.before, block.after
        if before is not None and before.free:
            self._remove(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.free:
            self._remove(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._put(block)

    def _put(self, block: _Block) -> None:
        block.free = True
        bisect.insort(self._free[block.small], (block.size, block.order, block))

    def _remove(self, block: _Block) -> None:
        pool = self._free[block.small]
        pool.pop(bisect.bisect_left(pool, (block.size, block.order)))

    def _number(self) -> int:
        self._next += 1
        return self._next
