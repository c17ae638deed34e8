"""Memory that runs out in a run: another recipe and the same result, or an error that says what is kept."""

import json
import sys

import pytest

from memfit.errors import MemfitError
from memfit.training import Options, train

STEPS = 6


def test_memory_that_runs_out_changes_the_recipe_and_nothing_else(
    model, text, plan, plain, tmp_path, monkeypatch, watcher
):
    """An allocation that fails: the same batch again, with the same chance, by a recipe that takes less."""
    from memfit.train.step import TrainStep

    failed = []
    call = TrainStep.__call__

    def short(self, batch):
        if self.steps == 2 and not failed:
            failed.append(batch["input_ids"])
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return call(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", short)
    report = train(
        model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,)
    )
    assert "memory ran out" in report.notes[0][1]
    assert [record.rung for record in watcher.records] == [0, 0, 1, 1, 1, 1]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)
    assert report.losses[:2] == plain[0].losses[:2]


def test_a_run_goes_back_to_its_checkpoint_if_weights_had_moved(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train.step import TrainStep

    failed = []
    call = TrainStep.__call__

    def short(self, batch):
        if self.steps == 3 and not failed:
            failed.append(True)
            call(self, batch)
            self._updated = 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return call(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", short)
    options = Options(steps=STEPS, save_every=2)
    report = train(model, text, out=tmp_path / "out", given=plan, options=options)
    assert [what for _, what in report.notes][1] == "went back to step 2, as some weights had been updated"
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)
    log = (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, log) if "labels" in line] == list(range(1, STEPS + 1))


def test_a_run_goes_down_where_room_is_short_and_up_again(
    model, text, plan, plain, tmp_path, monkeypatch, watcher
):
    from memfit.train import ladder, loop

    monkeypatch.setattr(ladder, "PATIENCE", 2)
    rungs = plan.ladder.rungs
    room = iter([1 << 40, rungs[1].extra_nbytes] + [1 << 40] * 10)
    monkeypatch.setattr(loop, "room_nbytes", lambda device: next(room))
    report = train(
        model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,)
    )
    assert [record.rung for record in watcher.records] == [0, 1, 1, 1, 0, 0]
    assert [what.partition(":")[0] for _, what in watcher.notes] == ["memory is short", "there is room again"]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)


def test_a_run_goes_down_where_a_step_took_more_than_its_budget(
    model, text, plan, plain, tmp_path, monkeypatch, watcher
):
    """Someone else's bytes in this process, as a user's own data set may hold, count as the system counts them."""
    from memfit.train.loop import Loop

    hoard = []
    call = Loop._one

    def greedy(self):
        if self.done == 2 and not hoard:
            hoard.append(b"x" * (plan.budget_nbytes + self.settings.runtime_nbytes))
        return call(self)

    monkeypatch.setattr(Loop, "_one", greedy)
    report = train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,))
    assert [record.rung for record in watcher.records][:4] == [0, 0, 0, 1]
    assert "measured" in watcher.notes[0][1] and "allowed: going on with" in watcher.notes[0][1]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)


def test_memory_that_is_never_enough_is_told(model, text, plan, tmp_path, monkeypatch):
    from memfit.train import loop
    from memfit.train.step import TrainStep

    def never(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(TrainStep, "__call__", never)
    waited = []
    monkeypatch.setattr(loop.time, "sleep", waited.append)
    with pytest.raises(MemfitError, match="memory ran out at step 1 with the most frugal recipe"):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS))
    assert waited == [1, 2, 4, 8, 16]


class Short:
    """Calls that run out of memory at given numbers, from 1."""

    def __init__(self, call, *numbers):
        self.call, self.numbers, self.done = call, numbers, 0

    def __call__(self, *args, **options):
        self.done += 1
        if not self.numbers or self.done in self.numbers:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return self.call(*args, **options)


def test_memory_that_runs_out_in_evaluation_changes_the_recipe(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train.step import TrainStep

    short = Short(TrainStep.evaluate, 1)
    monkeypatch.setattr(TrainStep, "evaluate", lambda *args: short(*args))
    report = train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, evaluate_every=3))
    assert [step for step, what in report.notes if "memory ran out" in what] == [4]
    assert [score["step"] for score in report.scores] == [3, 6]
    assert report.losses == pytest.approx(plain[0].losses, rel=2e-2)


def test_memory_that_is_never_enough_for_evaluation_loses_nothing(model, text, plan, plain, tmp_path, monkeypatch):
    from memfit.train import loop
    from memfit.train.step import TrainStep

    monkeypatch.setattr(loop.time, "sleep", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "evaluate", Short(TrainStep.evaluate))
        with pytest.raises(MemfitError, match=r"in the evaluation after step 6 .* checkpoint of step 6 is kept"):
            train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, evaluate_every=0))
    report = train(
        model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS, evaluate_every=0), resume=True
    )
    assert len(report.losses) == STEPS


@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("memfit.training", "make_trainable", "memory ran out while the model was loaded"),
        ("memfit.train.checkpoints", "save_states", "step 2 could not be saved: .*There is no earlier checkpoint"),
        ("memfit.training", "write_model", "memory ran out while the model was written; its last checkpoint is kept"),
    ],
)
def test_memory_that_runs_out_elsewhere_is_told(model, text, plan, tmp_path, monkeypatch, where, what, message):
    monkeypatch.setattr(sys.modules[where], what, Short(None))
    with pytest.raises(MemfitError, match=message):
        train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=2))
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_takes_back_what_waited_before_the_recipe(
    model, text, plan, plain, tmp_path, monkeypatch, watcher
):
    """Freed blocks that wait are the first to go; the recipe stays, and so does what is learned."""
    from memfit.account import malloc
    from memfit.train.freed import Freed
    from memfit.train.step import TrainStep

    told, failed = [], []
    call = TrainStep.__call__

    def short(self, batch):
        if self.steps == 2 and not failed:
            failed.append(True)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return call(self, batch)

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(malloc.LEVELS[0]))
    monkeypatch.setattr(malloc, "tell", told.append)
    monkeypatch.setattr(Freed, "watch", lambda self, measured: self._most and self._set(1))
    monkeypatch.setattr(TrainStep, "__call__", short)
    report = train(model, text, out=tmp_path / "out", given=plan, options=Options(steps=STEPS), observers=(watcher,))
    first, then = malloc.LEVELS[:2]
    assert told[-1] == first and set(told) == {first, then}
    assert report.notes == ((3, "memory ran out: freed memory goes back at once from here on"),)
    assert [record.rung for record in watcher.records] == [0] * STEPS
    assert [record.waiting_nbytes for record in watcher.records] == [first, then, first, first, first, first]
    assert report.losses == plain[0].losses
    assert report.measured_nbytes == max(r.peak_nbytes for r in watcher.records if r.waiting_nbytes == first)
