"""Keys or values of one layer in 8, 4 or 2 bits, but for the first few tokens and the most recent ones.

Keys have channels that are large in every token, so their scales are a channel's over a group of tokens; values
have not, so theirs are a token's over a group of channels (KIVI, Liu et al. 2024). The first tokens, which attention
falls back on, and the recent ones, which it reads most, stay as they came (KVQuant, Hooper et al. 2024).

B batch, H key-value heads, T tokens, D head width, b bits, G `GROUP`, g channels of a group of values.
"""

from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor

from memfit.errors import UsageError

GROUP: Final = 64
"""Tokens whose keys share scales, and that leave the recent window together."""
RECENT: Final = 32
"""Tokens that are kept whole at least; up to `GROUP` − 1 more wait until their group is full."""
FIRST: Final = 4
"""Tokens at the start that stay whole."""
CHANNELS: Final = 128
"""The most channels of a value that share a scale: with half as many, scaling them takes twice the time."""
BLOCK_NBYTES: Final = 4 * 2**20
"""Largest float32 transient of quantising."""

Axis = Literal["channel", "token"]

_SHARES: Final[dict[int, tuple[float, ...]]] = {2: (1.0, 0.9, 0.8, 0.7)}
"""Shares of a group's range that are tried; the one of least squared error is taken. With four levels a narrower range
halves the divergence; with more it gains nothing."""


