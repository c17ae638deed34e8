"""The account: who holds which bytes, when. A value; predictions and measurements share it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal[
    "parameter",
    "gradient",
    "optimizer",
    "activation",
    "kv_cache",
    "buffer",
    "temporary",
    "statistics",
    "outside",
]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Bytes that one module holds for one purpose."""

    kind: Kind
    module: str
    """Dotted name of the module that created the bytes; empty for the model itself."""
    device: str
    dtype: str
    nbytes: int
    """The most bytes of this entry alive at one moment of the listed phases' peaks."""
    phases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a task: its peak and what was alive at it."""

    name: str
    peak_nbytes: int
    """Allocated bytes at the worst moment, all that was alive counted."""
    end_nbytes: int
    """Allocated bytes when the phase ended."""
    at: str = ""
    """Where the worst moment was: the module running, then the operator."""
    alive: dict[str, int] = field(default_factory=dict)
    """Kind to bytes at the worst moment; sums to `peak_nbytes`."""
    reserved_nbytes: int | None = None
    """CUDA: bytes of the caching allocator's segments at the worst moment."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who holds which bytes, when. `peak_nbytes` is a maximum over moments, never a sum of parts."""

    phases: tuple[Phase, ...]
    entries: tuple[Entry, ...]
    """What was alive at the peak of any phase, by kind, module and dtype."""
    device: str = "cpu"
    outside_nbytes: int | None = None
    """What no allocator shows: the runtime's own libraries and buffers. None: not calibrated."""
    resident_nbytes: int | None = None
    """Peak of resident (CPU) or device-wide (CUDA) bytes; predicted as allocated or reserved plus outside."""
    file_backed_nbytes: int | None = None
    """The part of the resident bytes that is pages of files, at the end; measured only."""
    routing: str | None = None
    """`balanced` or `worst` where experts are chosen by data; None where nothing is."""
    heap_nbytes: int = 0
    """CPU, predicted: what the C heap keeps, and whole pages add, beyond the allocated peak."""
    kernels: int = 0
    """CPU, predicted: shapes of 16-bit products; the runtime keeps code for each."""
    runtime: str = "torch"
    """Predicted: `transformers` where the model is one of its classes, whose code then is in memory too."""
    seconds: float = 0.0
    """How long the account took to make."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak_nbytes)

    @property
    def peak_nbytes(self) -> int:
        return self.peak.peak_nbytes

    @property
    def peak_phase(self) -> str:
        return self.peak.name

    def phase(self, name: str) -> Phase:
        """The phase called `name`; KeyError names those there are."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(f"no phase {name!r}; there are {', '.join(p.name for p in self.phases)}")

    def to_json(self) -> dict[str, Any]:
        """One object for programs; the keys are promised (see the README)."""
        return {
            "peak_nbytes": self.peak_nbytes,
            "peak_phase": self.peak_phase,
            "phases": {phase.name: phase.peak_nbytes for phase in self.phases},
            "phase_details": [asdict(phase) for phase in self.phases],
            "entries": [asdict(entry) | {"phases": list(entry.phases)} for entry in self.entries],
            "device": self.device,
            "outside_nbytes": self.outside_nbytes,
            "resident_nbytes": self.resident_nbytes,
            "file_backed_nbytes": self.file_backed_nbytes,
            "routing": self.routing,
            "heap_nbytes": self.heap_nbytes,
            "kernels": self.kernels,
            "runtime": self.runtime,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Account":
        return cls(
            phases=tuple(Phase(**phase) for phase in data["phase_details"]),
            entries=tuple(Entry(**(entry | {"phases": tuple(entry["phases"])})) for entry in data["entries"]),
            **{key: data[key] for key in _PLAIN if key in data},
        )


_PLAIN = (
    "device", "outside_nbytes", "resident_nbytes", "file_backed_nbytes", "routing", "heap_nbytes", "kernels",
    "runtime", "seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One line of predicted beside measured."""

    what: str
    predicted_nbytes: int
    measured_nbytes: int

    @property
    def error(self) -> float:
        """(predicted − measured) / measured; 0 where both are 0."""
        if self.measured_nbytes == 0:
            return 0.0 if self.predicted_nbytes == 0 else float("inf")
        return (self.predicted_nbytes - self.measured_nbytes) / self.measured_nbytes


def compare(predicted: Account, measured: Account) -> tuple[Difference, ...]:
    """Predicted beside measured: each phase both have, each kind at the peak, then the resident peak."""
    lines = [
        Difference(what=f"phase {p.name}", predicted_nbytes=p.peak_nbytes, measured_nbytes=m.peak_nbytes)
        for p in predicted.phases
        for m in measured.phases
        if p.name == m.name
    ]
    # An allocator's events do not say whether a block is an operator's own.
    apart = "temporary" in measured.peak.alive or "temporary" not in predicted.peak.alive
    told, found = (_by_kind(account.peak.alive, apart=apart) for account in (predicted, measured))
    lines += [
        Difference(what=f"kind {kind}", predicted_nbytes=told.get(kind, 0), measured_nbytes=found.get(kind, 0))
        for kind in sorted(told.keys() | found.keys())
    ]
    lines += _entries_side_by_side(predicted.entries, measured.entries)
    if predicted.resident_nbytes is not None and measured.resident_nbytes is not None:
        lines.append(
            Difference(
                what="resident",
                predicted_nbytes=predicted.resident_nbytes,
                measured_nbytes=measured.resident_nbytes,
            )
        )
    return tuple(lines)


def _by_kind(alive: Mapping[str, int], *, apart: bool) -> dict[str, int]:
    """Bytes by kind; activations and temporaries as one unless they are to be told apart."""
    found: dict[str, int] = {}
    for kind, nbytes in alive.items():
        name = kind if apart or kind not in ("activation", "temporary") else "activation, temporary"
        found[name] = found.get(name, 0) + nbytes
    return found


def _named(entries: Iterable[Entry]) -> dict[tuple[str, str, str], int]:
    found: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        if entry.kind in ("parameter", "buffer"):
            key = (entry.kind, entry.module, entry.dtype)
            found[key] = found.get(key, 0) + entry.nbytes
    return found


def _entries_side_by_side(predicted: Iterable[Entry], measured: Iterable[Entry]) -> list[Difference]:
    """What both sides can name at any moment: parameters and buffers, by module and dtype; several of one name as their
    sum. What a cache has grown out of has no name in a measurement; its kind is compared."""
    left, right = _named(predicted), _named(measured)
    return [
        Difference(
            what="entry " + " ".join(part for part in key if part),
            predicted_nbytes=left.get(key, 0),
            measured_nbytes=right.get(key, 0),
        )
        for key in sorted(left.keys() | right.keys())
    ]
