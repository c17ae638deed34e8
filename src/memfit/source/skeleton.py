"""A model without weights: its class, its modules, its buffers, its ties."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from memfit.errors import BrokenInput


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a config means: its own architecture if transformers has it, else the causal language
    model of its type, else the bare model.

    Raises:
        BrokenInput: transformers has no model for this config.
    """
    for name in config.architectures or ():
        cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        if _is_model(cls) and cls.config_class is not None and isinstance(config, cls.config_class):
            return cls  # type: ignore[no-any-return]
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    raise BrokenInput(
        f"transformers {transformers.__version__} has no model for the type {config.model_type!r}."
    )


def _is_model(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel)


def build_skeleton(config: PretrainedConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of `config` with every parameter on `meta` and every buffer made, on the CPU or fake.

    Args:
        config: is not changed; the model gets a copy.
        dtype: of the parameters; default: the config's own, else float32.
    """
    config = copy.deepcopy(config)
    cls = model_class(config)
    wanted = dtype or config_dtype(config) or torch.float32
    # The modules are made outside of any mode: meta tensors hold no bytes that anyone need follow, and a fake
    # mode makes each of them twenty times slower.
    with (
        _disable_current_modes(),
        torch.device("meta"),
        init.no_init_weights(),
        init.meta_device_safe_creation_ops(),
    ):
        model = cls._from_config(config, dtype=wanted, **_unpooled(config))
        for name, parameter in _kept_in_fp32(model, wanted):
            owner, leaf = locate(model, name)
            setattr(owner, leaf, nn.Parameter(parameter.to(torch.float32), requires_grad=False))
        model.requires_grad_(False)
        model.tie_weights(recompute_mapping=False)
    make_buffers(model)
    return model.eval()


def _unpooled(config: PretrainedConfig) -> dict[str, bool]:
    """How a model without the pooling layer of its class is made, where the config says so (a BERT from GGUF)."""
    return {"add_pooling_layer": False} if getattr(config, "add_pooling_layer", True) is False else {}


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype that a config declares; None if it declares none."""
    dtype = config.dtype if config.dtype is not None else getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that transformers keeps in float32 whatever dtype is asked for."""
    kept = model._get_dtype_plan(dtype)
    if kept:
        for name, parameter in list(model.named_parameters()):
            if any(f".{part}." in f".{name}." for part in kept):
                yield name, parameter


def make_buffers(model: PreTrainedModel) -> None:
    """Make each buffer on the CPU and fill it as transformers does on loading, by the model's own
    initialiser.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # the initialiser then lets it be
    made: dict[int, torch.Tensor] = {}
    for owner, module in _owned(model, model):
        if not module._buffers:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
                module._buffers[name] = made[id(buffer)]
        with torch.no_grad():
            owner._init_weights(module)


def _owned(model: PreTrainedModel, module: nn.Module) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Every module below `module`, children first, with the model whose initialiser knows it."""
    for child in module.children():
        yield from _owned(child if isinstance(child, PreTrainedModel) else model, child)
    yield model, module


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter or buffer `name`, and its name there."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def ties_of(model: nn.Module) -> dict[str, str]:
    """Names of tied parameters and buffers, to the name of the first that shares the same object."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return ties


def tie_modules(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let each module named by a key share the weight of the module named by its value."""
    for target, source in tied.items():
        modules: list[Any] = [model.get_submodule(target), model.get_submodule(source)]
        modules[0].weight = modules[1].weight
