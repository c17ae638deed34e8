"""A weight of 8 bits whose products are of integers: the activations are rounded to 8 bits too, token by token.

N outputs, K inputs, M tokens.

    y_mn = s_m · t_n · Σ_k q_mk · w_nk        s_m = max_k |x_mk| / 127.5,  q = clip(round(x / s), −128, 127)

The scale s and its quotients are in the dtype of x, as compressed-tensors makes them for `dynamic` activations of the
strategy `token`: stock transformers chooses the same integers. Two kernels:

    onednn   `torch.ops.onednn.qlinear_pointwise`, on a weight in oneDNN's own order. Activations go in as u = q + 128
             with the zero point 128: without AMX, oneDNN has no kernel for signed ones but a plain loop, a thousand
             times slower.
    int_mm   `torch._int_mm`, on the weight as it lies: on CUDA, and where oneDNN's kernel is not there or not exact.
"""

from typing import Final

import torch
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed.blocks import Read, blocks_of, checked, takes_rows
from memfit.packed.cuda import workspace_nbytes
from memfit.packed.fake import blocks_to_run, device_meant
from memfit.packed.gradient import product
from memfit.packed.kernel import Kernel, choose_kernel
from memfit.packed.qlinear import prepack, prepacked_nbytes, qlinear
from memfit.packed.scheme import Scheme

TOKENS_NBYTES: Final = 4 * 2**20
"""Bytes of quotients made at a time. From 64 tokens on oneDNN's kernel is at its full rate."""
_FEWEST_CUDA: Final = 17
"""`torch._int_mm` on CUDA wants more than 16 rows."""
_DTYPES: Final = (torch.bfloat16, torch.float32)


