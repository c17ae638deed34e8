"""Modules that stand for a fitted model's in an ONNX graph, and what each of their tensors is read from.

N outputs or vocabulary entries, K inputs or width, b bits, g the block that shares a scale, G = K/g blocks of a row.

ONNX Runtime's operators of the domain `com.microsoft`: `MatMulNBits` multiplies by integers in blocks,
`GatherBlockQuantized` looks rows of such up. Both take u = q + 2^(b−1) as uint8, the first value of a byte in its low
bits, which is what compressed-tensors' words are, byte for byte; scales in float32; and zero points z + 2^(b−1),
packed along a row's blocks and left out if all are 2^(b−1).
Source: onnxruntime/docs/ContribOperators.md, checked with onnxruntime 1.32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memfit.errors import UsageError
from memfit.packed.forms import Form
from memfit.packed.modules import PackedEmbedding, PackedLinear, is_experts, packed_modules, why_not_packed
from memfit.packed.scheme import Scheme
from memfit.source.source import Source

ONNX_BITS: Final = (8, 4, 2)
"""Widths that ONNX Runtime multiplies and looks up on a CPU; 3, 5, 6 and 7 it has not."""
_BLOCKS: Final = (256, 128, 64, 32)
"""Blocks that it takes at every width and that a row can be cut into; a row is a multiple of 32."""
_DOMAIN: Final = "com.microsoft"
_ANY: Final = Scheme(bits=8, group=None)
"""Asked for where only a module's call matters: what can be packed at all is called as a plain product or look-up."""

Kind = Literal["values", "scales", "zeros", "plain"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one initializer of a graph is read from: a part of a packed module's weight, or a plain parameter."""

    kind: Kind
    owner: str
    """The packed module whose weight it is, of tied ones the one that stores it; or the parameter's name."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    """Of a packed weight."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def key(self) -> tuple[str, str, torch.dtype]:
        """Parts of one key hold the same bytes, whatever their shapes: they are in a file once."""
        return self.kind, self.owner, self.dtype


def block_of(scheme: Scheme, inputs: int) -> int:
    """Values that share a scale in the graph: the scheme's own group if ONNX Runtime takes it, else the largest block
    that divides it, whose scale is then repeated."""
    group = inputs if scheme.group is None else scheme.group
    return next(block for block in _BLOCKS if group % block == 0)


def require_onnx_scheme(scheme: Form, name: str) -> Scheme:
    """The scheme of module `name`.

    Raises:
        UsageError: ONNX Runtime has no form for it.
    """
    if not isinstance(scheme, Scheme) or scheme.values != "int" or scheme.activations != 16:
        raise UsageError(
            f"{name}: {scheme.name} cannot be in an ONNX file: ONNX Runtime multiplies floats with weights that are "
            "integers. Choose integers (--values int), and leave --activations out."
        )
    if scheme.bits not in ONNX_BITS:
        known = ", ".join(map(str, ONNX_BITS))
        raise UsageError(
            f"{name}: {scheme.name} cannot be in an ONNX file: ONNX Runtime multiplies integers of {known} bits. "
            f"Choose among these (--bits {','.join(map(str, ONNX_BITS))})."
        )
    return scheme


class _NBits(nn.Module):
    """Integers in blocks: `qweight` uint8 [..., K·b/8], `scales` float32 [N, G], `zero_points` uint8 [N, ⌈G·b/8⌉]."""

    qweight: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, packed: PackedLinear | PackedEmbedding, owner: str, *, flat: bool) -> None:
        super().__init__()
        scheme, (self.rows, self.inputs) = require_onnx_scheme(packed.store.scheme, owner), packed.store.shape
        self.scheme, self.owner, self.block = scheme, owner, block_of(scheme, self.inputs)
        blocks = self.inputs // self.block
        values = (self.inputs * scheme.bits // 8,) if flat else (blocks, self.block * scheme.bits // 8)
        self.register_buffer("qweight", torch.empty(self.rows, *values, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(self.rows, blocks))
        zeros = None
        if not scheme.symmetric:
            zeros = torch.empty(self.rows, math.ceil(blocks * scheme.bits / 8), dtype=torch.uint8)
        self.register_buffer("zero_points", zeros)

    def parts(self) -> dict[str, Part]:
        kinds: dict[str, Kind] = {"qweight": "values", "scales": "scales", "zero_points": "zeros"}
        return {
            name: Part(
                kind=kinds[name], owner=self.owner, dtype=buffer.dtype, shape=tuple(buffer.shape), scheme=self.scheme
            )
            for name, buffer in self.named_buffers(recurse=False)
            if name in kinds
        }

    def weight_inputs(self) -> list[Tensor]:
        return [self.scales] if self.zero_points is None else [self.scales, self.zero_points]


class NBitsLinear(_NBits):
    """x · ŵᵀ + bias by `MatMulNBits`."""

    def __init__(self, packed: PackedLinear, owner: str, *, accuracy_level: int) -> None:
        super().__init__(packed, owner, flat=False)
        self.bias, self.accuracy_level = packed.bias, accuracy_level

    @property
    def weight(self) -> Tensor:
        """Models ask for its type."""
        return torch.empty(0)

    def forward(self, input: Tensor) -> Tensor:
        attributes: dict[str, Any] = {
            "K": self.inputs, "N": self.rows, "bits": self.scheme.bits, "block_size": self.block,
        }  # fmt: skip
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        y: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::MatMulNBits", [input, self.qweight, *self.weight_inputs()], attributes,
            dtype=input.dtype, shape=(*input.shape[:-1], self.rows), version=1,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias


class NBitsEmbedding(_NBits):
    """Rows of a table by `GatherBlockQuantized`, times `embed_scale` where the model has one."""

    def __init__(self, packed: PackedEmbedding, owner: str) -> None:
        super().__init__(packed, owner, flat=True)
        self.embed_scale, self.padding_idx = packed.embed_scale, packed.padding_idx
        self.num_embeddings, self.embedding_dim = packed.num_embeddings, packed.embedding_dim

    @property
    def weight(self) -> Tensor:
        """Models ask for its type."""
        return torch.empty(0)

    def forward(self, input: Tensor) -> Tensor:
        attributes: dict[str, Any] = {
            "bits": self.scheme.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1,
        }  # fmt: skip
        rows: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::GatherBlockQuantized", [self.qweight, input, *self.weight_inputs()], attributes,
            dtype=torch.float32, shape=(*input.shape, self.inputs), version=1,
        )  # fmt: skip
        return rows if self.embed_scale is None else rows * self.embed_scale


class HalfLinear(nn.Module):
    """A linear layer, or GPT-2's, whose weight stays in bf16 in the file. ONNX Runtime widens it as it loads."""

    def __init__(self, linear: nn.Linear | Conv1D, weight: nn.Parameter) -> None:
        super().__init__()
        self.turned = isinstance(linear, Conv1D)
        self.stored, self.bias = weight, linear.bias

    @property
    def weight(self) -> Tensor:
        return self.stored.float()

    def forward(self, input: Tensor) -> Tensor:
        wide = self.stored.float()
        return F.linear(input, wide.t() if self.turned else wide, self.bias)


class HalfEmbedding(nn.Module):
    """A table that stays in bf16, in the file and in memory: only rows looked up are widened."""

    def __init__(self, table: Any, weight: nn.Parameter) -> None:
        super().__init__()
        self.stored, self.embed_scale = weight, getattr(table, "embed_scale", None)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx

    @property
    def weight(self) -> Tensor:
        return self.stored.float()

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.stored).float()
        return rows if self.embed_scale is None else rows * self.embed_scale


