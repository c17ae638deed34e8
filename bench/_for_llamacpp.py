"""What llama.cpp's quantizer is given: the model as GGUF in bf16, and the importance of each tensor's inputs.

    python bench/_for_llamacpp.py MODEL TOKENS THREADS

Writes `model.gguf` and `importance.json` beside MODEL. An importance is E[x²] of each input over the calibration text,
as llama.cpp's own tool gathers it, which is not in llama-cpp-python.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from memfit.format.gguf import write_gguf
from memfit.format.gguf_model import places_of
from memfit.models import load_model
from memfit.source.source import open_source


@torch.no_grad()
def main() -> None:
    model, tokens, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    source = open_source(model)
    write_gguf(source, model.parent / "model.gguf", mixture="BF16", overwrite=True)
    started, cpu_started = time.perf_counter(), sum(os.times()[:2])
    squares = mean_squares(load_model(source, dtype=torch.bfloat16), torch.tensor(json.loads(tokens.read_text())))
    seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:2]) - cpu_started
    named = {}
    for place in places_of(source):
        module = (place.parameter or "").removesuffix(".weight")
        if place.name == "token_embd.weight" and "lm_head" in squares:
            module = "lm_head"
        if module in squares:
            named[place.name] = squares[module].tolist()
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tensors": named}
    (model.parent / "importance.json").write_text(json.dumps(found))


def mean_squares(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """E[x²] of the inputs of each linear layer, by its name."""
    totals: dict[str, Tensor] = {}

    def hear(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            totals[name] = totals.get(name, 0) + rows.square().sum(0) / tokens.numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hear(name))
    for window in tokens:
        model(window[None])
    return totals


if __name__ == "__main__":
    main()
