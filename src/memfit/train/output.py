"""A trained model as a directory that others load: weights, config, tokenizer; or adapters, as peft writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memfit.format.companions import save_companions
from memfit.format.directory import OutputDirectory
from memfit.format.safetensors import TensorSpec, Writer
from memfit.source.source import Source
from memfit.technique.adapters import save as save_adapters

from .away import here


def write_model(
    model: nn.Module, out: OutputDirectory, *, source: Source | None = None, tokenizer: Any = None
) -> dict[str, str]:
    """Write the model into `out`, tensor by tensor: no copy of it is made, and of a model on a GPU
    one tensor is copied at a time.

    Args:
        model: with adapters of memfit's: they alone are written.
        source: what the model was made from: its companions are copied.
        tokenizer: saved where the source has no files of one.

    Returns: file name to the sha256 of what was written; empty for adapters.
    """
    if getattr(model, "peft_config", None):
        save_adapters(model, out.path, base=None if source is None else source.name)
        _companions(out.path, source, tokenizer)
        return {}
    tensors = _stored(model)
    specs = [
        TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    with Writer(out.path, specs) as writer:
        for name, tensor in tensors.items():
            with here((tensor,)):
                writer.write(name, tensor.detach().cpu().contiguous())
    config = getattr(model, "config", None)
    if config is not None:
        data = json.loads(config.to_json_string(use_diff=True))
        data.pop("quantization_config", None)
        data["architectures"] = [type(model).__name__]
        kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        widest = max(kinds, key=lambda dtype: dtype.itemsize, default=torch.float32)
        data["dtype"] = str(widest).removeprefix("torch.")
        out.write_json("config.json", data)
    _companions(out.path, source, tokenizer)
    return {shard.name: shard.sha256 for shard in writer.shards}


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, those that are tied under their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _companions(target: Path, source: Source | None, tokenizer: Any) -> None:
    directory = None if source is None else source.directory
    live = tokenizer if hasattr(tokenizer, "save_pretrained") else None
    save_companions(target, source=directory, tokenizer=live)
