"""Tensors whose bytes lie in a file: what waits between two blocks need not be in memory.

Each is a shared mapping of a file without a name, so that nothing is left of it however the process ends. Its pages
are resident while they are used, and go back to the file when `let_go` says so.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from memfit.account.watch import Watch
from memfit.packed.fake import is_fake


class Spill:
    """Makes such tensors in files of `directory`; without a directory, plain ones."""

    def __init__(self, directory: Path | None, watch: Watch) -> None:
        self.directory, self._watch = directory, watch
        self._files: dict[int, tuple[weakref.ref[torch.UntypedStorage], mmap.mmap | None]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values.

        Raises:
            OSError: the disk has no room for it; told here, for a page that cannot be written ends the process.
        """
        if self.directory is None:
            return torch.empty(shape, dtype=dtype)
        file = None
        if is_fake(torch.empty(0)):
            made = torch.empty(shape, dtype=dtype)
            self._watch.on_disk(made)
        else:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            with tempfile.TemporaryFile(dir=self.directory) as unnamed:
                os.posix_fallocate(unnamed.fileno(), 0, nbytes)
                file = mmap.mmap(unnamed.fileno(), nbytes)
            made = torch.frombuffer(file, dtype=dtype).view(shape)
        storage = made.untyped_storage()
        key = storage._cdata
        self._files[key] = (weakref.ref(storage, lambda _: self._files.pop(key, None)), file)
        return made

    def rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """Some rows, in memory if the tensor is in a file."""
        if tensor.untyped_storage()._cdata not in self._files:
            return tensor[rows]
        part = tensor[rows].clone()
        self.let_go(tensor)
        return part

    def let_go(self, tensor: Tensor) -> None:
        """What is resident of a tensor goes back to its file."""
        _, file = self._files.get(tensor.untyped_storage()._cdata, (None, None))
        if file is not None:
            file.madvise(mmap.MADV_DONTNEED)
