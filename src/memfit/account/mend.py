"""Operators whose course on fake tensors differs from the kernel's, and the course that the kernel takes.

Each function here stands for one operator while a dry run follows it. Fake tensors are on the CPU whatever
the target, so for CUDA the ways of writing that only the CPU has are left out; its attention is `cuda_kernels`'.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .ask import ask_recurrent_workspace

aten = torch.ops.aten


def _grouped_product(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Grouped products run in any dtype on the CPU; their shape function knows bf16 alone (torch 2.13)."""
    left, right = args[:2]
    if right.dim() == 2:  # the weights' gradient: a product of its own for each group of rows
        offsets = args[2] if len(args) > 2 else kwargs["offs"]
        return left.new_empty((offsets.numel(), left.shape[0], right.shape[-1]))  # type: ignore[no-any-return]
    return left.new_empty((left.shape[0], right.shape[-1]))  # type: ignore[no-any-return]


def _attention(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The kernel's output has the query's strides even where a dimension is 1, and the fake one's differ."""
    _, logsumexp = func(*args, **kwargs)
    query = args[0]
    return torch.empty_strided(query.shape, query.stride(), dtype=query.dtype), logsumexp


def _recurrent_layer(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """Where a gradient is wanted, the kernel keeps what its backward pass needs; how much, oneDNN chooses."""
    output, hidden, cell, _ = func(*args, **kwargs)
    kept = ask_recurrent_workspace(func, args) if args[-1] and torch.is_grad_enabled() else 0
    return output, hidden, cell, torch.empty((kept,), dtype=torch.uint8)


def _recurrent_layer_backward(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """mkldnn/RNN.cpp: gradients are fp32 whatever the dtype, and each bias has one of its own."""
    *found, again, hidden, cell = func(*args, **kwargs)
    return *found, torch.empty_like(again), hidden, cell


Mends = dict[Any, Callable[[Any, Any, Any], Any]]
_ANYWHERE: Final[Mends] = {aten._grouped_mm.default: _grouped_product}
MENDED: Final[dict[str, Mends]] = {
    "cpu": _ANYWHERE
    | {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
        aten.mkldnn_rnn_layer.default: _recurrent_layer,
        aten.mkldnn_rnn_layer_backward.default: _recurrent_layer_backward,
    },
    "cuda": _ANYWHERE,
}
"""By target: operators whose fake outputs differ from the kernel's. What is made inside is not followed, the
result is."""


def _lstm(
    input: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """native/mkldnn/RNN.cpp, mkldnn_rnn: one oneDNN kernel for each layer and direction, on dense inputs.

    Each input lives until the layer has run; the first, if it had to be made dense, until the end.
    """
    projects = states[0].shape[2] != states[1].shape[2]
    kinds = {tensor.dtype for tensor in (input, *states, *weights)}
    if projects or not kinds <= {torch.float32, torch.bfloat16} or len(kinds) > 1:
        return NotImplemented
    if not torch.backends.mkldnn.enabled or input.numel() == 0:
        return NotImplemented
    dense = (input.transpose(0, 1) if batch_first else input).contiguous()
    hidden, cell = (state.contiguous() for state in states)
    directions = 2 if bidirectional else 1
    stride = 4 if has_biases else 2
    x, ends_h, ends_c = dense, [], []
    out: list[Tensor] = [dense] * directions
    for layer in range(layers):
        for direction in range(directions):
            index = layer * directions + direction
            own = list(weights[index * stride : (index + 1) * stride])
            if not has_biases:
                own += [torch.zeros(w.shape, dtype=w.dtype) for w in own]
            y, hy, cy, _ = aten.mkldnn_rnn_layer(
                x, *own, hidden[index], cell[index], direction > 0, [], 2, hidden.shape[2], layers,
                has_biases, bidirectional, batch_first, train,
            )  # fmt: skip
            out[direction] = y
            ends_h.append(hy)
            ends_c.append(cy)
            del y, hy, cy, _, own
        x = out[0] if directions == 1 else torch.cat(out, -1)
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    result = x.transpose(0, 1) if batch_first else x
    return result, torch.stack(ends_h, 0), torch.stack(ends_c, 0)


@contextmanager
def lstm_of_kernels() -> Iterator[None]:
    """Inside, LSTM layers on fake tensors go the way of the CPU's kernels, also where gradients are wanted: torch
    itself chooses by the backend, before a dispatch mode is asked, and fake tensors have none."""
    plain = torch._VF.lstm

    def lstm(*args: Any) -> Any:
        if isinstance(args[0], FakeTensor) and not isinstance(args[1], Tensor):
            made = _lstm(*args)
            if made is not NotImplemented:
                return made
        return plain(*args)

    torch._VF.lstm = lstm  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch._VF.lstm


@contextmanager
def values_as_usual() -> Iterator[None]:
    """Inside, where transformers would look at values that fake tensors lack, it goes the way of usual ones.

    Texts are one a row: of positions that rise by one no mask is made, which it only sees on real ones. What it
    computes to see it is computed.
    """
    from transformers import masking_utils

    plain = masking_utils.find_packed_sequence_indices

    def one_text_a_row(position_ids: Tensor) -> Tensor | None:
        found: Tensor | None = plain(position_ids)
        if found is not None:  # else another `values_as_usual` is around this one
            (found[:, -1] == 0).all()
        return None

    masking_utils.find_packed_sequence_indices = one_text_a_row
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain
