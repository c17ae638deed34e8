"""One calibration pass that serves all: second moments of inputs and gradients around every weight.

Legend: W windows, T time, N tokens in all, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import masking_utils

from memfit.errors import UsageError
from memfit.packed.fake import is_fake
from memfit.source.source import Source

from .statistics import Moments, Statistics, Sums
from .stream import Streamed, row_shape

LOGITS_NBYTES: Final = 32 << 20
"""Bytes of float32 logits held at a time."""


def collect(
    source: Source,
    windows_WT: Tensor,
    modules: frozenset[str],
    *,
    batch: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Statistics:
    """Moments of every module in `modules` over the windows, the model read block by block.

    The loss is the model's own: labels are drawn from its predictions, so that gradients' second moments are
    Fisher information and ½ Σ G_o H_k Δw² estimates the KL divergence that a change Δw makes, in nats a token.
    A model without a head (an encoder) has a Gaussian around its output instead, of the outputs' own variance.

    Args:
        windows_WT: token ids.
        modules: names of the linear layers and embeddings to listen to.
        batch: windows run at once; memory grows with it.
        seed: of the labels.
        dtype: that the model runs in.
    """
    streamed = Streamed(source, dtype=dtype)
    streamed.watched = modules
    sums = Sums()
    generator = torch.Generator().manual_seed(seed)

    def hear(name: str, inputs: Tensor, out: Tensor) -> None:
        if inputs.is_floating_point():
            sums.add(name, "inputs", inputs.detach())
        else:
            _count(sums, name, inputs, rows=source.parameters[f"{name}.weight"][0][0])
        if out.requires_grad:
            out.register_hook(lambda g: sums.add(name, "gradients", g))  # type: ignore[no-untyped-call]

    streamed.listener = hear
    for start in range(0, windows_WT.shape[0], batch):
        ids_WT = windows_WT[start : start + batch]
        with torch.enable_grad(), one_text_a_row(dry=is_fake(ids_WT)):
            out = streamed.model(ids_WT, **arguments_of(streamed.model, ids_WT))
            hidden = hidden_of(out)
        slopes = [_head_gradient(streamed, state.detach(), sums, generator) for state in hidden]
        torch.autograd.backward(hidden, slopes)
        del out, hidden, slopes
    streamed.listener = None  # else the sums would live on in a ring with the model until it is collected
    statistics = Statistics(tokens=windows_WT.numel())
    statistics.moments |= _of_experts(streamed, sums, windows_WT.numel())
    for name in sums.modules():
        inputs, gradients = sums.mean(name, "inputs"), sums.mean(name, "gradients")
        counts = sums.mean(name, "counts")
        if counts is not None and gradients is not None:
            # A table is a linear layer whose inputs are one-hot: their mean squares are shares.
            inputs = counts
        if inputs is not None:
            statistics.moments[name] = Moments(inputs=inputs, gradients=gradients)
    return statistics


def _of_experts(streamed: Streamed, sums: Sums, tokens: int) -> dict[str, Moments]:
    """The moments of fused experts' weights, by the weight's name: inputs [E, K], gradients [E, N].

    Inputs are a mean over the tokens that an expert saw, gradients over all: what an expert seldom sees costs
    little. One that saw none has zeros.
    """
    found = {}
    weights = dict.fromkeys(name.partition("#")[0] for name in sums.modules() if "#" in name)
    for weight in weights:
        experts, outputs, width = streamed.source.parameters[weight][0]
        inputs, gradients = torch.zeros(experts, width), torch.zeros(experts, outputs)
        for expert in range(experts):
            seen = sums.count(f"{weight}#{expert}", "inputs")
            x, g = (sums.mean(f"{weight}#{expert}", part) for part in ("inputs", "gradients"))
            if x is not None and g is not None:
                inputs[expert] = x
                gradients[expert] = g.mul_(seen / tokens)
        found[weight] = Moments(inputs=inputs, gradients=gradients)
    return found


def _count(sums: Sums, name: str, ids: Tensor, *, rows: int) -> None:
    """Count how often each row of a table is looked up."""
    counts = torch.zeros(rows, dtype=torch.float32)
    flat = ids.reshape(-1)
    counts.index_add_(0, flat, torch.ones(flat.shape[0], dtype=torch.float32))
    sums.add_summed(name, "counts", counts, flat.shape[0])


@contextmanager
def one_text_a_row(*, dry: bool) -> Iterator[None]:
    """Where there is no cache, transformers looks at positions for several texts in a row, and builds a mask unless
    it can see that there is one. Fake positions show nothing: in a dry run the answer is given here."""
    look = masking_utils.find_packed_sequence_indices

    def answer(positions: Tensor) -> None:
        look(positions)

    if dry:
        masking_utils.find_packed_sequence_indices = answer
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def arguments_of(model: torch.nn.Module, ids_WT: Tensor) -> dict[str, Any]:
    """What a model takes beside the text: no cache; of an encoder-decoder, the same text to continue."""
    config = getattr(model, "config", None)
    arguments: dict[str, Any] = {}
    if getattr(config, "use_cache", None) is not None:
        arguments["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids_WT
    return arguments


def hidden_of(out: object) -> list[Tensor]:
    """What stands for the output: the hidden states that the head would read, or an encoder's last, and pooled."""
    if isinstance(out, Tensor):
        return [out]
    for names in (("logits",), ("last_hidden_state", "pooler_output")):
        found = [value for name in names if isinstance(value := getattr(out, name, None), Tensor)]
        if found:
            return found
    raise UsageError(
        f"the model's output is a {type(out).__name__}, with neither logits nor hidden states: it cannot be "
        "calibrated. Plan it without a text."
    )


