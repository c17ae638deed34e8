"""A store whose buffers are the stored parts themselves, read some rows at a time."""

import math

import torch
from torch import Tensor, nn

from memfit.errors import BrokenInput, UsageError
from memfit.packed.blocks import Read, blocks_of, takes_rows
from memfit.packed.fake import blocks_to_run
from memfit.packed.forms import LowRank, Narrow, Shared, Sparse, Whole

LOAD_NBYTES = 4 << 20
"""Bytes of a part that are read at a time."""


class Parts(nn.Module):
    """The stored parts of a weight [N, K] as buffers: `weight_kept` is `kept`, and so on. Born without storage."""

    holds_weights = True
    """Its buffers are a model's weights, and are accounted for as such."""

    def __init__(
        self, shape: tuple[int, int], scheme: Sparse | LowRank | Shared | Whole | Narrow, *,
        device: str | torch.device = "meta",
    ) -> None:  # fmt: skip
        super().__init__()
        if (reason := scheme.why_not(shape)) is not None:
            raise UsageError(f"a weight of shape {list(shape)} cannot be {scheme.name}: {reason}")
        self.shape, self._form = shape, scheme
        self._make_buffers(torch.device(device))

    def _make_buffers(self, device: torch.device) -> None:
        for part, (dtype, shape) in self._form.parts(self.shape).items():
            self.register_buffer(part.removeprefix("weight_"), torch.empty(shape, dtype=dtype, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self._form.name}"

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from the parts below `prefix`; see `PackedWeight.load_from`.

        Raises:
            BrokenInput: a tensor is not of the type or shape that the form asks for.
        """
        self._make_buffers(torch.device(device))
        by_rows = takes_rows(read)
        for part, (dtype, shape) in self._form.parts(self.shape).items():
            name, buffer = f"{prefix}.{part}", self.get_buffer(part.removeprefix("weight_"))
            row_nbytes = max(1, buffer.nbytes // max(shape[0], 1))
            for start, stop in blocks_to_run(blocks_of(shape[0], LOAD_NBYTES // row_nbytes, 1)):
                due = (stop - start, *shape[1:])
                # A file's rows are all dimensions but the last.
                each = math.prod(shape[1:-1])
                found = read(name, start * each, stop * each).view(due) if by_rows else read(name)[start:stop]
                if found.dtype != dtype or tuple(found.shape) != due:
                    raise BrokenInput(
                        f"{name}: {found.dtype} {list(found.shape)} where {dtype} {list(due)} was expected"
                    )
                buffer[start:stop].copy_(found)
                del found

    def fill(self, parts: dict[str, Tensor]) -> None:
        """Fill from the parts by name, as `weight_kept`."""
        self.load_from(lambda name: parts[name.removeprefix(".")], "")
