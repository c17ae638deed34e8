"""How near to the original are the number formats, at what bits a weight? Decoder layers only.

    python bench/formats.py [--model DIR_OR_GGUF] [--text FILE] [--windows 16] [--ways nearest search gptq]
                            [--only NAMES ...] [--output FILE]

Each format in three ways: to the nearest with the format's own scale, with searched scales (weighted by E[x²] of the
calibration text), and by GPTQ, each block for the inputs that those before it give. Default: the demo model and text.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _common import write_result
from memfit import demo
from memfit.account.watch import Unwatched
from memfit.compensate import compensate
from memfit.evaluate.divergence import compare_logits, record_logits
from memfit.evaluate.text import windows
from memfit.format.integers import Integers
from memfit.packed.scheme import Scheme
from memfit.source import load, open_source
from memfit.technique.quantize import dequantize, quantize
from memfit.text import Text

SCHEMES = (
    Scheme(bits=8, group=None), Scheme(bits=8, group=None, values="fp8"),
    Scheme(bits=4, group=32), Scheme(bits=4, group=64), Scheme(bits=4, group=128),
    Scheme(bits=4, group=64, values="nf4"), Scheme(bits=4, group=32, values="mxfp4"),
    Scheme(bits=4, group=None, values="codebook"), Scheme(bits=4, group=64, values="codebook"),
    Scheme(bits=4, group=None, values="codebook", vector=2), Scheme(bits=4, group=64, values="codebook", vector=2),
    Scheme(bits=3, group=128), Scheme(bits=3, group=None, values="codebook"),
    Scheme(bits=3, group=None, values="codebook", vector=2), Scheme(bits=3, group=128, values="codebook", vector=2),
    Scheme(bits=2, group=64), Scheme(bits=2, group=None, values="codebook"),
    Scheme(bits=2, group=None, values="codebook", vector=4), Scheme(bits=2, group=128, values="codebook", vector=4),
)  # fmt: skip

WAYS = ("nearest", "search", "gptq")


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of the blocks."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{name}"}


def importance_of(model: nn.Module, layers: Mapping[str, nn.Linear], ids_WT: Tensor) -> dict[str, Tensor]:
    """E[x²] of each layer's inputs."""
    sums = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(partial(_add, sums[name])) for name, layer in layers.items()]
    with torch.no_grad():
        for ids_T in ids_WT:
            model(ids_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / ids_WT.numel() for name, total in sums.items()}


def _add(total: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    total.add_(inputs[0].float().reshape(-1, len(total)).square().sum(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.model_directory()))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--only", nargs="+", help="formats, as 'int4 g128'; default: all")
    parser.add_argument("--name", default="formats")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    cut = Text.of_demo() if asked.text is None else Text.from_file(asked.text)
    source = open_source(asked.model)
    calibration, evaluation = (
        windows(source.tokenizer(), part, length=cut.length)[: asked.windows].clone()
        for part in (cut.calibration, cut.evaluation)
    )
    model = load(source, dtype=torch.bfloat16)
    layers = layers_of(model)
    importance = importance_of(model, layers, calibration)
    original = {name: layer.weight.data.clone() for name, layer in layers.items()}
    count = sum(weight.numel() for weight in original.values())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        logits = Path(work) / "logits"
        record_logits(model, evaluation, logits)
        for scheme in SCHEMES:
            if asked.only and scheme.name not in asked.only:
                continue
            nbytes = sum(scheme.nbytes(tuple(weight.shape)) for weight in original.values())
            row: dict[str, Any] = {"scheme": scheme.name, "bits_a_weight": 8 * nbytes / count}
            for way in asked.ways:
                started = time.process_time()
                chosen = Integers(Path(work) / scheme.name)
                if way == "gptq":
                    schemes = dict.fromkeys(layers, scheme)
                    compensate(source, calibration, schemes, chosen, watch=Unwatched())
                for name, layer in layers.items():
                    if way == "gptq":
                        made = chosen.read(name, scheme)
                    else:
                        made = quantize(
                            original[name], scheme, importance=importance[name], search=way == "search"
                        )
                    layer.weight.data.copy_(dequantize(made))
                seconds = time.process_time() - started
                found = compare_logits(logits, model, evaluation)
                row[way] = {"kl": found.kl, "interval": found.kl_interval, "cpu_seconds": seconds}
            rows.append(row)
            told = "  ".join(f"{way} {row[way]['kl']:.5f}" for way in row if way not in ("scheme", "bits_a_weight"))
            print(f"{scheme.name:14} {row['bits_a_weight']:6.3f} bits  {told}", flush=True)
    result = {"model": source.config.model_type, "weights": count, "tokens": evaluation.numel(), "formats": rows}
    print(f"written to {write_result(asked.name, result, output=asked.output)}")


if __name__ == "__main__":
    main()
