"""What is minimised: for each kind of model, how a batch becomes a loss that adds up over its parts.

A loss is a sum over labels, times a scale that the whole batch gives (1 / all labels that are not ignored). So the
sum over micro-batches is the loss of the batch, whatever the number of labels in each.

Legend: B batch, T time, D width, V vocabulary, C classes.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed.fake import is_fake
from memfit.task.infer import vocabulary
from memfit.technique.chunk_loss import IGNORED, ChunkLoss, Head, HeadCall
from memfit.technique.distil_loss import DistilCall

Batch = Mapping[str, Tensor]
KeepCall = Callable[[HeadCall | DistilCall], None]


class Objective(Protocol):
    """How a model is asked and judged."""

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse what is no batch for the model.

        Raises:
            UsageError: names the tensor, and what is wrong with it.
        """
        ...

    def count(self, batch: Batch) -> int:
        """Labels of the batch that count."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the loss is made of: logits, or hidden states before the head."""
        ...

    def loss(self, model: nn.Module, out: Tensor, batch: Batch, *, scale: float, keep: KeepCall | None) -> Tensor:
        """scale · Σ over the labels that count."""
        ...


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Cross-entropy of tokens: each position's next token (`shift`), or its own label."""

    shift: bool = True
    encodes: bool = False
    """An encoder-decoder: labels are the decoder's targets, its inputs are the same moved by one."""
    chunks: ChunkLoss | None = None
    head: Head = field(default_factory=Head)

    def check(self, model: nn.Module, batch: Batch) -> None:
        _require(batch, "input_ids", "labels")
        ids, labels = batch["input_ids"], batch["labels"]
        if ids.dim() != 2 or labels.dim() != 2 or labels.shape[0] != ids.shape[0]:
            raise UsageError(
                f"input_ids of {list(ids.shape)} and labels of {list(labels.shape)}: both must be [batch, tokens]."
            )
        if not self.encodes and labels.shape != ids.shape:
            raise UsageError(f"labels of {list(labels.shape)}, input_ids of {list(ids.shape)}: one for each token.")
        _require_below(ids, vocabulary(model), "input_ids", "the vocabulary has {} entries")
        _require_below(labels, vocabulary(model), "labels", "the vocabulary has {} entries")

    def count(self, batch: Batch) -> int:
        labels = batch["labels"]
        if is_fake(labels):
            return int(labels.numel()) - (labels.shape[0] if self.shift else 0)
        return int((labels[:, 1:] if self.shift else labels).ne(IGNORED).sum())

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if not hasattr(model, "config"):
            out = model(given["input_ids"])
            return out if isinstance(out, Tensor) else out[0]
        if self.encodes:
            given["decoder_input_ids"] = _moved_right(batch["labels"], model.config)
        return model(**given, **_without_cache(model)).logits  # type: ignore[no-any-return]

    def targets(self, batch: Batch) -> Tensor:
        """What each position is to answer: [B · T]."""
        labels = batch["labels"]
        if self.shift:
            # The last position has no next token: its label is ignored, and nothing has to be cut off the output.
            moved = torch.full_like(labels, IGNORED)
            moved[:, :-1].copy_(labels[:, 1:])
            labels = moved
        return labels.reshape(-1)

    def loss(self, model: nn.Module, out: Tensor, batch: Batch, *, scale: float, keep: KeepCall | None) -> Tensor:
        return self.loss_of(model, out, self.targets(batch), scale=scale, keep=keep)

    def loss_of(self, model: nn.Module, out: Tensor, labels: Tensor, *, scale: float, keep: KeepCall | None) -> Tensor:
        """scale · Σ cross-entropy with `targets` [B · T]."""
        if self.chunks is None:
            return cross_entropy(out.reshape(-1, out.shape[-1]), labels, scale=scale)
        head = output_head(model)
        assert head is not None
        if out.dtype != head.weight.dtype and not torch.is_autocast_enabled(out.device.type):
            out = out.to(head.weight.dtype)  # some models keep what goes from block to block in fp32
        return self.chunks.apply(
            out.reshape(-1, out.shape[-1]), head.weight, labels,
            bias_V=head.bias, scale=scale, head=self.head, keep=keep,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Cross-entropy of one label a row: [B]."""

    def check(self, model: nn.Module, batch: Batch) -> None:
        _require(batch, "input_ids", "labels")
        ids, labels = batch["input_ids"], batch["labels"]
        if ids.dim() != 2 or labels.shape != ids.shape[:1]:
            raise UsageError(
                f"input_ids of {list(ids.shape)} and labels of {list(labels.shape)}: [batch, tokens] and [batch] were "
                "expected."
            )
        _require_below(ids, vocabulary(model), "input_ids", "the vocabulary has {} entries")
        classes = getattr(getattr(model, "config", None), "num_labels", None)
        if isinstance(classes, int):
            _require_below(labels, classes, "labels", "the model has {} classes")

    def count(self, batch: Batch) -> int:
        labels = batch["labels"]
        return int(labels.numel()) if is_fake(labels) else int(labels.ne(IGNORED).sum())

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        names = inspect.signature(model.forward).parameters
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        if "input_ids" not in names:
            out = model(given["input_ids"])
        else:
            own = {name: value for name, value in given.items() if name in names}
            out = model(**own, **_without_cache(model))
        if isinstance(out, Tensor):
            return out
        return out.logits if hasattr(out, "logits") else out[0]  # type: ignore[no-any-return]

    def targets(self, batch: Batch) -> Tensor:
        """Each row's class: [B]."""
        return batch["labels"]

    def loss(self, model: nn.Module, out: Tensor, batch: Batch, *, scale: float, keep: KeepCall | None) -> Tensor:
        return self.loss_of(model, out, self.targets(batch), scale=scale, keep=keep)

    def loss_of(self, model: nn.Module, out: Tensor, labels: Tensor, *, scale: float, keep: KeepCall | None) -> Tensor:
        """scale · Σ cross-entropy with `targets` [B]."""
        return cross_entropy(out, labels, scale=scale)


@dataclass(frozen=True, kw_only=True)
class Custom:
    """A loss of one's own: `function(model, batch)` -> mean over the rows of the batch it is given."""

    function: Callable[[nn.Module, Batch], Tensor]

    def check(self, model: nn.Module, batch: Batch) -> None:
        if not batch:
            raise UsageError("the batch has no tensors.")

    def count(self, batch: Batch) -> int:
        return int(next(iter(batch.values())).shape[0])

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.function(model, batch)

    def loss(self, model: nn.Module, out: Tensor, batch: Batch, *, scale: float, keep: KeepCall | None) -> Tensor:
        return out * (scale * self.count(batch))


def _require(batch: Batch, *names: str) -> None:
    for name in names:
        if not isinstance(batch.get(name), Tensor):
            raise UsageError(f"the batch has no tensor {name!r}; it has {', '.join(batch) or 'nothing'}.")


def _require_below(ids: Tensor, most: int, name: str, of: str) -> None:
    """Every entry is one of 0..most-1, or ignored. On a GPU that would wait for it: there the kernels say so."""
    if ids.is_floating_point():
        raise UsageError(f"{name} are of {ids.dtype}; whole numbers were expected.")
    if is_fake(ids) or ids.device.type != "cpu":
        return
    known = ids[ids.ne(IGNORED)] if name == "labels" else ids
    if known.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(known))
    if high >= most:
        raise UsageError(f"{name} hold {high}, and {of.format(most)}.")
    if low < 0:
        ignored = f" ({IGNORED} is ignored)" if name == "labels" else ""
        raise UsageError(f"{name} hold {low}; they count from 0{ignored}.")


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """What tells a model not to make a cache, which is for generating."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _moved_right(labels_BT: Tensor, config: Any) -> Tensor:
    """The decoder's inputs: its start, then all labels but the last; ignored ones as padding."""
    padding = getattr(config, "pad_token_id", None) or 0
    start = getattr(config, "decoder_start_token_id", None)
    moved = torch.empty_like(labels_BT)
    moved[:, 1:].copy_(labels_BT[:, :-1])
    moved[:, 0].fill_(padding if start is None else start)
    return moved.masked_fill_(moved.eq(IGNORED), padding)


