"""What an output directory stores, told from the model alone: its tensors, in file order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from memfit.format.packed import OWN, packed_buffers, packed_specs, stored_as
from memfit.format.safetensors import TensorSpec
from memfit.packed.experts import WEIGHTS
from memfit.packed.forms import Form
from memfit.packed.modules import is_experts


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The tensors of an output, and what its config has to say of them."""

    specs: tuple[TensorSpec, ...]
    packed: Mapping[str, tuple[str, ...]]
    """Quantized module (fused experts: parameter) to the names of its tensors, in the order of `specs`."""
    plain: tuple[str, ...]
    """Parameters and persistent buffers that are stored as they are, in bf16."""
    extra: tuple[str, ...]
    """Buffers of packed modules that stock transformers looks for in the file."""
    embeddings: tuple[str, ...]
    """Quantized modules that are tables, and the heads tied to them."""
    tied: Mapping[str, str]
    """Quantized module to the one whose table it shares."""
    ignore: tuple[str, ...]
    """Linear layers left in 16 bits."""
    module_of: Mapping[str, str]
    """Key of `packed` to the quantized module that it is of."""
    own: bool
    """Whether something is stored as memfit alone reads it: the files then have names that no other program looks for.
    """

    def shape_of(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of what is written under a name of `plain_and_packed`."""
        parts = set(self.packed.get(name, (name,)))
        return tuple(spec.shape for spec in self.specs if spec.name in parts)

    def plain_and_packed(self) -> tuple[str, ...]:
        """What is to be written, in the order of `specs`: keys of `packed`, then `plain`, then `extra`."""
        return (*self.packed, *self.plain, *self.extra)


def stored_tensors(model: nn.Module, schemes: Mapping[str, Form]) -> Stored:
    """What a model with these schemes stores.

    Args:
        model: unpacked, its parameters on meta; tied parameters are one object.
        schemes: module name to scheme; of tied modules, all are there.
    """
    owner: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(schemes, key=lambda name: not isinstance(model.get_submodule(name), nn.Embedding)):
        weight = getattr(model.get_submodule(name), "weight", None)
        if isinstance(weight, nn.Parameter):
            first = owner.setdefault(id(weight), name)
            if first != name:
                tied[name] = first
    tables = {name for name in schemes if isinstance(model.get_submodule(name), nn.Embedding)}
    embeddings = {*tables, *(name for name, first in tied.items() if first in tables)}
    specs: list[TensorSpec] = []
    packed: dict[str, tuple[str, ...]] = {}
    quantized: set[int] = set()
    module_of: dict[str, str] = {}
    for name, scheme in schemes.items():
        if name in tied:
            continue
        sharing = [other for other, first in tied.items() if first == name]
        for stored, parameter in weights_of(model, name).items():
            shape = (math.prod(parameter.shape[:-1]), parameter.shape[-1])
            made = packed_specs(stored, shape, scheme, embedding=name in embeddings, tied=sharing)
            specs += made
            packed[stored] = tuple(spec.name for spec in made)
            quantized.add(id(parameter))
            module_of[stored] = name
    plain = []
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in quantized or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        plain.append(name)
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape)))
    buffers = packed_buffers(model, schemes)
    for name, buffer in buffers.items():
        specs.append(TensorSpec(name=name, dtype=buffer.dtype, shape=tuple(buffer.shape)))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return Stored(
        specs=tuple(specs),
        packed=packed,
        plain=tuple(plain),
        extra=tuple(buffers),
        embeddings=tuple(sorted(embeddings)),
        tied=tied,
        ignore=tuple(sorted(linears - schemes.keys())),
        module_of=module_of,
        own=any(stored_as(scheme, embedding=name in embeddings) == OWN for name, scheme in schemes.items()),
    )


def weights_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The weights of a quantizable module, by the name that their packed parts are stored under."""
    module = model.get_submodule(name)
    if is_experts(module):
        return {f"{name}.{part}": module.get_parameter(part) for part in WEIGHTS}
    return {name: module.get_parameter("weight")}
