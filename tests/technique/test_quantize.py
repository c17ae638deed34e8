"""Quantised weights are what is read back, never worse than plain rounding, and near the best there is."""

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as stock_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from memfit.packed.scheme import Scheme
from memfit.technique import quantize as room
from memfit.technique.quantize import Quantize, Quantized, dequantize, quantize, quantize_error

SCHEMES = [
    Scheme(bits=bits, group=group, symmetric=symmetric)
    for bits in (8, 7, 6, 5, 4, 3, 2)
    for group in ((None,) if bits == 8 else (32, 128))
    for symmetric in (True, False)
]
schemes = st.sampled_from(SCHEMES)


def draw(seed: int, rows: int, inputs: int, *, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, inputs, generator=generator)
    spread = torch.rand(rows, inputs, generator=generator).clamp_(min=0.05).sqrt()
    return w if kind == "normal" else w / spread


def skewed(seed: int, inputs: int) -> Tensor:
    return torch.rand(inputs, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3


def exact_error(w: Tensor, quantized: Quantized, importance: Tensor | None = None) -> Tensor:
    """Σ importance (w − ŵ)² of each row, in float64."""
    squares = (w.double() - dequantize(quantized).double()) ** 2
    return (squares if importance is None else squares * importance.double()).sum(dim=1)


def least_error(w: Tensor, scheme: Scheme, importance: Tensor) -> float:
    """The least error of a dense search, in plain loops and float64: steps, then places of the levels."""
    group = scheme.group or w.shape[1]
    span, half = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    total = 0.0
    for row in w.double():
        for start in range(0, w.shape[1], group):
            x, a = row[start : start + group], importance[start : start + group].double()
            spread = 2 * x.abs().max() if scheme.symmetric else x.max().clamp(min=0) - x.min().clamp(max=0)
            best = float("inf")
            for shrink in torch.linspace(0.3, 1.35, 160):
                step = (spread * shrink / span).bfloat16().double()
                middle = round(float((x.max() + x.min()) / 2 / step - span / 2))
                for lowest in (-half, 1 - half) if scheme.symmetric else range(middle - 2, middle + 3):
                    if -span <= lowest <= 0:
                        d = (x / step).round().clamp(lowest, lowest + span)
                        best = min(best, float((a * (x - (d * step).bfloat16().double()) ** 2).sum()))
            total += best
    return total


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_dequantize_is_bit_for_bit_what_compressed_tensors_reads_back(scheme: Scheme) -> None:
    w = draw(1, 6, 256, kind="heavy")
    quantized = quantize(w, scheme, importance=skewed(2, 256))
    strategy = "channel" if scheme.group is None else "group"
    args = QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric, strategy=strategy, group_size=scheme.group
    )
    stock = stock_dequantize(quantized.q, quantized.scale, quantized.zero, args=args)
    assert stock.dtype == torch.bfloat16
    assert torch.equal(stock.view(torch.int16), dequantize(quantized).view(torch.int16))


