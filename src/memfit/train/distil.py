"""Learning from a teacher: a loss beside the model's own, from a teacher in memory or from what it answered before.

The teacher is asked before the student's forward pass, so that of its own only what the loss needs is there beside the
student's activations: hidden states before the head, and of the layers that are matched.

Legend: B batch, T time, N = B · T tokens (or B rows of a classifier), V vocabulary, k kept entries.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.account.structure import stacked_blocks
from memfit.account.watch import Watch
from memfit.errors import UsageError
from memfit.packed.fake import repeated
from memfit.source.load import load
from memfit.source.source import open_source
from memfit.technique.chunk_loss import IGNORED, ChunkLoss
from memfit.technique.distil import (
    USUAL_TOP,
    Answers,
    Distil,
    FromHead,
    FromLogits,
    Top,
    attention_loss,
    hidden_loss,
    matched_layers,
)
from memfit.technique.distil_loss import chunked_distil_loss, distil_loss

from .objective import (
    Batch,
    Classifier,
    KeepCall,
    LanguageModel,
    Objective,
    head_of,
    objective_of,
    output_head,
    without_head,
)

IDS: Final = "teacher_ids"
LOG_PROBS: Final = "teacher_log_probs"
REST: Final = "teacher_rest"
"""What a batch has where the teacher was asked before: [B, T, k], [B, T, k] and [B, T]; without T of a classifier."""


@dataclass(slots=True)
class Seen:
    """What passed between a model's blocks, of each in order."""

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a teacher answered of a micro-batch."""

    answers: Answers
    seen: Seen


class Teacher:
    """A model that is asked and learns nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def ask(self, batch: Batch, *, chunks: bool, match: tuple[str, ...] = ()) -> Asked:
        """What it answers.

        Args:
            batch: as the student is given it.
            chunks: whether hidden states and a head will do; else logits are made.
            match: what is looked at between the blocks.
        """
        model, device = self.model, batch["input_ids"].device
        objective = _asked_as(model, chunks=chunks)
        # A block that is looked into is not told from an equal one.
        alike = _like_earlier(model) if "attention" not in match else ExitStack()
        with (
            torch.no_grad(), torch.autocast(device.type, enabled=False), without_head(model, objective), alike,
            looking(model, match) as seen,
        ):  # fmt: skip
            out = objective.forward(model, batch)
        out = out.reshape(-1, out.shape[-1])
        if not (isinstance(objective, LanguageModel) and objective.chunks is not None):
            return Asked(answers=FromLogits(logits_NV=out), seen=seen)
        head = output_head(model)
        assert head is not None
        bias = None if head.bias is None else head.bias.detach()
        out = out.to(head.weight.dtype)
        answers = FromHead(hidden_NE=out, weight_VE=head.weight.detach(), bias_V=bias, head=head_of(model))
        return Asked(answers=answers, seen=seen)


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What a step is given to learn from beside the labels."""

    distil: Distil
    teacher: Teacher | None = None
    """None: its answers come with each batch."""


@dataclass(kw_only=True)
class Distilled:
    """An objective: the model's own, and the teacher's answers."""

    own: LanguageModel | Classifier
    teaching: Teaching
    _asked: Asked | None = None
    _seen: Seen | None = None

    @property
    def distil(self) -> Distil:
        return self.teaching.distil

    def check(self, model: nn.Module, batch: Batch) -> None:
        self.own.check(model, batch)

    def count(self, batch: Batch) -> int:
        return self.own.count(batch)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        self._asked = self._seen = None  # of a pass that was left by an error
        if self.teaching.teacher is not None:
            self._asked = self.teaching.teacher.ask(batch, chunks=self._chunked, match=self.distil.match)
        with looking(model, self.distil.match) as self._seen:
            return self.own.forward(model, batch)

    def loss(self, model: nn.Module, out: Tensor, batch: Batch, *, scale: float, keep: KeepCall | None) -> Tensor:
        asked, seen = self._asked, self._seen
        self._asked = self._seen = None  # nothing outlives its micro-batch
        answers: Answers | None = _answers_with(batch) if asked is None else asked.answers
        if answers is None:
            raise UsageError(
                f"the batch has no tensor {IDS!r}: the teacher's answers come with each batch. Give them, or let the "
                "teacher be in memory."
            )
        labels = self.own.targets(batch)
        _check_entries(answers, _entries(model, out, self._chunked), self.distil)
        total = self._loss(model, out, labels, answers, scale, keep)
        if asked is not None and seen is not None and self.distil.match:
            weights = self._weights(batch, labels, scale, total.dtype)
            for name, match in (("hidden", hidden_loss), ("attention", attention_loss)):
                if name in self.distil.match:
                    ours, theirs = _matched(name, getattr(seen, name), getattr(asked.seen, name))
                    total = total + match(ours, theirs, weights) * self.distil.match_weight
        return total

    @property
    def _chunked(self) -> bool:
        return isinstance(self.own, LanguageModel) and self.own.chunks is not None

    def _loss(
        self, model: nn.Module, out: Tensor, labels: Tensor, answers: Answers, scale: float, keep: KeepCall | None
    ) -> Tensor:
        if self.distil.alpha == 1:
            return self.own.loss_of(model, out, labels, scale=scale, keep=keep)
        flat = out.reshape(-1, out.shape[-1])
        if not self._chunked:
            return distil_loss(flat, labels, answers, self.distil, scale=scale)
        assert isinstance(self.own, LanguageModel) and self.own.chunks is not None
        head = output_head(model)
        assert head is not None
        if flat.dtype != head.weight.dtype and not torch.is_autocast_enabled(flat.device.type):
            flat = flat.to(head.weight.dtype)
        return chunked_distil_loss(
            flat, head.weight, labels, answers, self.distil, chunk_nbytes=self.own.chunks.chunk_nbytes,
            bias_V=head.bias, scale=scale, head=self.own.head, keep=keep,
        )  # fmt: skip

    def _weights(self, batch: Batch, labels: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """What each token counts [B, T]: a classifier's row as much as its label, shared by all of its tokens."""
        ids = batch["input_ids"]
        counted = labels.ne(IGNORED).to(dtype) * scale
        if isinstance(self.own, LanguageModel):
            return counted.view(ids.shape)
        mask = batch.get("attention_mask", torch.ones_like(ids)).to(dtype)
        return mask / mask.sum(1, keepdim=True).clamp(min=1) * counted.unsqueeze(1)


