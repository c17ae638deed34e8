"""What the script of every peer shares: its arguments, which weights are meant, and what it writes.

It runs in the peer's environment, so it imports torch, transformers and safetensors alone. The scripts have other names
than the packages they import: a script's own folder comes first where modules are looked for.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CANNOT = 3
"""Exit code of a peer that has no such setting; the reason is the last line of stderr."""
SCALE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a peer is asked to do."""

    model: Path
    tokens: Path
    """JSON, token ids [windows][tokens]."""
    bits: int
    group: int
    algorithm: str
    scope: str
    """`layers`: linear weights in the numbered blocks. `whole`: all linear weights and the table of words."""
    threads: int
    out: Path


@dataclass(kw_only=True)
class Watch:
    """Seconds and bytes of what was watched."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of processors, children's too: what runs beside does not add to it."""
    peak_nbytes: int = 0
    libraries_nbytes: int = field(default_factory=lambda: resident("VmRSS"))
    """Resident before the model was loaded."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what runs inside; the peak is that of the process so far, loading included."""
        started, cpu_started = time.perf_counter(), sum(os.times()[:4])
        yield
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += sum(os.times()[:4]) - cpu_started
        self.peak_nbytes = resident("VmHWM")


def case_of(algorithms: tuple[str, ...]) -> Case:
    """The case that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--algorithm", choices=algorithms, default=algorithms[0])
    parser.add_argument("--scope", choices=("layers", "whole"), default="layers")
    parser.add_argument("--threads", type=int, default=2)
    case = Case(**vars(parser.parse_args()))
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    return case


def refuse(reason: str) -> None:
    """End: the peer has no such setting."""
    print(reason, file=sys.stderr)
    sys.exit(CANNOT)


def load_model(case: Case) -> nn.Module:
    """The model in bf16, by stock transformers."""
    import transformers

    (kind,) = json.loads((case.model / "config.json").read_text())["architectures"]
    loader = transformers.AutoModelForCausalLM if kind.endswith("ForCausalLM") else transformers.AutoModel
    model: nn.Module = loader.from_pretrained(case.model, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def windows(case: Case) -> Tensor:
    """The calibration's token ids [W, T]."""
    return torch.tensor(json.loads(case.tokens.read_text()), dtype=torch.long)


def linears(model: nn.Module, case: Case) -> dict[str, nn.Linear]:
    """Linear layers in scope, without a head that is tied to the table."""
    table = model.get_input_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight is not table.weight
        and (case.scope == "whole" or any(part.isdecimal() for part in name.split(".")))
    }


def tables(model: nn.Module, case: Case) -> dict[str, nn.Embedding]:
    """The table of words, where it is in scope; a head that is tied to it goes with it."""
    table = model.get_input_embeddings()
    return {name: m for name, m in model.named_modules() if m is table and case.scope == "whole"}


def packed_nbytes(model: nn.Module, names: Iterable[str], overhead: Callable[[Tensor], int], bits: int) -> int:
    """Bytes of a file: `bits` for each weight of `names` and its `overhead`, 16 bits for every other, ties once."""
    chosen = {f"{name}.weight" for name in names}
    total = 0
    for name, parameter in model.named_parameters():
        quantized = name in chosen
        total += parameter.numel() * bits // 8 + overhead(parameter) if quantized else parameter.numel() * 2
    return total


def by_group(group: int, *, zero_bits: int, scale_bits: int = SCALE_BITS) -> Callable[[Tensor], int]:
    """Bytes of scales and zero points of a weight with one of each for `group` inputs."""
    return lambda weight: weight.numel() // group * (scale_bits + zero_bits) // 8


def write(
    case: Case,
    replaced: Mapping[str, Tensor],
    watch: Watch,
    *,
    package: str,
    packed_nbytes: int,
    settings: dict[str, Any],
) -> None:
    """Write the model with `replaced` weights (by the checkpoint's names) as bf16, and `peer.json` beside them.

    The checkpoint's own files are copied: what a peer's library does to a config on saving plays no part.
    """
    case.out.mkdir(parents=True)
    left = set(replaced)
    for file in case.model.iterdir():
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copy(file, case.out / file.name)
            continue
        tensors = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                tensors[name] = stored.get_tensor(name)
                if name in replaced:
                    new = replaced[name].detach().to(torch.bfloat16)
                    if new.shape != tensors[name].shape:
                        raise ValueError(f"{name}: {list(new.shape)}, {list(tensors[name].shape)} in the checkpoint")
                    tensors[name] = new.contiguous().clone()
                    left.discard(name)
        save_file(tensors, case.out / file.name, metadata={"format": "pt"})
    if left:
        raise ValueError(f"not in the checkpoint: {', '.join(sorted(left)[:3])} ({len(left)} names)")
    about = {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "peak_nbytes": watch.peak_nbytes,
        "libraries_nbytes": watch.libraries_nbytes,
        "packed_nbytes": packed_nbytes,
        "settings": settings,
        "versions": {name: version(name) for name in (package, "torch", "transformers")},
        "threads": case.threads,
        "weights": len(replaced),
    }
    (case.out / "peer.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes (proc(5))."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")
