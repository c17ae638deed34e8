"""Distillation: a student learns what a teacher answers, beside what the text says.

    L = scale · Σ_n [ α · CE_n + (1 − α) · T² · KL_n ],   over labels y_n ≠ −100
    forward KL = Σ_v p_v (log p_v − log q_v),   reverse KL = Σ_v q_v (log q_v − log p_v)
    p = softmax(a), q = softmax(b),   a and b the logits of teacher and student, divided by T

T² keeps the KL's gradient as large as at T = 1 (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

Of answers kept on the disk there are the k likeliest entries of each token, and the mass of all others, which are one
class more in both distributions. What is lost by that: the KL of k + 1 classes is never more than that of V, and equal
to it where k = V (data processing inequality).

Legend: N tokens (or rows of a classifier), D the student's width, E the teacher's, V vocabulary (or classes), k kept
entries, c tokens of a chunk, H heads, B batch, T time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from memfit.technique.chunk_loss import Head

Kl = Literal["forward", "reverse"]
Place = Literal["auto", "memory", "disk"]
MATCHES: Final = ("hidden", "attention")
USUAL_TOP: Final = 64


@dataclass(frozen=True, kw_only=True)
class Distil:
    """The technique: whose answers are learned, and how."""

    teacher: str
    """A directory, a `.gguf` file or a hub id, of the same tokenizer."""
    alpha: float = 0.0
    """Share of the cross-entropy with the text's own tokens; 1: the teacher says nothing. On a text that the teacher
    was not trained on, cross-entropy leads away from the teacher."""
    temperature: float = 1.0
    kl: Kl = "forward"
    """`forward`: the student covers all that the teacher holds likely; `reverse`: it keeps to what is likeliest."""
    match: tuple[str, ...] = ()
    """What else is to be the teacher's: `hidden` states, `attention`; layer by layer, evenly where depths differ."""
    match_weight: float = 1.0
    """Of each of them in the loss."""
    top: int | None = None
    """Entries of each token that are kept where answers wait on the disk; None: 64. Of a classifier all are kept."""
    place: Place = "auto"
    """`memory`: the teacher is there beside the student; `disk`: it was asked before; `auto`: as the budget allows."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("a distillation needs a teacher: a directory, a .gguf file or a hub id")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha:g}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature:g}")
        for name, known in (("kl", get_args(Kl)), ("place", get_args(Place))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if unknown := [name for name in self.match if name not in MATCHES]:
            raise ValueError(f"match must be of {', '.join(MATCHES)}, got {unknown[0]!r}")
        if not (self.match_weight >= 0 and math.isfinite(self.match_weight)):
            raise ValueError(f"match_weight must be at least 0, got {self.match_weight:g}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        if self.match and self.place == "disk":
            raise ValueError(
                f"matching {' and '.join(self.match)} needs the teacher in memory: its likeliest tokens alone are kept "
                "on the disk. Leave out the matching, or the place"
            )

    @property
    def asks(self) -> bool:
        """Whether the teacher says anything at all."""
        return self.alpha < 1 or bool(self.match)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"match": list(self.match)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Distil":
        return cls(**(dict(data) | {"match": tuple(data["match"])}))


@dataclass(frozen=True, kw_only=True)
class FromHead:
    """What a teacher answers, as hidden states and the head that makes logits of them."""

    hidden_NE: Tensor
    weight_VE: Tensor
    bias_V: Tensor | None = None
    head: Head = field(default_factory=Head)


@dataclass(frozen=True, kw_only=True)
class FromLogits:
    """What a teacher answers, as logits."""

    logits_NV: Tensor


@dataclass(frozen=True, kw_only=True)
class Top:
    """What a teacher answered at the temperature of the loss: its likeliest entries, and what is left."""

    ids_Nk: Tensor
    """int32, no entry twice."""
    log_probs_Nk: Tensor
    rest_N: Tensor
    """log of the mass of all other entries."""


Answers = FromHead | FromLogits | Top


def top_of(logits_NV: Tensor, *, top: int, temperature: float) -> Top:
    """The `top` likeliest entries of softmax(logits / temperature), the likeliest first, in fp32.

    The mass that is left is added up of itself, not taken from 1: of a sure token it is 1e-9, and counts in a log.
    """
    z = logits_NV.float().div_(temperature) if logits_NV.dtype != torch.float32 else logits_NV / temperature
    kept, ids = z.topk(top, dim=-1)
    # The likeliest is the first. Kept entries are no part of what is left.
    peak = kept[:, :1].clone()
    z.scatter_(1, ids, -torch.inf)
    rest = z.sub_(peak).exp_().sum(-1, keepdim=True)
    kept.sub_(peak)
    norm = kept.exp().sum(-1, keepdim=True).add_(rest).log_()
    tiny = torch.finfo(torch.float32).tiny
    rest.clamp_(min=tiny).log_().sub_(norm)
    return Top(ids_Nk=ids.to(torch.int32), log_probs_Nk=kept.sub_(norm), rest_N=rest.squeeze(1))


# -- what lies between the layers ----------------------------------------------------------------------


def matched_layers(student: int, teacher: int) -> tuple[int, ...]:
    """For each layer of the student the teacher's that it is held against: the last with the last, evenly."""
    return tuple(max(0, round((layer + 1) * teacher / student) - 1) for layer in range(student))


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weights_BT: Tensor) -> Tensor:
    """Σ_n w_n · mean over layers of ‖s − t‖² / ‖t‖²: hidden states [B, T, D] of the layers matched, w [B, T]."""
    total = torch.zeros((), dtype=weights_BT.dtype, device=weights_BT.device)
    for s, t in zip(student, teacher, strict=True):
        wide = t.to(weights_BT.dtype)
        off_BT = (s.to(wide.dtype) - wide).square().sum(-1)
        total = total + (off_BT / wide.square().sum(-1).clamp(min=1e-12) * weights_BT).sum()
    return total / max(len(student), 1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weights_BT: Tensor) -> Tensor:
    """Σ_n w_n · mean over layers and heads of KL(teacher ‖ student) of a token's attention: [B, H, T, T], w [B, T].

    Source: Wang et al. 2020, arXiv:2002.10957, of each layer in place of the last alone.
    """
    total = torch.zeros((), dtype=weights_BT.dtype, device=weights_BT.device)
    for s, t in zip(student, teacher, strict=True):
        p, q = t.to(weights_BT.dtype), s.to(weights_BT.dtype)
        tiny = torch.finfo(torch.float32).tiny
        kl_BT = (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum(-1).mean(1)
        total = total + (kl_BT * weights_BT).sum()
    return total / max(len(student), 1)
