"""What calibration leaves behind: the one store that every technique and the search read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments around one weight [N, K], each a mean over the calibration tokens."""

    inputs: Tensor
    """Mean square of each input, float32 [K]: the diagonal of H = E[x xᵀ]. Of an embedding, whose inputs are
    one-hot, each entry's share of the tokens [V]. Of fused experts [E, K], over the tokens that each saw."""
    gradients: Tensor | None
    """Mean square of the loss's gradient at each output, float32 [N]: the diagonal of E[g gᵀ]. Of an embedding
    [D]; of fused experts [E, N], over all tokens. The labels are drawn from the model itself, so this is the true
    Fisher information (Martens 2020, section 9.2)."""


@dataclass(kw_only=True)
class Statistics:
    """Moments by module name, and the number of tokens they were taken over."""

    moments: dict[str, Moments] = field(default_factory=dict)
    tokens: int = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(H, G) of every module that has both, as prices take them."""
        return {
            name: (moments.inputs, moments.gradients)
            for name, moments in self.moments.items()
            if moments.gradients is not None
        }

    def save(self, path: Path) -> None:
        tensors = {}
        for name, moments in self.moments.items():
            tensors[f"{name}:inputs"] = moments.inputs.contiguous()
            if moments.gradients is not None:
                tensors[f"{name}:gradients"] = moments.gradients.contiguous()
        save_file(tensors, str(path), metadata={"tokens": str(self.tokens)})

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        moments: dict[str, Moments] = {}
        with safe_open(str(path), framework="pt") as file:
            tokens = int(file.metadata()["tokens"])
            names = set(file.keys())
            for key in sorted(names):
                module, _, part = key.rpartition(":")
                if part == "inputs":
                    gradients = f"{module}:gradients"
                    moments[module] = Moments(
                        inputs=file.get_tensor(key),
                        gradients=file.get_tensor(gradients) if gradients in names else None,
                    )
        return cls(moments=moments, tokens=tokens)


class Sums:
    """Running sums of squares by key; `mean` divides by the tokens seen."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, module: str, part: str, values: Tensor) -> None:
        """Add the squares of `values` [..., width], summed over all dimensions but the last."""
        rows = values.reshape(-1, values.shape[-1])
        self.add_summed(module, part, _squares(rows), rows.shape[0])

    def add_summed(self, module: str, part: str, summed: Tensor, count: int) -> None:
        key = (module, part)
        if key in self._sums:
            self._sums[key] += summed
        else:
            self._sums[key] = summed
        self._counts[key] = self._counts.get(key, 0) + count

    def mean(self, module: str, part: str) -> Tensor | None:
        """The mean; taken once, in the place of its sum."""
        total = self._sums.pop((module, part), None)
        return None if total is None else total.div_(self._counts[module, part])

    def count(self, module: str, part: str) -> int:
        """Rows that were added."""
        return self._counts.get((module, part), 0)

    def modules(self) -> list[str]:
        return list(dict.fromkeys(module for module, _ in self._sums))


_ROWS = 1024


def _squares(rows: Tensor) -> Tensor:
    """Σ over rows of squares, float32 [width]; in blocks, so that no float32 copy of all rows exists."""
    total = torch.zeros(rows.shape[1], dtype=torch.float32)
    for start in range(0, rows.shape[0], _ROWS):
        total += rows[start : start + _ROWS].to(torch.float32, copy=True).square_().sum(0)
    return total
