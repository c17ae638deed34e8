"""The tensors of packed modules in a file, as compressed-tensors and stock transformers look for them."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from memfit.format.safetensors import TensorSpec
from memfit.packed.bits import pack_values
from memfit.packed.forms import Form, LowRank, Narrow
from memfit.packed.levels import level_table, scale_values
from memfit.packed.scheme import OWN_VALUES, Scheme
from memfit.technique.quantize import Quantized

PACKED: Final = "pack-quantized"
INT: Final = "int-quantized"
FLOAT: Final = "float-quantized"
MXFP4: Final = "mxfp4-pack-quantized"
OWN: Final = "memfit"
"""No format of compressed-tensors: stock transformers must not find such weights, or it would draw random ones."""


def stored_as(scheme: Form, *, embedding: bool) -> str:
    """The format of compressed-tensors that stock transformers can read a weight of this scheme in, or `OWN`.

    `pack-quantized` where it works. transformers 5.24 with compressed-tensors 0.20 fails on it for embeddings
    (`PreTrainedModel._init_weights` goes for their `weight`, which is not there), and for zero points (made
    [N, G] on the meta device, packed in the file: "Reinit due to size mismatch", then RuntimeError). These are
    `int-quantized`: one int8 a value, whatever its bits. So are weights that are multiplied with activations of 8
    bits, as vLLM expects it. An embedding so stored can also be tied, and one table of int8 is no larger than an untied
    pair of 4 bits. FP8 is `float-quantized`. MXFP4 has a format of its own, which fails for embeddings as the packed
    one does; theirs is `float-quantized`, as E4M3 holds its levels exactly.
    """
    if not isinstance(scheme, Scheme) or scheme.values in OWN_VALUES:
        return OWN
    if scheme.values != "int":
        return MXFP4 if scheme.values == "mxfp4" and not embedding else FLOAT
    return INT if embedding or not scheme.symmetric or scheme.activations == 8 else PACKED


def packed_specs(
    module: str, shape: Sequence[int], scheme: Form, *, embedding: bool = False, tied: Sequence[str] = ()
) -> tuple[TensorSpec, ...]:
    """The tensors that a quantized weight [N, K] has in a file, in file order; `embedding`: it is a table.

    `pack-quantized`: `weight_shape` int64 [2], `weight_packed` int32 [N, ⌈K·b/32⌉], `weight_scale` bf16 [N, G].
    `int-quantized`: `weight` int8 [N, K], `weight_scale` bf16 [N, G] and, if asymmetric, `weight_zero_point` int8 [N,
    G]. `float-quantized`: `weight` float8_e4m3fn [N, K], `weight_scale` bf16 [N, G]. `mxfp4-pack-quantized`:
    `weight_packed` uint8 [N, K/2], `weight_scale` uint8 [N, K/32], exponents. memfit's own: `weight_packed` int32, the
    codes u packed as integers are, `weight_scale` bf16 [N, G], of a codebook `weight_codebook` bf16 [2^b], of vectors
    [2^(b·v), v]; nothing for tied modules. Else the modules of `tied` share an embedding's table, and have scales and
    zero points of their own, equal to its. Of a form that is no scheme, its `parts`; integers that factors go beside
    are in memfit's own form, too, with zero points `weight_zero_point` int8 [N, G]. What another module has of it is
    that one's alone, and may be all.
    """
    if not isinstance(scheme, Scheme):
        parts = tuple(
            TensorSpec(name=f"{module}.{part}", dtype=dtype, shape=size)
            for part, (dtype, size) in scheme.parts((shape[0], shape[1])).items()
        )
        base = scheme.base if isinstance(scheme, LowRank) else None
        if isinstance(scheme, Narrow) and scheme.base is not None:
            return _own_specs(module, scheme.narrow((shape[0], shape[1])), scheme.base)
        if isinstance(base, Scheme):
            return (*_own_specs(module, shape, base), *parts)
        return parts if base is None else (*packed_specs(module, shape, base), *parts)
    rows, columns = shape
    scales = (rows, scheme.groups(columns))
    form = stored_as(scheme, embedding=embedding)
    if form == MXFP4:
        return (
            TensorSpec(name=f"{module}.weight_packed", dtype=torch.uint8, shape=(rows, columns // 2)),
            TensorSpec(name=f"{module}.weight_scale", dtype=torch.uint8, shape=scales),
        )
    if form == OWN:
        return _own_specs(module, shape, scheme)
    if form == PACKED:
        words = (rows, math.ceil(columns * scheme.bits / 32))
        # Widest dtype first, so that each tensor starts where it is aligned.
        return (
            TensorSpec(name=f"{module}.weight_shape", dtype=torch.int64, shape=(2,)),
            TensorSpec(name=f"{module}.weight_packed", dtype=torch.int32, shape=words),
            TensorSpec(name=f"{module}.weight_scale", dtype=torch.bfloat16, shape=scales),
        )
    dtype = torch.float8_e4m3fn if form == FLOAT else torch.int8
    specs = [TensorSpec(name=f"{module}.weight", dtype=dtype, shape=(rows, columns))]
    for name in (module, *tied):
        specs.append(TensorSpec(name=f"{name}.weight_scale", dtype=torch.bfloat16, shape=scales))
        if not scheme.symmetric:
            specs.append(TensorSpec(name=f"{name}.weight_zero_point", dtype=torch.int8, shape=scales))
    return tuple(specs)


def _own_specs(module: str, shape: Sequence[int], scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Codes as integers are packed, scales, and what there is beside them."""
    rows, columns = shape
    scales = (rows, scheme.groups(columns))
    own = [
        TensorSpec(name=f"{module}.weight_packed", dtype=torch.int32, shape=(rows, columns * scheme.bits // 32)),
        TensorSpec(name=f"{module}.weight_scale", dtype=torch.bfloat16, shape=scales),
    ]
    if not scheme.symmetric:
        own.append(TensorSpec(name=f"{module}.weight_zero_point", dtype=torch.int8, shape=scales))
    if scheme.values == "codebook":
        own.append(TensorSpec(name=f"{module}.weight_codebook", dtype=torch.bfloat16, shape=scheme.codebook))
    return tuple(own)


def stored_values(quantized: Quantized, form: str) -> Tensor:
    """The values of some rows as a file of this format holds them, [n, ...]."""
    q, scheme = quantized.q, quantized.scheme
    if form == INT:
        return q
    if form in (PACKED, OWN):
        return pack_values(q, scheme.bits)
    if form == MXFP4:
        return pack_values(q, scheme.bits).view(torch.uint8)
    u = q.view(torch.uint8) + (1 << (scheme.bits - 1))
    if scheme.values == "fp8":
        return u.view(torch.float8_e4m3fn)
    levels = level_table(scheme).to(torch.float8_e4m3fn).view(torch.uint8)
    return levels.index_select(0, u.view(-1).to(torch.int32)).view(u.shape).view(torch.float8_e4m3fn)


def stored_scale(quantized: Quantized, form: str) -> Tensor:
    """The scales of some rows as a file of this format holds them, [n, G]."""
    return scale_values(quantized.scale) if form == FLOAT else quantized.scale


def packed_buffers(model: nn.Module, modules: Iterable[str]) -> dict[str, Tensor]:
    """The non-persistent buffers of modules that will be packed, by name, in bf16: they have to be in the
    file.

    Gemma's scaled embeddings have one, `embed_scale`. compressed-tensors 0.20 makes parameters of all that a
    packed module holds (`replace_direct_state_dict`), so stock transformers misses it, and fails where it
    would initialise the module anew. Checked on transformers 5.23: all such buffers are made as `nn.Buffer`,
    which is what that happens to.
    """
    found = {}
    for name in modules:
        module = model.get_submodule(name)
        for key, buffer in module.named_buffers(recurse=False):
            if key in module._non_persistent_buffers_set:
                found[f"{name}.{key}"] = buffer.to(torch.bfloat16)
    return found