def cross_entropy(logits: Tensor, labels: Tensor, *, scale: float) -> Tensor:
    """scale · Σ cross-entropy, in fp32 (fp64 for fp64): logits [N, V], labels [N]."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum") * scale


def objective_of(
    model: nn.Module,
    *,
    chunks: ChunkLoss | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> Objective:
    """How `model` is trained: by its class, or by `loss`.

    Raises:
        UsageError: nothing says what the model's outputs are.
    """
    if loss is not None:
        return Custom(function=loss)
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if kind.endswith("ForSequenceClassification"):
        return Classifier()
    head = output_head(model)
    if config is None or head is None:
        if config is not None or not any(isinstance(m, nn.Embedding) for m in model.modules()):
            raise UsageError(
                f"{kind} has no head that says what its outputs mean: give a loss, `loss(model, batch) -> Tensor`. "
                "With rows that have labels `memfit train` gives it a head for their classes, and plans by itself."
            )
        return LanguageModel()
    return LanguageModel(
        shift=not (kind.endswith("ForMaskedLM") or config.is_encoder_decoder),
        encodes=bool(config.is_encoder_decoder),
        chunks=chunks if chunks is not None and why_no_chunks(model) is None else None,
        head=head_of(model),
    )


def output_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes logits."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Linear) else None


def why_no_chunks(model: nn.Module) -> str | None:
    """Why the loss cannot be taken from hidden states, None if it can."""
    head = output_head(model)
    if head is None:
        return "the model has no linear head"
    if type(head).forward is not nn.Linear.forward:
        return f"the head is a {type(head).__name__}"
    if type(model).__name__.endswith("ForMaskedLM"):
        return "the head of a masked language model has layers of its own"
    return None


def head_of(model: nn.Module) -> Head:
    """What the model does to its head's product, by its config."""
    text = _text_config(model)
    cap = getattr(text, "final_logit_softcapping", None)
    multiplier = 1.0
    if getattr(text, "logits_scaling", None) is not None:
        multiplier = 1.0 / float(getattr(text, "logits_scaling", 1.0))
    elif isinstance(getattr(text, "logit_scale", None), float):
        multiplier = float(text.logit_scale)
    return Head(softcap=cap, multiplier=multiplier)


def _text_config(model: nn.Module) -> Any:
    """The config of the model, or of its part that reads text."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def without_head(model: nn.Module, objective: Objective) -> Iterator[None]:
    """Inside, a model whose loss is taken in chunks gives its hidden states where it gave logits.

    Raises:
        UsageError: it does more to its logits than is known of it.
    """
    if not isinstance(objective, LanguageModel) or objective.chunks is None:
        yield
        return
    head = output_head(model)
    assert head is not None
    text = _text_config(model)
    cap = getattr(text, "final_logit_softcapping", None)
    scaling = {name: getattr(model, name) for name in ("logit_scale", "logits_scaling") if hasattr(model, name)}
    in_config = {name: getattr(text, name) for name in ("logits_scaling",) if hasattr(text, name)}
    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    try:
        if cap is not None:
            text.final_logit_softcapping = None
        for name in scaling:
            setattr(model, name, 1.0)
        for name in in_config:
            setattr(text, name, 1.0)
        yield
    finally:
        del head.forward
        if cap is not None:
            text.final_logit_softcapping = cap
        for name, value in scaling.items():
            setattr(model, name, value)
        for name, value in in_config.items():
            setattr(text, name, value)
