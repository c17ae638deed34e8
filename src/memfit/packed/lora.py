"""Low-rank adapters over frozen linear layers, plain or packed: peft's layers, computed in less memory.

    LoRA   y = x Wᵀ + b + s · (x Aᵀ) Bᵀ                                   Hu et al., 2021, arXiv:2106.09685
    DoRA   y = m / ‖W + s B A‖ · (x Wᵀ + s · (x Aᵀ) Bᵀ) + b               Liu et al., 2024, arXiv:2402.09353

The norm is of each output's row, and a constant to the backward pass (DoRA, section 4.3). W + s B A is never made:

    ‖W + s B A‖² = ‖W‖² + 2 s Σ_r B · (W Aᵀ) + s² Σ_r B · (B A Aᵀ)

The adapter's product is added to the layer's in place, and computed in its dtype. peft's own layers make three more
tensors of that size, DoRA's four of the weight's and one of [K, K]. Names and saved form are peft's.

This file needs peft: import it where adapters are made.

Legend: M rows of activations, K inputs, N outputs, r rank, s scaling.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from memfit.errors import UsageError
from memfit.packed.fake import blocks_to_run
from memfit.packed.modules import PackedLinear, device_of

ADAPTER = "default"
"""peft's name of an only adapter; saved files do not have it."""
_TILE = 1 << 20
"""Weights that are squared at a time, and values of a product that are added at a time."""
_MULTIPLE = 64
"""Of rows of a tile: packed ones are laid out in blocks of so many."""


class AdaptedLinear(lora.Linear):
    """A linear layer, GPT-2's `Conv1D` or a `PackedLinear`, frozen, and an adapter."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)

    # -- what peft asks about the layer, and could only find out of a plain one --------------------------

    @property
    def lora_variants(self) -> Any:
        return super().lora_variants | {("use_dora",): Dora}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        if isinstance(module, PackedLinear):
            return module.in_features, module.out_features
        return super()._get_in_out_features(module)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        if isinstance(base_layer, PackedLinear):  # its `weight` is on meta
            return device_of(base_layer.store), base_layer.weight.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[no-any-return, no-untyped-call]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # peft calls `Module.to`, which swaps fake parameters, and cannot where something has a weak reference to one.
        own, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for part in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if adapter_name in part:
                recast(part[adapter_name], device=device or own, dtype=dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.base_layer, PackedLinear):
            raise UsageError(
                f"an adapter cannot be merged into a packed weight [{self.out_features}, {self.in_features}]. Save it, "
                "and merge it into the unpacked model."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    # -- running it -------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        usual = len(names) == 1 and not self.disable_adapters and not self.merged and not self.lora_bias[names[0]]
        if args or kwargs or not usual:
            return super().forward(x, *args, **kwargs)
        # Flat, so that the product is no view: in place on a view, the backward pass would copy its gradient.
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN: Tensor = self.base_layer(x_MK)
        if names[0] in self.lora_variant:
            y_MN = self._with_dora(names[0], x_MK, y_MN)
        else:
            y_MN = self._add_product(names[0], self.lora_dropout[names[0]](x_MK), y_MN)
        return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], y_MN.shape[-1])

    def _add_product(self, name: str, x_MK: Tensor, y_MN: Tensor) -> Tensor:
        """y + s (x Aᵀ) Bᵀ, in y."""
        down, up = self._factors(name)
        h_Mr = F.linear(x_MK, down.to(x_MK.dtype))
        arguments = (y_MN, h_Mr.to(y_MN.dtype), up.to(y_MN.dtype), self.scaling[name])
        added = _AddProduct.apply(*arguments)  # type: ignore[no-untyped-call]
        return cast(Tensor, added)

    def _with_dora(self, name: str, x_MK: Tensor, y_MN: Tensor) -> Tensor:
        magnitude = cast(Magnitude, self.lora_magnitude_vector[name])
        norm = magnitude.norm(self.base_layer, *self._factors(name), self.scaling[name])
        share = (magnitude.weight.to(norm.dtype) / norm).to(y_MN.dtype)
        bias = cast(Tensor | None, self.base_layer.bias)
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Identity) or not self.training:
            plain = y_MN if bias is None else y_MN.sub_(bias)
            out = self._add_product(name, x_MK, plain) * share
            return out if bias is None else out.add_(bias)
        # What is dropped is dropped of the change alone: x Wᵀ stays whole.
        x_MK = dropout(x_MK)
        plain = self.base_layer(x_MK)
        plain = plain if bias is None else plain.sub_(bias)
        y_MN = y_MN.sub_(plain)
        return y_MN.add_(self._add_product(name, x_MK, plain) * share)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r]."""
        return cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)


