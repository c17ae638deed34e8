"""The rules of the house, kept as tests: see ARCHITECTURE.md."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import memfit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "memfit"
MOST_LINES = 450
TEXTS = {".py", ".md", ".toml", ".html", ".txt", ".json", ".cfg", ".sh", ""}

PUBLIC = (
    "Account", "Adapters", "Allowed", "BrokenInput", "Distil", "DoesNotFit", "Entry", "Hyper", "Infer",
    "Interrupted", "LossNotFinite", "MemfitError", "Narrow",
    "Options", "OverBudget", "Phase", "Plan", "QualityMissed", "Recipe", "Report", "Sparse", "Text",
    "Train", "TrainPlan", "TrainStep", "UsageError",
    "account", "compare", "evaluate", "fit", "load", "make_cache", "measure", "plain_training", "plan",
    "train", "train_step",
)  # fmt: skip


def rooms() -> list[str]:
    """The rooms in the order that ARCHITECTURE.md gives: each imports from those below it."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert table is not None, "ARCHITECTURE.md lists the rooms in a block of ```text"
    return [line.split()[0].rstrip("/").removesuffix(".py") for line in table[1].splitlines() if line.strip()]


def room_of(module: str) -> str:
    """`memfit.plan.search` -> `plan`; the package itself -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def own_room(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[str]:
    """Dotted names of what a file imports from memfit, also inside its functions."""
    here = ("memfit", *file.relative_to(SOURCE).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "memfit")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            if name == "memfit":
                # `from memfit import demo` means the room; `from memfit import __version__` the package.
                for alias in node.names:
                    yield f"memfit.{alias.name}" if alias.name in rooms() else "memfit"
            elif name.startswith("memfit."):
                yield name


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def tracked() -> list[Path]:
    """Files of the repository; in a copy without git, those of its folders."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = done.stdout.split("\0") if done.returncode == 0 else []
    files = [ROOT / name for name in names if name]
    if not files:
        folders = ("src", "tests", "bench", "tools", ".ci")
        files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    files = [file for file in files if file.suffix in TEXTS and "__pycache__" not in file.parts]
    return sorted(file for file in files if file.is_file() and "egg-info" not in str(file))


def test_every_module_lives_in_a_room_of_the_architecture():
    assert {own_room(file) for file in modules()} - {"__init__"} == set(rooms())


def test_imports_point_one_way():
    order = {room: number for number, room in enumerate(rooms())}
    against = []
    for file in modules():
        if file == SOURCE / "__init__.py":
            continue
        own = own_room(file)
        for name in imported(file):
            other = room_of(name)
            if other and order[other] < order[own]:
                against.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not against, "\n".join(against)


def test_only_cli_imports_the_whole_package():
    """The package's own `__init__` imports `fit`: a room that used its names would close a circle."""
    for file in modules():
        if file.name in ("cli.py", "__init__.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "memfit" and not node.level:
                names = {alias.name for alias in node.names}
                assert names <= {"__version__", *rooms()}, f"{file.relative_to(ROOT)} imports {names}"


def test_no_file_is_longer_than_one_idea():
    files = [*modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {name: n for name, n in lengths.items() if n > MOST_LINES}


def test_public_names_are_these():
    assert sorted(memfit.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(memfit, name) is not None


# Put together here, so that this file does not hold what it forbids.
@pytest.mark.parametrize("word", ["/" + "work/", "/tmp" + "/h", "/" + "root/", "/opt" + "/wheels"])
def test_no_file_names_a_place_outside_the_repository(word):
    held = []
    for file in tracked():
        if word in file.read_text(encoding="utf-8", errors="replace"):
            held.append(str(file.relative_to(ROOT)))
    assert not held


@pytest.mark.parametrize(("before", "policy"), [("", "passive"), ("import torch; ", "None")])
def test_threads_sleep_where_memfit_comes_before_torch(before, policy):
    """OpenMP reads it once, when torch is loaded: afterwards it is left as it is, and never what a user has set."""
    words = f"import os; {before}import memfit; print(os.environ.get('OMP_WAIT_POLICY'))"
    told = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for env, expected in ((told, policy), (told | {"OMP_WAIT_POLICY": "active"}, "active")):
        run = subprocess.run([sys.executable, "-c", words], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected
