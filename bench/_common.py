"""What every benchmark ends with: where it ran, and one JSON file."""

import json
import time
from pathlib import Path
from typing import Any

from memfit.report.machine import describe_machine, describe_versions

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, result: dict[str, Any], *, output: Path | None = None) -> Path:
    """Write `result` with machine, versions, commit and date to `results/NAME.json`."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    path.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    return path


def verdict(name: str, passed: bool, detail: str) -> dict[str, Any]:
    """One criterion, printed and returned for the JSON."""
    print(f"{'pass' if passed else 'FAIL'}  {name}: {detail}")
    return {"criterion": name, "passed": passed, "detail": detail}
