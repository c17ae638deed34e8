"""Put what techniques have made of a model's weights into the model, in memory."""

from collections.abc import Mapping

from torch import nn

from memfit.errors import UsageError
from memfit.packed.integer import IntegerWeight
from memfit.packed.low_rank import LowRankWeight
from memfit.packed.modules import PackedEmbedding, PackedLinear, pack_module_skeleton
from memfit.packed.narrow import NarrowWeight
from memfit.packed.parts import Parts
from memfit.packed.store import PackedWeight

from .made import Made
from .quantize import Quantized


def install(model: nn.Module, made: Mapping[str, Made | Quantized]) -> None:
    """Swap linear layers and tables of `model`, in place, for modules that run from what was made of their weights.

    Args:
        model: real; biases and all other parameters stay.
        made: by module name; owners of what is shared are among them.

    Raises:
        UsageError: a module does not exist or cannot run so, or an owner is missing; nothing was swapped then.
    """
    forms = {name: one.scheme if isinstance(one, Quantized) else one.form for name, one in made.items()}
    for name, one in made.items():
        shape = tuple(one.q.shape) if isinstance(one, Quantized) else one.shape
        own = getattr(dict(model.named_modules()).get(name), "weight", None)
        if own is not None and tuple(own.shape) != shape:
            raise UsageError(f"{name} is {list(own.shape)}, and what was made for it {list(shape)}")
    pack_module_skeleton(model, forms)
    for name, one in made.items():
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear | PackedEmbedding), "nothing else has these forms"
        store = module.store
        if isinstance(one, Quantized):
            _fill(store, one)
            continue
        assert isinstance(store, Parts)
        store.fill(dict(one.parts))
        if one.base is not None:
            assert isinstance(store, LowRankWeight | NarrowWeight) and store.base is not None
            _fill(store.base, one.base)


def _fill(store: nn.Module, quantized: Quantized) -> None:
    if isinstance(store, IntegerWeight):
        store.fill(quantized.q, quantized.scale, quantized.zero)
        return
    assert isinstance(store, PackedWeight)
    store.fill(quantized.q, quantized.scale, quantized.zero, quantized.table)
