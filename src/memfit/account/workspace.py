"""What CPU kernels allocate for themselves: scratch that no output shows.

A rule gives two lists of sizes in bytes: blocks taken before the outputs exist, and blocks taken after.
All are free again when the operator returns. Rules follow ATen's sources, named with each. Kernels whose
scratch only they know (oneDNN's products, attention, recurrent layers) are asked: see `ask.py`.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from memfit.packed.routing import ROUTING

from .ask import (
    ask_attention,
    ask_attention_backward,
    ask_call,
    ask_eigenvectors,
    ask_integer_product,
    ask_product,
    ask_recurrent,
    ask_recurrent_unwritten,
)

_HALVES: Final = (torch.bfloat16, torch.float16)
Scratch = tuple[list[int], list[int]]
NONE: Final[Scratch] = ([], [])
aten = torch.ops.aten
_INTEGERS: Final = torch.ops.onednn.qlinear_pointwise
_PRODUCTS: Final = frozenset({aten.mm, aten.addmm, aten.bmm, aten.baddbmm})


def workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Scratch:
    """Sizes of the blocks that `func`'s CPU kernel takes before and after its outputs."""
    rule = _RULES.get(func.overloadpacket)
    if rule is not None:
        return rule(func, args, out)
    if torch.Tag.pointwise in func.tags:
        return _pointwise(func, args, out)
    return NONE


