"""What CUDA's autocast keeps in fp32 and the CPU's does not: fake tensors are on the CPU, and so under the CPU's.

After ATen/autocast_mode.h: the lists of functions that run in fp32, in so far as language models call them.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_NAMES: Final = (
    "pow", "__pow__", "rsqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "reciprocal", "softmax", "log_softmax",
    "softplus", "layer_norm", "group_norm", "cross_entropy", "nll_loss", "kl_div", "mse_loss", "logsumexp", "norm",
    "sum", "prod", "cumsum", "cumprod", "cosine_similarity", "smooth_l1_loss", "l1_loss",
)  # fmt: skip
_WIDE: Final = frozenset(
    getattr(place, name) for place in (torch, Tensor, F) for name in _NAMES if hasattr(place, name)
)
_HALVES: Final = (torch.float16, torch.bfloat16)


class CudaAutocast(TorchFunctionMode):
    """Inside, where autocast is on, 16-bit tensors given to one of CUDA's list become fp32 before."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor
