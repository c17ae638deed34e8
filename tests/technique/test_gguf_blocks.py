"""Blocks hold what was meant, bit for bit, and err less than the plain way of llama.cpp.

The plain way is ggml-quants.c's `make_qx_quants`, `make_qkx3_quants` and `make_qp_quants`, in float64.
"""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.errors import UsageError
from memfit.technique import gguf_blocks
from memfit.technique.gguf_blocks import KINDS, encode
from memfit.technique.gguf_layout import Fields, Kind

Numbers = np.ndarray


def decoded(packed: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def error(weight: torch.Tensor, values: torch.Tensor, h: torch.Tensor | None) -> float:
    weighed = (weight.double() - values.double()).square() * (1.0 if h is None else h.double())
    return float(weighed.sum())


def drawn(seed: int, tail: float, size: float, *, rows: int = 3, columns: int = 512) -> torch.Tensor:
    """Weights of a normal distribution, raised to a power that gives them tails."""
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return numbers.sign() * numbers.abs() ** tail * size


def importances(seed: int, spread: float, columns: int = 512) -> torch.Tensor:
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(seed + 1)) * spread)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**30), name=st.sampled_from(sorted(KINDS)))
def test_bytes_hold_every_number_that_a_kind_can_say(seed: int, name: str) -> None:
    kind, generator = KINDS[name], torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (5, count), generator=generator, dtype=torch.int32)

    minima = numbers(*kind.scales, kind.parts)
    fields = Fields(
        kind=kind,
        q=numbers(kind.low, kind.high, kind.block),
        k=numbers(*kind.scales, kind.parts),
        m=minima if kind.affine else torch.zeros_like(minima),
        d=torch.randn(5, generator=generator).half(),
        dmin=torch.randn(5, generator=generator).half(),
    )
    packed = fields.packed()
    assert packed.shape == (5, kind.nbytes)
    assert torch.equal(decoded(packed, name), fields.values())


@pytest.mark.parametrize("name", sorted(KINDS))
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**30), tail=st.floats(0.3, 3.0), size=st.sampled_from([1e-7, 1e-4, 0.02, 1.0, 300.0]),
    spread=st.floats(0.0, 4.0),
)  # fmt: skip
def test_what_is_read_is_what_was_meant(name: str, seed: int, tail: float, size: float, spread: float) -> None:
    weight = drawn(seed, tail, size).clamp(-65000, 65000)
    meant = torch.empty_like(weight)
    packed = encode(weight, name, importance=importances(seed, spread), meant=meant)
    assert packed.shape == (3, KINDS[name].row_nbytes(512))
    read = decoded(packed, name)
    assert torch.equal(read, meant)
    assert error(weight, read, None) <= error(weight, torch.zeros(1), None) * 1.0001 or spread


@pytest.mark.parametrize("name", sorted(KINDS))
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**30), tail=st.floats(0.5, 2.0), size=st.sampled_from([1e-3, 0.02, 1.0]),
    spread=st.floats(0.0, 3.0),
)  # fmt: skip
def test_it_errs_less_than_the_plain_way(name: str, seed: int, tail: float, size: float, spread: float) -> None:
    weight, h = drawn(seed, tail, size), importances(seed, spread)
    ours = error(weight, decoded(encode(weight, name, importance=h), name), h)
    # At few bits the search gives up some of this error for the weights' magnitude: of three rows it can come out above
    # by less than a thousandth, as Q3_K did once in a hundred draws.
    assert ours <= 1.005 * error(weight, plainly(weight, h, KINDS[name]), h)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_over_many_rows_it_errs_less_than_the_plain_way(name: str) -> None:
    ours = plain = 0.0
    for seed in range(6):
        weight, h = drawn(seed, 0.5 + seed / 4, 0.02, rows=32), importances(seed, seed / 2)
        total = error(weight, torch.zeros(1), h)
        ours += float(error(weight, decoded(encode(weight, name, importance=h), name), h) / total)
        plain += float(error(weight, plainly(weight, h, KINDS[name]), h) / total)
    assert ours < plain


