"""What the processor has instructions for."""

import torch


def multiplies_bf16() -> bool:
    """Whether products of bf16 are faster than those of fp32; without, they are slower by far."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
