"""One judge for all: a quantized model beside its original, in float32, in a process of its own.

    python bench/_judge.py record MODEL WINDOWS LOGITS THREADS
    python bench/_judge.py compare MODEL WINDOWS LOGITS THREADS OUT

Both run one window after the other. The original's logits lie in a file, and so are never in memory. Weights of either
are what bf16 holds of them; float32 is for the sums, whose rounding in bf16 is as large as what 8 bits do.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from memfit.evaluate import compare_logits, record_logits
from memfit.evaluate.outputs import kind_of
from memfit.models import load_model
from memfit.packed.modules import packed_modules
from memfit.source.source import open_source

ANSWER = "answer:"


def dense(out: Path, original: Path) -> nn.Module:
    """The model in `out` with dense float32 weights; `original` gives those of a packed one their modules."""
    file = out / "model.gguf"
    if file.exists():
        return load_model(open_source(file), dtype=torch.bfloat16).float()
    quantized = load_model(open_source(out), dtype=torch.bfloat16)
    packed = packed_modules(quantized)
    if not packed:
        return quantized.float()
    model = load_model(open_source(original), dtype=torch.float32)
    for name, parameter in quantized.named_parameters():
        model.get_parameter(name).copy_(parameter)
    for name, module in packed.items():
        model.get_parameter(f"{name}.weight").copy_(module.store.dense_rows(0, module.store.shape[0]))
    return model


@torch.no_grad()
def main() -> None:
    what, original, windows, logits, threads = sys.argv[1:6]
    torch.set_num_threads(int(threads))
    tokens = torch.load(windows, weights_only=True)
    if what == "record":
        model = load_model(open_source(original), dtype=torch.float32)
        record_logits(model, tokens, logits)
        count = sum(parameter.numel() for parameter in model.parameters())
        in_blocks = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
        )
        print(ANSWER + json.dumps({"weights": count, "in_blocks": in_blocks, "kind": kind_of(model)}))
        return
    quality = compare_logits(logits, dense(Path(sys.argv[6]), Path(original)), tokens)
    print(ANSWER + json.dumps(quality.to_json()))


if __name__ == "__main__":
    main()