def put_onnx_modules(model: nn.Module, source: Source, *, accuracy_level: int) -> dict[str, Part]:
    """Swap the modules of `model`, in place, for those above; what each tensor of it is read from, by its name.

    Args:
        model: `source.build(dtype=torch.float32)`, under a fake mode: its parameters become fake ones on the CPU.
        source: a fitted model.
        accuracy_level: of `MatMulNBits`: 0, computed in float32; 4, activations are rounded to int8.

    Raises:
        UsageError: a module has no form in ONNX.
    """
    owners = {id(tensor): name for name, tensor in model.named_parameters()}
    parts: dict[str, Part] = {}
    for name, module in packed_modules(model).items():
        if not isinstance(module, PackedLinear | PackedEmbedding):
            raise UsageError(f"{name}: fused experts cannot be in an ONNX file. Give a model without, or another form.")
        require_onnx_scheme(module.store.scheme, name)
        owner = source.tied.get(name, name)
        made: NBitsLinear | NBitsEmbedding
        if isinstance(module, PackedLinear):
            made = NBitsLinear(module, owner, accuracy_level=accuracy_level)
        else:
            made = NBitsEmbedding(module, owner)
        parts |= {f"{name}.{leaf}": part for leaf, part in made.parts().items()}
        _put(model, name, made)
    halves: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if is_experts(module):
            raise UsageError(f"{name}: fused experts cannot be in an ONNX file. Give a model without, or another form.")
        if (form := _half_form(module, name)) is not None:
            weight: nn.Parameter = module.get_parameter("weight")
            half = halves.setdefault(id(weight), _fake(weight, torch.bfloat16))
            _put(model, name, form(module, half))
            parts[f"{name}.stored"] = _plain(owners[id(weight)], half)
    plain: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in parts:
            wide = plain.setdefault(id(parameter), _fake(parameter, torch.float32))
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, wide)
            parts[name] = _plain(owners[id(parameter)], wide)
    return parts


def _half_form(module: nn.Module, name: str) -> Callable[[Any, nn.Parameter], nn.Module] | None:
    """What stands for a module whose weight is a matrix that stays in 16 bits; None: it stays in float32.

    Those are few and small: tables that are not simply looked up, as OPT's positions, and inputs that fill no word.
    """
    if isinstance(module, Conv1D):
        return HalfLinear
    plain = isinstance(module, nn.Linear | nn.Embedding) and why_not_packed(module, name, _ANY) is None
    return None if not plain else HalfLinear if isinstance(module, nn.Linear) else HalfEmbedding


def _plain(owner: str, parameter: nn.Parameter) -> Part:
    return Part(kind="plain", owner=owner, dtype=parameter.dtype, shape=tuple(parameter.shape))


def _fake(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.eval())