class _AddProduct(torch.autograd.Function):
    """y += s · h Bᵀ, in tiles of rows: the product is never whole, and nothing of its size is kept."""

    @staticmethod
    def forward(ctx: Any, y_MN: Tensor, h_Mr: Tensor, up_Nr: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(h_Mr, up_Nr)
        ctx.scaling = scaling
        ctx.mark_dirty(y_MN)
        step = max(_TILE // y_MN.shape[1], 1)
        for start in blocks_to_run(range(0, y_MN.shape[0], step)):
            rows = slice(start, min(start + step, y_MN.shape[0]))
            product = torch.mm(h_Mr[rows], up_Nr.t())
            y_MN[rows].add_(product, alpha=scaling)
            del product
        return y_MN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        h_Mr, up_Nr = ctx.saved_tensors
        d_h = torch.mm(g_MN, up_Nr).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        d_up = torch.mm(g_MN.t(), h_Mr).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        return g_MN, d_h, d_up, None


class Magnitude(DoraLinearLayer):
    """DoRA's m [N], trained, and the squares ‖W‖² of the frozen weight's rows, computed once."""

    squares: Tensor

    def __init__(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(fan_in_fan_out=isinstance(base_layer, Conv1D))  # type: ignore[no-untyped-call]
        squares = row_squares(base_layer)
        self.register_buffer("squares", squares, persistent=False)
        # B is zero at first, so that ‖W + s B A‖ is ‖W‖ and the layer's output does not change.
        self.weight = nn.Parameter(squares.sqrt().to(dtype))

    @torch.no_grad()
    def norm(self, base_layer: nn.Module, down_rK: Tensor, up_Nr: Tensor, scaling: float) -> Tensor:
        """‖W + s B A‖ of each row, [N] in fp32 (fp64 for fp64)."""
        wide = self.squares.dtype
        with torch.autocast(down_rK.device.type, enabled=False):
            across_Nr = _times(base_layer, down_rK).t().to(wide)
            down, up = down_rK.to(wide), up_Nr.to(wide)
            across_Nr = across_Nr.mul(2.0 * scaling).add_(up @ (down @ down.t()), alpha=scaling * scaling)
            total = across_Nr.mul_(up).sum(dim=1).add_(self.squares)
        # A row of zeros has the magnitude zero: its share is 0, not 0 / 0.
        return total.clamp_(min=torch.finfo(wide).tiny).sqrt_()


class Dora(DoraLinearVariant):
    """DoRA, in peft's terms; merging into a plain weight is peft's own."""

    @staticmethod
    def init(module: lora.LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        dtype = cast(Tensor, module.lora_A[adapter_name].weight).dtype
        module.lora_magnitude_vector[adapter_name] = Magnitude(module.get_base_layer(), dtype)

    @staticmethod
    def forward(module: lora.LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        assert isinstance(module, AdaptedLinear)
        flat = result.reshape(-1, result.shape[-1])
        return module._with_dora(active_adapter, x.reshape(-1, x.shape[-1]), flat).view(result.shape)


class Injector(LoraModel):
    """Puts adapters into a model, in place: `Injector(model, config, ADAPTER)`; the model stays what it is."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft would move the adapter to where `child.weight` is: on meta, where that is packed. It is in its place.
        setattr(parent, child_name, new_module)


@torch.no_grad()
def recast(module: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    """Give a module parameters of another dtype, or elsewhere, in the place of its own; buffers stay."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and (dtype not in (None, old.dtype) or device not in (None, old.device)):
                part._parameters[name] = nn.Parameter(
                    old.detach().to(device=device, dtype=dtype), requires_grad=old.requires_grad
                )


@torch.no_grad()
def row_squares(base_layer: nn.Module) -> Tensor:
    """‖W‖² of each output's row, [N] in fp32 (fp64 for fp64), a tile of W at a time."""
    if isinstance(base_layer, PackedLinear):
        store = base_layer.store
        (rows, inputs), dtype, device = store.shape, torch.float32, device_of(store)
    else:
        weight = _rows(base_layer)
        (rows, inputs), device = weight.shape, weight.device
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    squares = torch.empty(rows, dtype=dtype, device=device)
    step = max(_TILE // inputs // _MULTIPLE, 1) * _MULTIPLE
    for start in blocks_to_run(range(0, rows, step)):
        stop = min(start + step, rows)
        packed = isinstance(base_layer, PackedLinear)
        tile = (store.dense_rows(start, stop) if packed else weight[start:stop]).to(dtype, copy=True)
        squares[start:stop].copy_(tile.square_().sum(dim=1))
        del tile
    return squares


def _rows(base_layer: nn.Module) -> Tensor:
    """W [N, K] of a layer that is not packed."""
    weight = cast(Tensor, base_layer.weight).detach()
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def _times(base_layer: nn.Module, x_rK: Tensor) -> Tensor:
    """x Wᵀ [r, N], without the bias, in the weight's dtype."""
    if isinstance(base_layer, PackedLinear):
        return base_layer.store.matmul(x_rK.to(base_layer.weight.dtype))
    weight = _rows(base_layer)
    return F.linear(x_rK.to(weight.dtype), weight)
