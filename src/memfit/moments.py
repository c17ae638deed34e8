"""What a trace says of a phase's moments, with the weights and the cache that a plan chooses left out."""

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import nn

from memfit.account.ledger import Ledger, phase_spans


def moments(
    ledger: Ledger, owner: Mapping[str, str]
) -> tuple[int, dict[str, int], dict[tuple[str, str], int], dict[str, int]]:
    """What a trace says of each phase, weights of groups and the KV cache left out.

    Returns: bytes of parameters and buffers that belong to no group; phase to the most other bytes alive
    while no group's module runs; (phase, module) to the most while it runs; phase to the KV cache's bytes at
    its end.
    """
    storages = ledger.storages
    fixed = sum(
        s.nbytes for s in storages if s.kind in ("parameter", "buffer") and not member_of(s.module, owner)
    )
    rest: dict[str, int] = {}
    running: dict[tuple[str, str], int] = {}
    kv_nbytes: dict[str, int] = {}
    phase_of = {index: name for name, start, end in phase_spans(ledger) for index in range(start, end)}
    total = kv = 0
    for index, (number, sign) in enumerate(ledger.events):
        storage = storages[number]
        if storage.kind == "kv_cache":
            kv += sign * storage.nbytes
        elif storage.kind not in ("parameter", "buffer"):
            total += sign * storage.nbytes
        phase = phase_of.get(index)
        if phase is None:
            continue
        kv_nbytes[phase] = max(kv_nbytes.get(phase, 0), kv)
        member = member_of(storage.module, owner) if storage.kind != "kv_cache" and sign > 0 else None
        if member is None:
            rest[phase] = max(rest.get(phase, 0), total)
        else:
            running[phase, member] = max(running.get((phase, member), 0), total)
    return fixed, {**dict.fromkeys(rest, 0), **rest}, running, {k: v for k, v in kv_nbytes.items() if v}


def member_of(module: str, owner: Mapping[str, str]) -> str | None:
    """The group member that `module` is or lies in."""
    while module:
        if module in owner:
            return module
        module = module.rpartition(".")[0]
    return None


_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)")


def kind_of(module: str) -> str:
    """A module's name with the numbers of its layers left out: equal for equal modules of a stack."""
    return _NUMBER.sub("#", module)


def fake_weights(module: nn.Module) -> None:
    """Give every meta parameter and buffer a fake tensor of its shape."""
    for part in module.modules():
        for name, tensor in list(part._parameters.items()):
            if tensor is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty_like(tensor, device="cpu"), requires_grad=False
                )
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")
