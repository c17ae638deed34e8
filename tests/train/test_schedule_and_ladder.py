"""The learning rate over a run, and the way down and up the ladder of recipes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfit.train.ladder import PATIENCE, Ladder, Rung
from memfit.train.recipe import Recipe
from memfit.train.room import room_nbytes
from memfit.train.schedule import KINDS, Schedule

MIB = 1 << 20


@given(st.integers(1, 200), st.data(), st.sampled_from(KINDS))
def test_a_schedule_rises_to_one_and_never_above_and_falls_from_there(steps, data, kind):
    warmup = data.draw(st.integers(0, steps))
    factors = [Schedule(steps=steps, warmup=warmup, kind=kind).factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if warmup < steps:
        assert factors[warmup] == 1.0
    if kind == "constant":
        assert set(factors[warmup:]) <= {1.0}


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="from 0 to the 3 steps"):
        Schedule(steps=3, warmup=4)
    with pytest.raises(ValueError, match="one of cosine, linear, constant"):
        Schedule(steps=3, kind="sine")  # type: ignore[arg-type]


def ladder(*extras):
    rungs = [
        Rung(recipe=Recipe(slices=n + 1), peak_nbytes=100 * MIB + extra, extra_nbytes=extra)
        for n, extra in enumerate(extras)
    ]
    return Ladder(rungs)


def test_a_ladder_goes_down_as_far_as_the_room_asks_and_no_further():
    made = ladder(50, 30, 10)
    assert made.fit(60) is None
    assert made.fit(20) == "memory is short"
    assert made.at == 2
    assert made.fit(5) is None  # there is nothing below: the step is tried
    assert not made.down()


def test_it_goes_up_one_by_one_after_steps_without_trouble():
    made = ladder(50, 30, 10)
    made.fit(20)
    told = [made.fit(1000) for _ in range(2 * PATIENCE + 2)]
    assert [n for n, what in enumerate(told) if what] == [PATIENCE, 2 * PATIENCE + 1]
    assert made.at == 0


def test_after_memory_ran_out_it_waits_twice_as_long():
    made = ladder(50, 30)
    assert made.failed()
    told = [made.fit(1000) for _ in range(3 * PATIENCE)]
    assert [n for n, what in enumerate(told) if what] == [2 * PATIENCE]
    assert not (made.failed() and made.failed())


def test_rungs_are_read_back_from_json():
    rung = ladder(7).rung
    assert Rung.from_json(json.loads(json.dumps(rung.to_json()))) == rung


def test_a_limit_set_on_the_process_is_seen():
    import resource

    cpu = torch.device("cpu")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    free = room_nbytes(cpu)
    assert free > 64 * MIB
    with open("/proc/self/status", encoding="ascii") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (data + 64 * MIB, before[1]))
        assert room_nbytes(cpu) <= 64 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
