"""GPTQ's choices are those of its paper in float64, never worse than the scales alone; trouble is told."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memfit.packed.scheme import Scheme
from memfit.technique.gptq import DAMPING, Gptq, agreement, corrected, damping_for, factor, gptq
from memfit.technique.quantize import dequantize, quantize

SCHEMES = [
    Scheme(bits=4, group=32), Scheme(bits=3, group=64, symmetric=False), Scheme(bits=2, group=32),
    Scheme(bits=8, group=None), Scheme(bits=5, group=128, symmetric=False),
]  # fmt: skip


def draw(seed: int, rows: int = 12, inputs: int = 128) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of inputs that are correlated, float64."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = make(2 * inputs, inputs) @ (make(inputs, inputs) / inputs**0.5) * make(inputs).exp()
    return make(rows, inputs), x.t() @ x / x.shape[0]


def in_turn(hessian: Tensor, damping: float, together: int = 1) -> Iterator[tuple[list[int], Tensor]]:
    """Columns from the largest diag(H) on, so many at a time, and H⁻¹ of what is left, float64; Frantar et al. 2023."""
    diagonal = hessian.diagonal()
    inverse = torch.linalg.inv(hessian + damping * diagonal.mean() * torch.eye(len(diagonal), dtype=torch.float64))
    for run in diagonal.view(-1, together).sum(1).argsort(descending=True, stable=True).tolist():
        some = list(range(run * together, (run + 1) * together))
        yield some, inverse
        own = torch.linalg.inv(inverse[some][:, some])
        inverse = inverse - inverse[:, some] @ own @ inverse[some]


def own_weights(hessian: Tensor, damping: float, together: int = 1) -> Tensor:
    """What is left of a column's own squared error where those after it make up for the rest, fp32 [K]."""
    found = torch.zeros(len(hessian))
    for some, inverse in in_turn(hessian, damping, together):
        for at, j in enumerate(some):  # of a run, each after those before it
            after = some[at:]
            before = some[:at]
            left = inverse[after][:, after]
            if before:
                held = torch.linalg.inv(inverse[before][:, before])
                left = left - inverse[after][:, before] @ held @ inverse[before][:, after]
            found[j] = 1 / left[0, 0]
    return found


