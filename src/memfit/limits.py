"""How much memory a process may take: a hard limit, and what beside the tensors it has to leave room for."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from memfit.account.meter import resident_nbytes

RUNTIME_NBYTES: Final = 48 << 20
"""What the runtime may take beside the allocator under a hard limit: buffers of threads, holes in the heap."""
KERNEL_NBYTES: Final = 1 << 20
"""And more for each shape of a 16-bit product: the code that oneDNN makes for it. 0.7 MiB were measured."""


def runtime_nbytes_of(kernels: int) -> int:
    """What the runtime may take beside the allocator under a limit: its buffers, and code for each of `kernels`."""
    return RUNTIME_NBYTES + kernels * KERNEL_NBYTES


@contextmanager
def limited(nbytes: int | None, *, runtime_nbytes: int = RUNTIME_NBYTES) -> Iterator[None]:
    """Inside, this process may take at most `nbytes` of private memory more than it has, and the runtime's
    own growth (setrlimit(2), RLIMIT_DATA); None: as much as it likes."""
    if nbytes is None:
        yield
        return
    data = resident_nbytes()["data"]
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data + nbytes + runtime_nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
