"""NF4, FP8 and MXFP4: the nearest level of the format, scales that never err more than the plain; trouble is told."""

import itertools

import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from memfit.packed.levels import E2M1, NF4, level_table, scale_values
from memfit.packed.scheme import Scheme
from memfit.technique import float_values
from memfit.technique.float_values import Grid
from memfit.technique.gptq import gptq
from memfit.technique.quantize import dequantize, quantize, quantize_error

from .test_gptq import in_turn, own_weights

NF = Scheme(bits=4, group=32, values="nf4")
FP8 = Scheme(bits=8, group=None, values="fp8")
MX = Scheme(bits=4, group=32, values="mxfp4")
CODEBOOK = Scheme(bits=3, group=None, values="codebook")
SCHEMES = [NF, FP8, MX, CODEBOOK, Scheme(bits=8, group=32, values="fp8"), Scheme(bits=2, group=64, values="codebook")]


def draw(seed: int, rows: int = 5, inputs: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    return weight, torch.rand(inputs, generator=generator) ** 4


def nearest(weight: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """The plain way, float64: each weight by its group's scale, to the nearest of all levels; of two, the lower."""
    u = weight.double().view(*scale.shape, -1) / scale.double()[..., None]
    level = levels[(u[..., None] - levels).abs().argmin(-1)]
    return (level * scale.double()[..., None]).view(weight.shape)


def levels_of(scheme: Scheme, table: Tensor | None) -> Tensor:
    """Ascending, float64."""
    if table is not None:
        return table.double()
    if scheme.values == "nf4":
        return torch.tensor(NF4).bfloat16().double()
    if scheme.values == "mxfp4":
        return torch.tensor([-level for level in E2M1[:0:-1]] + list(E2M1)).double()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return every[~every.isnan()].unique()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_values_are_the_nearest_levels_in_float64(scheme: Scheme, search: bool) -> None:
    weight, importance = draw(0)
    found = quantize(weight, scheme, importance=importance, search=search)
    plain = nearest(weight, levels_of(scheme, found.table), scale_values(found.scale))
    assert torch.equal(dequantize(found), plain.bfloat16())


@pytest.mark.parametrize("scheme", [NF, FP8, MX], ids=lambda scheme: scheme.name)
def test_the_plain_scale_is_the_formats(scheme: Scheme) -> None:
    weight, _ = draw(1)
    found = quantize(weight, scheme, search=False)
    peak = weight.view(*found.scale.shape, -1).abs().amax(-1)
    top = {"nf4": 1.0, "fp8": 448.0}
    due = 2.0 ** (peak.log2().floor() - 2) if scheme is MX else (peak / top[scheme.values]).bfloat16().float()
    assert torch.equal(scale_values(found.scale).float(), due)


@settings(max_examples=40, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), magnitude=st.sampled_from([1e-8, 0.02, 1.0, 1e8]))
def test_a_search_errs_no_more_than_the_plain_scale(scheme: Scheme, seed: int, magnitude: float) -> None:
    weight, importance = draw(seed)
    weight *= magnitude
    found = quantize(weight, scheme, importance=importance)
    plain = quantize(weight, scheme, importance=importance, search=False)
    errors = [quantize_error(weight, made, importance=importance) for made in (found, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


@pytest.mark.parametrize(("scheme", "most"), [(NF, 0.9), (MX, 0.97), (FP8, 0.97)], ids=lambda v: getattr(v, "name", ""))
def test_searched_scales_pay(scheme: Scheme, most: float) -> None:
    weight, importance = draw(2, rows=256)
    errors = [
        quantize_error(weight, quantize(weight, scheme, importance=importance, search=search), importance=importance)
        for search in (True, False)
    ]
    assert errors[0].sum() < most * errors[1].sum()


@pytest.mark.parametrize("scheme", [NF, MX], ids=lambda scheme: scheme.name)
def test_the_search_is_near_to_a_dense_one(scheme: Scheme) -> None:
    weight, importance = draw(3, rows=64)
    found = quantize(weight, scheme, importance=importance)
    levels, best = levels_of(scheme, None), torch.full(found.scale.shape, torch.inf, dtype=torch.float64)
    peak = weight.view(*found.scale.shape, -1).abs().amax(-1).double()
    steps = torch.arange(-6, 4) if scheme is MX else torch.linspace(-1.5, 0.3, 181)
    for step in steps:
        scale = 2.0 ** ((peak.log2().floor() if scheme is MX else peak.log2()) + step)
        squares = (weight - nearest(weight, levels, scale)).square() * importance
        best = torch.minimum(best, squares.view(*found.scale.shape, -1).sum(-1))
    error = quantize_error(weight, found, importance=importance).sum()
    assert error < (1.001 if scheme is MX else 1.02) * best.sum()


def test_mxfp4_rounds_as_compressed_tensors_does_but_for_ties() -> None:
    x = torch.linspace(-7, 7, 4001)
    x = x[(x.abs() * 8 % 1).abs() > 1e-3]
    grid = Grid(MX)
    assert torch.equal(grid.levels[grid.nearest(x)], cast_to_fp4(x.clone()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("what", ["zeros", "constant", "one outlier", "tiny", "subnormal"])
def test_degenerate_rows_give_what_is_nearest(scheme: Scheme, what: str) -> None:
    weight = {
        "zeros": torch.zeros(3, 64), "constant": torch.full((3, 64), 0.37),
        "one outlier": torch.full((3, 64), 1e-3).index_fill_(1, torch.tensor(5), 100.0),
        "tiny": torch.ones(3, 64) * 1e-25, "subnormal": torch.ones(3, 64) * 1e-40,
    }[what]  # fmt: skip
    read = dequantize(quantize(weight, scheme)).float()
    assert bool(read.isfinite().all())
    if what in ("constant", "tiny"):
        torch.testing.assert_close(read, weight, rtol=0.13, atol=0)
    elif what == "one outlier":
        torch.testing.assert_close(read[:, 5], weight[:, 5], rtol=0.13, atol=0)
    else:
        assert float((read - weight).abs().max()) < 1e-28


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**121])
def test_weights_that_are_no_numbers_are_refused(scheme: Scheme, bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match=r"not finite or larger than 2\^120"):
        quantize(weight, scheme)


@pytest.mark.parametrize("inputs", [31, 48, 100])
def test_widths_that_a_format_cannot_hold_are_refused_with_their_numbers(inputs: int) -> None:
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match=rf"{scheme.name} cannot store \(2, {inputs}\).*multiple"):
            quantize(torch.ones(2, inputs), scheme)


@pytest.mark.parametrize(("wrong", "told"), [
    ({"bits": 3, "values": "nf4"}, "nf4 has 4 bits, got 3"),
    ({"bits": 8, "group": 64, "values": "mxfp4"}, "mxfp4 has 4 bits, got 8"),
    ({"bits": 4, "group": 64, "values": "mxfp4"}, "mxfp4 has groups of 32, got 64"),
    ({"bits": 4, "group": None, "values": "mxfp4"}, "groups of 32, got a whole row"),
    ({"bits": 4, "values": "nf4", "symmetric": False}, "no zero points"),
])  # fmt: skip
def test_schemes_that_are_none_are_refused(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Scheme(**wrong)


def as_in_the_paper(w: Tensor, hessian: Tensor, scheme: Scheme, *, damping: float) -> Tensor:
    """ŵ by Frantar et al. 2023, algorithm 1 as first derived, to the nearest level; float64."""
    made = quantize(w, scheme, importance=own_weights(hessian, damping))
    levels, scale = levels_of(scheme, made.table), scale_values(made.scale).double()
    rest, read = w.clone(), torch.zeros_like(w)
    group = w.shape[1] // scale.shape[1]
    for (j,), inverse in in_turn(hessian, damping):
        s = scale[:, j // group]
        read[:, j] = nearest(rest[:, j : j + 1], levels, s[:, None])[:, 0].bfloat16()
        rest -= torch.outer((rest[:, j] - read[:, j]) / inverse[j, j], inverse[j])
    return read


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_gptq_takes_any_values(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(4)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, w = make(256, 128) @ (make(128, 128) / 11) * make(128).exp(), make(12, 128)
    hessian = x.t() @ x / 256
    made = gptq(w, hessian, scheme, damping=0.01, block=24)
    assert torch.equal(dequantize(made.quantized).double(), as_in_the_paper(w, hessian, scheme, damping=0.01))
    plain = w - dequantize(quantize(w, scheme, importance=hessian.diagonal().float())).double()
    assert made.error.sum() < torch.einsum("nk,kl,nl->", plain, hessian, plain)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_blocks_of_rows_give_what_the_whole_gives_and_fakes_go_the_same_way(
    monkeypatch: pytest.MonkeyPatch, scheme: Scheme
) -> None:
    weight, importance = draw(5, rows=40)
    whole = quantize(weight, scheme, importance=importance)
    monkeypatch.setattr(float_values, "WORKSPACE_NBYTES", 32 * 128 * 7)
    blocks = quantize(weight, scheme, importance=importance, table=whole.table)
    assert torch.equal(blocks.q, whole.q) and torch.equal(blocks.scale, whole.scale)
    with FakeTensorMode():
        made = quantize(torch.empty(40, 128), scheme, importance=torch.empty(128))
    for mine, real in ((made.q, whole.q), (made.scale, whole.scale), (made.table, whole.table)):
        if real is None:
            assert mine is None
        else:
            assert mine is not None and (mine.shape, mine.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("scheme", [NF, MX, CODEBOOK, FP8], ids=lambda scheme: scheme.name)
def test_temporaries_stay_within_the_workspace(scheme: Scheme) -> None:
    weight = torch.zeros(2048, 512, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = quantize(weight, scheme, importance=torch.ones(512))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    results = sum(t.nbytes for t in (found.q, found.scale, found.table) if t is not None)
    learning = 3 * 2**20 if scheme is CODEBOOK else 0  # 2^16 bins in float64, and 512 x 512 gains
    assert max(alive) - results <= float_values.WORKSPACE_NBYTES + learning


def test_levels_are_the_formats_own() -> None:
    assert level_table(MX).tolist() == [*E2M1, *(-level for level in E2M1)]
    assert level_table(FP8)[:127].equal(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16())
    with pytest.raises(ValueError, match="int4 g128 has no levels"):
        level_table(Scheme(bits=4))
