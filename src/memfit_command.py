"""Where the command begins: in a process that has, from its first block on, what libraries read as they are brought in.

A module of its own, for to bring in anything of `memfit` is to bring in torch.
"""

import os
import sys
from typing import Final

QUIET: Final = {
    # A thread that waits sleeps: where another process wants the core too, spinning at every barrier made the
    # decode of a small model 90 times slower.
    "OMP_WAIT_POLICY": "passive",
    # numpy's and SciPy's own products are not used, and their threads would begin with them: fork(2) copies none.
    "OPENBLAS_NUM_THREADS": "1",
    # Blocks from 1 MiB come from the system and go back to it, so that resident follows allocated
    # (`memfit.account.malloc`).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "MALLOC_ARENA_MAX": "2",
    # Small chunks that wait in caches lie between holes that would be one: a tenth more was resident, and chance.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of the environment of every process whose memory is measured."""
_MEASURED: Final = ("fit", "train")
"""Commands whose own process is, or is copied to one that is."""


def is_quiet() -> bool:
    """Whether this process began with `QUIET`."""
    return all(os.environ.get(name) == value for name, value in QUIET.items())


def main() -> None:
    """Run the command line; begin again with `QUIET` where a command wants that."""
    if sys.argv[1:2] and sys.argv[1] in _MEASURED and not is_quiet():
        # -P: a file of the directory one happens to stand in is not to be taken for a library's.
        os.execve(sys.executable, [sys.executable, "-P", "-m", "memfit_command", *sys.argv[1:]], os.environ | QUIET)
    from memfit.cli import main as run

    run()


if __name__ == "__main__":
    sys.argv[0] = "memfit"  # what help and errors call it
    main()
