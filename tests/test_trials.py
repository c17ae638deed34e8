"""Where techniques are mixed, the plan of all together is made and judged beside the best of one alone."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit import demo
from memfit.account.account import compare
from memfit.jobs import JOBS
from memfit.packed.forms import LowRank, form_of, techniques_of
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.groups import find_groups
from memfit.plan.plan import read_plan
from memfit.plan.price import prices, weighting_of
from memfit.planning import ALL_TOGETHER, best_plan, fronts
from memfit.source.source import Source, open_source
from memfit.study import Study
from memfit.technique.making import make, shared_by_rows, weight_of
from memfit.trials import rivals

TASK = memfit.Infer(prompt=16, new_tokens=2)
ALLOWED = Allowed(techniques=("quantize", "low-rank"), bits=(8, 4), groups={8: (None,), 4: (64,)}, kv_bits=(16,))


@pytest.fixture(scope="module")
def source(make_llama: Any) -> Source:
    return open_source(make_llama(hidden_size=128, intermediate_size=256, initializer_range=0.2))


def answer(study: Study, *, of_one: float, of_both: float) -> dict[str, Any]:
    """What calibration might say: integers of 4 bits cost `of_one`, and with factors beside them `of_both`."""
    costs = {
        frozenset({"quantize"}): of_one, frozenset({"low-rank"}): 9.0, frozenset({"quantize", "low-rank"}): of_both,
    }  # fmt: skip
    return {
        "prices": [
            [name, form.to_json(), 0.01 if form == Scheme(bits=8, group=None) else costs[techniques_of(form)]]
            for name, forms in study.schemes.items()
            for form in forms
        ]
    }


@pytest.mark.parametrize(("of_both", "names"), [(0.9, {"quantize"}), (0.001, set()), (1.1, set())])
def test_a_plan_has_a_rival_unless_it_is_the_same_or_far_better(
    source: Source, of_both: float, names: set[str]
) -> None:
    study = Study(source, TASK, ALLOWED)
    told = answer(study, of_one=1.0, of_both=of_both)
    found = {(name, form_of(form)): price for name, form, price in told["prices"]}
    smallest, *larger = (point.needed_nbytes for point in fronts(study, 0, prices=found, kv_prices={})["quantize"])
    nbytes = next(needed for needed in larger if needed > smallest) - 1  # of one technique there is but one plan
    chosen = best_plan(study, nbytes, prices=found, kv_prices={}, priced_by="text")
    alone = best_plan(study, nbytes, prices=found, kv_prices={}, priced_by="text", technique="quantize")
    assert chosen is not None and alone is not None
    assert {name for form in alone.schemes().values() for name in techniques_of(form)} == {"quantize"}
    assert alone.expected_kl >= chosen.expected_kl
    plans = rivals(study, chosen, told)
    assert set(plans) == {ALL_TOGETHER} | names
    assert all(plan.predicted is not None and plan.predicted["peak_nbytes"] <= nbytes for plan in plans.values())
    assert set(rivals(study, chosen, {})) == {ALL_TOGETHER}, "where nothing was priced, nothing is known of rivals"


def test_what_loses_less_is_taken_whatever_was_expected(source: Source, tmp_path: Path, monkeypatch: Any) -> None:
    room, trials = (importlib.import_module(f"memfit.{name}") for name in ("fit", "trials"))
    words = demo.heldout_text().read_text(encoding="utf-8")
    text = memfit.Text(
        calibration=words[:8000], evaluation=words[8000:16000], length=64, calibration_windows=4, evaluation_windows=4
    )
    asked: list[str] = []
    expected: list[dict[str, Any]] = []

    def rival(study: Study, chosen: Any, told: dict[str, Any]) -> dict[str, Any]:
        # Of the same bytes at most, and clearly worse: whatever can have 4 bits has them.
        four = {
            name: 1 + next(n for n, form in enumerate(forms) if isinstance(form, Scheme) and form.bits == 4)
            for name, forms in study.schemes.items()
            if forms
        }
        costs = {(name, form_of(form)): price for name, form, price in told["prices"]}
        expected.append(chosen.schemes())
        plan = study.plan(four | {"kv_cache": 0}, costs, chosen.budget_nbytes, {16: 0.0}, "text")
        return {ALL_TOGETHER: replace(plan, predicted=chosen.predicted), "quantize": chosen}

    def here(job: dict[str, Any], **_: Any) -> dict[str, Any]:
        asked.append(job["do"])
        return JOBS[job["do"]](job)

    monkeypatch.setattr(room, "rivals", rival)
    for module in (room, trials):
        monkeypatch.setattr(module, "run_job", here)
    report = memfit.fit(source.directory, "75%", tmp_path / "out", task=TASK, text=text, allowed=ALLOWED, threads=1)
    assert asked == ["calibrate", "choose", "compress", "choose", "compress", "judge", "judge", "prove"]
    assert set(report.tried) == {ALL_TOGETHER, "quantize"}
    assert report.tried["quantize"] < report.tried[ALL_TOGETHER]
    assert report.quality.kl == report.tried["quantize"], "what is written is what was judged"
    assert read_plan(tmp_path / "out" / "plan.json").schemes() == expected[0]
    assert report.measured.peak_nbytes == pytest.approx(report.predicted.peak_nbytes, rel=0.005)
    lines = [line.what for line in compare(report.predicted_fit, report.measured_fit)]
    assert "phase compress" in lines and len(lines) == len(set(lines)), "of two plans' jobs one line a phase"
    assert report.predicted_fit.resident_nbytes is None, "nothing is told where nothing is known"
    assert type(report).from_json(report.to_json()).tried == report.tried


def test_factors_of_a_table_are_made_for_what_is_looked_up_and_priced_as_made() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(1024, 64), "h": nn.Linear(64, 1024)})
    group = next(group for group in find_groups(model) if group.members == ("e",))
    table = model["e"].weight.detach().bfloat16()
    often, counts = torch.full((1024,), 1e-4), torch.rand(64) + 0.1
    often[:6] = torch.rand(6)
    statistics = {"e": (often, counts)}
    form = LowRank(rank=8, base=Scheme(bits=3, group=64))
    priced = prices([group], {group.name: (form,)}, lambda _: table, statistics, rows=1024)[group.name, form]
    weighting = weighting_of(group, "e.weight", statistics)
    assert weighting is not None

    def error(rows_N: torch.Tensor | None) -> float:
        right = shared_by_rows(form, table.split(100), weighting.importance(), rows_N)
        made = weight_of(make(table, form, importance_K=weighting.importance(), shared=right))
        return float(0.5 * ((table - made).double().square() * counts * often.unsqueeze(1)).sum())

    assert priced == pytest.approx(error(weighting.rows()), rel=0.05)
    assert error(weighting.rows()) < 0.1 * error(None)
