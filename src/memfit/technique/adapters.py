"""Adapters: a frozen model learns through small low-rank factors (LoRA, DoRA); over a packed model, QLoRA.

The layers are peft's, as is the saved form: what was trained here, `peft.PeftModel.from_pretrained` loads.
The model is changed in place and keeps its class and its names, so that all that works on it still does.
"""

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memfit.errors import UsageError
from memfit.packed.experts import WEIGHTS as EXPERTS
from memfit.packed.fake import copies_of_fakes, repeated
from memfit.packed.modules import (
    PackedLinear,
    is_experts,
    pack_module_skeleton,
    packed_modules,
    why_not_packed,
)
from memfit.packed.scheme import BITS, GROUPS, Scheme
from memfit.packed.store import PackedWeight

if TYPE_CHECKING:
    from peft import LoraConfig

Kind = Literal["lora", "dora"]
Dtype = Literal["model", "float32"]
Quantize = Callable[[Tensor, Scheme], tuple[Tensor, Tensor, Tensor | None]]
"""`quantize(weight [N, K], scheme)` -> int8 q [N, K], bf16 scale [N, G], int8 zero points [N, G] or None."""

_LINEAR: Final = (nn.Linear, Conv1D, PackedLinear)
_READ_DIRECTLY: Final = ("dt_proj",)
_MAMBA: Final = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Models of which peft adapts no `out_proj`: their fused kernels read its weight themselves."""
_ROUTERS: Final = ("gate", "router", "shared_expert_gate")
_TASKS: Final = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
"""End of a class's name -> peft's name of the task, and the new heads that are trained whole and saved with it."""
_PREFIX: Final = "base_model.model."
"""Of every name in a saved adapter."""


NOT_INSTALLED: Final = "peft is not installed. Run: pip install 'memfit[train]'"


def is_installed() -> bool:
    """Whether the library that makes adapters is here."""
    return importlib.util.find_spec("peft") is not None


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The technique: low-rank adapters on linear layers, all else frozen."""

    kind: Kind = "lora"
    """`lora`; `dora`: the direction of each weight's row is adapted so, its magnitude is trained by itself."""
    rank: int = 16
    alpha: float = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are dropped in training."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the layers, as peft takes them (`q_proj`); None: all linear layers of the blocks."""
    base_bits: int = 16
    """Bits of the frozen linear layers of the blocks; below 16 they are packed (QLoRA)."""
    dtype: Dtype = "model"
    """Of the adapters' parameters: the adapted layer's, or fp32. Products are in the activations' dtype."""

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("dtype", get_args(Dtype)), ("base_bits", (16, *BITS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"targets must be a tuple of names, or None for all, got {self.targets!r}")

    # -- what it would do ---------------------------------------------------------------------------------

    def why_not(self, model: nn.Module) -> str | None:
        """Why it cannot be applied to `model`, fake or real; None if it can. It names layer and shape."""
        if not is_installed():
            return NOT_INSTALLED
        if getattr(model, "peft_config", None):
            return "the model has adapters already"
        modules = dict(model.named_modules())
        for target in self.targets or ():
            matched = [name for name in modules if _ends(name, target)]
            if not matched:
                return f"the model has no layer {target!r}; its blocks have {', '.join(_endings(model)) or 'none'}"
            for name in matched:
                if (reason := _why_not_adapted(model, name, modules[name])) is not None:
                    return reason
        if not self.layers(model):
            return "the model has no blocks with linear layers. Name the layers as targets"
        return self._why_not_packed_base(model)

    def layers(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the layers that get an adapter, in the order of the model."""
        if self.targets is None:
            return tuple(n for n, m in _linear_of_blocks(model) if _why_not_adapted(model, n, m) is None)
        return tuple(n for n, _ in model.named_modules() if any(_ends(n, target) for target in self.targets))

    def packs(self, model: nn.Module) -> dict[str, Scheme]:
        """Names of the layers that are packed, and how: those of the blocks that are not packed yet, and can be."""
        found = {}
        for name, module in _weights_of_blocks(model) if self.base_bits < 16 else ():
            scheme = self._scheme(module)
            if _why_left_in_16_bits(name, module, scheme) is None:
                found[name] = scheme
        return found

    def left_out(self, model: nn.Module) -> dict[str, str]:
        """Layers of the blocks that are left as they are though all were asked for, and why."""
        found = {}
        if self.targets is None:
            for name, module in _linear_of_blocks(model):
                if (reason := _why_not_adapted(model, name, module)) is not None:
                    found[name] = f"no adapter: {reason}"
        for name, module in _weights_of_blocks(model):
            if is_experts(module) and self.targets is None:
                found[name] = f"no adapter: {name}: {type(module).__name__} is no linear layer"
            if self.base_bits < 16 and (reason := _why_left_in_16_bits(name, module, self._scheme(module))) is not None:
                found[name] = f"stays in 16 bits: {reason}"
        return found

    def _scheme(self, module: nn.Module) -> Scheme:
        """8 bits: a scale a row. Else the largest group that fits, and 64 at most from 3 bits down."""
        if self.base_bits == 8:
            return Scheme(bits=8, group=None)
        inputs = _inputs(module)
        sizes = [size for size in GROUPS if inputs % size == 0 and (self.base_bits > 3 or size <= 64)]
        return Scheme(bits=self.base_bits, group=sizes[0] if sizes else GROUPS[-1])

    def _why_not_packed_base(self, model: nn.Module) -> str | None:
        if self.base_bits == 16:
            return None
        packs = self.packs(model)
        if not packs and not packed_modules(model):
            reasons = [reason for reason in self.left_out(model).values() if "16 bits" in reason]
            return f"nothing of the blocks can be packed in {self.base_bits} bits; {reasons[0] if reasons else 'none'}"
        for name in packs:
            for parameter in model.get_submodule(name).parameters():
                if parameter.dtype != torch.bfloat16:
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    return (
                        f"{name} {list(parameter.shape)} is in {dtype}, and packed weights run in bfloat16. "
                        "Load the model in bfloat16"
                    )
        return None

    # -- doing it -----------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, quantize: Quantize | None = None) -> nn.Module:
        """`model` itself, frozen, packed if asked for, with adapters; on fake tensors or real ones.

        Args:
            model: changed in place. Packed weights must have been loaded.
            quantize: rounds a weight, where any is to be packed.

        Raises:
            UsageError: `why_not`.
        """
        if (reason := self.why_not(model)) is not None:
            raise UsageError(f"adapters: {reason}.")
        from memfit.packed.lora import ADAPTER, AdaptedLinear, Injector, recast

        packs = self.packs(model)
        if packs:
            if quantize is None:
                raise ValueError(f"base_bits={self.base_bits} needs `quantize`, to round the weights with")
            _pack(model, packs, quantize)
        config = self.config(model)
        config._register_custom_module(dict.fromkeys(_LINEAR, AdaptedLinear))
        with warnings.catch_warnings():
            # peft copies new heads (`copy.deepcopy`), which asks fake tensors for an address; they copy well without.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            with copies_of_fakes():
                Injector(model, config, ADAPTER)
        if self.dtype == "float32":
            for module in model.modules():
                if isinstance(module, AdaptedLinear):
                    for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
                        recast(part, dtype=torch.float32)
        return model

    def pack(self, model: nn.Module, quantize: Quantize, read: Callable[[str], Tensor]) -> None:
        """Pack what `apply` would, of a model that is not loaded yet: beyond it, one weight is held at a time.

        Args:
            model: changed in place; the parameters on meta.
            read: from a parameter's name to its values.

        Raises:
            UsageError: `why_not`.
        """
        if (reason := self.why_not(model)) is not None:
            raise UsageError(f"adapters: {reason}.")
        _pack(model, self.packs(model), quantize, read)

    def config(self, model: nn.Module) -> "LoraConfig":
        """What peft calls this, for `model`."""
        from peft import LoraConfig

        layers = self.layers(model)
        modules = dict(model.named_modules())
        endings = sorted({name.rpartition(".")[2] for name in layers})
        same = {name for name in modules if any(_ends(name, ending) for ending in endings)} == set(layers)
        task, heads = _task_of(model)
        trained = [name for name in heads if name in modules]
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.kind == "dora",
            target_modules=endings if same else list(layers),
            fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in layers),
            task_type=task,
            modules_to_save=trained or None,
            bias="none",
        )


def save(model: nn.Module, directory: str | Path, *, base: str | None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` writes them.

    Args:
        model: with adapters, from `Adapters.apply`.
        directory: is made; files in it are overwritten.
        base: the model that the adapters belong to, as peft will look for it: a hub id or a directory.

    Raises:
        UsageError: the model has no adapters.
    """
    if not getattr(model, "peft_config", None):
        raise UsageError("the model has no adapters to save.")
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from memfit.packed.lora import ADAPTER

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = copy.copy(model.peft_config[ADAPTER])  # type: ignore[index]
    config.base_model_name_or_path, config.inference_mode = base, True
    # Sets come out in another order in each process.
    config.target_modules = sorted(config.target_modules)
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=mapping)


def _pack(
    model: nn.Module, schemes: dict[str, Scheme], quantize: Quantize, read: Callable[[str], Tensor] | None = None
) -> None:
    """Swap layers for packed ones, the largest first; each weight is dropped as soon as it is rounded.

    Where the weights are on meta, `read` reads them.
    """
    names = sorted(schemes, key=lambda name: -_entries(model.get_submodule(name)))
    plain = {name: model.get_submodule(name) for name in names}
    pack_module_skeleton(model, schemes)
    for name in names:
        module, packed = plain.pop(name), packed_modules(model.get_submodule(name))[""]
        stores: dict[str, PackedWeight]
        if isinstance(packed, PackedLinear):
            assert isinstance(packed.store, PackedWeight), "a base rounds no activations"
            stores = {} if packed.tied else {"weight": packed.store}
        else:
            stores = {part: getattr(packed, part) for part in EXPERTS}
        for part, store in stores.items():
            weight = module.get_parameter(part).detach() if read is None else read(f"{name}.{part}")
            _fill(store, quantize, weight.flatten(0, -2), name)
            del weight
            delattr(module, part)
        del module


def _fill(store: PackedWeight, quantize: Quantize, weight: Tensor, name: str) -> None:
    def call() -> dict[str, Any]:
        store.fill(*quantize(weight, store.scheme))
        return dict(store._buffers)

    found = repeated(("pack", store.scheme, store.kernel), None, name, lambda: (weight,), call, any_recipe=True)
    store._buffers.update(found)


def _linear_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers inside of the stacks of blocks, those of adapters in them left out."""
    head = _head(model)
    for name, module in _modules_of_blocks(model):
        if isinstance(module, _LINEAR) and module is not head:
            yield name, module


def _weights_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What of the blocks is not packed yet, linear layers and experts."""
    linear = [(n, m) for n, m in _linear_of_blocks(model) if not isinstance(m, PackedLinear)]
    yield from linear
    yield from ((n, m) for n, m in _modules_of_blocks(model) if is_experts(m))


def _modules_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    stacks: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(stacks)):
            yield name, module
        elif isinstance(module, nn.ModuleList):
            stacks.append(name + ".")