def _head_gradient(streamed: Streamed, hidden: Tensor, sums: Sums, generator: torch.Generator) -> Tensor:
    """Gradient of the loss at the hidden states [W, T, D]; moments of the head are added on the way."""
    # Some models make their logits in float32 (Mamba); the head's rows come in the model's own type.
    states_ND = hidden.reshape(-1, hidden.shape[-1]).to(streamed.dtype)
    if streamed.head is None:
        noise = torch.randn(states_ND.shape, generator=generator)
        return (noise / states_ND.float().std().clamp_min(1e-6)).to(hidden.dtype).view(hidden.shape)
    name = f"{streamed.head}.weight"
    sums.add(streamed.head, "inputs", states_ND)
    token_N, log_total_N = _draw(streamed, states_ND, generator)
    gradient_ND = torch.zeros(states_ND.shape, dtype=torch.float32)
    square_V = torch.zeros(row_shape(streamed.source, name)[0], dtype=torch.float32)
    for head in heads_of(streamed):
        part = slice(head.start, head.start + head.rows_RD.shape[0])
        square_V[part] = _block_gradient(states_ND, head, token_N, log_total_N, gradient_ND)
    sums.add_summed(streamed.head, "gradients", square_V, states_ND.shape[0])
    return gradient_ND.to(hidden.dtype).view(hidden.shape)


def _draw(streamed: Streamed, states_ND: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token for each position, drawn from the model's prediction, and the log of the prediction's total.

    Drawn while the vocabulary passes by: the largest of logit plus Gumbel noise is a sample of the softmax.
    """
    count = states_ND.shape[0]
    best_N = torch.full((count,), -torch.inf)
    token_N = torch.zeros(count, dtype=torch.int64)
    log_total_N = torch.full((count,), -torch.inf)
    for head in heads_of(streamed):
        for at, logits in head.logits(states_ND):
            part = slice(at, at + logits.shape[0])
            log_total_N[part] = torch.logaddexp(log_total_N[part], logits.logsumexp(1))
            noise = torch.rand(logits.shape, generator=generator).clamp_min_(1e-30)
            noise.log_().neg_().log_().neg_()
            value, index = noise.add_(logits).max(1)
            better = value > best_N[part]
            token_N[part] = torch.where(better, index + head.start, token_N[part])
            best_N[part] = torch.maximum(best_N[part], value)
    return token_N, log_total_N


def _block_gradient(
    states_ND: Tensor, head: "HeadRows", token_N: Tensor, log_total_N: Tensor, gradient_ND: Tensor
) -> Tensor:
    """Add (p − 1[token])·rows to `gradient_ND`; returns Σ over positions of (p − 1[token])², [R]."""
    rows_RD = head.rows_RD
    square_R = torch.zeros(rows_RD.shape[0])
    for at, logits in head.logits(states_ND):
        part = slice(at, at + logits.shape[0])
        slope = head.bend(logits)
        chance = logits.sub_(log_total_N[part].unsqueeze(1)).exp_()
        local = token_N[part] - head.start
        inside = (local >= 0) & (local < rows_RD.shape[0])
        place = local.clamp(0, rows_RD.shape[0] - 1).unsqueeze(1)
        chance.scatter_add_(1, place, -inside.float().unsqueeze(1))
        if slope is not None:
            chance.mul_(slope)  # from the capped logit back to what the head gave
        gradient_ND[part] += (chance.to(rows_RD.dtype) @ rows_RD).float()
        square_R += chance.square_().sum(0)
    return square_R


@dataclass(frozen=True)
class HeadRows:
    """Some rows of the head: `start`, ... of the vocabulary."""

    start: int
    rows_RD: Tensor
    bias_R: Tensor | None
    cap: float | None
    """Logits are cap · tanh(logits / cap), as Gemma 2 has them."""

    def logits(self, states_ND: Tensor, *, nbytes: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [n, R]) of blocks of positions, of at most `nbytes`."""
        step = max(1, (nbytes or LOGITS_NBYTES) // (4 * self.rows_RD.shape[0]))
        for at in range(0, states_ND.shape[0], step):
            yield at, self.logits_at(states_ND[at : at + step])

    def logits_at(self, states_ND: Tensor) -> Tensor:
        """Logits of all these positions, float32 [N, R]."""
        logits = (states_ND @ self.rows_RD.T).float()
        if self.bias_R is not None:
            logits.add_(self.bias_R)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def bend(self, logits: Tensor) -> Tensor | None:
        """The slope of capped logits over what the head's product gave; None where nothing caps them."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1)


def heads_of(streamed: Streamed) -> Iterator[HeadRows]:
    """The head, block by block, from the first row to the last."""
    bias_V = None
    if f"{streamed.head}.bias" in streamed.source.parameters:
        bias_V = streamed.source.read_parameter(f"{streamed.head}.bias", dtype=torch.float32)
    for start, rows_RD in streamed.rows(f"{streamed.head}.weight"):
        part = slice(start, start + rows_RD.shape[0])
        yield HeadRows(start, rows_RD, None if bias_V is None else bias_V[part], streamed.cap)
        del rows_RD
