"""The arithmetic of the C heap, beside the C heap."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.account.dry_run import trace
from memfit.account.heap import Heap, heap_nbytes
from memfit.account.ledger import Ledger, Storage
from memfit.account.malloc import FAST, LEVELS, trim_threshold
from memfit.account.watch import Watch
from memfit_command import QUIET

MIB = 1 << 20

ON_THE_REAL_HEAP = """
import ctypes, json, sys

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h hblkhd u f uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
steps = json.loads(sys.stdin.read())
place, held = ctypes.c_void_p(), [0] * len(steps)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
for size in (1 << power for power in range(19, 4, -1)):
    while True:  # fill the holes that starting has left, whatever it was that left them
        end = libc.mallinfo2().keepcost
        filled = libc.malloc(size)
        if libc.mallinfo2().keepcost != end:
            libc.free(filled)  # it came from the heap's end: no hole is as large
            break
while libc.malloc(40) % 64 != 32:
    pass  # until the heap's end is at a multiple of 64, where told begins
before, most = libc.mallinfo2(), 0
for number, nbytes in steps:
    if nbytes:
        assert libc.posix_memalign(ctypes.byref(place), 64, nbytes) == 0  # as torch asks for its blocks
        held[number] = place.value
    else:
        libc.free(held[number])
    now = libc.mallinfo2()
    most = max(most, now.arena + now.hblkhd - before.arena - before.hblkhd)
print(most)
"""


def lived(*steps: tuple[str, int]) -> Ledger:
    """A ledger of births (name, bytes) and ends (name, 0)."""
    ledger, numbers = Ledger(), {}
    for name, nbytes in steps:
        if nbytes:
            numbers[name] = ledger.born(Storage(nbytes, "activation", "", "", torch.uint8))
        else:
            ledger.ended(numbers[name])
    return ledger


def some_steps(seed: int, count: int) -> list[tuple[int, int]]:
    """Blocks that come and go, as activations do: several sizes again and again, long and short lives."""
    chance = random.Random(seed)
    sizes = [chance.randrange(100, 3 * MIB) for _ in range(6)] + [chance.randrange(50_000, MIB) for _ in range(6)]
    steps, alive = [], []
    for number in range(count):
        steps.append((number, chance.choice(sizes)))
        alive.append(number)
        while alive and (len(alive) > 120 or chance.random() < 0.42):
            steps.append((alive.pop(chance.randrange(len(alive))), 0))
    return steps


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="another C library")
@pytest.mark.parametrize(("seed", "waiting"), [(0, LEVELS[0]), (1, LEVELS[0]), (2, LEVELS[0]), (3, FAST), (4, FAST)])
def test_the_real_heap_grows_as_told(seed: int, waiting: int) -> None:
    steps = some_steps(seed, 1500)
    thresholds = {
        "MALLOC_MMAP_THRESHOLD_": str(waiting), "MALLOC_TRIM_THRESHOLD_": str(trim_threshold(waiting)),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_REAL_HEAP], input=json.dumps(steps), capture_output=True, text=True,
        env=os.environ | QUIET | thresholds, check=True,
    )  # fmt: skip
    measured = int(done.stdout)
    heap, told, asked, most_asked, nbytes_of = Heap(waiting), 0, 0, 0, {}
    for number, nbytes in steps:
        if nbytes:
            nbytes_of[number] = nbytes
            heap.begin(number, nbytes)
        else:
            heap.end(number)
        asked += nbytes or -nbytes_of[number]
        told, most_asked = max(told, heap.resident_nbytes), max(most_asked, asked)
    assert measured > 1.06 * most_asked, "there is nothing to explain"
    assert told == pytest.approx(measured, rel=0.01 if waiting == LEVELS[0] else 0.03)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 200))
def test_blocks_never_overlap_and_all_that_ends_is_given_back(seed: int, count: int) -> None:
    heap, alive = Heap(), {}
    for number, nbytes in some_steps(seed, count):
        if nbytes:
            heap.begin(number, nbytes)
            alive[number] = nbytes
        else:
            heap.end(number)
            del alive[number]
        chunks = sorted(chunk for chunk in heap._held.values() if not isinstance(chunk, int))
        for (start, size), (after, _) in itertools.pairwise(chunks):
            assert start + size <= after
        assert heap.resident_nbytes >= sum(alive.values())
    for number in alive:
        heap.end(number)
    assert heap.resident_nbytes <= MIB + 256 * 1024
    assert not heap._size_of and not heap._sizes and not heap._fresh and not heap._held


def test_large_blocks_are_whole_pages_with_a_header() -> None:
    assert heap_nbytes(lived(("a", 3 * MIB))) == 4096
    assert heap_nbytes(lived(("a", 3 * MIB - 200))) == 200


def test_what_no_kernel_writes_to_is_no_page() -> None:
    ledger = Ledger()
    ledger.born(Storage(3 * MIB, "activation", "", "", torch.uint8, MIB))
    assert heap_nbytes(ledger) == 4096 - MIB


def test_a_recurrent_layer_leaves_some_of_what_it_keeps_unwritten() -> None:
    layer = torch.nn.LSTM(64, 64)
    # Whatever lies in the memory that the layer will be given.
    others = [torch.full((nbytes,), 7, dtype=torch.uint8) for nbytes in (1 << 20, 1 << 19, 1 << 18) * 8]
    del others

    class Step:
        def run(self, model: torch.nn.Module, watch: Watch) -> None:
            with watch.phase("forward"):
                model(torch.ones(200, 4, 64, requires_grad=True))

    kept = [s for s in trace(lambda: layer, Step()).storages if s.operator == "aten::mkldnn_rnn_layer" and s.unwritten]
    assert len(kept) == 1
    assert kept[0].unwritten % 4096 == 0 and kept[0].unwritten < kept[0].nbytes
    assert kept[0].nbytes - kept[0].unwritten >= 200 * 4 * 64 * 4 * 4, "four gates a step are kept"


def test_what_stays_keeps_the_heap_below_it() -> None:
    # 0.75 MiB from the heap and a little above it; then the hole is of no use to 4 MiB of pages.
    ledger = lived(("hole", 3 * MIB // 4), ("stays", 1000), ("hole", 0), ("large", 4 * MIB))
    assert 3 * MIB // 4 <= heap_nbytes(ledger) < 3 * MIB // 4 + 8192


def test_a_large_block_takes_a_hole_that_is_large_enough() -> None:
    halves = [(f"half {number}", 3 * MIB // 4) for number in range(3)]
    ends = [(name, 0) for name, _ in halves]
    ledger = lived(*halves, ("stays", 1000), *ends, ("large", 2 * MIB))
    assert heap_nbytes(ledger) < 4096
