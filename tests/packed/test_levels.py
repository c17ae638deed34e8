"""Weights whose values are no integers: held packed, run as what they stand for, in the bytes that are promised."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.errors import BrokenInput, UsageError
from memfit.packed import store as store_file
from memfit.packed.bits import pack_values
from memfit.packed.kernel import runtime_nbytes
from memfit.packed.levels import E2M1, NF4, exponents, part_of, scale_values
from memfit.packed.scheme import Scheme
from memfit.packed.store import PackedWeight

SCHEMES = [
    Scheme(bits=4, group=64, values="nf4"), Scheme(bits=4, group=None, values="nf4"),
    Scheme(bits=8, group=None, values="fp8"), Scheme(bits=8, group=32, values="fp8"),
    Scheme(bits=4, group=32, values="mxfp4"),
    *(
        Scheme(bits=bits, group=group, values="codebook", vector=vector)
        for bits, group, vector in ((2, 64, 4), (2, None, 2), (3, 128, 2), (4, None, 2))
    ),
    *(Scheme(bits=bits, group=group, values="codebook") for bits, group in ((2, 64), (3, None), (4, None), (8, 128))),
]  # fmt: skip
MX = SCHEMES[4]
SHAPES = [(192, 256), (41, 128)]
CASES = pytest.mark.parametrize(
    ("scheme", "shape"), list(itertools.product(SCHEMES, SHAPES)), ids=lambda v: getattr(v, "name", str(v))
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "WORKSPACE_NBYTES", 65536)


def draw(scheme: Scheme, shape: tuple[int, int]) -> tuple[PackedWeight, dict[str, Tensor], Tensor]:
    """A store of random codes and scales, its parts in a file, and the numbers that they stand for, float64."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randint(0, 1 << scheme.bits, shape, generator=generator)
    if scheme.values == "fp8":
        u[(u & 0x7F) == 0x7F] = 3  # NaN
    groups = scheme.groups(shape[1])
    scale = (torch.rand(shape[0], groups, generator=generator) + 0.5).bfloat16()
    table = torch.randn(scheme.codebook, generator=generator).bfloat16()
    table = table.sort().values if scheme.vector == 1 else table
    levels = {
        "nf4": torch.tensor(NF4).bfloat16(), "mxfp4": torch.tensor([*E2M1, *(-x for x in E2M1)]),
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn), "codebook": table,
    }[scheme.values].double()  # fmt: skip
    if scheme is MX:
        scale = torch.randint(120, 130, scale.shape, generator=generator).to(torch.uint8)
    numbers = 2.0 ** (scale.double() - 127) if scheme is MX else scale.double()
    if scheme.vector != 1:  # the codes of a vector are the digits of its level's place, the first the lowest
        worth = (1 << scheme.bits) ** torch.arange(scheme.vector)
        u_first = (u.view(shape[0], -1, scheme.vector) * worth).sum(-1)
    else:
        u_first = u
    dense = (levels[u_first].view(shape[0], groups, -1) * numbers[..., None]).view(shape)
    q = (u - (1 << (scheme.bits - 1))).to(torch.int8)
    own = table if scheme.values == "codebook" else None
    parts = {"w.weight_packed": pack_values(q, scheme.bits), "w.weight_scale": scale, "w.weight_codebook": table}
    return PackedWeight.from_quantized(q, scale, None, scheme, table=own), parts, dense


@CASES
def test_rows_are_what_their_codes_stand_for(scheme: Scheme, shape: tuple[int, int]) -> None:
    store, _, dense = draw(scheme, shape)
    assert torch.equal(store.dense_rows(0, shape[0]), dense.bfloat16())
    assert torch.equal(store.dense_rows(3, 37), dense.bfloat16()[3:37])
    index = torch.tensor([[5, 0], [5, shape[0] - 1]])
    assert torch.equal(store.rows(index), dense.bfloat16()[index])
    torch.testing.assert_close(store.dense_rows(0, 9, dtype=torch.float32).double(), dense[:9], rtol=1e-6, atol=0)


