"""What a figure was measured on: the machine, the versions, the commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

PACKAGES: Final = (
    "memfit",
    "torch",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "gguf",
    "numpy",
    "scipy",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerators and system, for the JSON of reports and benchmarks."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "usable_cpus": _usable_cpus(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_nbytes": _memory(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on, and the commit of a checkout."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if (commit := git_commit()) is not None:
        found["commit"] = commit
    return found


def git_commit(directory: Path | None = None) -> str | None:
    """The commit of memfit's own checkout, with `+changes` where files differ; None if it is installed."""
    directory = directory or Path(__file__).resolve().parents[3]
    # Only memfit's own repository counts: installed elsewhere, an outer repository says nothing of memfit.
    if not (directory / ".git").exists():
        return None
    head = _git(directory, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_nbytes": properties.total_memory}
