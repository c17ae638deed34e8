"""A tensor put aside between two passes: as it is, in 8 bits, on the host, or on the disk."""

import tempfile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .fake import blocks_to_run, is_fake

Store = Literal["memory", "int8", "host", "disk"]
STORES: tuple[Store, ...] = ("memory", "int8", "host", "disk")

# Legend: W values of a row's last dimension


class Kept(NamedTuple):
    """A tensor, or what it is made from again."""

    tensor: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    file: Any = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


def stash(tensor: Tensor, store: Store) -> Kept:
    """Put a tensor aside."""
    if store == "memory" or not tensor.is_floating_point():
        return Kept(tensor=tensor)
    kept = Kept(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
    if store == "int8":
        codes, scales = encode_rows(tensor)
        return kept._replace(codes=codes, scales=scales)
    if store == "host":
        return kept._replace(tensor=tensor.to("cpu", copy=True))
    if is_fake(tensor):
        return kept
    file = tempfile.TemporaryFile()  # noqa: SIM115 (it is open from the forward pass to the backward)
    file.write(memoryview(tensor.detach().contiguous().view(torch.uint8).cpu().numpy()))  # type: ignore[arg-type]
    return kept._replace(file=file)


def unstash(kept: Kept) -> Tensor:
    """The tensor again."""
    if kept.device is None:
        assert kept.tensor is not None
        return kept.tensor
    if kept.codes is not None and kept.scales is not None:
        return decode_rows(kept.codes, kept.scales, dtype=kept.dtype)
    if kept.tensor is not None:
        return kept.tensor.to(kept.device)
    tensor = torch.empty(kept.shape, dtype=kept.dtype)
    if kept.file is not None:
        kept.file.seek(0)
        kept.file.readinto(memoryview(tensor.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        kept.file.close()
    return tensor.to(kept.device)


_ROWS_AT_ONCE = 1 << 20
"""Values that are encoded at a time."""


def encode_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[.., W] -> int8 codes of the same shape and one fp32 scale a row: code = round(x · 127 / max|x|)."""
    width = tensor.shape[-1]
    flat = tensor.reshape(-1, width)
    codes = torch.empty(flat.shape, dtype=torch.int8, device=tensor.device)
    scales = torch.empty(flat.shape[0], 1, dtype=torch.float32, device=tensor.device)
    step = max(1, _ROWS_AT_ONCE // width)
    for start in blocks_to_run(range(0, flat.shape[0], step)):
        rows = flat[start : start + step].to(torch.float32, copy=True)
        scale = scales[start : start + step]
        torch.amax(rows.abs(), -1, keepdim=True, out=scale)
        scale.div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)
        codes[start : start + step].copy_(rows.div_(scale).round_())
    return codes.view(tensor.shape), scales


def decode_rows(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What `encode_rows` was given, to half a step of 1/127 of each row's largest value."""
    width = codes.shape[-1]
    flat = codes.reshape(-1, width)
    out = torch.empty(flat.shape, dtype=dtype, device=codes.device)
    step = max(1, _ROWS_AT_ONCE // width)
    for start in blocks_to_run(range(0, flat.shape[0], step)):
        rows = flat[start : start + step].to(torch.float32)
        out[start : start + step].copy_(rows.mul_(scales[start : start + step]))
    return out.view(codes.shape)
