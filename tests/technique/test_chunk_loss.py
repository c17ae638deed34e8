"""The loss in chunks: what float64 says of the whole logits, whichever way the chunks lie."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.account.meter import Meter
from memfit.technique.chunk_loss import ChunkLoss, Head, HeadCall, rows_of_gradient

TOKENS, VOCABULARY, WIDTH = 700, 1000, 16
CHUNKS = {
    "one chunk": 1 << 30,
    "tokens": 8 * VOCABULARY * 300,
    "entries": 8 * TOKENS * 100,
    "the fewest entries": 1,
}


def _given(*, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::5] = -100
    return hidden, weight, labels, torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True) if bias else None


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    z = F.linear(hidden, weight, bias)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return F.cross_entropy(head.multiplier * z, labels, reduction="sum") * 0.01


def _off(found: Tensor, right: Tensor) -> float:
    return float(((found - right).norm() / right.norm()).detach())


@pytest.mark.parametrize("head", [Head(), Head(softcap=5.0), Head(softcap=5.0, multiplier=0.3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_are_those_of_whole_logits(chunk: str, bias: bool, head: Head) -> None:
    hidden, weight, labels, b = _given(bias=bias)
    of = [tensor for tensor in (hidden, weight, b) if tensor is not None]
    right = _plain(hidden, weight, labels, b, head)
    gradients = torch.autograd.grad(right, of)
    loss = ChunkLoss(chunk_nbytes=CHUNKS[chunk]).apply(hidden, weight, labels, bias_V=b, scale=0.01, head=head)
    assert _off(loss, right) < 1e-13
    for found, gradient in zip(torch.autograd.grad(loss, of), gradients, strict=True):
        assert _off(found, gradient) < 1e-13


@pytest.mark.parametrize("chunk", CHUNKS)
def test_rows_made_later_are_the_gradient(chunk: str) -> None:
    hidden, weight, labels, bias = _given(bias=True)
    (right,) = torch.autograd.grad(_plain(hidden, weight, labels, bias, Head()), [weight])
    kept: list[HeadCall] = []
    loss = ChunkLoss(chunk_nbytes=CHUNKS[chunk]).apply(
        hidden, weight, labels, bias_V=bias, scale=0.01, keep=kept.append
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    assert bias is not None
    parts = [range(start, min(start + 130, VOCABULARY)) for start in range(0, VOCABULARY, 130)]
    made = [rows_of_gradient(kept[0], weight.detach(), bias.detach(), part.start, part.stop) for part in parts]
    assert _off(torch.cat(made), right) < 1e-13


@pytest.mark.parametrize("chunk", CHUNKS)
def test_in_16_bits_it_is_as_near_as_whole_logits_are(chunk: str) -> None:
    hidden, weight, labels, _ = _given(bias=False)
    right = torch.autograd.grad(_plain(hidden, weight, labels, None, Head()), [hidden, weight])

    def in_halves(make: Any) -> list[float]:
        low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
        found = torch.autograd.grad(make(*low), low)
        return [_off(gradient.double(), one) for gradient, one in zip(found, right, strict=True)]

    chunks = ChunkLoss(chunk_nbytes=-(-CHUNKS[chunk] // 2))
    ours = in_halves(lambda x, w: chunks.apply(x, w, labels, scale=0.01))
    whole = in_halves(lambda x, w: _plain(x, w, labels, None, Head()))
    assert all(a < 1.1 * b for a, b in zip(ours, whole, strict=True)), (ours, whole)


def test_all_labels_ignored_give_nothing() -> None:
    hidden, weight, labels, _ = _given(bias=False)
    loss = ChunkLoss(chunk_nbytes=1).apply(hidden, weight, labels.fill_(-100), scale=0.01)
    assert float(loss.detach()) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in torch.autograd.grad(loss, [hidden, weight]))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_where_nothing_is_learned_no_gradient_is_made(chunk: str) -> None:
    hidden, weight, labels, bias = _given(bias=True)
    technique = ChunkLoss(chunk_nbytes=CHUNKS[chunk])
    learning, judging = Meter(), Meter()
    with learning.phase("loss"):
        right = technique.apply(hidden, weight, labels, bias_V=bias)
    with judging.phase("loss"), torch.no_grad():
        loss = technique.apply(hidden, weight, labels, bias_V=bias)
    assert torch.equal(loss, right.detach())
    gradients = sum(tensor.nbytes for tensor in (hidden, weight, bias) if tensor is not None)
    assert judging.account().peak_nbytes <= learning.account().peak_nbytes - gradients
