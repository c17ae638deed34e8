"""What every rank of every layer errs by, with H whole: one pass of the text through the model, block after block.

Prices from the diagonal of H take the inputs of a layer as independent. For integers that is near enough; for factors
it is not, as what they spare is what inputs have in common: on the demo model, ranks chosen by the diagonal lost six
times what those chosen here lost, at the same bytes. A block's inputs are heard, their H factored, and let go.

Legend of shapes: W windows, T time, N outputs, K inputs, n the shorter of both.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memfit.account.watch import Watch
from memfit.calibrate.inputs import hear_inputs
from memfit.packed.fake import repeated
from memfit.packed.scheme import Scheme
from memfit.source.source import Source
from memfit.technique.gptq import DAMPING, Factor, factor, gptq
from memfit.technique.heads import narrow_errors
from memfit.technique.low_rank import errors_by_rank
from memfit.technique.quantize import dequantize
from memfit.technique.share import Member, shared_errors
from memfit.technique.spectrum import Metric


@dataclass(kw_only=True)
class Spectra:
    """Nats a token of every rank, float64 [n + 1], to second order: ½ Σ_o G_o (E H Eᵀ)_oo."""

    alone: dict[tuple[str, Scheme | None], Tensor] = field(default_factory=dict)
    """By module, and the integers that its factors go beside, by GPTQ; None: none."""
    basis: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """Of one right factor for modules that read the same input, in the order of their calls."""
    heads: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """By values and output of an attention: of every number of dimensions kept."""

    def save(self, path: Path) -> None:
        """One file of safetensors."""
        tensors = {
            json.dumps([name, None if base is None else base.to_json()]): errors
            for (name, base), errors in self.alone.items()
        }
        tensors |= {json.dumps(["basis", *names]): errors for names, errors in self.basis.items()}
        tensors |= {json.dumps(["heads", *names]): errors for names, errors in self.heads.items()}
        save_file(tensors, str(path))

    @classmethod
    def read(cls, path: Path) -> "Spectra":
        """What `save` wrote."""
        found = cls()
        with safe_open(str(path), framework="pt") as file:
            for key in sorted(file.keys()):
                first, *rest = json.loads(key)
                errors = file.get_tensor(key)
                if first == "basis":
                    found.basis[tuple(rest)] = errors
                elif first == "heads":
                    found.heads[rest[0], rest[1]] = errors
                else:
                    found.alone[first, None if rest[0] is None else Scheme(**rest[0])] = errors
        return found


@torch.no_grad()
def spectra(
    source: Source,
    windows_WT: Tensor,
    wanted: Mapping[str, Sequence[Scheme | None]],
    gradients: Callable[[str], Tensor | None],
    *,
    watch: Watch,
    heads: Mapping[str, tuple[str, int]] | None = None,
    batch: int = 4,
    scratch: Path | None = None,
    damping: float = DAMPING,
) -> Spectra:
    """The errors of all ranks of the linear layers in the model's blocks.

    Args:
        windows_WT: token ids.
        wanted: module name to the integers that factors may go beside; None among them: factors alone.
        gradients: of a module G [N], as calibration has found it; None: all outputs count 1.
        heads: name of an attention's output to that of its values, and the width of a head.
        batch: windows that go through a block at once.
        scratch: where what blocks give each other waits in files; None: in memory.
        damping: see `gptq.factor`.

    Raises:
        ValueError: a layer whose inputs are not finite, or all 0.
    """
    found = Spectra()

    def heard(layers: Mapping[str, nn.Linear], stage: Sequence[str], hessian: Tensor) -> None:
        made = factor(hessian, damping=damping, overwrite=True)
        _add(found, layers, stage, made, wanted, gradients, heads or {})

    kinds = {name: tuple(bases) for name, bases in wanted.items()}
    hear_inputs(source, windows_WT, kinds, heard, watch=watch, phase="spectra", batch=batch, scratch=scratch)
    return found


def _add(
    found: Spectra, layers: Mapping[str, nn.Linear], stage: Sequence[str], made: Factor,
    wanted: Mapping[str, Sequence[Scheme | None]], gradients: Callable[[str], Tensor | None],
    heads: Mapping[str, tuple[str, int]],
) -> None:  # fmt: skip
    """The errors of layers that read one input."""
    metric = Metric(factor=made)
    weights = {name: layers[name].weight.detach() for name in stage}
    for name, weight in weights.items():
        for base in wanted[name]:
            rest = weight if base is None else _lost(name, weight, made, base)
            found.alone[name, base] = errors_by_rank(rest, factor=made, rows_N=gradients(name)).mul_(0.5)
            del rest
        if name in heads and heads[name][0] in layers:
            value, width = heads[name]
            errors = narrow_errors(
                layers[value].weight.detach(), weight, width=width, factor_Q=made, rows_M=gradients(name)
            )
            found.heads[value, name] = errors.mul_(0.5)
    if len(stage) > 1:
        members = {
            name: Member(weight=weight, metric=metric, rows=gradients(name)) for name, weight in weights.items()
        }
        found.basis[tuple(stage)] = shared_errors(members, "right").mul_(0.5)


def _lost(name: str, weight: Tensor, made: Factor, base: Scheme) -> Tensor:
    """What rounding a weight loses; a dry run tells it from an equal one."""

    def call() -> tuple[Tensor]:
        return (weight.float().sub_(dequantize(gptq(weight, made, base).quantized)),)

    given = lambda: (weight, made.order, made.coupling, made.weights, made.importance, made.dead)  # noqa: E731
    (lost,) = repeated(("lost", base), None, name, given, call)
    assert isinstance(lost, Tensor)
    return lost
