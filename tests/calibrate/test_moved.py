"""H, and what layers are to make up for, beside plain sums in float64; of few outputs and of many."""

import pytest
import torch
from torch import Tensor

from memfit.calibrate import moved as room
from memfit.calibrate.moved import Moved

TOKENS = (30, 11, 37)
"""Of each part; the first two are the first half."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_TOKENS", 16)
    monkeypatch.setattr(room, "_ROWS", 7)
    monkeypatch.setattr(room, "_PANEL", 10)


def inputs(width: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in TOKENS:
        x = torch.randn(count, width, generator=generator).to(torch.bfloat16)
        found.append((x, (x + 0.1 * torch.randn(count, width, generator=generator)).to(torch.bfloat16)))
    return found


@pytest.mark.parametrize("outputs", [{"one": 6}, {"one": 12, "two": 20}])
@pytest.mark.parametrize("width", [24, 100])
def test_sums_are_those_of_all_tokens(outputs: dict[str, int], width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(n, width, generator=generator).to(torch.bfloat16) for name, n in outputs.items()}
    found = Moved(outputs, width, weights.__getitem__, torch.Generator().manual_seed(2))
    parts = inputs(width)
    for number, (x, now) in enumerate(parts):
        found.add(x, now)
        if number > 0:
            found.end_half()
    x, now = (torch.cat(side).double() for side in zip(*parts, strict=True))
    hessian = found.hessian()
    torch.testing.assert_close(hessian.double(), now.t() @ now / len(now), rtol=1e-4, atol=1e-4)
    assert torch.equal(hessian, hessian.t())
    cross = (x - now).t() @ now
    first = TOKENS[0] + TOKENS[1]
    halves = [(x - now)[part].t() @ now[part] / len(now[part]) for part in (slice(first), slice(first, None))]
    signs = torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        p = torch.randint(0, 2, (32, outputs[name]), generator=signs).mul(2).sub(1).double()
        amount, of_halves = found.of(name)
        assert of_halves is not None
        assert near(amount, weight.double() @ cross / len(now))
        for got, right in zip(of_halves, halves, strict=True):
            assert near(got, p @ weight.double() @ right)


def near(found: Tensor, right: Tensor) -> bool:
    """As products of what bf16 holds of their factors are."""
    return bool((found.double() - right).norm() < 5e-3 * right.norm())


def test_of_one_window_there_are_no_halves() -> None:
    found = Moved({"one": 6}, 24, lambda _: torch.ones(6, 24), torch.Generator())
    found.add(*inputs(24)[0])
    found.end_half()
    assert found.of("one")[1] is None
