"""Whether a checkpoint has what its model needs, nothing else, in the right shapes; no weights are read."""

import itertools
import math
from collections.abc import Mapping

import torch

from memfit.errors import BrokenInput, UsageError
from memfit.packed.forms import Form, LowRank, Narrow, Shared, Whole
from memfit.packed.scheme import OWN_VALUES, Scheme
from memfit.source.checkpoint import SafetensorsCheckpoint, TensorInfo
from memfit.source.layout import check_pieces
from memfit.source.live import active_fake_mode
from memfit.source.quantized import QuantizedCheckpoint
from memfit.source.source import PACKED_PARTS, Source


def check_original(source: Source, what: str, *, needed_by: str | None = None) -> None:
    """`check`, and whether the model can be changed.

    Args:
        what: what its weights are to be, such as "trained".
        needed_by: the command that needs weights; None: a config will do.

    Raises:
        BrokenInput: see `check`.
        UsageError: its weights are packed, or not there.
    """
    check(source)
    if source.schemes:
        raise UsageError(
            f"{source.name}: its weights are packed (quantized, pruned, factored or shared), and packed weights are "
            f"not {what}. Give the model that it was made from."
        )
    if needed_by is not None:
        require_weights(source, needed_by)


def require_weights(source: Source, needed_by: str) -> None:
    """Raise UsageError if a source has a config alone: what can be planned for, and run with random weights only."""
    if source.checkpoint is None:
        if source.directory is not None and any(source.directory.glob("*.onnx")):
            raise UsageError(
                f"{source.name}: has a graph for ONNX Runtime in place of weights; its README.md says how to run it. "
                f"Give `{needed_by}` the model that it was made of."
            )
        raise UsageError(
            f"{source.name}: has a config and no weights. `plan` works on it; `{needed_by}` needs the weights."
        )


def check(source: Source, *, copies: bool = True) -> None:
    """Raise BrokenInput unless the checkpoint and the model of `source` fit each other exactly.

    Headers are compared with the model; of weights, only second copies of tied ones are read, and only to see
    that they are the same: two that differ would make another model, depending on which is taken.

    Args:
        source: one without a checkpoint passes.
        copies: False: the second copies that memfit wrote itself are believed.

    Raises:
        BrokenInput: a tensor is missing, unexpected, of another shape or kind, or its copy differs.
    """
    if source.checkpoint is None:
        return
    unexpected = [*source.layout.unexpected, *_stray_parts(source)]
    if isinstance(source.checkpoint, QuantizedCheckpoint):
        unexpected = [name for name in unexpected if not source.checkpoint.is_zero_bias(name)]
    if unexpected:
        info = source.tensors[unexpected[0]]
        more = f" and {len(unexpected) - 1} more are" if len(unexpected) > 1 else " is"
        raise BrokenInput(
            f"{info.file}: tensor {info.name!r} {info.shape}{more} unexpected: "
            f"{source.config.model_type!r} has no place "
            "for it. Correct 'architectures' in config.json, or fetch the checkpoint that belongs to it."
        )
    schemes = source.schemes
    for name, (shape, dtype, canonical) in source.parameters.items():
        module, _, part = name.rpartition(".")
        scheme = schemes.get(name) or (
            schemes.get(module) if part in ("weight", "gate_up_proj", "down_proj") else None
        )
        if scheme is not None:
            _check_packed(source, module if part == "weight" else name, scheme, shape)
            continue
        if canonical in source.layout.pieces:
            check_pieces(name, source.layout.pieces[canonical], source.tensors, shape=shape, dtype=dtype)
        elif name not in source.buffers:
            raise source.missing(name)
    if isinstance(source.checkpoint, SafetensorsCheckpoint | QuantizedCheckpoint) and active_fake_mode() is None:
        _check_copies(source, source.checkpoint, own=copies)


def _stray_parts(source: Source) -> list[str]:
    """Stored parts of packed weights that belong to no module with a scheme."""
    if not source.quantized:
        return []
    prefix = source.prefix
    known: set[str] = set()
    for module in source.schemes:
        for name in (module, f"{module}.gate_up_proj", f"{module}.down_proj"):
            known |= {name, name.removeprefix(prefix)}
    return [
        name
        for name in source.tensors
        if name.rpartition(".")[2] in PACKED_PARTS and name.rpartition(".")[0] not in known
    ]