class IntegerWeight(nn.Module):
    """A weight [N, K] in 8 bits, with products of integers. Born without storage; `load_from` or `fill` fill it.

    Buffers: `packed` (int8, in the order of its kernel) and `scale` float32 [N].
    """

    holds_weights = True
    """Its buffers are a model's weights, and are accounted for as such."""
    packed: Tensor
    scale: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        device: str | torch.device = "meta",
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        if (reason := scheme.why_not(shape)) is not None:
            raise UsageError(f"a weight of shape {list(shape)} cannot be {scheme.name}: {reason}")
        self.shape, self.scheme = shape, scheme
        self.kernel: Kernel = kernel or choose_kernel(scheme, shape)
        self._make_buffers(torch.device(device))

    def _make_buffers(self, device: torch.device) -> None:
        size = (prepacked_nbytes(self.shape),) if self.kernel == "onednn" else self.shape
        self.register_buffer("packed", torch.empty(size, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(self.shape[0], dtype=torch.float32, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        packed = prepacked_nbytes(self.shape) if self.kernel == "onednn" else self.packed.nbytes
        return packed + self.scale.nbytes

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.scheme.name}, kernel={self.kernel}"

    # -- filling it ----------------------------------------------------------------------------------

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from `prefix.weight_packed` and `.weight_scale`; see `PackedWeight.load_from`.

        The weight as in the file is there until it is in the kernel's order: for a moment it is there twice.

        Raises:
            BrokenInput: a tensor is not of the type or shape that the scheme asks for.
        """
        rows, inputs = self.shape
        name = f"{prefix}.weight_packed"
        q = torch.empty(self.shape, dtype=torch.int8, device=device)
        by_rows = takes_rows(read)
        whole = None if by_rows else checked(read(name), name, torch.int32, (rows, inputs // 4))
        for start, stop in blocks_to_run(blocks_of(rows, TOKENS_NBYTES // inputs, 1)):
            if whole is not None:
                words = whole[start:stop]
            else:
                words = checked(read(name, start, stop), name, torch.int32, (stop - start, inputs // 4))
            # A byte of the file is q + 128.
            q[start:stop].view(torch.uint8).copy_(words.contiguous().view(torch.uint8)).bitwise_xor_(128)
            del words
        del whole
        name = f"{prefix}.weight_scale"
        scale = checked(read(name), name, torch.bfloat16, (rows, 1))
        self._put(q, scale)

    def fill(self, q: Tensor, scale: Tensor, zero: Tensor | None = None) -> None:
        """Fill from int8 q [N, K] and bf16 scale [N, 1]; `zero` is None."""
        name = f"weight {list(self.shape)} {self.scheme.name}"
        if zero is not None:
            raise UsageError(f"{name}: zero points come with an asymmetric scheme, and only with one")
        self._put(checked(q, name, torch.int8, self.shape), checked(scale, name, torch.bfloat16, (self.shape[0], 1)))

    def _put(self, q: Tensor, scale: Tensor) -> None:
        self.scale = scale.view(-1).to(torch.float32)
        if self.kernel == "onednn":
            self.packed = prepack(q)
        else:
            self.packed = q

    @classmethod
    def from_quantized(
        cls, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, *, kernel: Kernel | None = None
    ) -> "IntegerWeight":
        """The store of int8 q [N, K] and bf16 scale [N, 1]; `zero` is None."""
        store = cls((q.shape[0], q.shape[1]), scheme, kernel=kernel)
        store.fill(q, scale, zero)
        return store

    # -- using it ----------------------------------------------------------------------------------

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop, dense [stop − start, K]. A copy of all integers is made: for looking, not for running."""
        q = self.packed.to_dense().t() if self.kernel == "onednn" else self.packed
        return q[start:stop].to(dtype).mul_(self.scale[start:stop, None].to(dtype))

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K], rounded to 8 bits, times the weight, transposed: [..., N].

        Raises:
            TypeError: activations of another type than bfloat16 and float32.
        """
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{self.scheme.name} takes bfloat16 or float32 activations; got "
                f"{str(x.dtype).removeprefix('torch.')}. Run the model in bfloat16."
            )
        y = product(self, x.reshape(-1, self.shape[1]), 0, self.shape[0])
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.shape[0])

    def product(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [M, K] times the whole weight: [M, N]. `start` and `stop` are its first and last row."""
        most = workspace_nbytes(x, TOKENS_NBYTES) // (x.element_size() * self.shape[1])
        blocks = blocks_to_run(blocks_of(x.shape[0], most, 1))
        if len(blocks) == 1:
            return self._times_tokens(x)
        out = x.new_empty(x.shape[0], self.shape[0])
        for a, b in blocks:
            out[a:b].copy_(self._times_tokens(x[a:b]))
        return out

    def product_back(self, g: Tensor, start: int, stop: int) -> Tensor:
        """Raises UsageError: what is rounded on its way in has no gradient."""
        raise UsageError(
            f"a weight [{self.shape[0]}, {self.shape[1]}] of {self.scheme.name} rounds its activations, through which "
            "no gradient passes. Train the model as it was, or one that was fitted without --activations 8."
        )

    def _times_tokens(self, x: Tensor) -> Tensor:
        """Some tokens [M, K] → [M, N]."""
        u, scale = round_tokens(x)
        if self.kernel == "onednn":
            y = qlinear(u, self.packed, self.scale, self.shape, x.dtype)
        else:
            y = self._times_plain(u.bitwise_xor_(128).view(torch.int8), x.dtype)
        del u
        return y.mul_(scale)

    def _times_plain(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 q [M, K] times the weight by `torch._int_mm`, times the weight's scales: [M, N]."""
        tokens = q.shape[0]
        if device_meant(q).type == "cuda" and tokens < _FEWEST_CUDA:
            q = torch.nn.functional.pad(q, (0, 0, 0, _FEWEST_CUDA - tokens))
        out = q.new_empty((tokens, self.shape[0]), dtype=dtype)
        for a, b in blocks_to_run(blocks_of(self.shape[0], workspace_nbytes(q, TOKENS_NBYTES) // (8 * q.shape[0]), 64)):
            sums = torch._int_mm(q, self.packed[a:b].t())[:tokens].to(torch.float32)
            out[:, a:b].copy_(sums.mul_(self.scale[a:b]))
            del sums
        return out


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] → (uint8 q + 128 [M, K], scale [M, 1] in x's dtype): the integers that compressed-tensors chooses.

    Infinity or NaN among a token's entries is in its scale, and so in all of its outputs.
    """
    # A token of zeros has any scale, but 0.
    scale = x.abs().amax(-1, keepdim=True).div_(127.5).clamp_min_(torch.finfo(x.dtype).tiny)
    quotient = (x / scale).clamp_(-128, 127).round_()
    q = quotient.to(torch.int8)
    del quotient
    return q.view(torch.uint8).bitwise_xor_(128), scale