@CASES
def test_products_are_those_of_float64_both_ways(scheme: Scheme, shape: tuple[int, int]) -> None:
    store, _, dense = draw(scheme, shape)
    for rows in (1, 40):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        y = store.matmul(x)
        due = x.detach().double() @ dense.t()
        assert (y.double() - due).norm() / due.norm() < 0.005
        assert x.grad is None
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        y.backward(g)
        assert isinstance(x.grad, Tensor)
        back = g.double() @ dense
        assert (x.grad.double() - back).norm() / back.norm() < 0.005


@CASES
def test_bytes_and_what_a_file_gives(scheme: Scheme, shape: tuple[int, int]) -> None:
    store, parts, _ = draw(scheme, shape)
    assert store.nbytes == runtime_nbytes(scheme, shape)
    assert store.nbytes - scheme.nbytes(shape) == (0 if scheme.values == "codebook" else 2 << scheme.bits)

    def read_rows(name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        return parts[name][start:stop]

    for read in (parts.__getitem__, read_rows):
        loaded = PackedWeight(shape, scheme)
        loaded.load_from(read, "w")
        for mine, theirs in zip(loaded.buffers(), store.buffers(), strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))  # two of E4M3's codes are NaN
    with FakeTensorMode():
        fake = PackedWeight(shape, scheme)
        empty = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in parts.items()}
        fake.load_from(empty.__getitem__, "w")
        assert fake.nbytes == store.nbytes
        for rows in (1, 40):
            y = fake.matmul(torch.empty(2, rows, shape[1], dtype=torch.bfloat16))
            assert y.shape == (2, rows, shape[0]) and y.dtype == torch.bfloat16
        assert fake.rows(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, shape[1])


def test_every_exponent_is_the_power_of_two_that_it_says() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(scale_values(every).double(), 2.0 ** (every.double() - 127))
    assert torch.equal(exponents(scale_values(every[1:])), every[1:])


def test_levels_of_mxfp4_come_back_from_fp8() -> None:
    _, parts, dense = draw(MX, (41, 128))
    levels = (dense.view(41, 4, 32) / scale_values(parts["w.weight_scale"]).double()[..., None]).view(41, 128)
    # −0 and 0 are two codes of one level.
    assert torch.equal(part_of("weight_packed", levels.to(torch.float8_e4m3fn), MX), parts["w.weight_packed"])
    scale = scale_values(parts["w.weight_scale"])
    assert torch.equal(part_of("weight_scale", scale, MX), parts["w.weight_scale"])
    octets = parts["w.weight_packed"].view(torch.uint8)
    assert torch.equal(part_of("weight_packed", octets, MX), parts["w.weight_packed"])


@pytest.mark.parametrize(("part", "stored", "told"), [
    ("weight_packed", torch.tensor([[0.5, 1.25]]).repeat(1, 16).to(torch.float8_e4m3fn), "none of E2M1's levels"),
    ("weight_scale", torch.tensor([[127, 255]], dtype=torch.uint8), "E8M0's NaN"),
    ("weight_scale", torch.tensor([[0.5, 0.75]]).bfloat16(), "no power of two"),
    ("weight_scale", torch.tensor([[0.5, -0.5]]).bfloat16(), "no power of two"),
])  # fmt: skip
def test_what_mxfp4_has_no_code_for_is_refused(part: str, stored: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        part_of(part, stored, MX)


def test_parts_of_another_kind_are_refused() -> None:
    store, parts, _ = draw(MX, (41, 128))
    with pytest.raises(BrokenInput, match=r"w.weight_scale: torch.bfloat16 where torch.uint8"):
        store.load_from((parts | {"w.weight_scale": torch.ones(41, 4).bfloat16()}).__getitem__, "w")
    scheme = SCHEMES[-1]
    store, parts, _ = draw(scheme, (41, 128))
    with pytest.raises(BrokenInput, match=r"w.weight_codebook: shape \[16\] where \[256\]"):
        store.load_from((parts | {"w.weight_codebook": torch.ones(16).bfloat16()}).__getitem__, "w")
    with pytest.raises(UsageError, match="a table of levels comes with a codebook"):
        store.fill(torch.zeros(41, 128, dtype=torch.int8), parts["w.weight_scale"])
