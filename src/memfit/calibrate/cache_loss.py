"""What a KV cache in fewer bits costs: the same text read through it, beside the text read without.

Legend: W windows, T time, N positions, a and b logits [N, R] of some rows of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memfit.packed.cache import cache_argument, make_cache
from memfit.packed.fake import is_fake
from memfit.source.source import Source
from memfit.task.infer import takes_cache

from .collect import LOGITS_NBYTES, arguments_of, heads_of, hidden_of
from .stream import Streamed


def cache_losses(
    source: Source, windows_WT: Tensor, bits: Sequence[int], *, dtype: torch.dtype = torch.bfloat16
) -> dict[int, float]:
    """KL divergence in nats a token of the model with a KV cache in `bits` bits from itself without, by bits.

    The model is read block by block, once for each of `bits` and once without a cache; the vocabulary passes by
    once. Empty where the model has no cache or no head, so that nothing can be said.

    Args:
        windows_WT: token ids; few are enough, since every position is compared.
    """
    streamed = Streamed(source, dtype=dtype)
    if not bits or streamed.head is None or not takes_cache(streamed.model):
        return {}
    plain = arguments_of(streamed.model, windows_WT)
    states = {}
    with torch.no_grad():
        for kind in (16, *bits):
            options = plain
            if kind != 16:
                cache = make_cache(streamed.model.config, kv_bits=kind)
                options = plain | {"use_cache": True, str(cache_argument(streamed.model)): cache}
            hidden = hidden_of(streamed.model(windows_WT, **options))[0]
            states[kind] = hidden.reshape(-1, hidden.shape[-1]).to(streamed.dtype)
        return _divergences(streamed, states)


def _divergences(streamed: Streamed, states: dict[int, Tensor]) -> dict[int, float]:
    """KL(16 ‖ b) for every other b: Σ_v p_v (a_v − b_v) − log Σ eᵃ + log Σ eᵇ, the sums kept as rows pass by."""
    count = states[16].shape[0]
    total_N = {kind: torch.full((count,), -torch.inf) for kind in states}
    apart_N = {kind: torch.zeros(count) for kind in states if kind != 16}
    for head in heads_of(streamed):
        for at, a in head.logits(states[16], nbytes=LOGITS_NBYTES // 8):
            part = slice(at, at + a.shape[0])
            before = total_N[16][part].clone()
            total_N[16][part] = torch.logaddexp(before, a.logsumexp(1))
            # All seen so far counts less as the total grows.
            fade = (before - total_N[16][part]).exp_()
            share = (a - total_N[16][part].unsqueeze(1)).exp_()
            for kind, apart in apart_N.items():
                b = head.logits_at(states[kind][part])
                total_N[kind][part] = torch.logaddexp(total_N[kind][part], b.logsumexp(1))
                apart[part] = apart[part] * fade + (share * (a - b)).sum(1)
    found = {kind: (apart - total_N[16] + total_N[kind]).double().mean() for kind, apart in apart_N.items()}
    return {kind: 0.0 if is_fake(loss) else max(0.0, float(loss)) for kind, loss in found.items()}