class PackedStates:
    """Keys (`axis` channel) or values (`axis` token) [B, H, T, D].

    x̂ = u · scale + minimum with u in 0..2^b − 1, so |x − x̂| ≤ scale/2 and what bf16 rounds, at 2 bits for what is
    within the range. Of T tokens, the first F = `FIRST` are whole, n = ⌊(T − F − `RECENT`)/G⌋ groups of G are in
    `codes`, and the rest is whole: a function of T, however the tokens came.

    Attributes:
        codes: uint8 [B, H, n·G, D·b/8]. A byte holds, from the low bits up, the values j, j + D·b/8, j + 2·D·b/8, ...
            of the head. None before the first group.
        scales: bf16 scale and minimum, [B, H, n, 2, D] by channel, [B, H, n·G, 2, D/g] by token.
        whole: the first tokens and the recent ones, [B, H, F + r, D], in the type that came in.
        length: T.
        window: how many of the last tokens are kept, with what is left of their groups; 0: all.
        dropped: groups that have left the window.
    """

    codes: Tensor | None
    scales: Tensor | None
    whole: Tensor

    def __init__(self, states: Tensor, bits: int, *, axis: Axis, window: int = 0) -> None:
        width = int(states.shape[-1])
        if width % (8 // bits):
            raise UsageError(f"heads of {width} do not fill whole bytes at {bits} bits; use more kv_bits")
        if 0 < window <= least_window():
            raise ValueError(f"a window of {window} tokens has no packed form; the least is {least_window() + 1}")
        self.bits, self.axis, self.window, self.dtype = bits, axis, window, states.dtype
        self.length = self.dropped = 0
        self.codes = self.scales = None
        self.whole = states[:, :, :0]
        self.append(states)

    @property
    def seen(self) -> int:
        """How many tokens the next ones look back at."""
        return min(self.length, self.window) if self.window else self.length

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("codes", "scales", "whole"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def extended(self, states: Tensor) -> Tensor:
        """[B, H, seen + t, D]: what is seen and `states` [B, H, t, D] as they are; then they are put behind it."""
        dense = self.dense(states)
        self.append(states)
        return dense

    def dense(self, states: Tensor | None = None) -> Tensor:
        """[B, H, seen, D] in the type that came in, and `states` behind; transients of a byte for eight / b values."""
        if self.codes is None:
            return self.whole if states is None else torch.cat([self.whole, states], dim=-2)
        first, packed = self._first(self.length), self.codes.shape[-2]
        stored = packed + self.whole.shape[-2]
        more = 0 if states is None else int(states.shape[-2])
        batch, heads, _, width = self.whole.shape
        out = self.whole.new_empty(batch, heads, stored + more, width)
        _unpack(self.codes, self.bits, out[:, :, first : first + packed])
        self._rescale(out[:, :, first : first + packed])
        if first:
            out[:, :, :first].copy_(self.whole[:, :, :first])
        out[:, :, first + packed : stored].copy_(self.whole[:, :, first:])
        if states is not None:
            out[:, :, stored:].copy_(states)
        return out[:, :, stored - self.seen :]

    def append(self, states: Tensor) -> None:
        """Put `states` [B, H, t, D] behind what is there, and quantise the groups that are full and not recent."""
        length = self.length + int(states.shape[-2])
        had, had_dropped = self._groups_of(self.codes) + self.dropped, self.dropped
        groups, dropped = max(had, self._groups(length)), self._dropped(length)
        first = FIRST if self._first(length) else 0
        if groups > had or dropped > had_dropped:
            self._requantise(states, had, groups, dropped)
        if groups > had or self._first(self.length) > first:
            parts = [*self._span(states, 0, first), *self._span(states, FIRST + groups * GROUP, length, had)]
        else:
            parts = [self.whole, states]
        parts = [part for part in parts if part.shape[-2]]
        alone = len(parts) == 1  # a copy: a view would keep all that it is a view of
        self.whole = parts[0].clone(memory_format=torch.contiguous_format) if alone else torch.cat(parts, dim=-2)
        self.length, self.dropped = length, dropped

    def drop_last(self, tokens: int) -> None:
        """Drop the last `tokens`. Of a group that is cut, what is left is whole again, with the error it has."""
        keep = self.length - tokens
        if self.dropped or keep < 0 or (self.window and self.length > self.window):
            raise ValueError(f"{tokens} of {self.length} tokens cannot be taken back")
        whole = self.whole.shape[-2]
        recent = whole - min(FIRST, whole)
        groups = min(self._groups_of(self.codes), max(0, (keep - FIRST) // GROUP))
        if tokens <= recent or self.codes is None:
            self.whole = self.whole[:, :, : whole - tokens].clone()
        else:
            dense, at = self.dense(), FIRST + groups * GROUP
            self.whole = torch.cat([dense[:, :, : min(FIRST, keep)], dense[:, :, at:keep]], dim=-2)
            del dense
            self.codes, self.scales = self._kept(0, groups)
        self.length = keep

    def change(self, change: Any) -> None:
        """Put `change(tensor)` in the place of every tensor; for what selects or repeats the batch."""
        for name, tensor in list(self.tensors()):
            setattr(self, name, change(tensor))

    # -- which tokens are where --------------------------------------------------------------------

    def _groups(self, length: int) -> int:
        """Groups quantised after `length` tokens, those dropped again among them."""
        return max(0, (length - FIRST - RECENT) // GROUP)

    def _dropped(self, length: int) -> int:
        return max(0, (length - self.window - FIRST) // GROUP) if self.window else 0

    def _first(self, length: int) -> int:
        """How many of the first tokens are kept after `length`: none once the window has left them behind."""
        return min(FIRST, length) if not self.window or length - self.window < FIRST else 0

    def _groups_of(self, codes: Tensor | None) -> int:
        return 0 if codes is None else int(codes.shape[-2]) // GROUP

    def layout(self, length: int) -> tuple[int, int, int]:
        """What changes by leaps as tokens come: between two leaps, all that is kept only grows."""
        return self._groups(length), self._dropped(length), self._first(length)

    def _span(self, states: Tensor, start: int, stop: int, groups: int = 0) -> list[Tensor]:
        """Tokens `start` to `stop` of all, views of what is whole (behind `groups` groups) and of the new states."""
        first = self._first(self.length)
        behind = start >= FIRST
        offset = FIRST + groups * GROUP - first if behind else 0  # of the token that stands at whole[0]
        split = min(stop, self.length)
        parts = []
        if start < split:
            parts.append(self.whole[:, :, start - offset : split - offset])
        if stop > self.length:
            parts.append(states[:, :, max(start - self.length, 0) : stop - self.length])
        return parts

    # -- quantising --------------------------------------------------------------------------------

    def _kept(self, start: int, stop: int) -> tuple[Tensor | None, Tensor | None]:
        """Copies of codes and scales of the groups `start` to `stop` of those that are there."""
        if self.codes is None or self.scales is None or start >= stop:
            return None, None
        per = 1 if self.axis == "channel" else GROUP
        return (
            self.codes[:, :, start * GROUP : stop * GROUP].clone(),
            self.scales[:, :, start * per : stop * per].clone(),
        )

    def _requantise(self, states: Tensor, had: int, groups: int, dropped: int) -> None:
        """Codes and scales of the groups `dropped` to `groups`, of which those before `had` are there already."""
        batch, heads, _, width = states.shape
        count, per = groups - dropped, 1 if self.axis == "channel" else GROUP
        channels = width if self.axis == "channel" else width // channels_of(width)
        codes = self.whole.new_empty(batch, heads, count * GROUP, width * self.bits // 8, dtype=torch.uint8)
        scales = self.whole.new_empty(batch, heads, count * per, 2, channels, dtype=torch.bfloat16)
        keep = max(0, had - dropped)
        if keep and self.codes is not None and self.scales is not None:
            gone = dropped - self.dropped
            codes[:, :, : keep * GROUP].copy_(self.codes[:, :, gone * GROUP :])
            scales[:, :, : keep * per].copy_(self.scales[:, :, gone * per :])
        step = max(BLOCK_NBYTES // (batch * heads * width * 4 * GROUP), 1)
        for start in range(dropped + keep, groups, step):
            stop = min(start + step, groups)
            parts = self._span(states, FIRST + start * GROUP, FIRST + stop * GROUP, had)
            x = (torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]).to(torch.float32, copy=True)
            del parts
            at, until = start - dropped, stop - dropped
            dim = -2 if self.axis == "channel" else -1
            u, scale, minimum = _round(self._grouped(x), dim, self.bits)
            del x
            scales[:, :, at * per : until * per, 0].copy_(scale.squeeze(dim))
            scales[:, :, at * per : until * per, 1].copy_(minimum.squeeze(dim))
            _pack(u.view(batch, heads, -1, width), self.bits, codes[:, :, at * GROUP : until * GROUP])
            del u, scale, minimum
        self.codes, self.scales = codes, scales

    def _grouped(self, states: Tensor) -> Tensor:
        """[B, H, n·G, D] → [B, H, n, G, D] by channel, [B, H, n·G, D/g, g] by token."""
        if self.axis == "channel":
            return torch.unflatten(states, 2, (-1, GROUP))
        return torch.unflatten(states, 3, (-1, channels_of(states.shape[-1])))

    def _rescale(self, u: Tensor) -> None:
        """u [B, H, n·G, D] → x̂, in place."""
        assert self.scales is not None
        scales = self.scales if self.scales.dtype == u.dtype else self.scales.to(u.dtype)
        grouped = self._grouped(u)
        if self.axis == "channel":
            scale, minimum = (scales[:, :, :, i].unsqueeze(3) for i in (0, 1))
            torch.addcmul(minimum, grouped, scale, out=grouped)
        else:  # one pass for both is slower here: it does not take a whole row's scale at once
            grouped.mul_(scales[:, :, :, 0].unsqueeze(4)).add_(scales[:, :, :, 1].unsqueeze(4))


def least_window() -> int:
    """A sliding window of so many tokens, or fewer, is whole all the time."""
    return FIRST + RECENT + GROUP


def channels_of(width: int) -> int:
    """g: the most channels, up to `CHANNELS`, that divide a head of `width`; the head where they would be few."""
    most = next(g for g in range(min(CHANNELS, width), 0, -1) if width % g == 0)
    return most if most >= CHANNELS // 4 else width


def _round(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """u uint8, and bf16 scale and minimum over `dim`, which stays with one entry; `x` (float32) is used up."""
    levels = 2**bits - 1
    low, high = x.amin(dim=dim, keepdim=True), x.amax(dim=dim, keepdim=True)
    shares = _SHARES.get(bits, (1.0,))
    scale, minimum = _step(low, high, shares[0], levels)
    if len(shares) > 1:
        least = _squared_error(x, scale, minimum, dim, levels)
        for share in shares[1:]:
            other = _step(low, high, share, levels)
            error = _squared_error(x, *other, dim, levels)
            better = error < least
            scale, minimum = torch.where(better, other[0], scale), torch.where(better, other[1], minimum)
            least = torch.minimum(error, least)
            del other, error, better
        del least
    del low, high
    x.sub_(minimum).div_(scale).round_().clamp_(0, levels)
    return x.to(torch.uint8), scale.to(torch.bfloat16), minimum.to(torch.bfloat16)


def _step(low: Tensor, high: Tensor, share: float, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum of `share` of a range, around its middle: float32 that bf16 holds exactly.

    bf16 rounds the minimum and the scale by up to 2^−8 of what they are: the range is wider by as much, or the largest
    value would be clipped.
    """
    inset = (high - low).mul_((1 - share) / 2)
    minimum = low + inset
    minimum = minimum.sub_(minimum.abs().mul_(2**-8)).to(torch.bfloat16).to(torch.float32)
    scale = (high - inset).sub_(minimum).mul_((1 + 2**-7) / levels).clamp_(min=2**-60)
    return scale.to(torch.bfloat16).to(torch.float32), minimum


def _squared_error(x: Tensor, scale: Tensor, minimum: Tensor, dim: int, levels: int) -> Tensor:
    """Σ (x − x̂)² over `dim`."""
    rounded = (x - minimum).div_(scale).round_().clamp_(0, levels).mul_(scale).add_(minimum)
    return rounded.sub_(x).square_().sum(dim=dim, keepdim=True)


def _pack(u: Tensor, bits: int, out: Tensor) -> None:
    """u uint8 [..., D] → `out` uint8 [..., D·b/8]."""
    length = out.shape[-1]
    out.copy_(u[..., :length])
    for i in range(1, 8 // bits):
        out.bitwise_or_(u[..., i * length : (i + 1) * length].bitwise_left_shift_(i * bits))


def _unpack(codes: Tensor, bits: int, out: Tensor) -> None:
    """`codes` uint8 [..., D·b/8] → u in `out` [..., D]."""
    segments, length = 8 // bits, codes.shape[-1]
    if segments == 1:
        out.copy_(codes)
        return
    part = torch.bitwise_and(codes, 2**bits - 1)
    out[..., :length].copy_(part)
    for i in range(1, segments):
        torch.bitwise_right_shift(codes, i * bits, out=part)
        if i < segments - 1:
            part.bitwise_and_(2**bits - 1)
        out[..., i * length : (i + 1) * length].copy_(part)
