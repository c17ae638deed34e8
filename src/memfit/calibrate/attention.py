"""Attention of a text's windows by products of matrices: some five times faster in bf16 than the fused kernel.

On a processor torch's fused attention makes scores in pieces that are too small for matrix units: 90 GFLOP/s a core
were seen, where products do 450. A window of calibration is short, so that a block of its scores stays in the cache.
Right of a causal mask's diagonal none are made; sliding windows longer than the text have such a mask too.

Legend of shapes: B windows, H heads, V heads of keys and values, G heads that share one, T time, S time of keys, D
width, R rows of a block of T.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memfit.packed.fake import is_fake

from .processor import multiplies_bf16

_ROWS: Final = 128
"""Of T at once, at the most and at the least."""
_FEWEST_ROWS: Final = 16
_SCORES_NBYTES: Final = 4 << 20
"""Of a window's scores that are there at once."""


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Inside, models that use torch's fused attention run on this where they can: in bf16, without gradients."""
    if not multiplies_bf16():
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def attend(
    query_BHTD: Tensor, key_BVSD: Tensor, value_BVSD: Tensor, mask: Tensor | None, *, scale: float, causal: bool
) -> Tensor:
    """Attention [B, T, H, D], `torch.nn.functional.scaled_dot_product_attention` of the same arguments.

    Args:
        mask: [B or 1, H or 1, T, S], what is added to the scores, or where they count (bool); None: all of them.
        causal: row t reads keys up to t alone; without a mask.
    """
    windows, heads, time, _ = query_BHTD.shape
    shared, keys, width = key_BVSD.shape[1], key_BVSD.shape[2], value_BVSD.shape[3]
    group = heads // shared
    fitting = _SCORES_NBYTES // (heads * keys * query_BHTD.element_size())
    rows = max(_FEWEST_ROWS, min(_ROWS, fitting // _FEWEST_ROWS * _FEWEST_ROWS))
    out_BTHD = query_BHTD.new_empty(windows, time, heads, width)
    nothing = query_BHTD.new_empty(1, 1, 1)
    lowest = torch.finfo(query_BHTD.dtype).min
    ahead_RR = torch.ones(rows, rows, dtype=torch.bool, device=query_BHTD.device).triu_(1)
    for window in range(windows):
        key_VSD, value_VSD = key_BVSD[window], value_BVSD[window]
        for start in range(0, time, rows):
            stop = min(start + rows, time)
            seen = stop if causal else keys
            query = query_BHTD[window, :, start:stop].reshape(shared, group * (stop - start), -1)
            scores = torch.baddbmm(nothing, query, key_VSD[:, :seen].transpose(1, 2), beta=0, alpha=scale)
            scores_HRS = scores.view(heads, stop - start, seen)
            if causal:
                scores_HRS[..., start:].masked_fill_(ahead_RR[: stop - start, : stop - start], lowest)
            elif mask is not None:
                part = mask[window if mask.shape[0] > 1 else 0, :, start:stop]
                if part.dtype == torch.bool:
                    scores_HRS.masked_fill_(part.logical_not(), lowest)
                else:
                    scores_HRS.add_(part)
            share = F.softmax(scores, -1)
            del scores, scores_HRS, query
            made = torch.bmm(share, value_VSD[:, :seen]).view(heads, stop - start, width)
            out_BTHD[window, start:stop] = made.transpose(0, 1)
            del share, made
    return out_BTHD


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **more: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As transformers calls it; what `attend` cannot do goes the usual way."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    whole = (query.shape[2], key.shape[2])  # of a mask: one that is the same for all rows has 1
    if (
        torch.is_grad_enabled() or dropout or query.dtype != torch.bfloat16 or query.device.type != "cpu"
        or query.shape[0] != key.shape[0] or (causal and whole[0] != whole[1])
        or (attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.shape[2:] != whole))
        or any(more.get(name) is not None for name in ("position_bias", "softcap"))
    ):  # fmt: skip
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **more,
        )  # fmt: skip
    if attention_mask is not None and _is_causal(attention_mask):
        causal, attention_mask = True, None
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    return attend(query, key, value, attention_mask, scale=scale, causal=causal), None


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask [.., T, S] says what `causal` says; of a fake one nobody knows."""
    time, keys = mask.shape[-2:]
    if is_fake(mask) or mask.dtype != torch.bool or time != keys or time == 1:
        return False
    return torch.equal(mask, torch.ones(time, keys, dtype=torch.bool, device=mask.device).tril_().expand_as(mask))
