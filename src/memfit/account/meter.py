"""Measure a task on real tensors: the allocator's own events, and what the system says is resident."""

import ctypes
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from .account import Account, Entry, Kind, Phase

# Kineto reports the start and the stop of each session on stderr, at any level below this one.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


class _Named:
    """What of the tensors that someone said the purpose of is there at each phase's end."""

    may_skip, prefix, device = False, "", "cpu"

    def __init__(self) -> None:
        self._peaks: dict[str, tuple[int, int, int | None]] = {}
        self._alive: dict[str, dict[str, int]] = {}
        self._entries: dict[tuple[Kind, str, str], dict[str, int]] = {}
        self._held: dict[int, _Held] = {}

    def holds(self, kind: Kind, module: str, tensor: torch.Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_mkldnn:  # opaque: it has bytes, and no storage that could be asked for them
            own = weakref.ref(tensor)
            address, nbytes = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
            self._held[address] = _Held(kind, module, dtype, nbytes, lambda: own() is None)
            return
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._held[storage.data_ptr()] = _Held(kind, module, dtype, storage.nbytes(), weak.expired)

    def on_disk(self, tensor: torch.Tensor) -> None:
        """Nothing: a mapping comes from no allocator."""

    def _note(self, phase: str) -> None:
        """Write down what of the named storages is still there at a phase's end."""
        for address, held in list(self._held.items()):
            if held.expired():
                del self._held[address]
        alive: dict[str, int] = {}
        now: dict[tuple[Kind, str, str], int] = {}
        for held in self._held.values():
            alive[held.kind] = alive.get(held.kind, 0) + held.nbytes
            key = (held.kind, held.module, held.dtype)
            now[key] = now.get(key, 0) + held.nbytes
        self._alive[phase] = alive
        for key, nbytes in now.items():
            self._entries.setdefault(key, {})[phase] = nbytes

    def account(self) -> Account:
        """The measurement so far. What no `holds` named is activation: the rest of each peak."""
        return Account(
            phases=tuple(
                Phase(
                    name=name, peak_nbytes=peak, end_nbytes=end, alive=_with_rest(self._alive[name], peak),
                    reserved_nbytes=reserved,
                )
                for name, (peak, end, reserved) in self._peaks.items()
            ),
            entries=tuple(
                Entry(
                    kind=kind, module=module, device=self.device, dtype=dtype,
                    nbytes=max(by_phase.values()), phases=tuple(by_phase),
                )
                for (kind, module, dtype), by_phase in sorted(self._entries.items())
            ),
            device=self.device,
        )  # fmt: skip


class Meter(_Named):
    """A watch that adds up the CPU allocator's events, phase by phase.

    The events come from the allocator's memory reports to the profiler, not from what follows fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._born = Born()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Profile what runs inside; its allocations and frees are added when it closes."""
        session = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)
        session.__enter__()  # type: ignore[no-untyped-call]
        # Of the allocator alone: events of operators are of no use here, and take longer than what small ones do.
        torch._C._autograd._enable_record_function(False)
        try:
            yield
        finally:
            torch._C._autograd._enable_record_function(True)
            session.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        peak = self._born.follow(session)
        before = self._peaks[name][0] if name in self._peaks else 0
        self._peaks[name] = (max(before, peak), self._born.nbytes, None)
        self._note(name)


class CudaMeter(_Named):
    """A watch that asks the CUDA caching allocator for its own peaks, phase by phase: bytes in blocks, and in segments.

    What the process holds already when it begins is not counted. Segments that are free are given back then, as a
    process of its own would have none.
    """

    device = "cuda"

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self._before = torch.cuda.memory_allocated()
        self._reserved_before = torch.cuda.memory_reserved()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The peaks of what runs inside, from what is there when it begins."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self._before
        reserved = torch.cuda.max_memory_reserved() - self._reserved_before
        before, _, most = self._peaks.get(name, (0, 0, 0))
        now = torch.cuda.memory_allocated() - self._before
        self._peaks[name] = (max(before, peak), now, max(most or 0, reserved))
        self._note(name)


@dataclass(frozen=True, slots=True)
class _Held:
    """A storage that someone said the purpose of."""

    kind: Kind
    module: str
    dtype: str
    nbytes: int
    expired: Callable[[], bool]


def _with_rest(held: dict[str, int], peak: int) -> dict[str, int]:
    return held | {"activation": max(0, peak - sum(held.values()))}


class Born:
    """What was allocated while profiling sessions looked on, and is alive.

    What was there before them is not counted, nor is its end: Python frees at any time what others left in cycles.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._sizes: dict[int, int] = {}

    def follow(self, session: Any) -> int:
        """Count what a session saw; returns the most bytes that were alive at once.

        The session's records are let go: it refers to itself, and would keep them, gigabytes in all, until it is
        collected.
        """
        peak = self.nbytes
        for _, address, nbytes in _allocations(session):
            # What is born where something else lies tells that this was freed between two sessions.
            self.nbytes -= self._sizes.pop(address, 0)
            if nbytes > 0:
                self._sizes[address] = nbytes
                self.nbytes += nbytes
                peak = max(peak, self.nbytes)
        session.profiler = None
        return peak


def _allocations(session: Any) -> list[tuple[int, int, int]]:
    """(time, address, bytes) of each allocator event a profiling session saw; bytes < 0 where freed."""
    events = []
    # In their order, which sorting keeps where two have one time.
    stack = session.profiler.kineto_results.experimental_event_tree()[::-1]
    while stack:
        node = stack.pop()
        if node.tag == torch._C._profiler._EventType.Allocation:
            event = node.typed[1]
            events.append((node.start_time_ns, event.ptr, event.alloc_size))
        stack.extend(node.children[::-1])
    return sorted(events, key=lambda event: event[0])


def resident_nbytes() -> dict[str, int]:
    """Bytes of this process: resident `now`, `peak`, `anonymous`, `file`; `data`, the private memory that RLIMIT_DATA
    bounds, resident or not (Linux: /proc/self/status)."""
    wanted = {"VmRSS": "now", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file", "VmData": "data"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in wanted:
            found[wanted[key]] = int(value.split()[0]) * 1024
    return found


def reset_resident_peak() -> None:
    """Start the peak of the resident size anew (Linux: /proc/self/clear_refs, proc(5))."""
    gc.collect()
    trim()
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Give freed pages back to the system; glibc keeps them otherwise."""
    with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if with_trim is not None:
        with_trim(0)
