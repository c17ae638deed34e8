"""What weights are kept in and what products are computed in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

_DTYPES: Final[dict[str, torch.dtype]] = {
    "fp32": torch.float32,
    "autocast": torch.float32,
    "master": torch.bfloat16,
    "stochastic": torch.bfloat16,
    "kahan": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The technique: `fp32`; `autocast` (fp32 weights, bf16 products); `master`, `stochastic`, `kahan`, `bf16` (bf16
    weights that move in different ways, see `weights`); `fp16`, whose loss is scaled."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in _DTYPES:
            raise ValueError(f"precision must be one of {', '.join(_DTYPES)}, got {self.kind!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return _DTYPES[self.kind]

    def apply(self, model: nn.Module) -> None:
        """Cast the trained parameters of `model`, one after the other, ties kept. fp64 is left, for it is asked for.

        Parameters that need no gradient, and buffers, stay as they were loaded.
        """
        for holders in _places(model):
            old: nn.Parameter = getattr(*holders[0])
            if old.dtype in (self.dtype, torch.float64) or not old.requires_grad:
                continue
            new = nn.Parameter(old.detach().to(self.dtype))
            for module, name in holders:
                setattr(module, name, new)
            del old, new

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Inside, products are computed as this precision says."""
        if self.kind != "autocast":
            return nullcontext()
        # Casts are made anew at each use: kept ones would be a second copy of the weights until the pass ends.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def _places(model: nn.Module) -> Iterator[list[tuple[nn.Module, str]]]:
    """Where each parameter is: several modules where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    yield from found.values()


@dataclass
class LossScale:
    """By what a loss in fp16 is multiplied, so that small gradients are not rounded to zero.

    It is halved when a gradient overflows, and doubled after so many steps without (Micikevicius et al., 2018).
    """

    value: float = 2.0**16
    every: int = 2000
    good: int = 0

    def grow(self) -> None:
        """A step went well."""
        self.good += 1
        if self.good >= self.every:
            self.value, self.good = min(self.value * 2.0, 2.0**24), 0

    def shrink(self) -> None:
        """A gradient was infinite."""
        self.value, self.good = max(self.value / 2.0, 1.0), 0