def kernel_of(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Shape of the product that oneDNN makes code for, None where it makes none."""
    packet = func.overloadpacket
    if packet is aten._grouped_mm:
        left, right, offsets = args[:3]
        if left.dtype not in _HALVES:
            return None
        if right.dim() == 3:
            return ("grouped", left.shape[0], left.shape[1], right.shape[2], right.shape[0])
        return ("grouped, weights", left.shape[1], left.shape[0], right.shape[1], offsets.numel())
    if packet is _INTEGERS:
        return (2, *args[0].shape, args[3].shape[1], f"integers to {args[9]}")
    if packet not in _PRODUCTS:
        return None
    left, right = args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
    if not _is_halved(left.dtype) or math.prod(left.shape) * right.shape[-1] <= 16**3:
        return None
    return (left.dim(), *left.shape, right.shape[-1], right.stride(-1) == 1)


def unwritten(func: Any, args: tuple[Any, ...], out: Any) -> tuple[Tensor, int] | None:
    """An output that its kernel writes to in part, and the bytes that it leaves out; None of most operators."""
    if func.overloadpacket is not aten.mkldnn_rnn_layer or not out[3].numel():
        return None
    return out[3], ask_recurrent_unwritten(func, args)


def _pointwise(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """TensorIterator.cpp, compute_types: on the CPU an operand of another dtype is cast into a copy.

    A Python number where a tensor is meant becomes a 0-dim tensor first, double or int64, and is cast
    like any operand (ScalarOps.h, wrapped_scalar_tensor).
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    numbers = _numbers_as_tensors(func, args)
    if not tensors or not (numbers or len({t.dtype for t in tensors}) > 1):
        return NONE
    if func.overloadpacket in _UNPROMOTED:
        return NONE
    common = torch.result_type(tensors[0], tensors[1]) if len(tensors) > 1 else tensors[0].dtype
    for tensor in tensors[2:]:
        common = torch.promote_types(common, tensor.dtype)
    for number in numbers:
        kind: Any = type(number)
        common = _with_number(common, kind)
    sizes: list[int] = []
    for number in numbers:
        sizes.append(1 if isinstance(number, bool) else 8)
    for tensor in tensors:
        if tensor.dtype != common and not (func._schema.name.endswith("_") and tensor is tensors[0]):
            sizes.append(math.prod(tensor.shape) * common.itemsize)
    for number in numbers:
        own = torch.bool if isinstance(number, bool) else torch.int64 if isinstance(number, int) else torch.float64
        if own != common:
            sizes.append(common.itemsize)
    return sizes, []


@cache
def _with_number(dtype: torch.dtype, kind: Any) -> torch.dtype:
    """The dtype that a tensor's and a Python number's are promoted to."""
    return torch.result_type(torch.empty((1,), dtype=dtype, device="meta"), kind(1))


def _numbers_as_tensors(func: Any, args: tuple[Any, ...]) -> list[int | float]:
    """The Python numbers among the arguments that the kernel wraps into tensors."""
    return [
        arg
        for arg, declared in zip(args, func._schema.arguments, strict=False)
        if isinstance(arg, (int, float))
        and (declared.type.kind() == "TensorType" or (func._overloadname == "Scalar" and declared.name == "other"))
    ]


def _mean(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """ReduceOps.cpp, mean on the CPU: sum, then divide in place by the count, a wrapped number."""
    return [], [8, out.dtype.itemsize]


def _product(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """LinearAlgebra.cpp hands fp16 and bf16 products to oneDNN, with a scratchpad of its own choosing.

    Products of up to 16³ multiplications stay in ATen (mkldnn/Matmul.cpp, checksize); a batch that is
    dense neither by rows nor by columns, as an expanded weight is, gets copied first.
    """
    left, right = args[1:3] if func.overloadpacket in (aten.addmm, aten.baddbmm) else args[:2]
    if not _is_halved(left.dtype):
        return NONE
    if math.prod(left.shape) * right.shape[-1] <= 16**3:
        return NONE
    copies = [t.numel() * t.element_size() for t in (left, right) if out.dim() == 3 and not _is_dense(t)]
    return [], [*copies, ask_product(left, right)]


def _integer_product(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """quantized/cpu/qlinear.cpp: oneDNN's scratchpad, and the activations' scale and zero point as tensors."""
    return [], [ask_integer_product(args[0], out)]


def _is_halved(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies: 16-bit factors, or fp32 ones of which 16 bits are to count."""
    return dtype in _HALVES or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.transpose(-1, -2).is_contiguous()


def _grouped_product(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """cpu/GroupedBlas.cpp: one product after another, so the scratch of the largest group."""
    left, right = args[:2]
    if left.dtype not in _HALVES:
        return NONE
    if right.dim() == 2:
        inner = right.shape[0] if ROUTING.get() == "worst" else -(-right.shape[0] // out.shape[0])
        return [], [ask_product(left.narrow(1, 0, inner), right.narrow(0, 0, inner))]
    rows = left.shape[0] if ROUTING.get() == "worst" else -(-left.shape[0] // right.shape[0])
    return [], [ask_product(left.narrow(0, 0, rows), right.select(0, 0))]


def _attention(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """cpu/FlashAttentionKernel.cpp: one block of scores and accumulators for each thread."""
    return [], [ask_attention(args)]


def _attention_backward(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """cpu/FlashAttentionKernel.cpp: blocks of scores and of their gradients for each thread, and products' scratch."""
    return [], [ask_attention_backward(args)]


def _convolution(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """Convolution.cpp: 1-dim convolutions run as 2-dim ones, on copies in oneDNN's layout."""
    return [], [ask_call(func, args)]


def _recurrent(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """mkldnn/RNN.cpp: the biases added up, the weights in oneDNN's layout, and its scratchpad."""
    return [], [ask_recurrent(func, args)]


def _eigenvectors(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """BatchLinearAlgebra.cpp: LAPACK's work arrays, by the size alone, and by whether values alone are wanted."""
    matrix = args[0]
    return [], [ask_eigenvectors(tuple(matrix.shape), matrix.dtype, vectors=out[1].numel() > 0)]


def _cholesky_solve(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """BatchLinearAlgebra.cpp, _cholesky_solve_helper: the triangle is copied column by column, beside the result."""
    return [], [args[1].numel() * args[1].dtype.itemsize]


def _safe_softmax(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """transformers/attention.cpp: after the softmax, a mask of −inf, its rows, and a zero to fill with."""
    return [], [out.numel(), out.numel() // out.shape[args[1]], out.dtype.itemsize]


def _embedding(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """Embedding.cpp: indices that are not contiguous are copied for index_select."""
    indices = args[1]
    return ([] if indices.is_contiguous() else [indices.numel() * 8]), []


def _sort(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """native/cpu/SortingKernel.cpp: a copy of the indices."""
    return [], [args[0].numel() * 8]


def _histogram(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """cpu/HistogramKernel.cpp: the edges, and a histogram of each thread."""
    size = out.dtype.itemsize
    return [(out.numel() + 1) * size], [out.numel() * size * torch.get_num_threads()]


def _running_sum(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """ReduceOps.cpp, cumsum: the input is cast to the result's dtype first."""
    return ([] if args[0].dtype == out.dtype else [out.numel() * out.dtype.itemsize]), []


def _sum(func: Any, args: tuple[Any, ...], out: Any) -> Scratch:
    """ReduceOpsUtils.h, make_reduction_from_out_ty: the input is cast to the result's dtype, beside the result."""
    return [], ([] if args[0].dtype == out.dtype else [args[0].numel() * out.dtype.itemsize])


_UNPROMOTED: Final = frozenset({aten.where, aten.copy_, aten.masked_fill, aten.masked_fill_, aten._to_copy})
_RULES: Final[dict[Any, Callable[[Any, tuple[Any, ...], Any], Scratch]]] = {
    aten.mean: _mean,
    aten.mm: _product,
    aten.addmm: _product,
    aten.bmm: _product,
    aten.baddbmm: _product,
    aten._grouped_mm: _grouped_product,
    _INTEGERS: _integer_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._safe_softmax: _safe_softmax,
    aten._linalg_eigh: _eigenvectors,
    aten.cholesky_solve: _cholesky_solve,
    aten.convolution: _convolution,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent,
    aten.embedding: _embedding,
    aten.sort: _sort,
    aten.histc: _histogram,
    aten.cumsum: _running_sum,
    aten.sum: _sum,
    aten.floor_divide: _pointwise,
}