@settings(max_examples=30, deadline=None)
@given(
    scheme=schemes,
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "heavy"]),
    magnitude=st.sampled_from([1e-30, 1e-8, 0.02, 1.0, 1e8, 1e30]),
    shift=st.sampled_from([0.0, 0.5, 3.0]),
    weighted=st.booleans(),
)
def test_the_search_is_never_worse_than_rounding_to_nearest(
    scheme: Scheme, seed: int, kind: str, magnitude: float, shift: float, weighted: bool
) -> None:
    w = (draw(seed, 3, 256, kind=kind) + shift) * magnitude
    importance = skewed(seed, 256) if weighted else None
    found = quantize(w, scheme, importance=importance)
    plain = quantize(w, scheme, importance=importance, search=False)
    half = 2 ** (scheme.bits - 1)
    for quantized in (found, plain):
        assert quantized.q.dtype == torch.int8 and quantized.scale.dtype == torch.bfloat16
        assert -half <= int(quantized.q.min()) and int(quantized.q.max()) < half
        assert quantized.scale.isfinite().all() and (quantized.scale != 0).all()
        assert (quantized.zero is None) == scheme.symmetric
        if quantized.zero is not None:
            assert -half <= int(quantized.zero.min()) and int(quantized.zero.max()) < half
        assert dequantize(quantized).isfinite().all()
    assert (exact_error(w, found, importance) <= exact_error(w, plain, importance) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    [
        (Scheme(bits=2, group=64), 0.01),
        (Scheme(bits=3, group=128), 0.01),
        (Scheme(bits=4, group=128), 0.01),
        (Scheme(bits=4, group=128, symmetric=False), 0.01),
        (Scheme(bits=2, group=64, symmetric=False), 0.015),
        (Scheme(bits=6, group=128), 0.015),
        (Scheme(bits=8, group=None), 0.02),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_search_is_near_a_dense_one(scheme: Scheme, tolerance: float) -> None:
    w, importance = draw(3, 6, 256), torch.rand(256, generator=torch.Generator().manual_seed(4)) + 0.2
    found = exact_error(w, quantize(w, scheme, importance=importance), importance).sum()
    assert found <= least_error(w, scheme, importance) * (1 + tolerance)


@settings(max_examples=15, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 10**6))
def test_rows_do_not_know_of_each_other(scheme: Scheme, seed: int) -> None:
    w = draw(seed, 7, 128)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    whole, shuffled = (quantize(x, scheme, search=False) for x in (w, w[order]))
    assert torch.equal(whole.q[order], shuffled.q) and torch.equal(whole.scale[order], shuffled.scale)
    # Searched: torch adds the columns at a vector's end in another order, and candidates may all but tie.
    errors, moved = exact_error(w, quantize(w, scheme)), exact_error(w[order], quantize(w[order], scheme))
    torch.testing.assert_close(errors[order], moved, rtol=0.05, atol=0)


@settings(max_examples=15, deadline=None)
@given(scheme=st.sampled_from([s for s in SCHEMES if s.symmetric]), seed=st.integers(0, 10**6))
def test_a_weight_and_its_negative_come_out_equally_well(scheme: Scheme, seed: int) -> None:
    w = draw(seed, 3, 128)
    torch.testing.assert_close(
        exact_error(w, quantize(w, scheme)), exact_error(-w, quantize(-w, scheme)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_blocks_do_not_change_what_is_read_back(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w = draw(5, 10, 128)
    made = quantize(w, scheme, search=False)
    whole, errors = dequantize(made), quantize_error(w, made)
    monkeypatch.setattr(room, "WORKSPACE_NBYTES", 3 * 128 * 4 * 7)
    assert [block.stop for block in room._blocks(10, 128)] == [3, 6, 9, 10]
    assert torch.equal(dequantize(made), whole)
    assert torch.equal(quantize_error(w, made), errors)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_fake_tensors_run_the_same_lines(scheme: Scheme, weighted: bool) -> None:
    real = quantize(draw(6, 5, 128), scheme)
    with FakeTensorMode():
        w, importance = torch.empty(5, 128, dtype=torch.bfloat16), torch.empty(128) if weighted else None
        fake = quantize(w, scheme, importance=importance)
        assert quantize_error(w, fake, importance=importance).shape == (5,)
        assert dequantize(fake).shape == (5, 128)
    for name in ("q", "scale", "zero"):
        left, right = getattr(real, name), getattr(fake, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.shape == right.shape and left.dtype == right.dtype


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("value", [0.0, 0.37, -1.5, 1e-35, 1e30])
def test_constant_rows_are_kept(scheme: Scheme, value: float) -> None:
    w = torch.full((2, 128), value)
    found = dequantize(quantize(w, scheme)).float()
    assert ((found - w).abs() <= abs(value) * 2**-7 + 1e-33).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_columns_without_importance_give_way(scheme: Scheme) -> None:
    w = draw(7, 4, 128)
    w[:, ::8] *= 50
    importance = torch.ones(128)
    importance[::8] = 0
    plain = exact_error(w, quantize(w, scheme, search=False), importance).sum()
    found = quantize(w, scheme, importance=importance)
    assert exact_error(w, found, importance).sum() < 0.2 * plain
    assert torch.equal(quantize(w, scheme, importance=torch.zeros(128)).q, quantize(w, scheme).q)


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    quantize(draw(14, 2, 64), Scheme(bits=4, group=32))
    assert torch.get_num_threads() == before


def test_the_workspace_is_bounded() -> None:
    w, scheme = torch.zeros(4096, 512, dtype=torch.bfloat16), Scheme(bits=2, group=32, symmetric=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = quantize(w, scheme, importance=torch.ones(512))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert found.zero is not None
    results = sum(t.nbytes for t in (found.q, found.scale, found.zero))
    assert room.WORKSPACE_NBYTES / 2 < max(alive) - results <= room.WORKSPACE_NBYTES


def test_only_the_proportions_of_importances_count() -> None:
    w, importance, scheme = draw(8, 4, 128), skewed(8, 128), Scheme(bits=3, group=64)
    expected = quantize(w, scheme, importance=importance)
    for factor in (2.0**-100, 2.0**100):
        found = quantize(w, scheme, importance=importance * factor)
        assert torch.equal(found.q, expected.q) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_the_error_is_the_exact_one(scheme: Scheme) -> None:
    w, importance = draw(9, 4, 128).bfloat16(), skewed(9, 128)
    found = quantize(w, scheme, importance=importance)
    before = w.clone()
    for a in (None, importance):
        torch.testing.assert_close(
            quantize_error(w, found, importance=a).double(), exact_error(w, found, a), rtol=1e-5, atol=1e-12
        )
    assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    w = draw(10, 3, 64)
    w[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(w, Scheme(bits=4, group=32))


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
def test_importances_that_are_no_weights_are_refused(bad: float) -> None:
    importance = torch.ones(64)
    importance[3] = bad
    with pytest.raises(ValueError, match="importance must be"):
        quantize(draw(11, 3, 64), Scheme(bits=4, group=32), importance=importance)


def test_shapes_that_the_scheme_cannot_store_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the group 128"):
        quantize(draw(12, 3, 64), Scheme(bits=4, group=128))
    with pytest.raises(ValueError, match="shape"):
        quantize(torch.ones(2, 3, 64), Scheme(bits=4, group=32))
    with pytest.raises(ValueError, match="64 inputs"):
        quantize(draw(12, 3, 64), Scheme(bits=4, group=32), importance=torch.ones(63))


def test_the_technique_is_the_function() -> None:
    w, technique = draw(13, 3, 64), Quantize(scheme=Scheme(bits=4, group=32))
    assert technique.why_not((3, 64)) is None and technique.why_not((3, 48)) is not None
    assert torch.equal(technique.apply(w).q, quantize(w, technique.scheme).q)
    plain = Quantize(scheme=technique.scheme, search=False).apply(w)
    assert torch.equal(plain.q, quantize(w, technique.scheme, search=False).q)