@pytest.mark.parametrize("name", sorted(KINDS))
def test_zeros_stay_zeros_and_constants_constants(name: str) -> None:
    assert not decoded(encode(torch.zeros(2, 256), name), name).any()
    for value in (1.0, -1.0, 0.37, -3e-3):
        weight = torch.full((2, 256), value)
        assert torch.allclose(decoded(encode(weight, name), name), weight, rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q4_0"])
def test_magnitudes_are_kept(name: str) -> None:
    weight = drawn(11, 1.0, 0.05, rows=64)
    along = float((weight * decoded(encode(weight, name), name)).sum() / weight.square().sum())
    lost = error(weight, decoded(encode(weight, name), name), None) / float(weight.square().sum())
    # Weights of the least error would be smaller by what they err.
    assert 1 - 0.7 * lost < along < 1


@pytest.mark.parametrize("name", sorted(KINDS))
def test_one_large_weight_among_zeros(name: str) -> None:
    weight = torch.zeros(1, 256)
    weight[0, 77] = 2.0
    assert torch.allclose(decoded(encode(weight, name), name), weight, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_fp16s_ends_are_held(name: str) -> None:
    weight = drawn(1, 1.0, 1.0, columns=256)
    large = weight / weight.abs().max() * 65504
    got = decoded(encode(large, name), name)
    assert got.isfinite().all() and error(large, got, None) < 0.2 * error(large, torch.zeros(1), None)
    tiny = weight * 1e-7  # d below the smallest number of fp16
    got = decoded(encode(tiny, name), name)
    assert error(tiny, got, None) <= error(tiny, torch.zeros(1), None)
    for size in (1e-14, 1e-30, 1e-40):
        assert not decoded(encode(weight * size, name), name).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e5])
def test_what_fp16_cannot_hold_is_refused(bad: float) -> None:
    weight = torch.zeros(2, 256)
    weight[1, 3] = bad
    with pytest.raises(UsageError, match="Q4_K"):
        encode(weight, "Q4_K")


def test_shapes_kinds_and_importances_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="multiples of 256"):
        encode(torch.zeros(2, 320), "Q6_K")
    assert encode(torch.zeros(2, 320), "Q8_0").shape == (2, 340)
    with pytest.raises(UsageError, match="'IQ1_S'"):
        encode(torch.zeros(2, 256), "IQ1_S")
    for wrong in (torch.ones(255), torch.full((256,), float("nan")), -torch.ones(256)):
        with pytest.raises(UsageError, match="importance"):
            encode(torch.zeros(2, 256), "Q4_K", importance=wrong)


def test_columns_that_nothing_reads_are_still_sensible() -> None:
    weight = drawn(5, 1.0, 0.1)
    h = torch.zeros(512)
    assert torch.equal(encode(weight, "Q4_K", importance=h), encode(weight, "Q4_K"))
    h[:40] = 1.0
    read = decoded(encode(weight, "Q4_K", importance=h), "Q4_K")
    assert error(weight, read, None) < 0.05 * error(weight, torch.zeros(1), None)


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "Q4_0"])
def test_tiles_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(9, 1.2, 0.1, rows=5, columns=1024)
    h = importances(9, 1.0, columns=1024)
    whole = encode(weight, name, importance=h)
    monkeypatch.setattr(gguf_blocks, "TILE", 2 * 256)
    monkeypatch.setattr(gguf_blocks, "_ROWS", 2)
    cut = encode(weight, name, importance=h)
    # Sums of other lengths of vectors may round otherwise, and near ties fall the other way.
    assert (decoded(cut, name) != decoded(whole, name)).float().mean() < 0.01
    assert error(weight, decoded(cut, name), h) == pytest.approx(error(weight, decoded(whole, name), h), rel=1e-3)


def test_bf16_weights_are_taken() -> None:
    weight = drawn(3, 1.0, 0.1).bfloat16()
    assert torch.equal(encode(weight, "Q5_K"), encode(weight.float(), "Q5_K"))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_dry_run_gives_the_shape(name: str) -> None:
    with FakeTensorMode():
        packed = encode(torch.empty(300, 1024), name, importance=torch.ones(1024))
    assert packed.shape == (300, KINDS[name].row_nbytes(1024))


# The plain way.


