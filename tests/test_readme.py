"""The README's sessions, run as they are printed, and the keys that it promises."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memfit import demo

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
}
SHORT = ("--prompt", "64", "--new-tokens", "4")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line after a `$` in a console block."""

    line: str
    exit_code: int


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[Command]:
    """Lines that begin with `$`, and the exit code that a comment after them tells."""
    found = []
    for block in blocks("console"):
        for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            code = re.search(r"#\s*exit code (\d+)", line)
            found.append(Command(line=line, exit_code=int(code[1]) if code else 0))
    return found


def promised(command: str) -> set[str]:
    """Keys of the README's table row for `memfit COMMAND --json`, as paths: `quality.kl`."""
    row = re.search(rf"^\| `{command}` +\|(.*)\|$", README, re.MULTILINE)
    assert row is not None, f"the README has no row of keys for {command}"
    return set(re.findall(r"`([a-z0-9_.]+)`", row[1]))


def missing(data: dict[str, Any], keys: set[str]) -> set[str]:
    def has(key: str) -> bool:
        at: Any = data
        for part in key.split("."):
            if not isinstance(at, dict) or part not in at:
                return False
            at = at[part]
        return True

    return {key for key in keys if not has(key)}


def run(directory: Path, *arguments: str) -> dict[str, Any]:
    """The one object that `memfit ... --json` prints."""
    done = subprocess.run(
        ["memfit", *arguments, "--json"],
        cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the sessions run; what the first of them writes, the later ones read."""
    return tmp_path_factory.mktemp("readme")


def test_console_sessions_run_as_printed(place):
    assert commands()
    variables = ""
    for command in commands():
        done = subprocess.run(
            ["bash", "-c", f"{variables}{command.line}"],
            cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == command.exit_code, f"$ {command.line}\n{done.stdout}\n{done.stderr}"
        if command.exit_code == 3:
            assert "DoesNotFit: 1.00 MiB allowed" in done.stderr
            assert not done.stdout
        if re.match(r"\w+=", command.line):
            variables += f"{command.line}\n"
    report = json.loads((place / "half" / "report.json").read_text())
    assert report["measured"]["peak_nbytes"] <= report["budget_nbytes"]
    assert not missing(report, promised("fit"))


def test_python_session_runs_as_printed(place):
    """All blocks in one process and one namespace, as a reader would type them."""
    session = "\n".join(blocks("python"))
    assert "memfit.load(" in session
    done = subprocess.run(
        [sys.executable, "-c", session],
        cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_json_of_account_has_the_promised_keys(tmp_path):
    data = run(tmp_path, "account", str(demo.model_directory()), *SHORT)
    assert not missing(data, promised("account"))
    for key in ("kind", "module", "dtype", "nbytes", "phases"):
        assert all(key in entry for entry in data["entries"])


def test_json_of_plan_has_the_promised_keys_for_a_config_without_weights(tmp_path):
    shutil.copy(demo.model_directory() / "config.json", tmp_path)
    data = run(tmp_path, "plan", str(tmp_path), "--budget", "60%", *SHORT, "--quiet")
    assert not missing(data, promised("account") | promised("plan"))
    assert data["fits"] is True


def test_json_of_eval_has_the_promised_keys(place):
    """On what the console session wrote."""
    if not (place / "half").exists():
        pytest.skip("the console session was not run")
    text = place / "text.txt"
    text.write_text(demo.heldout_text().read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    original = str(demo.model_directory())
    data = run(place, "eval", "half", "--reference", original, "--text", str(text), *SHORT, "--quiet")
    assert not missing(data, promised("account") | promised("eval"))


def test_json_of_train_has_the_promised_keys(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(demo.calibration_text().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    words = ("--batch", "2", "--sequence", "32", "--steps", "1", "--quiet", "-o", "out")
    data = run(tmp_path, "train", str(demo.model_directory()), "--data", str(text), *words)
    # The row tells what is in each of the records, too.
    assert not missing(data | data["records"][0], promised("train"))


def test_every_install_and_test_command_is_the_one_that_ci_runs():
    script = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("ruff check . && mypy && pytest -n 2 --dist loadfile --no-loadscope-reorder",):
        assert command in README
        assert command in script
    assert "pip install . && memfit fit" in README
    assert "pip install '.[test]' && pytest" in README
