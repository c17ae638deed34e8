"""Freed blocks wait where the budget has room, and go back where it has none."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.account import malloc
from memfit.account.malloc import LEVELS
from memfit.train.freed import Freed
from memfit_command import QUIET

GIB = 1 << 30

_LIVES = """
import torch
from memfit.account.meter import resident_nbytes
from memfit.account.malloc import LEVELS
from memfit.train.freed import Freed

def held(mib):
    "MiB that stay of 16 blocks; small ones between them live on, or the heap would give back its end."
    before = resident_nbytes()["anonymous"]
    blocks, between = zip(*((torch.ones(mib << 18), torch.ones(225 << 10)) for _ in range(16)))
    del blocks
    return resident_nbytes()["anonymous"] - before - 16 * (900 << 10) >> 20, found.free_nbytes() >> 20

found = Freed(None)
held(3)  # the first brings threads' stacks and libraries' own
print(*held(3))
found.watch(0)
found.watch(0)
print(*held(3), *held(16), found.waiting_nbytes == LEVELS[1])
print(found.give_back(), *held(3), found.give_back(), found.watch(0), found.level)
"""


def test_blocks_wait_as_malloc_was_told_and_go_back():
    """Held against the system's own count, in a process whose thresholds are set."""
    run = subprocess.run(
        [sys.executable, "-c", _LIVES], env=os.environ | QUIET, capture_output=True, text=True, check=True
    )
    before, waiting, after = (line.split() for line in run.stdout.splitlines())
    assert int(before[0]) <= 1 and before[1] == "0"
    assert all(46 <= int(nbytes) <= 50 for nbytes in waiting[:2])  # 16 blocks of 3 MiB
    assert int(waiting[2]) <= 1 and waiting[4] == "True"  # blocks of 16 MiB go back
    assert after[0] == "True" and int(after[1]) <= 1 and after[2:] == ["0", "False", "False", "0"]


def test_a_process_that_sets_its_thresholds_itself_is_left_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(malloc, "tell", lambda nbytes: pytest.fail("malloc was told"))
    found = Freed(None)
    assert not found.watch(0) and not found.watch(0) and not found.give_back() and found.waiting_nbytes == LEVELS[0]


@given(st.lists(st.floats(0.5, 1.3), min_size=1, max_size=30), st.integers(0, 40))
def test_a_level_is_taken_where_there_is_room_and_left_for_good_where_there_is_none(shares, growth):
    """Whatever steps take: never up without the room for it, down at once where a peak is too near."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(malloc, "tell", told.append)
        found = Freed(GIB, active=True)
        most = len(LEVELS) - 1
        assert not found.watch(0) and found.level == 0, "the first step has no states yet"
        for share in shares:
            before = found.level
            measured = int(share * GIB * (1 + growth / 1000 * before))
            down = found.watch(measured)
            assert down == (before > 0 and measured > 0.98 * GIB) == (found.level < before)
            if down:
                most = before - 1
            if found.level > before:
                assert measured * 1.02 + 2 * LEVELS[found.level] <= GIB
            assert found.level <= most and abs(found.level - before) <= 1
        assert set(told) <= set(LEVELS)
        found.give_back()
        assert found.level == 0 and not found.watch(0) and found.level == 0


def test_without_a_budget_all_may_wait():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(malloc, "tell", lambda nbytes: None)
        found = Freed(None, active=True)
        for _ in (*LEVELS, None):
            assert not found.watch(GIB)
        assert found.waiting_nbytes == LEVELS[-1]