def _check_packed(source: Source, prefix: str, scheme: Form, shape: tuple[int, ...]) -> None:
    """The parts of one packed weight [..., N, K], as compressed-tensors stores them."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if (reason := scheme.why_not(shape)) is not None:
        raise BrokenInput(
            f"{source.name}: {prefix!r} {shape} cannot be {scheme.name}: {reason}. Correct config.json."
        )
    tied = prefix in source.tied
    if not isinstance(scheme, Scheme):
        if tied:
            return
        for part, (dtype, due) in scheme.parts(shape).items():
            _check_part(source, f"{prefix}.{part}", scheme.name, shape, due, dtype)
        if isinstance(scheme, Shared):
            _check_shared(source, prefix, scheme, shape)
        base = scheme.base if isinstance(scheme, LowRank | Narrow) else None
        if isinstance(scheme, Narrow):
            rows, columns = scheme.narrow(shape)
        if isinstance(base, Whole):
            _check_packed(source, prefix, base, shape)
        if not isinstance(base, Scheme):
            return
        scheme = base
    groups = scheme.groups(columns)
    if tied and scheme.values in OWN_VALUES:
        return
    wanted: dict[str, tuple[int, int, torch.dtype | None]] = {"weight_scale": (rows, groups, None)}
    by_value = source.stored_by_value(prefix)
    zeros = (math.ceil(rows * scheme.bits / 32), groups, torch.int32)
    if scheme.values == "fp8" or (by_value is not None and scheme.values in ("int", "mxfp4")):
        wanted["weight"] = (rows, columns, torch.int8 if scheme.values == "int" else torch.float8_e4m3fn)
        zeros = (rows, groups, torch.int8)
    elif scheme.values == "mxfp4":
        wanted["weight_packed"] = (rows, columns // 2, torch.uint8)
        wanted["weight_scale"] = (rows, groups, torch.uint8)
    else:
        wanted["weight_packed"] = (rows, columns * scheme.bits // 32, torch.int32)
    if tied:
        wanted = {part: due for part, due in wanted.items() if part == "weight_scale"}
    elif scheme.values == "codebook":
        levels = scheme.codebook
        wanted["weight_codebook"] = (math.prod(levels[:-1]), levels[-1], torch.bfloat16)
    if not scheme.symmetric:
        wanted["weight_zero_point"] = zeros
    for part, (count, width, due_dtype) in wanted.items():
        _check_part(source, f"{prefix}.{part}", scheme.name, shape, (count, width), due_dtype)


def _check_shared(source: Source, prefix: str, scheme: Shared, shape: tuple[int, ...]) -> None:
    """What a module has of its owner's is there."""
    owner = f"{scheme.owner}.weight"
    own_shape = source.parameters[owner][0] if owner in source.parameters else ()
    if (reason := scheme.why_not_with(shape, source.schemes.get(scheme.owner), own_shape)) is not None:
        raise BrokenInput(f"{source.name}: {prefix!r} {shape} cannot be {scheme.name}: {reason}. Correct config.json.")


def _check_part(
    source: Source, name: str, scheme: str, shape: tuple[int, ...], due: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """One part: there, of the size `due` (experts' parts have one more dimension), and of `dtype`, None: any float."""
    info = source.stored_info(name)
    if info is None:
        raise source.missing(name)
    folded = (math.prod(info.shape[:-1]), *info.shape[-1:]) if len(due) == 2 else info.shape
    if folded != due:
        raise BrokenInput(
            f"{info.file}: tensor {info.name!r} has the shape {info.shape}; {scheme} of {shape} takes {due}. Config "
            "and weights do not belong together: fetch both again."
        )
    if (dtype is not None and info.dtype != dtype) or (dtype is None and not info.dtype.is_floating_point):
        raise BrokenInput(
            f"{info.file}: tensor {info.name!r} has the dtype {info.dtype}; {dtype or 'a float'} was due. Config and "
            "weights do not belong together: fetch both again."
        )


def _check_copies(source: Source, checkpoint: SafetensorsCheckpoint | QuantizedCheckpoint, *, own: bool) -> None:
    """Second copies of tied weights hold the same bytes as the first."""
    pairs = dict(source.layout.duplicates)
    if own:
        for (target, origin), part in itertools.product(source.tied.items(), PACKED_PARTS):
            copy, first = source.stored_info(f"{target}.{part}"), source.stored_info(f"{origin}.{part}")
            if copy is not None and first is not None:
                pairs[copy.name] = first.name
    else:
        written = {f"{target}.weight" for target in source.tied}
        pairs = {one: other for one, other in pairs.items() if one not in written}
    for one, other in pairs.items():
        if not _same(checkpoint, source.tensors, one, other):
            raise BrokenInput(
                f"{source.tensors[one].file}: tensor {one!r} differs from {other!r}, and config.json "
                "says that they "
                "are tied. If both are meant, set tie_word_embeddings to false."
            )


def _same(
    checkpoint: SafetensorsCheckpoint | QuantizedCheckpoint, tensors: Mapping[str, TensorInfo], one: str, other: str
) -> bool:
    left, right = tensors[one], tensors[other]
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    pairs = zip(checkpoint.blocks(one), checkpoint.blocks(other), strict=True)
    return all(a == b for a, b in pairs)
