"""Is the plan that the search chose the best there is? It and its neighbours made and measured, side by side.

    python bench/neighbours.py [--budgets 50,35,25] [--count 6] [--allow quantize,low-rank] [--output FILE]

The search adds up prices, as if what one layer loses did not change what another loses. Here the demo model is planned
at each budget; a neighbour is the best plan without one choice of the plan, the dearest choices first. All are made by
GPTQ and measured on text that nothing was priced on. Printed: expected and measured KL, how well their order agrees
(Spearman), and whether any neighbour beats the plan by more than the interval of the difference between two KLs.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import memfit
from _common import verdict, write_result
from memfit import demo
from memfit.answers import kv_prices_of, prices_of
from memfit.errors import DoesNotFit
from memfit.plan.plan import Plan
from memfit.planning import account_of, make_plan
from memfit.source.source import open_source
from memfit.steps import calibration_job
from memfit.study import Study
from memfit.text import Text
from memfit.worker import run_job

FORBIDDEN = 1e6
"""Nats a token: what a choice is said to cost that is not to be made."""
TASK = memfit.Infer(prompt=32, new_tokens=8)


def plans(study: Study, nbytes: int, answer: dict[str, Any], count: int) -> list[Plan]:
    """The plan of a budget, and the best plans without one of its choices, the dearest first."""
    prices, kv_prices = prices_of(answer), kv_prices_of(answer)

    def make(without: tuple[str, Any] | None) -> Plan:
        told = prices if without is None else prices | {without: FORBIDDEN}
        plan = make_plan(study, nbytes, prices=told, kv_prices=kv_prices, priced_by="text")
        true = [0.0 if c.scheme is None else prices[c.name, c.scheme] for c in plan.choices]
        return replace(plan, expected_kl=sum(true) + kv_prices[plan.kv_bits])

    found = [make(None)]
    for choice in sorted(found[0].choices, key=lambda choice: -choice.price):
        if len(found) > count or choice.scheme is None:
            break
        try:
            other = make((choice.name, choice.scheme))
        except DoesNotFit:
            continue
        if all(other.schemes() != plan.schemes() for plan in found):
            found.append(other)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default="50,35,25")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--allow", default="quantize")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    source, text = open_source(demo.model_directory()), Text.of_demo()
    study = Study(source, TASK, memfit.Allowed(techniques=tuple(given.allow.split(","))))
    whole = account_of(source, TASK).peak_nbytes
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        answer = run_job(calibration_job(study, text, work, reference=False))
        for share in map(int, given.budgets.split(",")):
            for number, plan in enumerate(plans(study, whole * share // 100, answer, given.count)):
                report = memfit.fit(
                    source.directory, out=work / "out", text=text, given=plan, overwrite=True,
                    allowed=study.allowed,
                )  # fmt: skip
                quality = report.to_json()["quality"]
                rows.append(
                    {
                        "budget": share, "neighbour": number, "expected": plan.expected_kl, "kl": quality["kl"],
                        "interval": quality["kl_interval"], "peak_nbytes": plan.predicted["peak_nbytes"],
                        "schemes": {choice.name: choice.scheme and choice.scheme.name for choice in plan.choices},
                    }
                )  # fmt: skip
                print({k: v for k, v in rows[-1].items() if k != "schemes"}, flush=True)
    result = {"task": TASK.to_json(), "allow": given.allow, "rows": rows, "verdicts": judged(rows)}
    write_result("neighbours", result, output=given.output)


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for share in dict.fromkeys(row["budget"] for row in rows):
        own = [row for row in rows if row["budget"] == share]
        chosen, best = own[0], min(own, key=lambda row: row["kl"])
        order = spearmanr([row["expected"] for row in own], [row["kl"] for row in own]).statistic
        # Half the widths of two intervals, added as of independent means: cautious, since the text is the same.
        width = sum(((row["interval"][1] - row["interval"][0]) / 2) ** 2 for row in (chosen, best)) ** 0.5
        detail = (
            f"{share} %: chosen {chosen['kl']:.5f}, best of {len(own)} {best['kl']:.5f} (within {width:.5f}), expected "
            f"{chosen['expected']:.5f} and {best['expected']:.5f}; order {order:.2f}"
        )
        good = chosen["kl"] <= best["kl"] + width
        found.append(verdict("no neighbour beats the plan by more than the interval", good, detail))
    return found


if __name__ == "__main__":
    main()
