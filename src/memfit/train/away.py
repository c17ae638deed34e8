"""Weights that wait elsewhere, on the host or the disk, and are in memory while their block runs (exact).

A parameter that is away stays the same object, with its shape and dtype: its data is one entry, repeated. `here` brings
it for a time, and what has changed in that time is written back. (Offload of parameters: Rajbhandari et al., 2021,
ZeRO-Infinity, arXiv:2104.07857.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.technique.checkpoint import Segment

from .recipe import Recipe
from .states import States, states_at
from .uses import in_one_block

_STATE: Final = "weight"
_ATTRIBUTE: Final = "memfit_away"


@dataclass(slots=True)
class _Away:
    """Where one parameter waits."""

    store: States
    name: str
    hole: Tensor
    """What its data is meanwhile."""
    entries: int
    uses: int = field(default=0)
    changed: bool = field(default=False)


def may_leave(parameter: Tensor) -> bool:
    """Whether it is worth the way: vectors stay."""
    return parameter.dim() > 1


@torch.no_grad()
def send_away(parameter: nn.Parameter, store: States, name: str) -> None:
    """Move the parameter's data into `store`, under `name`; nothing if it is away already."""
    if _away(parameter) is not None:
        return
    flat = parameter.detach().reshape(-1)
    store.make(name, {_STATE: (parameter.dtype, flat.numel())}, parameter, held={_STATE: flat.cpu()})
    hole = torch.empty(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    store.write(name, _STATE, 0, flat)
    setattr(parameter, _ATTRIBUTE, _Away(store, name, hole, flat.numel()))
    parameter.data = hole


def bring_back(parameter: nn.Parameter) -> None:
    """Let the parameter have its data from now on."""
    away = _away(parameter)
    if away is not None:
        assert not away.uses, f"{away.name} is in use"
        parameter.data = _read(away)
        delattr(parameter, _ATTRIBUTE)


@contextmanager
def here(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the parameters have their data; those marked by `changed` are written back in the end."""
    found = [(parameter, away) for parameter in parameters if (away := _away(parameter)) is not None]
    try:
        for parameter, away in found:
            if not away.uses:
                parameter.data = _read(away)
            away.uses += 1
        yield
    finally:
        for parameter, away in found:
            away.uses -= 1
            if not away.uses:
                if away.changed:
                    away.store.write(away.name, _STATE, 0, parameter.detach().view(-1))
                    away.changed = False
                parameter.data = away.hole


def changed(parameter: nn.Parameter) -> None:
    """To be called where its data was changed."""
    away = _away(parameter)
    if away is not None:
        away.changed = True


def sending(recipe: Recipe, directory: str | None = None) -> Callable[[str, nn.Parameter], None] | None:
    """What sends weights away as `recipe` says, each as soon as it is loaded; None if all stay.

    It takes a parameter's only name, and the parameter.
    """
    if recipe.weights == "memory":
        return None
    store, blocks = states_at(recipe.weights, directory), tuple(name + "." for name in recipe.recompute)

    def send(name: str, parameter: nn.Parameter) -> None:
        if name.startswith(blocks) and may_leave(parameter):
            send_away(parameter, store, name)

    return send


def place(
    model: nn.Module, segments: Sequence[Segment], recipe: Recipe, directory: str | None, stack: ExitStack
) -> None:
    """Send the weights of blocks that are recomputed to where they are to wait, and bring those of others back.

    Until `stack` is left, `model.state_dict()` is refused where some are away: what is in their place is no weight.
    """
    send = sending(recipe, directory)
    sent: set[int] = set()
    if send is not None:
        stacked = in_one_block(model)
        for segment in segments:
            for name, parameter in segment.block.named_parameters():
                # Of adapters, what is trained stays: it is small, and is saved by others.
                if id(parameter) in stacked and (recipe.adapters is None or not parameter.requires_grad):
                    send(f"{segment.name}.{name}", parameter)
                    sent.add(id(parameter))
    for parameter in model.parameters():
        if id(parameter) not in sent:
            bring_back(parameter)
    if sent and recipe.adapters is None:
        hook: Any = model.register_state_dict_pre_hook(_refuse_holes)  # type: ignore[no-untyped-call]
        stack.callback(hook.remove)


def _refuse_holes(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not keep_vars:  # who asks for the parameters themselves brings them
        raise UsageError(
            "weights wait elsewhere between steps, and what is in their place would be saved. Call the step's close() "
            "first, which brings all of them back."
        )


def _read(away: _Away) -> Tensor:
    return away.store.read(away.name, _STATE, 0, away.entries).view(away.hole.shape)


def _away(parameter: Tensor) -> _Away | None:
    return getattr(parameter, _ATTRIBUTE, None)
