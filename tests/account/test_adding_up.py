"""Gradients that add up in autograd's engine: in place or not, as on real tensors."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

from memfit.account.ask import ask
from memfit.account.dry_run import dry_run
from memfit.account.meter import Meter

V, D = 5000, 64
RESULTS = {
    "tied, through a transposed view": lambda h, w: (h @ w.t()).tanh().sum(),
    "tied, each its own": lambda h, w: ((w * 2).sum(0) * h).sum(),
    "residual": lambda h, w: ((h + h.relu()) * 2).sum(),
    "shared": lambda h, w: (h + h).sum(),
    "three": lambda h, w: (h.relu() + h.tanh() + h.exp()).sum(),
    "three of the table": lambda h, w: h.sum() + w.relu().sum() + w.tanh().sum() + w.exp().sum(),
}


class Task:
    learns = True

    def __init__(self, result):
        self.result = result

    def run(self, model, watch):
        with watch.phase("forward"):
            weight = model.weight.requires_grad_(True)
            loss = self.result(model(torch.arange(2000).reshape(40, 50)), weight)
        with watch.phase("backward"):
            loss.backward()


@pytest.mark.parametrize("name", RESULTS)
def test_the_peak_of_adding_up_is_that_of_real_tensors(name):
    task = Task(RESULTS[name])
    predicted = dry_run(lambda: nn.Embedding(V, D), task)
    gc.collect()
    meter = Meter()
    with meter.phase("load"):
        model = nn.Embedding(V, D)
    task.run(model, meter)
    measured = meter.account()
    assert abs(predicted.phase("backward").peak_nbytes - measured.phase("backward").peak_nbytes) <= 64


def _seen_by_another() -> list[torch.Tensor]:
    """4 MiB whose size the profiler knows, as of what another meter looked on at."""
    with Meter().phase("before"):
        return [torch.empty(1 << 20)]


def test_a_meter_counts_neither_what_was_there_before_nor_its_end():
    before = _seen_by_another()
    meter = Meter()
    with meter.phase("one"):
        before.clear()
        own = [torch.empty(1 << 18)]
    assert meter.account().phase("one").peak_nbytes == meter.account().phase("one").end_nbytes == 1 << 20
    own.clear()
    with meter.phase("two"):
        # malloc gives the block that was let go between the phases out again.
        own = [torch.empty(1 << 18)]
    assert meter.account().phase("two").end_nbytes <= 2 << 20
    with meter.phase("three"):
        own.clear()
    assert meter.account().phase("three").end_nbytes == meter.account().phase("two").end_nbytes - (1 << 20)


def test_scratch_is_found_where_others_are_freed_meanwhile():
    before = _seen_by_another()

    def run() -> torch.Tensor:
        before.clear()
        scratch = torch.ones(1 << 18)
        return scratch[:1].clone()

    assert ask(run) == 1 << 20


def test_a_meter_keeps_no_records_of_phases_that_have_ended():
    """They refer to themselves, and would be there until they are collected: gigabytes, where events are many. In a
    process of its own, since in one that has done much else the heap has holes to fill."""
    code = """if True:
        import gc
        import torch
        from memfit.account.meter import Meter, resident_nbytes
        meter, grown = Meter(), []
        gc.disable()
        for _ in range(6):
            with meter.phase("small"):
                for _ in range(20_000):
                    torch.empty(8)
            grown.append(resident_nbytes()["anonymous"])
        print(grown[-1] - grown[0], meter.account().phase("small").peak_nbytes)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, peak_nbytes = map(int, done.stdout.split())
    assert grown < 16 << 20
    assert peak_nbytes <= 64
