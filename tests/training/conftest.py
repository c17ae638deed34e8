"""A tiny model, a text, a plan to train the one on the other, and a run that nothing happens to."""

from pathlib import Path

import pytest

import memfit
from memfit import demo
from memfit.training import Options, train

TASK = memfit.Train(batch=4, sequence=32, hyper=memfit.Hyper(lr=1e-3))
STEPS = 6


@pytest.fixture(scope="module")
def model(make_llama) -> Path:
    return make_llama(hidden_size=32, intermediate_size=64, attention_dropout=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(demo.calibration_text().read_text(encoding="utf-8")[:12000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def plan(model):
    return memfit.plan(model, "80%", task=TASK)


@pytest.fixture(scope="module")
def plain(model, text, plan, tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return train(model, text, out=out, given=plan, options=Options(steps=STEPS, save_every=2)), out


class Watcher:
    """An observer that does something after a step."""

    def __init__(self, act=lambda record: None):
        self.act, self.records, self.notes = act, [], []

    def begin(self, total, budget_nbytes):
        self.total = total

    def step(self, record):
        self.records.append(record)
        self.act(record)

    def note(self, step, what):
        self.notes.append((step, what))

    def evaluated(self, step, scores):
        pass

    def end(self):
        pass


@pytest.fixture
def watcher():
    return Watcher()
