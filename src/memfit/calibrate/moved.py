"""What the layers that read one input are to make up for: how far it has moved what they give.

Legend of shapes: T time (of inputs: tokens), N outputs, K inputs, S sums of rows with random signs.

    H = E[x̂ x̂ᵀ] [K, K]          of each layer D = W E[(x − x̂) x̂ᵀ] [N, K], and of each half of the text P D [S, K]

P has random signs. E[(x − x̂) x̂ᵀ] serves all layers of one input, but is as large as H: where the layers have few
outputs for the width, sums of W (x − x̂) x̂ᵀ take less memory and time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from memfit.packed.fake import blocks_to_run

from .processor import multiplies_bf16

_SUMS: Final = 32
"""Random sums of a weight's rows that stand for all of them in `agreement`."""
_TOKENS: Final = 512
"""Tokens whose inputs are in fp32 at a time: of more, oneDNN's products are a fifth slower."""
_ROWS: Final = 1024
"""Rows of a weight that are in fp32 at a time."""
_PANEL: Final = 256
"""Columns of H at a time, at the least: what is below its diagonal blocks is not computed."""
_PANELS: Final = 8
"""At the most: each has a shape of its own, for which oneDNN makes code."""


class Inputs:
    """H of what layers read, summed over tokens as they come: all that those take which make up for nothing.

    Args:
        width: K.
    """

    def __init__(self, width: int) -> None:
        self._hessian = torch.zeros(width, width)
        self.tokens = 0

    def add(self, x_TK: Tensor) -> None:
        """Some tokens."""
        with _products_of_bf16():
            for part in _parts(x_TK):
                self.add_part(x_TK[part].float())

    def add_part(self, x: Tensor) -> None:
        """Some tokens, few enough, in fp32."""
        self.tokens += x.shape[0]
        for start, stop in _panels(self._hessian.shape[0]):  # what is below its diagonal blocks is left out
            self._hessian[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])

    def hessian(self) -> Tensor:
        """H; it is the caller's from then on."""
        found, self._hessian = self._hessian, torch.empty(0)
        for start, stop in _panels(found.shape[0]):
            found[stop:, start:stop].copy_(found[start:stop, stop:].t())
        return found.div_(max(self.tokens, 1))


class Moved:
    """Sums over tokens as they come.

    Args:
        outputs: N of each layer, by name.
        width: K.
        weight: of a layer's name its weight as it was [N, K].
        random: where signs come from.
    """

    def __init__(
        self, outputs: Mapping[str, int], width: int, weight: Callable[[str], Tensor], random: torch.Generator
    ) -> None:
        self._weight = weight
        self._left = set(outputs)
        self._inputs = Inputs(width)
        self._signs = {name: _signs(rows, random) for name, rows in outputs.items()}
        shared = width <= 2 * sum(outputs.values())
        self._shared = torch.zeros(width, width) if shared else None
        self._own = {} if shared else {name: torch.zeros(rows, width) for name, rows in outputs.items()}
        self._sums: dict[str, list[Tensor]] = {name: [] for name in outputs}
        self._of_halves: list[int] = []
        """Tokens of each half that has ended."""

    def add(self, before_TK: Tensor, x_TK: Tensor) -> None:
        """Some tokens: x, and x̂."""
        tokens = _parts(x_TK)
        with _products_of_bf16():
            for part in tokens:
                x = x_TK[part].float()
                self._inputs.add_part(x)
                if self._shared is not None:
                    self._shared.addmm_(before_TK[part].sub(x_TK[part]).float().t(), x)
                del x
            for name, moved in self._own.items():
                weight = self._weight(name)
                for part in tokens:
                    x = x_TK[part].float()
                    off = before_TK[part].sub(x_TK[part]).to(weight.dtype)
                    for row in blocks_to_run(range(0, weight.shape[0], _ROWS)):
                        rows = slice(row, row + _ROWS)
                        moved[rows].addmm_(F.linear(off, weight[rows]).float().t(), x)
                    del x, off
                del weight

    def end_half(self) -> None:
        """Half of the text has been added."""
        for name, sums in self._sums.items():
            found = self._signed_sum(name)
            # Of the second half: all, less what the first has made of it.
            for before in sums:
                found.sub_(before)
            sums.append(found)
        self._of_halves.append(max(self._inputs.tokens - sum(self._of_halves), 1))

    def hessian(self) -> Tensor:
        """H; it is the caller's from then on."""
        return self._inputs.hessian()

    def of(self, name: str) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """A layer's D, and P D of each half of the text; of one window there are no halves. Each layer is asked for
        once."""
        self._left.discard(name)
        halves = [total.div(count) for total, count in zip(self._sums.pop(name), self._of_halves, strict=True)]
        if self._shared is None:
            moved = self._own.pop(name)
        else:
            weight = self._weight(name)
            moved = torch.empty(weight.shape, dtype=torch.float32)
            for row in blocks_to_run(range(0, weight.shape[0], _ROWS)):
                rows = slice(row, row + _ROWS)
                torch.mm(weight[rows].float(), self._shared, out=moved[rows])
            if not self._left:
                self._shared = None
        moved.div_(max(self._inputs.tokens, 1))
        return moved, (halves[0], halves[1]) if len(halves) == 2 else None

    def _signed_sum(self, name: str) -> Tensor:
        """P W Σ (x − x̂) x̂ᵀ so far [S, K]."""
        signs = self._signs[name]
        if self._shared is None:
            return signs.mm(self._own[name])
        weight, found = self._weight(name), torch.zeros(_SUMS, self._shared.shape[0])
        for row in blocks_to_run(range(0, weight.shape[0], _ROWS)):
            rows = slice(row, row + _ROWS)
            found.addmm_(signs[:, rows], weight[rows].float())
        return found.mm(self._shared)


def _parts(x_TK: Tensor) -> list[slice]:
    """Tokens whose inputs are in fp32 at a time."""
    return [slice(start, start + _TOKENS) for start in blocks_to_run(range(0, x_TK.shape[0], _TOKENS))]


def _panels(width: int) -> Iterator[tuple[int, int]]:
    step = max(_PANEL, -(-width // (64 * _PANELS)) * 64)
    for start in range(0, width, step):
        yield start, min(start + step, width)


def _signs(rows: int, random: torch.Generator) -> Tensor:
    """[S, rows] of −1 and 1."""
    return torch.randint(0, 2, (_SUMS, rows), generator=random).mul_(2).sub_(1).float()


@contextmanager
def _products_of_bf16() -> Iterator[None]:
    """Inside, products of fp32 take what bf16 holds of their factors, and add up in fp32, where the processor has
    instructions for that: twice as fast. What a layer reads is bf16 anyway."""
    before = torch.get_float32_matmul_precision()
    if multiplies_bf16():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
