"""One packed weight [N, K]: its bytes as the kernels read them, and all that can be done with it.

N rows (outputs), K inputs, G groups of g inputs, M rows of activations.
Every transient is bounded: a dense copy is made of a few rows at a time and dropped before the next.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed import cuda, nibbles
from memfit.packed.bits import PLANES, join_planes, split_planes, unpack_unsigned, unpack_zeros
from memfit.packed.blocks import Read
from memfit.packed.blocks import blocks_of as _blocks
from memfit.packed.blocks import checked as _check
from memfit.packed.blocks import takes_rows as _takes_rows
from memfit.packed.fake import blocks_to_run, device_meant
from memfit.packed.gradient import product
from memfit.packed.kernel import KERNEL_NAMES, Kernel, choose_kernel
from memfit.packed.levels import dequantize, level_table, look_up
from memfit.packed.scheme import Scheme

WORKSPACE_NBYTES: Final = 4 * 2**20
"""The largest dense block of a weight that is ever made on a CPU, and the largest transient of a load."""
SPREAD_NBYTES: Final = 4 * 2**20
"""Bytes made at a time for the int4 and int8 kernels of weights that these cannot read as they lie. From 2 to 4 MiB
decode speed is the same within noise; at 0.25 MiB the calls themselves take a third of the time."""
FEW_ROWS: Final = 32
"""Up to so many rows of activations the int4 and int8 kernels are used; for more, blocks are unpacked. With AMX the
dense product is ahead from about 45 rows on (1770 against 163 GFLOP/s, and the unpacking); without, only from about 200
(82 against 70 GFLOP/s a core)."""
_FEWEST_INPUTS: Final = 8
"""So many inputs of a segment are unpacked at once even where the rows are too many for the workspace."""


class PackedWeight(nn.Module):
    """A weight [N, K] in the layout of its kernel. Born without storage; `load_from` or `fill` fill it.

    Buffers: `plane0`, `plane1`, ... (the packed values), `scale` bf16 (MXFP4: its exponent, uint8), if asymmetric
    `zero` int8, and if its values are no integers `table` bf16 [2^b], what they stand for; of vectors [2^(b·v), v].
    """

    holds_weights = True
    """Its buffers are a model's weights, and are accounted for as such."""
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        device: str | torch.device = "meta",
        aligned: int | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        if (reason := scheme.why_not(shape)) is not None:
            raise UsageError(f"a weight of shape {list(shape)} cannot be {scheme.name}: {reason}")
        self.shape, self.scheme = shape, scheme
        self.groups = scheme.groups(shape[1])
        self.group = shape[1] // self.groups
        self._scale_dtype = torch.uint8 if scheme.values == "mxfp4" else torch.bfloat16
        self.kernel: Kernel = kernel or choose_kernel(scheme, shape, aligned=aligned)
        self.rows_stored = shape[0] + (-shape[0] % nibbles.ROWS if self.kernel == "nibbles" else 0)
        self._make_buffers(torch.device(device))

    # -- what it is made of --------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane, the most significant first."""
        return {
            "int8": (8,), "nibbles": nibbles.PLANES.get(self.scheme.bits, ()), "planes": PLANES[self.scheme.bits]
        }[self.kernel]  # fmt: skip

    @property
    def planes(self) -> list[Tensor]:
        return [self.get_buffer(f"plane{i}") for i in range(len(self.widths))]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _make_buffers(self, device: torch.device) -> None:
        rows, inputs, by_group = self.rows_stored, self.shape[1], self.kernel == "nibbles"
        empty = partial(torch.empty, device=device)
        for i, width in enumerate(self.widths):
            shape: tuple[int, ...] = (rows, inputs * width // 8)
            if by_group:
                shape = (rows // nibbles.ROWS, inputs * width // 4, 32)
            dtype = torch.int8 if self.kernel == "int8" else torch.uint8
            self.register_buffer(f"plane{i}", empty(shape, dtype=dtype))
        # The int4 kernel wants the scales of a group side by side; unpacking wants those of a row.
        shape = (self.groups, rows) if by_group else (rows, self.groups)
        self.register_buffer("scale", empty(shape, dtype=self._scale_dtype))
        self.register_buffer("zero", None if self.scheme.symmetric else empty(shape, dtype=torch.int8))
        is_level = self.scheme.values != "int"
        self.register_buffer("table", empty(self.scheme.codebook, dtype=torch.bfloat16) if is_level else None)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.scheme.name}, kernel={self.kernel}"

    # -- filling it ----------------------------------------------------------------------------------

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from `prefix.weight_packed`, `.weight_scale`, if asymmetric `.weight_zero_point`, and of a codebook
        `.weight_codebook`.

        `read(name)` gives a whole tensor, [N, ...] or [E, N/E, ...]; if it also takes `start` and `stop`, the
        packed values are read some rows at a time, and the file's tensor is never whole in memory.

        Raises:
            BrokenInput: a tensor is not of the type or shape that the scheme asks for.
        """
        self._make_buffers(torch.device(device))
        rows, bits = self.shape[0], self.scheme.bits
        words_shape = (rows, self.shape[1] * bits // 32)
        name = f"{prefix}.weight_packed"
        by_rows = _takes_rows(read)
        whole = None if by_rows else _check(read(name), name, torch.int32, words_shape)
        for start, stop in blocks_to_run(self._load_blocks()):
            if whole is not None:
                words = whole[start:stop]
            else:
                words = _check(read(name, start, stop), name, torch.int32, (stop - start, words_shape[1]))
            self._put(unpack_unsigned(words, bits, self.shape[1]), start, stop)
            del words
        del whole
        name = f"{prefix}.weight_scale"
        scale = _check(read(name), name, self._scale_dtype, (rows, self.groups))
        zero = None
        if not self.scheme.symmetric:
            name = f"{prefix}.weight_zero_point"
            zero = unpack_zeros(
                _check(read(name), name, torch.int32, (-(-rows * bits // 32), self.groups)), bits, rows
            )
        self._put_scales(scale, zero)
        if self.scheme.values == "codebook":
            name = f"{prefix}.weight_codebook"
            self._put_table(_check(read(name), name, torch.bfloat16, self.scheme.codebook))
        else:
            self._put_table(None)

    def fill(self, q: Tensor, scale: Tensor, zero: Tensor | None = None, table: Tensor | None = None) -> None:
        """Fill from int8 q [N, K], scale [N, G], if asymmetric int8 zero points [N, G], and a codebook's levels."""
        name = f"weight {list(self.shape)} {self.scheme.name}"
        _check(q, name, torch.int8, self.shape)
        if (zero is None) != self.scheme.symmetric:
            raise UsageError(f"{name}: zero points come with an asymmetric scheme, and only with one")
        if (table is None) != (self.scheme.values != "codebook"):
            raise UsageError(f"{name}: a table of levels comes with a codebook, and only with one")
        self._make_buffers(q.device)
        for start, stop in blocks_to_run(self._load_blocks()):
            self._put(q[start:stop].view(torch.uint8) + (1 << (self.scheme.bits - 1)), start, stop)
        shape = (self.shape[0], self.groups)
        self._put_scales(
            _check(scale, name, self._scale_dtype, shape),
            None if zero is None else _check(zero, name, torch.int8, shape),
        )
        self._put_table(table)

    @classmethod
    def from_quantized(
        cls, q: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, *, kernel: Kernel | None = None,
        table: Tensor | None = None,
    ) -> "PackedWeight":  # fmt: skip
        """The store of int8 q [N, K], scale [N, G], int8 zero points [N, G] or None, and a codebook's levels."""
        store = cls((q.shape[0], q.shape[1]), scheme, kernel=kernel)
        store.fill(q, scale, zero, table)
        return store

    def _load_blocks(self) -> Iterator[tuple[int, int]]:
        # A row's transients: the words, u, its planes before and after they are laid out: 5 bytes an input at
        # most; of MXFP4 stored as FP8 the codes that are looked up, too.
        nbytes = 12 if self.scheme.values == "mxfp4" else 5
        return _blocks(self.shape[0], WORKSPACE_NBYTES // (nbytes * self.shape[1]), self._multiple)

    def _put(self, u: Tensor, start: int, stop: int) -> None:
        """Lay out rows start to stop, uint8 u = q + 2^(b−1) [n, K]; `u` is used up."""
        if self.kernel == "int8":
            self.planes[0][start:stop].copy_(u.bitwise_xor_(128).view(torch.int8))
            return
        step = self._multiple
        if (short := -u.shape[0] % step) != 0:
            u = F.pad(u, (0, 0, 0, short))
        parts = (
            split_planes(u, self.widths)
            if self.kernel == "planes"
            else nibbles.pack_rows(u, self.scheme.bits)
        )
        for plane, part in zip(self.planes, parts, strict=True):
            plane[start // step : -(-stop // step)].copy_(part)

    def _put_scales(self, scale: Tensor, zero: Tensor | None) -> None:
        turned, rows = self.kernel == "nibbles", self.shape[0]
        for buffer, values in ((self.scale, scale), (self.zero, zero)):
            if buffer is not None and values is not None:
                (buffer.t() if turned else buffer)[:rows].copy_(values)
                (buffer.t() if turned else buffer)[rows:].zero_()

    def _put_table(self, table: Tensor | None) -> None:
        if self.table is not None:
            self.table.copy_(level_table(self.scheme) if table is None else table)

    @property
    def _multiple(self) -> int:
        """Rows that are laid out together."""
        return nibbles.ROWS if self.kernel == "nibbles" else 1

    # -- using it ----------------------------------------------------------------------------------

    def offset(self, start: int) -> int:
        """How far row `start` lies from the first of those that it is laid out with."""
        return start % self._multiple

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop, dense [stop − start, K], bit for bit what compressed-tensors dequantises to."""
        first, last = start // self._multiple, -(-stop // self._multiple)
        if self.kernel == "nibbles":
            planes = [plane[first:last] for plane in self.planes]
            q = torch.empty(last - first, 2, 32, self.shape[1], dtype=torch.int8, device=self.scale.device)
            for half in (0, 1):
                q[:, half].copy_(nibbles.unpack_half(planes, self.scheme.bits, half).transpose(1, 2))
            q = q.view(-1, self.shape[1])[start - first * nibbles.ROWS : stop - first * nibbles.ROWS]
            scale = self.scale[:, start:stop].t()
            zero = None if self.zero is None else self.zero[:, start:stop].t()
            return dequantize(q, scale, zero, dtype)
        return self._unpack(*self._rows(start, stop), dtype)

    def _rows(self, start: int, stop: int) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Planes, scales and zeros of rows start to stop."""
        zero = None if self.zero is None else self.zero[start:stop]
        return [plane[start:stop] for plane in self.planes], self.scale[start:stop], zero

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]. Only they are unpacked."""
        flat = index.reshape(-1)
        if self.kernel == "nibbles":
            q = nibbles.gather_rows(self.planes, self.scheme.bits, flat)
            scale, zero = self.scale[:, flat].t(), None if self.zero is None else self.zero[:, flat].t()
            dense = dequantize(q, scale, zero, dtype)
        else:
            zero = None if self.zero is None else self.zero[flat]
            dense = self._unpack([plane[flat] for plane in self.planes], self.scale[flat], zero, dtype)
        return dense.view(*index.shape, self.shape[1])

    def matmul(self, x: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """x [..., K] times rows start to stop of the weight, transposed: [..., stop − start].

        x gets its gradient, if it wants one (`product_back`); the weight is frozen.

        Raises:
            TypeError: the kernel cannot take activations of this type, or only by a path many times slower.
        """
        stop = self.shape[0] if stop is None else stop
        if self.kernel != "planes" and x.dtype != torch.bfloat16:
            raise TypeError(
                f"{self.scheme.name} runs on {KERNEL_NAMES[self.kernel]}, which takes bfloat16 activations; "
                f"got {str(x.dtype).removeprefix('torch.')}. Run the model in bfloat16."
            )
        y = product(self, x.reshape(-1, self.shape[1]), start, stop)
        # A view of the product could not be changed in place without a copy of its gradient in the backward pass.
        return y if x.dim() == 2 else y.view(*x.shape[:-1], stop - start)

    def product(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [M, K] times rows start to stop, transposed, without a gradient: [M, stop − start]."""
        if self.kernel == "planes" and cuda.runs_few(x, self.widths, self.table):
            planes, scale, zero = self._rows(start, stop)
            return cuda.product(x, planes, self.widths, scale, zero, self.table)
        integers = self.zero is None and self.table is None
        by_row = self.groups == 1 and integers and x.dtype == torch.bfloat16 and device_meant(x).type == "cpu"
        if x.shape[0] > FEW_ROWS or not (self.kernel == "nibbles" or by_row):
            return self._matmul_dense(x, start, stop)
        if self.kernel == "nibbles":
            return self._matmul_nibbles(x.contiguous(), start, stop)
        return self._matmul_int8(x.contiguous(), start, stop)

    def product_back(self, g: Tensor, start: int, stop: int) -> Tensor:
        """The gradient of `product`'s x: g [M, stop − start] times rows start to stop, [M, K] in g's dtype.

        The weight is cut by inputs, not by rows: each output is then one sum over all rows, and no sums in a
        wider type, of the size of x, have to be kept between blocks.
        """
        segments, length = self._segments
        blocks = blocks_to_run(self._column_blocks(stop - start))
        if len(blocks) == 1:
            return self._times_back(g, start, stop, *blocks[0])
        out = g.new_empty(g.shape[0], self.shape[1])
        by_segment = out.view(-1, segments, length)
        for low, high in blocks:
            part = self._times_back(g, start, stop, low, high)
            by_segment[:, :, low:high].copy_(part.view(-1, segments, high - low))
            del part
        return out

    @property
    def _segments(self) -> tuple[int, int]:
        """(S, L): a row's K inputs are S segments of L, and input s·L + j is in byte j of the narrowest plane."""
        segments = (4 if self.kernel == "nibbles" else 8) // min(self.widths)
        return segments, self.shape[1] // segments

    def _column_blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Cut the inputs of each segment into blocks of which S · `rows` values are at most the workspace."""
        segments, length = self._segments
        most = cuda.workspace_nbytes(self.scale, WORKSPACE_NBYTES) // (self._unpacked_nbytes * segments * rows)
        if self.groups == 1:
            return _blocks(length, most, _FEWEST_INPUTS)
        # No block may cut a run of inputs that have one scale but where another block begins as well.
        unit = math.gcd(length, self.group)
        while most < unit and unit % 2 == 0 and unit > _FEWEST_INPUTS:
            unit //= 2
        return _blocks(length, most, unit)

    def _times_back(self, g: Tensor, start: int, stop: int, low: int, high: int) -> Tensor:
        """g [M, stop − start] times inputs low to high of every segment: [M, S · (high − low)]."""
        _, length = self._segments
        nibbled = self.kernel == "nibbles"
        step = nibbles.ROWS if nibbled else 1
        rows = slice(start // step, -(-stop // step))
        # The groups of the runs of inputs that have one scale, run by run.
        unit = high - low if self.groups == 1 else math.gcd(length, self.group, low, high)
        first = torch.arange(0, self.shape[1], length, device=g.device)[:, None]
        run = torch.arange(low, high, unit, device=g.device)
        group = first.add(run).floor_divide_(self.group).view(-1)
        if self.groups == 1:
            group = group[:1]
        planes = [_columns(plane[rows], length, low, high) for plane in self.planes]
        whole = slice(start, rows.stop * step)
        if nibbled:
            scale, zero = self.scale[group, whole], None if self.zero is None else self.zero[group, whole]
            return F.linear(g, self._turn(planes, scale, zero)[:, : stop - start])
        scale, zero = self.scale[whole, group], None if self.zero is None else self.zero[whole, group]
        return g @ self._unpack(planes, scale, zero, g.dtype)

    def _matmul_int8(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Few rows [M, K] on the int8 kernel; narrower values with one scale a row are widened for it."""
        if self.kernel == "int8":
            return torch._weight_int8pack_mm(x, self.planes[0][start:stop], self.scale[start:stop, 0])
        out = x.new_empty(x.shape[0], stop - start)
        for a, b in blocks_to_run(_blocks(stop - start, SPREAD_NBYTES // self.shape[1], 1)):
            q = self._join([plane[start + a : start + b] for plane in self.planes])
            out[:, a:b].copy_(torch._weight_int8pack_mm(x, q, self.scale[start + a : start + b, 0]))
            del q
        return out

    def _matmul_nibbles(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Few rows [M, K] on the int4 kernel, a block of rows of the weight at a time."""
        bits, inputs, step = self.scheme.bits, self.shape[1], nibbles.ROWS
        # A weight that is read as it lies needs only its scales in a new order: 4 bytes for each group.
        spread = any(term.widths != (4,) for term in nibbles.TERMS[bits])
        row_nbytes = inputs // 2 if spread else self.groups * 4
        whole = stop + -stop % step
        blocks = blocks_to_run(_blocks(whole - start, SPREAD_NBYTES // row_nbytes, step))
        if len(blocks) == 1 and whole == stop:
            return self._times_nibbles(x, start, stop)
        out = x.new_empty(x.shape[0], stop - start)
        for a, b in blocks:
            part = out[:, a:b]
            part.copy_(self._times_nibbles(x, start + a, start + b)[:, : part.shape[1]])
        return out

    def _times_nibbles(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Whole blocks of rows, term by term."""
        step, terms = nibbles.ROWS, nibbles.TERMS[self.scheme.bits]
        planes = [plane[start // step : stop // step] for plane in self.planes]
        scale = self.scale[:, start:stop]
        zero = None if self.zero is None else self.zero[:, start:stop]
        y: Tensor | None = None
        for n, term in enumerate(terms):
            used, planes = planes[: len(term.widths)], planes[len(term.widths) :]
            weight = nibbles.term_nibbles(used, term).view(stop - start, self.shape[1] // 2)
            scale_zero = nibbles.scale_zero(scale, zero, self.scheme.bits, n)
            part = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, self.group, scale_zero)
            y = part if y is None else y.add_(part)
            del weight, scale_zero, part
        assert y is not None
        return y

    def _matmul_dense(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Any number of rows [M, K]: rows of the weight are unpacked, used and dropped, block by block."""
        inputs = self.shape[1]
        rows = cuda.workspace_nbytes(self.scale, WORKSPACE_NBYTES) // (self._unpacked_nbytes * inputs)
        blocks = blocks_to_run(_blocks(stop - start, rows, self._multiple))
        if len(blocks) == 1:
            return self._times_block(x, start, stop)
        out = x.new_empty(x.shape[0], stop - start)
        for low, high in blocks:
            out[:, low:high].copy_(self._times_block(x, start + low, start + high))
        return out

    def _times_block(self, x: Tensor, start: int, stop: int) -> Tensor:
        if self.kernel == "nibbles":
            return x @ self._dense_turned(start, stop)
        return F.linear(x, self.dense_rows(start, stop, dtype=x.dtype))

    def _dense_turned(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as columns: bf16 [K, stop − start]."""
        step, whole = nibbles.ROWS, stop + -stop % nibbles.ROWS
        planes = [plane[start // step : whole // step] for plane in self.planes]
        zero = None if self.zero is None else self.zero[:, start:whole]
        return self._turn(planes, self.scale[:, start:whole], zero)[:, : stop - start]

    def _turn(self, planes: list[Tensor], scale: Tensor, zero: Tensor | None) -> Tensor:
        """Planes [n/64, k·p/4, 32] of nibbles, scale and zero [c, n] → bf16 [k, n]: the inputs are first already."""
        blocks, inputs = planes[0].shape[0], planes[0].shape[1] * 4 // self.widths[0]
        dense = torch.empty(inputs, blocks, 2, 32, dtype=torch.bfloat16, device=self.scale.device)
        for half in (0, 1):
            dense[:, :, half].copy_(nibbles.unpack_half(planes, self.scheme.bits, half).transpose(0, 1))
        by_group = dense.view(scale.shape[0], -1, scale.shape[1])
        if zero is not None:
            by_group.sub_(zero[:, None].to(dense.dtype))
        by_group.mul_(scale[:, None])
        return dense.view(inputs, -1)

    @property
    def _unpacked_nbytes(self) -> int:
        """Bytes made of a value as it is unpacked: in bf16, and the index of its level where it is no integer."""
        return 2 if self.table is None or cuda.unpacks(self.scale, self.table) else 6

    def _unpack(self, planes: list[Tensor], scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """ŵ [n, k] in `dtype` of the same rows of every plane; scale and zero [n, c]."""
        if dtype == torch.bfloat16 and self.kernel == "planes" and cuda.unpacks(scale, self.table):
            return cuda.unpack(planes, self.widths, scale, zero, self.table)
        if self.table is None:
            return dequantize(self._join(planes), scale, zero, dtype)
        return look_up(join_planes(planes, self.widths), scale, self.table, dtype=dtype)

    def _join(self, planes: list[Tensor]) -> Tensor:
        """int8 q [n, K] of the same rows of every plane."""
        if self.kernel == "int8":
            return planes[0]
        return join_planes(planes, self.widths).sub_(1 << (self.scheme.bits - 1)).view(torch.int8)


def _columns(plane: Tensor, length: int, low: int, high: int) -> Tensor:
    """A plane [n, m·L, ...] with inputs low to high of each segment alone: [n, m · (high − low), ...], a plane too."""
    by_segment = plane.view(plane.shape[0], -1, length, *plane.shape[2:])
    return by_segment[:, :, low:high].flatten(1, 2)