def _why_not_adapted(model: nn.Module, name: str, module: nn.Module) -> str | None:
    kind, last = type(module).__name__, name.rpartition(".")[2]
    what = f"{name} {list(_shape(module))}"
    if not isinstance(module, _LINEAR):
        return f"{what}: {kind} is no linear layer"
    if kind == "NonDynamicallyQuantizableLinear" or last in _READ_DIRECTLY:
        return f"{what}: the model reads this weight itself instead of calling the layer"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA and last == "out_proj":
        return f"{what}: fused kernels of {model_type} read this weight instead of calling the layer"
    if module is _head(model) and _is_tied(model, module):
        return f"{what}: it is tied to the embedding, which an adapter of its own would part it from"
    return None


def _why_left_in_16_bits(name: str, module: nn.Module, scheme: Scheme) -> str | None:
    if name.rpartition(".")[2] in _ROUTERS:
        return f"{name} {list(_shape(module))} chooses experts"
    return why_not_packed(module, name, scheme)


def _is_tied(model: nn.Module, head: nn.Module) -> bool:
    if isinstance(head, PackedLinear):
        return head.tied
    return sum(p is head.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def _inputs(module: nn.Module) -> int:
    """What the inputs of all its weights are multiples of."""
    return math.gcd(*(p.shape[-1] for p in module.parameters(recurse=False) if p.dim() > 1))


def _entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _ends(name: str, ending: str) -> bool:
    """Whether peft takes `ending` for the module `name`."""
    return name == ending or name.endswith("." + ending)


def _endings(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, _ in _linear_of_blocks(model)})


def _task_of(model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    kind, config = type(model).__name__, getattr(model, "config", None)
    if kind.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM", ()
    return next((task for end, task in _TASKS.items() if kind.endswith(end)), (None, ()))