def as_in_the_paper(w: Tensor, hessian: Tensor, scheme: Scheme, *, damping: float) -> Tensor:
    """q by Frantar et al. 2023, algorithm 1 as first derived: after each column, H⁻¹ without it; float64."""
    scales = quantize(w, scheme, importance=own_weights(hessian, damping))
    rest, q, half = w.clone(), scales.q.clone(), 2 ** (scheme.bits - 1)
    group = w.shape[1] // scales.scale.shape[1]
    for (j,), inverse in in_turn(hessian, damping):
        scale = scales.scale[:, j // group].double()
        zero = 0 if scales.zero is None else scales.zero[:, j // group].double()
        q[:, j] = (rest[:, j] / scale + zero).round().clamp(-half, half - 1)
        error = (rest[:, j] - ((q[:, j] - zero) * scale).bfloat16().double()) / inverse[j, j]
        rest -= torch.outer(error, inverse[j])
    return q


def error_of(w: Tensor, read: Tensor, hessian: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of each row, float64."""
    d = w.double() - read.double()
    return torch.einsum("nk,kl,nl->n", d, hessian.double(), d)


@pytest.mark.parametrize("block", [1, 24, 128, 1000])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_choices_are_those_of_the_paper(scheme: Scheme, block: int) -> None:
    w, hessian = draw(1)
    made = gptq(w, hessian, scheme, damping=0.01, block=block)
    assert torch.equal(made.quantized.q, as_in_the_paper(w, hessian, scheme, damping=0.01))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    torch.testing.assert_close(made.error, error_of(w, dequantize(made.quantized), damped), rtol=1e-9, atol=0)


@settings(max_examples=40, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), magnitude=st.sampled_from([1e-8, 0.02, 1.0, 1e8]))
def test_fp32_is_as_good_as_float64(scheme: Scheme, seed: int, magnitude: float) -> None:
    """A tie may fall otherwise, and what follows with it; how good the whole is does not change."""
    w, hessian = draw(seed)
    w *= magnitude
    narrow, wide = gptq(w.float(), hessian.float(), scheme), gptq(w, hessian, scheme)
    found = error_of(w, dequantize(narrow.quantized), hessian).sum()
    assert found <= 1.02 * error_of(w, dequantize(wide.quantized), hessian).sum()
    torch.testing.assert_close(wide.quantized.scale, quantize(w, scheme, importance=own_weights(hessian, 0.01)).scale)


@settings(max_examples=40, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6))
def test_correlated_inputs_make_it_better_than_rounding(scheme: Scheme, seed: int) -> None:
    w, hessian = draw(seed)
    plain = quantize(w, scheme, importance=hessian.diagonal().float())
    found = gptq(w, hessian, scheme).quantized
    assert error_of(w, dequantize(found), hessian).sum() < error_of(w, dequantize(plain), hessian).sum()


@settings(max_examples=20, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6))
def test_inputs_that_are_not_correlated_leave_plain_rounding(scheme: Scheme, seed: int) -> None:
    w, hessian = draw(seed)
    diagonal = torch.diag(hessian.diagonal())
    made = factor(diagonal.float())
    # The last bit of a weighting decides between two zero points that lose the same, so both take the same bits.
    torch.testing.assert_close(made.own_weights(), own_weights(diagonal, DAMPING))
    found = gptq(w.float(), made, scheme).quantized
    plain = quantize(w.float(), scheme, importance=made.own_weights())
    assert torch.equal(found.q, plain.q)


def test_rows_by_blocks_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from memfit.technique import gptq as room

    w, hessian = draw(3)
    whole = gptq(w, hessian, SCHEMES[0])
    monkeypatch.setattr(room, "_ROWS", 5)
    parts = gptq(w, factor(hessian), SCHEMES[0])
    assert torch.equal(whole.quantized.q, parts.quantized.q)
    torch.testing.assert_close(whole.error, parts.error, rtol=1e-12, atol=0)


def test_inputs_that_are_always_0_get_weights_of_0() -> None:
    w, hessian = draw(4)
    dead = torch.tensor([3, 64, 127])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    for scheme in SCHEMES:
        found = gptq(w, hessian, scheme).quantized
        assert not dequantize(found)[:, dead].any()
        alive = gptq(w, hessian, scheme).error
        assert alive.isfinite().all()


def test_damping_is_raised_where_it_must_be_and_told() -> None:
    w, hessian = draw(5)
    assert gptq(w, hessian, SCHEMES[0], damping=0.02).damping == 0.02
    even = torch.randn(256, 128, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    even = even.t() @ even / 256
    below = torch.linalg.eigvalsh(even)[0] + 0.05 * even.diagonal().mean()  # as sums in low precision may be
    odd = even - below * torch.eye(128, dtype=torch.float64)
    assert gptq(w, odd, SCHEMES[0], damping=0.01).damping == pytest.approx(0.1)
    few = torch.randn(5, 128, dtype=torch.float64)  # fewer texts than inputs: singular, and damping is enough
    assert gptq(w, few.t() @ few, SCHEMES[0]).damping == 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:64], "is \\[K, K\\], got shape"),
        (lambda h: h[:64, :64], "of 64 inputs, the weight has 128"),
        (lambda h: h * torch.nan, "not finite"),
        (lambda h: -h, "negative diagonal"),
        (lambda h: h * 0, "no input was ever anything else"),
        (lambda h: torch.full_like(h, -50.0).fill_diagonal_(1.0), "not positive definite"),
    ],
)
def test_a_hessian_that_cannot_be_one_is_refused(change, message) -> None:
    w, hessian = draw(6)
    with pytest.raises(ValueError, match=message):
        gptq(w, change(hessian), SCHEMES[0])


def test_a_weight_that_cannot_be_stored_is_refused() -> None:
    w, hessian = draw(7)
    with pytest.raises(ValueError, match="not finite"):
        gptq(w * torch.inf, hessian, SCHEMES[0])
    with pytest.raises(ValueError, match="not a multiple of the group"):
        gptq(w[:, :96], hessian[:96, :96], Scheme(bits=4, group=64))
    with pytest.raises(ValueError, match="damping"):
        Gptq(scheme=SCHEMES[0], damping=0.0)
    assert Gptq(scheme=SCHEMES[0]).why_not((4, 100)) is not None
    assert Gptq(scheme=SCHEMES[0]).apply(w, hessian).damping == 0.01


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.01, 0.5]))
def test_the_corrected_weight_is_the_least_squares_answer(seed: int, damping: float) -> None:
    """W' = argmin E|W x - W' x̂|² + λ|W' - W|², solved plainly, as one tall system."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    w, x = make(5, 32), make(70, 32) * make(32).exp()
    x_now = x + 0.3 * make(70, 32)
    hessian, cross = x_now.t() @ x_now / 70, (x - x_now).t() @ x_now / 70
    made = factor(hessian, damping=damping)
    found = corrected(w, w @ cross, made)
    held = (damping * hessian.diagonal().mean()).sqrt() * torch.eye(32, dtype=torch.float64)
    right = torch.linalg.lstsq(torch.cat([x_now / 70**0.5, held]), torch.cat([x @ w.t() / 70**0.5, held @ w.t()]))
    torch.testing.assert_close(found, right.solution.t(), rtol=1e-7, atol=1e-9)


def test_inputs_that_nothing_changed_leave_the_weight_as_it_is() -> None:
    w, hessian = draw(4)
    assert torch.equal(corrected(w, torch.zeros_like(w), factor(hessian)), w)
    narrow = corrected(w.bfloat16(), torch.zeros(w.shape), factor(hessian.float()))
    assert torch.equal(narrow, w.bfloat16().float())


def test_halves_that_agree_are_believed_and_chance_is_not() -> None:
    w, hessian = draw(5, rows=64)
    made = factor(hessian)
    assert agreement(w, w, made) == pytest.approx(1.0, abs=1e-12)
    assert agreement(w, -w, made) == 0.0
    assert agreement(torch.zeros_like(w), torch.zeros_like(w), made) == 0.0
    generator = torch.Generator().manual_seed(6)
    signs = torch.randint(0, 2, (400, 64), generator=generator).mul(2).sub(1).double()
    noise = [draw(seed, rows=64)[0] for seed in (7, 8)]
    first, second = w + noise[0], w + noise[1]
    told = agreement(first, second, made)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128))
    mean = (first + second) / 2
    assert told == pytest.approx(float((first @ inverse * second).sum() / (mean @ inverse * mean).sum()), rel=1e-9)
    assert agreement(signs @ first, signs @ second, made) == pytest.approx(told, rel=0.1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_what_is_agreed_on_errs_less_on_other_text(seed: int) -> None:
    """Of 40 tokens for 32 inputs a least-squares answer is mostly chance: less of it is nearer on tokens not seen."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    w, x = make(64, 32), make(20000, 32)
    x_now = x + 0.3 * make(20000, 32)
    off = x - x_now
    halves = [(off[part].t() @ x_now[part]) / 20 for part in (slice(0, 20), slice(20, 40))]
    made = factor(x_now[:40].t() @ x_now[:40] / 40)
    share = agreement(w @ halves[0], w @ halves[1], made)
    moved = w @ (halves[0] + halves[1]) / 2

    def error(part: float) -> float:
        return float((x[40:] @ w.t() - x_now[40:] @ corrected(w, moved * part, made).t()).square().mean())

    assert error(share) < error(1.0)


def test_the_fewer_tokens_the_more_damping_which_loses_less_on_others() -> None:
    assert damping_for(512, 1024) > damping_for(512, 8192) > damping_for(256, 8192) > 0
    assert damping_for(512, 1 << 30) == damping_for(16, 1 << 30) == DAMPING
    assert damping_for(4096, 1) < 1
    lost = torch.zeros(2)
    scheme, chances = Scheme(bits=3, group=64), 1 / torch.arange(1, 2001)
    for seed in range(4):
        # Inputs as words are: a few of them often, and many that a short text has none of.
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator)
        words = draw(2000, 128) @ (draw(128, 128) * torch.logspace(0, -1, 128)).t()
        seen, others = (
            words[torch.multinomial(chances, count, replacement=True, generator=generator)] for count in (128, 1 << 15)
        )
        weight, hessian, unseen = draw(64, 128), seen.t() @ seen / len(seen), others.t() @ others / len(others)
        for n, damping in enumerate((damping_for(128, 128), 0.01)):
            read = dequantize(gptq(weight, hessian, scheme, damping=damping).quantized)
            lost[n] += error_of(weight, read, unseen).sum()
    assert lost[0] < 0.95 * lost[1]