def distilled(objective: Objective, teaching: Teaching | None, *, recomputed: bool) -> Objective:
    """What is learned: the objective, or with a teacher's answers in it.

    Raises:
        UsageError: it is a loss of one's own, or attention is matched of blocks that run again.
    """
    if teaching is None or not teaching.distil.asks:
        return objective
    match = teaching.distil.match
    if not isinstance(objective, LanguageModel | Classifier):
        raise UsageError("a loss of one's own has no logits to distil into. Leave out the loss, or the teacher.")
    if match and isinstance(objective, LanguageModel) and objective.encodes:
        raise UsageError(f"matching {' and '.join(match)} is for models of one stack; this one has an encoder as well.")
    if "attention" in match and recomputed:
        raise UsageError(
            "matching attention needs each block's attention kept for the backward pass, and blocks are to run again. "
            "Leave out the matching, or train without recomputing."
        )
    return Distilled(own=objective, teaching=teaching)


def load_teaching(distil: Distil | None, watch: Watch, *, device: torch.device | str = "cpu") -> Teaching | None:
    """The teacher, loaded as it is stored, where it is to be in memory; fake under a fake mode."""
    if distil is None or not distil.asks:
        return None
    if distil.place == "disk":
        return Teaching(distil=distil)
    model = load(open_source(distil.teacher), device=device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        watch.holds("parameter", "teacher." + name.rpartition(".")[0], tensor)
    return Teaching(distil=distil, teacher=Teacher(model))


def made_up_answers(
    batch: Batch, objective: Objective, teaching: Teaching | None, entries: int
) -> dict[str, Tensor]:
    """The batch, with answers as they would come with it; entries: of the vocabulary, or classes."""
    if teaching is None or teaching.teacher is not None:
        return dict(batch)
    ids = batch["input_ids"]
    whole = isinstance(objective, Classifier)
    shape, top = (ids.shape[:1], entries) if whole else (ids.shape, top_for(teaching.distil, entries))
    kept = torch.arange(top, dtype=torch.int32, device=ids.device).expand(*shape, top).contiguous()
    even = torch.full((*shape, top), -math.log(top + 1), device=ids.device)
    return dict(batch) | {IDS: kept, LOG_PROBS: even, REST: torch.full(shape, -math.log(top + 1), device=ids.device)}


def top_for(distil: Distil, entries: int) -> int:
    """Entries that are kept of each token.

    Raises:
        UsageError: more are asked for than there are.
    """
    if distil.top is not None and distil.top > entries:
        raise UsageError(
            f"{distil.top} of the teacher's answers are to be kept, and it has {entries}. Keep {entries} at the most."
        )
    return min(USUAL_TOP, entries) if distil.top is None else distil.top


def _asked_as(model: nn.Module, *, chunks: bool) -> Objective:
    """How a teacher's outputs are got; one whose head is packed makes its logits itself."""
    get = getattr(model, "get_output_embeddings", None)
    if output_head(model) is None and callable(get) and get() is not None:
        config: Any = model.config
        return LanguageModel(encodes=bool(config.is_encoder_decoder))
    return objective_of(model, chunks=ChunkLoss() if chunks else None)


def _answers_with(batch: Batch) -> Top | None:
    if IDS not in batch:
        return None
    ids, log_probs, rest = (batch[name] for name in (IDS, LOG_PROBS, REST))
    return Top(ids_Nk=ids.flatten(0, -2), log_probs_Nk=log_probs.flatten(0, -2), rest_N=rest.flatten())


def _entries(model: nn.Module, out: Tensor, chunked: bool) -> int:
    head = output_head(model) if chunked else None
    return int(out.shape[-1] if head is None else head.weight.shape[0])


def _check_entries(answers: Answers, entries: int, distil: Distil) -> None:
    if isinstance(answers, Top):
        return
    theirs = answers.weight_VE.shape[0] if isinstance(answers, FromHead) else answers.logits_NV.shape[1]
    if theirs != entries:
        raise UsageError(
            f"the teacher {distil.teacher} tells {theirs} entries apart, and the student {entries}: they must be the "
            "same. Give a teacher of the same tokenizer and vocabulary, or of the same classes."
        )


def _matched(name: str, ours: list[Tensor], theirs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The student's tensors and, for each, the teacher's.

    Raises:
        UsageError: a model shows none, or they are of other widths or heads.
    """
    for who, seen in (("student", ours), ("teacher", theirs)):
        if not seen:
            raise UsageError(f"the {who} shows no {name} between its blocks. Leave out --match {name}.")
    chosen = [theirs[layer] for layer in matched_layers(len(ours), len(theirs))]
    one, other = ours[0], chosen[0]
    at, what = (-1, "wide") if name == "hidden" else (1, "heads")
    if one.shape[at] != other.shape[at]:
        told = f"{one.shape[at]} {what} and the teacher's {other.shape[at]}"
        raise UsageError(f"matching {name}: the student's layers have {told}. Leave out --match {name}.")
    return ours, chosen


# -- looking between the blocks ------------------------------------------------------------------------


@contextmanager
def looking(model: nn.Module, what: tuple[str, ...]) -> Iterator[Seen]:
    """Inside, what passes between the blocks of `model` is noted, and attention weights are made if they are wanted."""
    seen = Seen()
    if not what:
        yield seen
        return
    blocks = list(stacked_blocks(model))
    with ExitStack() as stack:
        if "attention" in what:
            stack.enter_context(_with_weights(model))
        for _, block in blocks:
            if "hidden" in what:
                note = lambda module, given, out: seen.hidden.append(out if isinstance(out, Tensor) else out[0])  # noqa: E731
                stack.callback(block.register_forward_hook(note).remove)
            if "attention" in what:
                _look_for_attention(block, seen, stack)
        yield seen


def _look_for_attention(block: nn.Module, seen: Seen, stack: ExitStack) -> None:
    """Note the first output of a module in the block that is attention: the second of several, [B, H, T, T]."""
    found: list[bool] = []

    def begin(module: nn.Module, given: Any) -> None:
        found.clear()

    def note(module: nn.Module, given: Any, out: Any) -> None:
        weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        if not found and isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[2] == weights.shape[3]:
            found.append(True)
            seen.attention.append(weights)

    stack.callback(block.register_forward_pre_hook(begin).remove)
    for module in block.modules():
        if module is not block:
            stack.callback(module.register_forward_hook(note).remove)


@contextmanager
def _with_weights(model: nn.Module) -> Iterator[None]:
    """Inside, attention is computed where its weights can be seen; not by a kernel that has none."""
    switch: Any = getattr(model, "set_attn_implementation", None)
    if switch is None:
        yield
        return
    config: Any = model.config
    before = config._attn_implementation
    switch("eager")
    try:
        yield
    finally:
        switch(before)


@contextmanager
def _like_earlier(model: nn.Module) -> Iterator[None]:
    """Inside, a dry run tells a block of the teacher from an equal one before it."""

    def told(name: str, block: nn.Module) -> Any:
        plain: Any = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return repeated(
                "teacher", block, name, lambda: (args, kwargs), lambda: plain(*args, **kwargs), any_recipe=True
            )

        return forward

    blocks = [(name, block, vars(block).get("forward")) for name, block in stacked_blocks(model)]
    for name, block, _ in blocks:
        block.forward = told(name, block)
    try:
        yield
    finally:
        for _, block, before in blocks:
            if before is None:
                del block.forward
            else:
                block.forward = before
