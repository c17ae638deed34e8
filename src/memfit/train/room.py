"""How many more bytes this process can have: by the system, its container, a limit set from outside."""

import resource
from pathlib import Path

import psutil
import torch


def room_nbytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now, beyond what is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [int(psutil.virtual_memory().available)]
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            found.append(soft - _status(used))
    container = _container()
    if container is not None:
        found.append(container)
    return max(0, min(found))


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _container() -> int | None:
    """What the control group of this process has left (cgroup v2); None: it has no limit."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()[-1].rpartition(":")[2]
        for root in (Path("/sys/fs/cgroup") / group.lstrip("/"), Path("/sys/fs/cgroup")):
            limit = root / "memory.max"
            if limit.is_file():
                text = limit.read_text(encoding="ascii").strip()
                if text == "max":
                    return None
                held = int((root / "memory.current").read_text(encoding="ascii"))
                return int(text) - held + _reclaimable(root)
    except (OSError, ValueError, IndexError):
        pass
    return None


def _reclaimable(root: Path) -> int:
    """The page cache of the group, which the system gives back."""
    for line in (root / "memory.stat").read_text(encoding="ascii").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