def plainly(weight: torch.Tensor, h: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The weights that llama.cpp's own encoder would store, block by block."""
    w, a = weight.double().numpy(), h.double().numpy()
    out = np.zeros_like(w)
    for row in range(w.shape[0]):
        for at in range(0, w.shape[1], kind.block):
            here = slice(at, at + kind.block)
            x = w[row, here].reshape(kind.parts, kind.width)
            spread = (x**2).mean() if not kind.flat else (w[row] ** 2).mean()
            qw = a[here].reshape(x.shape)
            # ggml weighs large weights more; Q6_K takes the importances as they are.
            emphasis = qw if kind.name == "Q6_K" else qw * np.sqrt(spread * (2 if kind.flat else 1) + x**2)
            out[row, here] = (plain_affine if kind.affine else plain_symmetric)(x, emphasis, kind).reshape(-1)
    return torch.from_numpy(out)


def half(value: float | Numbers) -> Numbers:
    return np.float16(value).astype(np.float64)


def plain_symmetric(x: Numbers, h: Numbers, kind: Kind) -> Numbers:
    if kind.name == "Q8_0":
        d = np.abs(x).max() / 127
        return half(d) * np.round(x / d)
    found = [qx(part, weigh, -kind.low) for part, weigh in zip(x, h, strict=True)]
    if kind.flat:
        return half(found[0][0]) * found[0][1]
    scales = np.array([scale for scale, _ in found])
    if kind.name == "Q6_K":
        d = half(-scales[np.abs(scales).argmax()] / 128)
        k = np.minimum(np.round(scales / d), 127) if d else scales * 0
    else:
        d, k = qx(scales, h.sum(axis=1), 32)
        d = half(d)
    step = (d * k)[:, None]
    return step * np.clip(np.round(x / np.where(step == 0, 1, step)), kind.low, kind.high)


def qx(x: Numbers, h: Numbers, nmax: int) -> tuple[float, Numbers]:
    """make_qx_quants: nineteen steps around the one that the largest magnitude asks for."""
    peak = x[np.abs(x).argmax()]
    if abs(peak) < 1e-15:
        return 0.0, x * 0
    best, scale, levels = -1.0, 0.0, x * 0
    for move in (0, *range(-9, 0), *range(1, 10)):
        q = np.clip(np.round(-(nmax + 0.1 * move) / peak * x), -nmax, nmax - 1)
        lx, l2 = (h * x * q).sum(), (h * q * q).sum()
        if l2 > 0 and lx * lx > best * l2:
            scale, levels, best = lx / l2, q, lx / l2 * lx
    return scale, levels


def plain_affine(x: Numbers, h: Numbers, kind: Kind) -> Numbers:
    found = [qkx(part, weigh, kind.high) for part, weigh in zip(x, h, strict=True)]
    if kind.flat:
        scale, low, q = found[0]
        return half(scale) * q + half(low)
    scales, minima = np.array([one[0] for one in found]), -np.array([one[1] for one in found])
    d, k = qp(scales, kind.scales[1], h.sum(axis=1))
    dmin, m = qp(minima, kind.scales[1], h.sum(axis=1))
    step, low = (half(d) * k)[:, None], (half(dmin) * m)[:, None]
    return step * np.clip(np.round((x + low) / np.where(step == 0, 1, step)), 0, kind.high) - low


def qkx(x: Numbers, h: Numbers, nmax: int) -> tuple[float, float, Numbers]:
    """make_qkx3_quants: (scale, minimum, levels) of 37 ranges."""
    low, high = min(x.min(), 0.0), x.max()
    if high <= low:
        return 0.0, low, x * 0
    scale, levels = (high - low) / nmax, np.clip(np.round(nmax / (high - low) * (x - low)), 0, nmax)
    best, minimum = (h * (scale * levels + low - x) ** 2).sum(), low
    for move in range(37):
        q = np.clip(np.round((-0.9 + 0.05 * move + nmax) / (high - low) * (x - low)), 0, nmax)
        sw, sx, sl, sl2, sxl = h.sum(), (h * x).sum(), (h * q).sum(), (h * q * q).sum(), (h * q * x).sum()
        determinant = sw * sl2 - sl * sl
        if determinant <= 0:
            continue
        this, least = (sw * sxl - sx * sl) / determinant, (sl2 * sx - sl * sxl) / determinant
        if least > 0:
            this, least = sxl / sl2, 0.0
        mad = (h * (this * q + least - x) ** 2).sum()
        if mad < best:
            best, scale, minimum, levels = mad, this, least, q
    return scale, minimum, levels


def qp(x: Numbers, nmax: int, h: Numbers) -> tuple[float, Numbers]:
    """make_qp_quants: integers for scales, changed one at a time while that helps."""
    peak = x.max()
    if peak < 1e-15:
        return 0.0, x * 0
    tries = [(0.1 * move + nmax) / peak for move in (0, -4, -3, -2, -1, 1, 2, 3, 4)]
    inverse = min(tries, key=lambda one: (h * (x - np.minimum(np.round(one * x), nmax) / one) ** 2).sum())
    q = np.minimum(np.round(inverse * x), nmax)
    lx, l2 = (h * x * q).sum(), (h * q * q).sum()
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            slx, sl2 = lx - h[i] * x[i] * q[i], l2 - h[i] * q[i] ** 2
            if slx > 0 and sl2 > 0:
                new = min(round(x[i] * sl2 / slx), nmax)
                after, square = slx + h[i] * x[i] * new, sl2 + h[i] * new**2
                if new != q[i] and after**2 * l2 > lx**2 * square:
                    q[i], lx, l2, changed = new, after, square, True
        if not changed:
            break
    return lx / l2 if l2 else 0.0, q
