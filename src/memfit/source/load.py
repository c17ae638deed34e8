"""From a source to a model that runs, one parameter at a time; the same on fake tensors."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from memfit.packed.fake import aiming_at
from memfit.packed.modules import packed_modules
from memfit.source.check import check
from memfit.source.skeleton import locate
from memfit.source.source import Source

Place = Callable[[str], torch.device | str]
"""From a parameter's or packed module's name to the device that it goes to."""
Read = Callable[[str], torch.Tensor]
"""From a parameter's name to a fresh CPU tensor of it, in the model's dtype."""


def load(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    place: Place | None = None,
    pack: Callable[[nn.Module, Read], None] | None = None,
    send: Callable[[str, nn.Parameter], None] | None = None,
) -> nn.Module:
    """The model of `source` with its weights, in evaluation mode.

    Beyond the model, at most one stored tensor of a packed module, or a block of 4 MiB, or, for another
    device than the CPU, one parameter is held. What needs most of that is loaded first, while little else is there.

    Args:
        source: what to load.
        dtype: of the float parameters; default: as the config says, else as stored.
        device: where the parameters and buffers go.
        place: where each parameter goes, by its name, in place of `device`.
        pack: is called with the model while all its parameters are on meta; puts filled packed modules into it, and
            reads what they are made of.
        send: is given each parameter that is not tied, and its name, as soon as it was read, and may take its data.

    Raises:
        BrokenInput: a weight is missing, of another shape or type, or not finite.
    """
    check(source, copies=False)
    # Packed weights are laid out for where they will be; on a CPU, for what a dry run is aimed at.
    kind = torch.device(device).type
    where: Place = place if place is not None else lambda name: device
    with nullcontext() if kind == "cpu" else aiming_at(kind):
        model = source.build(dtype=dtype)
        packed, stored = packed_modules(model), _stored_nbytes(source)
        if pack is not None:
            plain = dict(model.named_parameters(remove_duplicate=False))
            pack(model, lambda name: source.read_parameter(name, dtype=plain[name].dtype))
            for name, module in packed_modules(model).items():
                if name not in packed:
                    _move_buffers(module, where(name))
    for name, module in sorted(packed.items(), key=lambda item: -stored[item[0]]):
        module.load_from(source.read_packed, name)
        _move_buffers(module, where(name))
    for names in sorted(_parameters(model), key=lambda names: -_nbytes(model, names[0])):
        parameter = _materialise(model, names, source, torch.device(where(names[0])))
        if send is not None and len(names) == 1:
            send(names[0], parameter)
        del parameter
    _load_buffers(model, source, where)
    return model


def _parameters(model: nn.Module) -> Iterator[list[str]]:
    """The names of each parameter still on meta: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type == "meta":
            names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def _materialise(model: nn.Module, names: list[str], source: Source, device: torch.device) -> nn.Parameter:
    """Read one parameter and set it under each of its names."""
    tensor = source.read_parameter(names[0], dtype=model.get_parameter(names[0]).dtype)
    parameter = nn.Parameter(_at(tensor, device), requires_grad=False)
    for name in names:
        owner, leaf = locate(model, name)
        setattr(owner, leaf, parameter)
    return parameter


def _load_buffers(model: nn.Module, source: Source, where: Place) -> None:
    """Read the persistent buffers that the checkpoint has; move them all to their place."""
    inside = {id(part) for module in packed_modules(model).values() for part in module.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        for leaf, buffer in list(module._buffers.items()):
            full = f"{name}.{leaf}" if name else leaf
            if buffer is not None and full in source.layout.pieces:
                source.read_into(full, buffer)
            if buffer is not None:
                module._buffers[leaf] = _at(buffer, where(full))


def _move_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move what a packed module holds; its bias, if any, is a parameter and is still to be read."""
    for part in module.modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[leaf] = _at(buffer, device)


def _at(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on its device: what stays is not asked, which thousands of times in a dry run would tell."""
    return tensor if torch.device(device).type == "cpu" else tensor.to(device)


def _stored_nbytes(source: Source) -> Counter[str]:
    """Bytes stored under each module's name, those of the modules below it among them."""
    found: Counter[str] = Counter()
    for name, info in source.tensors.items():
        while name := name.rpartition(".")[0]:
            found[name] += info.nbytes
    return found


def _nbytes(model: nn.Module, name: str) -> int:
    parameter = model.get_parameter(name)
    return parameter.numel() * parameter.dtype.itemsize
