"""From what a user names as a model to a function that loads it."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from memfit.errors import UsageError
from memfit.source.load import Read, load
from memfit.source.source import Source, open_source, source_from_config
from memfit.train.away import sending
from memfit.train.recipe import Recipe
from memfit.train.task import packing

ModelSpec = str | dict[str, Any]
"""A path or hub id; `{"config": {...}}`: random weights; `{"factory": "module:function"}`: any module."""


def require_device(device: str) -> None:
    """Refuse `cuda` where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is here: `account` and `plan` work without one, the rest needs it.")


def loader_for(spec: ModelSpec) -> "Source | Callable[[], nn.Module]":
    """What `load_model` takes: a source, or a function that makes a module."""
    if isinstance(spec, (str, Path)):
        return open_source(spec)
    if "config" in spec:
        settings = dict(spec["config"])
        return source_from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    if "factory" in spec:
        module, _, function = spec["factory"].partition(":")
        made: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
        return lambda: made(**spec.get("settings", {}))
    raise UsageError(f"{spec!r} names no model: give a path, a hub id, a config or a factory.")


def load_model(
    made: "Source | Callable[[], nn.Module]",
    *,
    dtype: str | torch.dtype | None = None,
    pack: Callable[[nn.Module, Read], None] | None = None,
    send: Callable[[str, nn.Parameter], None] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model with its weights on `device`, real or, under a fake mode, fake; `pack` and `send`: see `load`."""
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if isinstance(made, Source):
        if made.checkpoint is None:
            made = source_from_config(made.config)
        return load(made, dtype=kind, pack=pack, send=send, device=device)
    model = made().eval().requires_grad_(False)
    if kind is not None:
        _cast_floats(model, kind)
    return model if torch.device(device).type == "cpu" else model.to(device)


def load_to_train(
    made: "Source | Callable[[], nn.Module]",
    recipe: Recipe,
    *,
    directory: str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model with its weights as `recipe` trains it: in its dtype, packed, or away in `directory`, if it says so."""
    pack, send = packing(recipe), sending(recipe, directory)
    return load_model(made, dtype=recipe.dtype, pack=pack, send=send, device=device)


def _cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every float parameter and buffer by one of `dtype`, one after the other, ties kept.

    `Module.to` would swap tensors in place, which is not allowed of fake ones that are followed.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point():
                places.setdefault(id(tensor), []).append((module, name))
    for holders in places.values():
        old = getattr(*holders[0])
        new = old.to(dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        for module, name in holders:
            setattr(module, name, new)
        del old, new
