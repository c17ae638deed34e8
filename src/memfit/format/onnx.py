"""Writing a fitted model as ONNX: the graph in model.onnx, its weights in model.onnx.data, a few rows at a time.

The integers, scales and zero points are those of the fitted directory. What two nodes share, as an embedding and the
head tied to it, lies in the file once.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.account.watch import Watch
from memfit.calibrate.stream import rows_of
from memfit.errors import MemfitError
from memfit.format.onnx_graph import Traced, trace_graph
from memfit.format.onnx_modules import Part, block_of, put_onnx_modules
from memfit.packed.bits import unpack_zeros
from memfit.packed.fake import blocks_to_run
from memfit.source.checkpoint import bytes_of
from memfit.source.source import Source
from memfit.units import format_size

GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"
ROWS_NBYTES: Final = 4 << 20
"""Bytes of a weight that are read at a time."""
_PAGE: Final = 4096
"""Where tensors of some size begin, so that ONNX Runtime can map them; others begin at a multiple of 64."""


@dataclass(frozen=True, kw_only=True)
class OnnxFiles:
    """What was written."""

    nbytes: int
    """Of graph and weights."""
    files: Mapping[str, str]
    """File to sha256."""
    operators: Mapping[str, int]
    """`MatMulNBits 4 bits` and the like, and `MatMul`, to their number in the graph."""
    repeated_nbytes: int
    """Of scales and zero points that are there more than once, as ONNX Runtime takes no larger block."""


def write_onnx(source: Source, directory: Path, *, watch: Watch, accuracy_level: int = 0) -> OnnxFiles:
    """Write the fitted model of `source` into `directory`, as model.onnx and model.onnx.data.

    Beyond the graph, some rows of one weight are in memory at a time.

    Args:
        source: a directory that memfit has written.
        watch: is told when weights are read and written; the graph is made before.
        accuracy_level: see `put_onnx_modules`.

    Raises:
        UsageError: the model or one of its schemes has no form in ONNX.
        MemfitError: the disk has less room than the weights take.
    """
    import onnx_ir

    traced = trace_graph(source, accuracy_level=accuracy_level)
    places, nbytes = _places(traced.parts)
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise MemfitError(
            f"{directory}: {format_size(free)} free, {format_size(nbytes)} needed for the weights. Free some space or "
            "write to another disk."
        )
    with watch.phase("onnx"):
        digest = _write_data(source, traced.parts, places, directory / DATA)
    for name, part in traced.parts.items():
        value = traced.model.graph.initializers[name]
        value.const_value = onnx_ir.ExternalTensor(
            DATA, places[part.key], part.nbytes, value.dtype, shape=onnx_ir.Shape(part.shape), name=name,
            base_dir=str(directory),
        )  # fmt: skip
    # The exporter writes down where in which file each node comes from.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(traced.model)
    onnx_ir.save(traced.model, directory / GRAPH)
    graph = (directory / GRAPH).read_bytes()
    return OnnxFiles(
        nbytes=nbytes + len(graph),
        files={GRAPH: hashlib.sha256(graph).hexdigest(), DATA: digest},
        operators=_operators(traced),
        repeated_nbytes=sum(_repeated_nbytes(part) for part in _once(traced.parts).values()),
    )


def onnx_parts(source: Source) -> Mapping[str, Part]:
    """What the weights of a file will be, told without tracing: those that the graph leaves out are there, too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = source.build(dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return put_onnx_modules(model, source, accuracy_level=0)


def read_all(source: Source, parts: Mapping[str, Part]) -> None:
    """Make every tensor of a file as `write_onnx` does, and write none: for a dry run."""
    kinds = set()
    for part in _once(parts).values():
        # Nothing outlives its own turn, so equal parts need to be made once.
        kind = (part.kind, part.dtype, part.shape, part.scheme)
        if kind not in kinds:
            kinds.add(kind)
            for block in read_part(source, part):
                del block


def read_part(source: Source, part: Part) -> Iterator[Tensor]:
    """The bytes of a part, from its first to its last, as flat contiguous tensors."""
    if part.kind == "plain":
        yield from _plain(source, part)
        return
    assert part.scheme is not None
    rows = part.shape[0]
    if part.kind == "zeros":
        yield _zeros(source, part)
        return
    step = max(1, ROWS_NBYTES * rows // part.nbytes)
    name = {"values": "weight_packed", "scales": "weight_scale"}[part.kind]
    for start in blocks_to_run(range(0, rows, step)):
        read = source.read_packed(f"{part.owner}.{name}", start, min(rows, start + step))
        if part.kind == "values":
            yield read.view(torch.uint8).view(-1)
        else:
            yield _repeated(read.to(part.dtype), part.shape[1]).reshape(-1)
        del read


def _plain(source: Source, part: Part) -> Iterator[Tensor]:
    if len(part.shape) < 2:
        yield source.read_parameter(part.owner, dtype=part.dtype).reshape(-1)
        return
    for _, rows in rows_of(source, part.owner, dtype=part.dtype):
        yield rows.reshape(-1)
        del rows


def _zeros(source: Source, part: Part) -> Tensor:
    """uint8 [N, ⌈G·b/8⌉], flat: z + 2^(b−1), the first of a byte in its low bits, each row filled up."""
    assert part.scheme is not None
    bits, rows = part.scheme.bits, part.shape[0]
    zero_NG = unpack_zeros(source.read_packed(f"{part.owner}.weight_zero_point"), bits, rows)
    u = zero_NG.view(torch.uint8) + (1 << (bits - 1))
    u = _repeated(u, _blocks(source, part))
    each = 8 // bits
    if (short := -u.shape[1] % each) != 0:
        u = F.pad(u, (0, short))
    packed = u[:, ::each].clone()
    for place in range(1, each):
        packed.bitwise_or_(u[:, place::each] << (place * bits))
    return packed.view(-1)


def _blocks(source: Source, part: Part) -> int:
    """Blocks of a row."""
    assert part.scheme is not None
    inputs = source.parameters[f"{part.owner}.weight"][0][-1]
    return inputs // block_of(part.scheme, inputs)


def _repeated(by_group: Tensor, blocks: int) -> Tensor:
    """[N, G] with each column as often as the graph's blocks are in a group."""
    times = blocks // by_group.shape[1]
    return by_group if times == 1 else by_group.repeat_interleave(times, dim=1)


def _repeated_nbytes(part: Part) -> int:
    if part.kind not in ("scales", "zeros") or part.scheme is None or part.scheme.group is not None:
        return 0
    return part.nbytes - part.nbytes // part.shape[1]


def _once(parts: Mapping[str, Part]) -> dict[Any, Part]:
    """Each part that lies in the file, by its key."""
    return {part.key: part for part in parts.values()}


def _places(parts: Mapping[str, Part]) -> tuple[dict[Any, int], int]:
    """Key of a part to where it begins in the file, and the file's length."""
    places, end = {}, 0
    for key, part in _once(parts).items():
        multiple = _PAGE if part.nbytes >= _PAGE else 64
        places[key] = math.ceil(end / multiple) * multiple
        end = places[key] + part.nbytes
    return places, end


def _write_data(source: Source, parts: Mapping[str, Part], places: Mapping[Any, int], file: Path) -> str:
    """Write the weights; the sha256 of the file."""
    digest, end = hashlib.sha256(), 0
    with open(file, "xb") as out:

        def put(content: memoryview | bytes) -> None:
            nonlocal end
            digest.update(content)
            out.write(content)
            end += len(content)

        for key, part in _once(parts).items():
            put(b"\0" * (places[key] - end))
            for block in read_part(source, part):
                put(memoryview(bytes_of(block)))  # type: ignore[arg-type]  # an array is a buffer; its stub says not
                del block
            if end != places[key] + part.nbytes:
                raise MemfitError(f"{part.owner}: {part.nbytes} bytes were to be written, {end - places[key]} came.")
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _operators(traced: Traced) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in traced.model.graph:
        name = node.op_type
        if "bits" in node.attributes:
            name = f"{name} {node.attributes['bits'].value} bits"
        elif name not in ("MatMul", "Gather", "Gemm") or not any(
            value is not None and value.name in traced.parts for value in node.inputs
        ):
            continue
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))
