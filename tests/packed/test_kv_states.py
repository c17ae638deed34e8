"""Packed keys and values: what they hold is what plain float64 arithmetic says, however the tokens came."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memfit.errors import UsageError
from memfit.packed import kv_states
from memfit.packed.kv_states import FIRST, GROUP, RECENT, PackedStates, channels_of, least_window


def draw(tokens: int, *, width: int = 32, batch: int = 2, seed: int = 0) -> Tensor:
    """Channels of very different sizes and offsets, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, 2, tokens, width, generator=generator)
    return (states * torch.linspace(0.1, 8, width) + torch.linspace(-9, 9, width)).to(torch.bfloat16)


def groups_of(x: Tensor, axis: str) -> tuple[Tensor, int]:
    """[B, H, n·G, D] in groups, and the dimension that a group's entries lie along."""
    if axis == "channel":
        return x.unflatten(2, (-1, GROUP)), -2
    return x.unflatten(3, (-1, channels_of(x.shape[-1]))), -1


def counted(tokens: int) -> int:
    return max(0, (tokens - FIRST - RECENT) // GROUP) * GROUP


def assert_same(one: PackedStates, other: PackedStates) -> None:
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        twin = vars(other)[name]
        if isinstance(value, Tensor):
            assert torch.equal(value, twin), name
            # Bytes, too: a view would keep all of a prompt.
            assert value.untyped_storage().nbytes() == twin.untyped_storage().nbytes() == value.nbytes, name
        else:
            assert value == twin, name


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_states_come_back_as_float64_rounds_them(bits, axis, monkeypatch):
    monkeypatch.setattr(kv_states, "BLOCK_NBYTES", 4096)
    tokens = 5 * GROUP + 7
    x = draw(tokens, width=128)
    packed = PackedStates(x, bits, axis=axis)
    count = counted(tokens)
    dense = packed.dense()
    assert torch.equal(dense[:, :, :FIRST], x[:, :, :FIRST])
    assert torch.equal(dense[:, :, FIRST + count :], x[:, :, FIRST + count :])
    assert packed.codes is not None and packed.codes.nbytes == 2 * 2 * count * 128 * bits // 8

    part = slice(FIRST, FIRST + count)
    exact, dim = groups_of(x[:, :, part].double(), axis)
    found, _ = groups_of(dense[:, :, part].double(), axis)
    levels = 2**bits - 1
    low, high = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    scale, minimum = (packed.scales[:, :, :, i].double().unsqueeze(dim) for i in (0, 1))
    top = minimum + levels * scale
    # Dequantising rounds the product and the sum to bf16, each by up to 2^-8 of what it is.
    rounding = 2**-8 * (levels * scale + torch.maximum(minimum.abs(), top.abs()))
    beyond = torch.maximum(minimum - exact, exact - top)
    assert bool(((found - exact).abs() <= torch.maximum(scale / 2, beyond) + rounding).all())
    if bits > 2:
        # All of the group is in the range, which is no wider than bf16's rounding of its ends asks for.
        assert bool((beyond <= 0).all())
        assert bool((top - minimum <= (high - low) * (1 + 2**-6) + 2**-6 * low.abs()).all())
    step = (high - low) / levels
    plain = ((exact - low) / step).round() * step + low
    errors = [(got - exact).square().mean(dim, keepdim=True).sqrt() for got in (found, plain)]
    assert bool((errors[0] <= errors[1] * 1.02 + rounding).all())
    if bits == 2:
        assert errors[0].square().mean() < 0.7 * errors[1].square().mean()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90) | st.sampled_from([1, 1, GROUP, 130]), min_size=1, max_size=9),
    bits=st.sampled_from([8, 4, 2]),
    axis=st.sampled_from(["channel", "token"]),
    window=st.sampled_from([0, 0, least_window() + 1, 130]),
)
def test_any_split_into_appends_gives_the_same(sizes, bits, axis, window):
    x = draw(sum(sizes), width=8, batch=1)
    whole = PackedStates(x, bits, axis=axis, window=window)
    split = PackedStates(x[:, :, : sizes[0]], bits, axis=axis, window=window)
    at = sizes[0]
    for size in sizes[1:]:
        seen, part = split.seen, x[:, :, at : at + size]
        before = split.dense()
        extended = split.extended(part)
        assert extended.shape[-2] == seen + size
        assert torch.equal(extended[:, :, :seen], before) and torch.equal(extended[:, :, seen:], part)
        at += size
    assert_same(whole, split)
    assert whole.seen == (min(at, window) if window else at)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_window_keeps_of_all_what_it_sees(bits):
    x = draw(400, width=8)
    for tokens in (3, 90, 131, 133, 134, 200, 330, 400):
        everything = PackedStates(x[:, :, :tokens], bits, axis="channel")
        window = PackedStates(x[:, :, :tokens], bits, axis="channel", window=130)
        seen = everything.dense()[:, :, -130:]
        if tokens - 130 >= FIRST or tokens <= 130:
            assert torch.equal(window.dense(), seen)
        stored = window.whole.shape[-2] + (0 if window.codes is None else window.codes.shape[-2])
        assert window.seen <= stored < 130 + GROUP + FIRST


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_constant_states_come_back(bits, axis):
    x = torch.full((1, 1, 120, 32), -2.5, dtype=torch.bfloat16)
    assert torch.allclose(PackedStates(x, bits, axis=axis).dense(), x, rtol=2**-6)
    assert not PackedStates(torch.zeros_like(x), bits, axis=axis).dense().any()


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 260), taken=st.integers(0, 260), more=st.integers(1, 150), bits=st.sampled_from([8, 2]))
def test_tokens_taken_back_leave_the_others(tokens, taken, more, bits):
    taken = min(taken, tokens)
    x = draw(tokens, width=8, batch=1)
    packed = PackedStates(x, bits, axis="token")
    before = packed.dense()
    packed.drop_last(taken)
    assert packed.length == tokens - taken
    assert torch.equal(packed.dense(), before[:, :, : tokens - taken])
    new = draw(more, width=8, batch=1, seed=1)
    packed.append(new)
    assert packed.dense().shape[-2] == tokens - taken + more
    assert torch.equal(packed.dense()[:, :, -min(more, RECENT) :], new[:, :, -min(more, RECENT) :])


def test_what_cannot_be_taken_back_or_held_is_refused():
    packed = PackedStates(draw(300, width=8), 4, axis="channel", window=130)
    with pytest.raises(ValueError, match="3 of 300 tokens cannot be taken back"):
        packed.drop_last(3)
    with pytest.raises(ValueError, match="6 of 5 tokens"):
        PackedStates(draw(5), 4, axis="channel").drop_last(6)
    with pytest.raises(ValueError, match="a window of 100 tokens has no packed form; the least is 101"):
        PackedStates(draw(5), 4, axis="channel", window=100)
    with pytest.raises(UsageError, match="heads of 5 do not fill whole bytes at 4 bits"):
        PackedStates(torch.zeros(1, 1, 1, 5), 4, axis="token")


def test_channels_that_share_a_scale_divide_the_head():
    assert [channels_of(width) for width in (8, 64, 80, 96, 256, 160, 134)] == [8, 64, 80, 96, 128, 80, 67]
