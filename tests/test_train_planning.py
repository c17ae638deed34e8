"""Planning to train: within the budget, the least change first, and told when nothing fits."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf

import memfit
from memfit import demo
from memfit.models import load_model
from memfit.source.source import open_source
from memfit.train.plan import TrainPlan

TASK = memfit.Train(batch=2, sequence=64, hyper=memfit.Hyper(lr=1e-3, clip=None))


@pytest.fixture(scope="module")
def plans():
    """Budget to plan, of the demo model."""
    return {share: memfit.plan(demo.model_directory(), share, task=TASK) for share in ("100%", "60%")}


def test_every_plan_is_within_its_budget(plans):
    for plan in plans.values():
        assert plan.fits and plan.peak_nbytes <= plan.budget_nbytes


def test_what_is_learned_changes_only_where_nothing_else_fits(plans):
    assert plans["100%"].changes == () == plans["60%"].changes
    assert plans["100%"].recipe.state_bits == 32 and plans["100%"].recipe.precision == "master"


def test_the_whole_budget_costs_no_time(plans):
    assert plans["100%"].slowdown == pytest.approx(1.0, abs=0.5)


def test_a_plan_is_what_the_account_says_and_what_a_step_takes(plans):
    plan = plans["60%"]
    found = memfit.account(demo.model_directory(), plan.task)
    assert found.peak_nbytes == plan.peak_nbytes
    model = load_model(open_source(demo.model_directory()))
    step = memfit.train_step(model, plan)
    ids = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    losses = [step({"input_ids": ids, "labels": ids}).loss for _ in range(3)]
    assert losses[2] < losses[0]


def test_a_plan_is_read_back(plans):
    plan = plans["60%"]
    assert TrainPlan.from_json(json.loads(plan.dumps())) == plan
    with pytest.raises(memfit.BrokenInput, match="version 9"):
        TrainPlan.from_json(plan.to_json() | {"version": 9})
    with pytest.raises(memfit.BrokenInput, match="no training plan"):
        TrainPlan.from_json({"version": 1})


def test_adapters_that_cannot_be_made_are_told_beside_the_smallest_budget(monkeypatch):
    """The answer is there without peft; who asks for adapters alone is told what is missing."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    task = replace(TASK, batch=1, sequence=16)
    with pytest.raises(memfit.DoesNotFit, match=r"smallest budget that works is \d+ bytes.*not looked at: peft is not"):
        memfit.plan(demo.model_directory(), "1MiB", task=task)
    with pytest.raises(memfit.UsageError, match=r"pip install 'memfit\[train\]'"):
        memfit.plan(demo.model_directory(), "1MiB", task=task, full=False)


def test_what_may_take_no_longer_is_told_where_it_binds():
    task = replace(TASK, batch=1, sequence=16)
    with pytest.raises(memfit.DoesNotFit, match=r"--slowdown above 1.5 may"):
        memfit.plan(demo.model_directory(), "1MiB", task=task, adapters=False, slowdown=1.5)


@pytest.mark.slow
def test_nothing_fits_names_the_smallest_budget_which_then_works():
    with pytest.raises(memfit.DoesNotFit, match="smallest budget that works") as found:
        memfit.plan(demo.model_directory(), "1MiB", task=TASK, adapters=False)
    smallest = found.value.smallest_nbytes
    assert memfit.plan(demo.model_directory(), smallest, task=TASK, adapters=False).peak_nbytes <= smallest


def test_adapters_are_planned_where_asked_for():
    plan = memfit.plan(demo.model_directory(), "60%", task=TASK, full=False)
    assert plan.recipe.adapters is not None
    assert any("LoRA" in change for change in plan.changes)


def test_something_must_be_allowed_to_learn():
    with pytest.raises(memfit.UsageError, match="neither the whole model nor adapters"):
        memfit.plan(demo.model_directory(), "60%", task=TASK, full=False, adapters=False)


def test_what_does_not_fit_says_what_a_smaller_batch_or_shorter_texts_free(tmp_path):
    hf.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    task = memfit.Train(batch=4, sequence=64)
    with pytest.raises(memfit.DoesNotFit, match=r"--batch 2 frees .*--sequence 32 frees .*") as found:
        memfit.plan(tmp_path, 1000, task=task, adapters=False)
    freed = found.value.levers["--sequence 32"]
    with pytest.raises(memfit.DoesNotFit) as shorter:
        memfit.plan(tmp_path, 1000, task=replace(task, sequence=32), adapters=False)
    assert shorter.value.smallest_nbytes <= found.value.smallest_nbytes - freed
