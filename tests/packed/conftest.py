from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memfit.packed.scheme import Scheme

Rounded = tuple[Tensor, Tensor, Tensor | None]


def _round_to(weight: Tensor, scheme: Scheme) -> Rounded:
    rows, inputs = weight.shape
    groups = scheme.groups(inputs)
    by_group = weight.float().view(rows, groups, -1)
    least, most = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if scheme.symmetric:
        scale = (by_group.abs().amax(-1) / (most + 0.5)).to(torch.bfloat16)
        zero, shift = None, torch.zeros_like(scale, dtype=torch.float32)
    else:
        low, high = by_group.amin(-1).clamp(max=0), by_group.amax(-1).clamp(min=0)
        scale = ((high - low) / (most - least)).to(torch.bfloat16)
        shift = (least - low / scale.float()).round().clamp(least, most)
        zero = shift.to(torch.int8)
    q = (by_group / scale.float()[..., None] + shift[..., None]).round().clamp(least, most)
    return q.to(torch.int8).view(rows, inputs), scale, zero


def _expand(rounded: Rounded) -> Tensor:
    q, scale, zero = rounded
    by_group = q.double().view(*scale.shape, -1)
    if zero is not None:
        by_group = by_group - zero.double()[..., None]
    return (by_group * scale.double()[..., None]).view(q.shape)


@pytest.fixture
def round_to() -> Callable[[Tensor, Scheme], Rounded]:
    """Weight [N, K] to int8 q, bf16 scale [N, G] and zero points, to the nearest."""
    return _round_to


@pytest.fixture
def expand() -> Callable[[Rounded], Tensor]:
    """(q − z) · s in float64."""
    return _expand


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
