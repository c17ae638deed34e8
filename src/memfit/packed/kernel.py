"""Which kernel a packed weight runs on, and what it costs in bytes there."""

import math
from typing import Final, Literal

from memfit.packed import nibbles
from memfit.packed.fake import aimed_at
from memfit.packed.forms import Form, LowRank, Narrow
from memfit.packed.qlinear import integer_kernel, prepacked_nbytes
from memfit.packed.scheme import Scheme

Kernel = Literal["int8", "nibbles", "planes", "onednn", "int_mm", "sparse", "factors", "whole", "narrow"]
KERNEL_NAMES: Final[dict[Kernel, str]] = {
    "int8": "torch._weight_int8pack_mm",
    "nibbles": "aten._weight_int4pack_mm_for_cpu",
    "planes": "unpack and multiply",
    "onednn": "onednn.qlinear_pointwise",
    "int_mm": "torch._int_mm",
    "sparse": "rows made dense, some at a time",
    "factors": "two narrow products",
    "whole": "one product in 16 bits",
    "narrow": "fewer dimensions a head",
}


def choose_kernel(scheme: Scheme, shape: tuple[int, ...], *, aligned: int | None = None) -> Kernel:
    """The fastest kernel that can take a weight of this shape.

    `aligned`: rows of each part that is used on its own, as one expert of many; [E, N, K] has parts of N.
    """
    on_cuda = aimed_at() == "cuda"
    if scheme.activations == 8:
        return "int_mm" if on_cuda else integer_kernel()
    if scheme.values != "int" or on_cuda:
        return "planes"
    if scheme.bits == 8 and scheme.group is None and scheme.symmetric:
        return "int8"
    rows = math.prod(shape[:-1])
    if aligned is None and len(shape) == 3:
        aligned = shape[1]
    padding = -rows % nibbles.ROWS if aligned is None else 0
    # Rows are padded to whole blocks where that is next to nothing, as for a vocabulary of 50257.
    fits = padding * 64 <= rows and (aligned or 0) % nibbles.ROWS == 0 and scheme.group in (32, 64, 128)
    if fits and scheme.bits in nibbles.PLANES and nibbles.kernel_layout_is_known():
        return "nibbles"
    return "planes"


def runtime_nbytes(scheme: Form, shape: tuple[int, ...], *, kernel: Kernel | None = None) -> int:
    """Bytes of the buffers of a weight [..., N, K], on `kernel` or the one that would be chosen.

    As `scheme.nbytes`, but a zero point takes a byte, rows are padded to a multiple of 64 for the int4
    kernel, and levels are there whether a file holds them or not. For products of integers oneDNN says what its order
    takes, and a scale is float32. Forms that are no schemes are kept as they are stored.
    """
    if isinstance(scheme, LowRank) and isinstance(scheme.base, Scheme):
        return scheme.nbytes(shape) + runtime_nbytes(scheme.base, shape) - scheme.base.nbytes(shape)
    if isinstance(scheme, Narrow) and scheme.base is not None:
        return runtime_nbytes(scheme.base, scheme.narrow(shape))
    if not isinstance(scheme, Scheme):
        return scheme.nbytes(shape)
    if scheme.values != "int":
        return scheme.nbytes(shape) + (0 if scheme.values == "codebook" else 2 << scheme.bits)
    rows, inputs = math.prod(shape[:-1]), shape[-1]
    kernel = kernel or choose_kernel(scheme, shape)
    if scheme.activations == 8:
        return (prepacked_nbytes((rows, inputs)) if kernel == "onednn" else rows * inputs) + 4 * rows
    if kernel == "nibbles":
        rows += -rows % nibbles.ROWS
    groups = scheme.groups(inputs)
    return rows * inputs * scheme.bits // 8 + rows * groups * (2 if scheme.symmetric else 3)
