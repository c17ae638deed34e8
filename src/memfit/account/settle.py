"""From the events of a ledger to the account they amount to: each phase's worst moment, and who was alive."""

import torch

from memfit.packed.routing import ROUTING

from .account import Account, Entry, Kind, Phase
from .cuda import Segments
from .heap import heap_nbytes
from .ledger import Ledger, phase_spans
from .malloc import LEVELS
from .outside import kernel_count


def settle(
    ledger: Ledger, *, device: str = "cpu", heap: bool = True, waiting_nbytes: int = LEVELS[0]
) -> Account:
    """The account that the ledger's events amount to: for each phase its worst moment and what was alive.

    Without `heap`, nothing is said of the C heap, which takes longest: enough where allocated bytes are asked for.
    `waiting_nbytes` is what malloc will be told (see `malloc`).
    """
    spans = phase_spans(ledger)
    sizes = {number: storage.nbytes for number, storage in enumerate(ledger.storages)}
    worst = _worst_moments(ledger, spans, device, sizes)
    phases: list[Phase] = []
    entries: dict[tuple[Kind, str, str], dict[str, int]] = {}
    for name in dict.fromkeys(name for name, _, _ in spans):
        peak, index, end, reserved = worst[name]
        alive = _alive_at(ledger, index)
        by_kind: dict[str, int] = {}
        for number in alive:
            storage = ledger.storages[number]
            nbytes = sizes[number]
            by_kind[storage.kind] = by_kind.get(storage.kind, 0) + nbytes
            key = (storage.kind, storage.module, _short(storage.dtype))
            entries.setdefault(key, {}).setdefault(name, 0)
            entries[key][name] += nbytes
        last = ledger.storages[ledger.events[index][0]] if ledger.events else None
        at = " ".join(part for part in (last.module, last.operator) if part) if last else ""
        phases.append(
            Phase(name=name, peak_nbytes=peak, end_nbytes=end, at=at, alive=by_kind, reserved_nbytes=reserved)
        )
    return Account(
        phases=tuple(phases),
        entries=tuple(
            Entry(
                kind=kind, module=module, device=device, dtype=dtype,
                nbytes=max(by_phase.values()), phases=tuple(by_phase),
            )
            for (kind, module, dtype), by_phase in sorted(entries.items())
        ),
        device=device,
        routing=ROUTING.get() if ledger.routed else None,
        heap_nbytes=heap_nbytes(ledger, waiting_nbytes) if heap and device == "cpu" else 0,
        kernels=kernel_count(ledger),
        runtime=ledger.runtime,
    )  # fmt: skip


def _worst_moments(
    ledger: Ledger, spans: list[tuple[str, int, int]], device: str, sizes: dict[int, int]
) -> dict[str, tuple[int, int, int, int | None]]:
    """For each phase: bytes at the worst moment, its event, bytes at the end, reserved bytes (CUDA).

    On CUDA `sizes` become those of the blocks that storages have got.
    """
    phase_of = {}
    for name, start, end in spans:
        for index in range(start, end):
            phase_of[index] = name
    worst: dict[str, tuple[int, int, int, int | None]] = {}
    segments = Segments() if device == "cuda" else None
    total = 0
    starts: dict[int, list[str]] = {}
    for name, start, _ in spans:
        worst.setdefault(name, (-1, max(start - 1, 0), 0, None))
        starts.setdefault(start, []).append(name)

    def begin(index: int) -> None:
        """What a phase finds when it begins counts, too: one may do nothing but free, or nothing at all."""
        for name in starts.get(index, ()):
            if total > worst[name][0]:
                worst[name] = (total, max(index - 1, 0), total, segments.reserved_nbytes if segments else None)

    for index, (number, sign) in enumerate(ledger.events):
        begin(index)
        nbytes = ledger.storages[number].nbytes
        if segments is not None:
            nbytes = sizes[number] = segments.step(number, nbytes, sign)
        total += sign * nbytes
        phase = phase_of.get(index)
        if phase is None:
            continue
        peak, at, _, reserved = worst[phase]
        if total > peak:
            peak, at = total, index
        if segments is not None:
            reserved = max(reserved or 0, segments.reserved_nbytes)
        worst[phase] = (peak, at, total, reserved)
    begin(len(ledger.events))
    return worst


def _alive_at(ledger: Ledger, index: int) -> list[int]:
    alive: dict[int, None] = {}
    for number, sign in ledger.events[: index + 1]:
        if sign > 0:
            alive[number] = None
        else:
            del alive[number]
    return [number for number in alive if ledger.storages[number].nbytes]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
