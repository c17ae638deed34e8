"""Where CUDA takes other kernels than the CPU: attention and dropout, on fake tensors, which are on the CPU.

Attention: after aten/native/transformers/cuda/sdp_utils.cpp and attention.cu of torch 2.11, for a Hopper GPU with
cuDNN 9: 16 bits go to cuDNN, a single query to flash attention, fp32 and masks that learn to the memory-efficient
kernel, and what that cannot take, as keys shared by several heads, to plain products. Dropout (Dropout.cpp) is one
kernel, that keeps a byte for each entry.

Legend: B batch, H query heads, G key heads, T queries, S keys, D width of a head
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

aten = torch.ops.aten
HALVES: Final = (torch.float16, torch.bfloat16)
_WIDEST: Final = 256
_ALIGNED: Final = 8
_QUERIES: Final = 64
"""Queries of a block of the memory-efficient backward kernel."""
_LOCK_NBYTES: Final = 16


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Inside, what is called on fake tensors goes the way of CUDA's kernels."""
    plain, plain_dropout = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.dropout

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if not isinstance(query, FakeTensor):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not isinstance(input, FakeTensor) or not training or inplace or not 0.0 < p < 1.0:
            return plain_dropout(input, p, training, inplace)
        dropped: Tensor = torch.native_dropout(input, p, True)[0]
        return dropped

    torch.nn.functional.scaled_dot_product_attention = attention
    torch.nn.functional.dropout = dropout
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
        torch.nn.functional.dropout = plain_dropout


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
    scale: float | None, shared: bool,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled("cpu"):  # of fake tensors, which are there
        low = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(low), key.to(low), value.to(low)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(low)
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    width, half = query.shape[-1], query.dtype in HALVES
    alike = query.dim() == 4 and query.shape[1] == key.shape[1]
    plain_shape = (
        query.dim() == 4 and (alike or shared) and width == value.shape[-1]
        and width % (_ALIGNED if half else 4) == 0
    )  # fmt: skip
    found: Any
    fixed = mask is None or not (wants and mask.requires_grad)
    if plain_shape and half and fixed and width <= _WIDEST and query.shape[-2] > 1:
        bias = _bias(mask, query.dtype, pad=False)
        found = aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, wants, dropout, causal, False, scale=scale
        )
    elif plain_shape and half and width <= _WIDEST and mask is None:
        found = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, False, scale=scale)
    elif plain_shape and alike and query.dtype != torch.float64:
        bias = _bias(mask, query.dtype, pad=True)
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        found = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, wants, dropout, causal, scale=scale
        )
    else:
        found = aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=shared and not alike
        )
    out: Tensor = found[0]
    return out


def _bias(mask: Tensor | None, dtype: torch.dtype, *, pad: bool) -> Tensor | None:
    """A mask as what is added to the scores; rows of the memory-efficient kernel are padded to eight entries."""
    if mask is None:
        return None
    made = torch.where(mask, 0.0, float("-inf")).to(dtype) if mask.dtype == torch.bool else mask
    missing = -mask.shape[-1] % _ALIGNED
    if not pad or not missing:
        return made
    return torch.nn.functional.pad(made, (0, missing))[..., : mask.shape[-1]]


def _cudnn_backward(args: Any) -> int:
    """A gradient of the queries in fp32, a sum for each query, and gradients of keys that several heads share, each
    head's own (measured: cuDNN 9, H200)."""
    query, key = args[1], args[2]
    batch, heads, queries, width = query.shape
    own = 2 * batch * heads * key.shape[2] * width * query.element_size() if key.shape[1] != heads else 0
    return int(4 * batch * heads * queries * (width + 1) + own + 256)


def _efficient_backward(args: Any) -> int:
    """mem_eff_attention/kernel_backward.h: a sum for each query, and what a block of queries has added up in fp32,
    behind a lock."""
    query = args[1]
    batch, heads, queries, width = query.shape
    widest = next((w for w in (64, 128) if width <= w), 1 << max(width - 1, 1).bit_length())
    blocks = math.ceil(queries / _QUERIES)
    return int(batch * heads * (4 * queries + blocks * (4 * _QUERIES * widest + _LOCK_NBYTES)))


def _norm(args: Any) -> int:
    """Over anything but the last dimension: twice the tensor in fp32 (measured)."""
    tensor, dims = args[0], args[2] if len(args) > 2 else None
    last = dims is None or any(dim % tensor.dim() == tensor.dim() - 1 for dim in dims)
    return 0 if last else 8 * int(tensor.numel()) + 8


def _safe_softmax(args: Any) -> int:
    """Which entries, and which rows, are masked out."""
    scores = args[0]
    return int(scores.numel() + scores.numel() // max(scores.shape[-1], 1) + 4)


SCRATCH: Final[dict[Any, Callable[[Any], int]]] = {
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten.linalg_vector_norm.default: _norm,
    aten._safe_softmax.default: _safe_softmax,
}
"""Bytes that a kernel takes for itself while it runs."""
