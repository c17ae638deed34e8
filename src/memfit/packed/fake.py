"""Fake tensors have shapes and dtypes and no storage; what only makes sense on real ones is guarded here."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no bytes to read: it was made under `FakeTensorMode`."""
    return isinstance(tensor, FakeTensor)
