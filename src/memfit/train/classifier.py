"""A model with a head for classes: as it is, or a body without one that is given a new head."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from memfit.data.batches import Kind
from memfit.errors import UsageError
from memfit.source.load import Read, load
from memfit.source.skeleton import build_skeleton, locate, model_class
from memfit.source.source import Source


def is_classifier(source: Source) -> bool:
    """Whether the model has a head for classes."""
    return model_class(source.config).__name__.endswith("ForSequenceClassification")


def kind_of(source: Source) -> Kind:
    """How the model of a source is trained."""
    name = model_class(source.config).__name__
    if name.endswith("ForMaskedLM"):
        return "masked"
    if getattr(source.config, "is_encoder_decoder", False):
        return "seq2seq"
    # A body alone has no loss of its own: it can become a classifier.
    return "causal" if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) else "classifier"


def load_classifier(
    source: Source,
    *,
    classes: int,
    names: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    seed: int = 0,
    pad: int | None = None,
    pack: Callable[[nn.Module, Read], None] | None = None,
    send: Callable[[str, nn.Parameter], None] | None = None,
) -> nn.Module:
    """The model of `source` with a head of `classes`: its own, or where it has none a new one, drawn from `seed`.

    The same on fake tensors.

    Args:
        names: of the classes, for the config. pad: the id of padding, which models that read from the left need.
        pack, send: see `load`.

    Raises:
        UsageError: its own head has another number of classes, or its kind can have none.
    """
    if is_classifier(source):
        own = int(source.config.num_labels)
        if own != classes:
            raise UsageError(f"{source.name}: its head has {own} classes, and the data has {classes}.")
        return load(source, dtype=dtype, pack=pack, send=send)
    body = load(source, dtype=dtype, pack=pack, send=send)
    model: nn.Module = _skeleton(source, classes, names, next(body.parameters()).dtype, pad)
    prefix = str(model.base_model_prefix)
    inner: nn.Module = getattr(body, str(getattr(body, "base_model_prefix", "")), body)
    for name, child in model.get_submodule(prefix).named_children():
        if getattr(inner, name, None) is None:
            setattr(inner, name, child)  # as a pooler, which a masked language model is stored without
    setattr(model, prefix, inner)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in list(model.named_parameters()):
            if parameter.device.type == "meta":
                owner, leaf = locate(model, name)
                setattr(owner, leaf, nn.Parameter(_drawn(name, parameter, model.config), requires_grad=False))
    return model


def _skeleton(
    source: Source, classes: int, names: Sequence[str], dtype: torch.dtype, pad: int | None
) -> PreTrainedModel:
    config = copy.deepcopy(source.config)
    mapping = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:
        raise UsageError(f"{source.name}: transformers has no classifier of the type {config.model_type}.")
    config.architectures = [mapping[type(config)].__name__]
    config.num_labels = classes
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad
    made: PreTrainedModel = build_skeleton(config, dtype=dtype)
    return made


def _drawn(name: str, like: torch.Tensor, config: Any) -> torch.Tensor:
    """A new parameter, as transformers draws those of heads."""
    made = torch.empty(like.shape, dtype=like.dtype)
    if like.dim() > 1:
        return made.normal_(0.0, float(getattr(config, "initializer_range", 0.02)))
    return made.fill_(0.0 if name.endswith("bias") else 1.0)
