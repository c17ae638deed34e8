"""Scales and norms of a whole model learn together, once all of its integers are chosen.

The model runs from the disk twice: as it was, once, which gives the hidden states that its head read (a text is small
beside a model); then as it became, a window a step, each block read, run and let go, and run again for the backward
pass (`calibrate/stream.py`). So learning takes about a block more than choosing the integers did.

Legend of shapes: W windows, T time, D width, P positions of a window.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.account.watch import Anew, Watch
from memfit.calibrate.attention import attention_by_products
from memfit.calibrate.collect import arguments_of, hidden_of, one_text_a_row
from memfit.calibrate.spill import Spill
from memfit.calibrate.stream import Streamed
from memfit.compensate import Thrift
from memfit.format.integers import Integers
from memfit.looked_up import LookedUp
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.forms import Form
from memfit.packed.scheme import Scheme
from memfit.plan.price import Weighting
from memfit.source.smoothed import stored_alone
from memfit.source.source import Source
from memfit.technique.attune import Attuning, Grown, Moved, divergence
from memfit.technique.tune import is_tunable, relative_error

_JUDGED: Final = 8
"""Windows on which it is seen whether learning helped."""
_CLASSIFIED: Final = 16
"""Windows of a step where each has but one answer."""


@torch.no_grad()
def attune(
    source: Source, windows_WT: Tensor, schemes: Mapping[str, Form], integers: Integers, *, watch: Watch,
    attuning: Attuning, thrift: Thrift | None = None, scratch: Path | None = None,
    weighting: Callable[[str], Weighting | None] = lambda _: None,
) -> None:  # fmt: skip
    """Let what is stored beside the integers of a model learn; what is learned is kept in `integers`.

    Nothing, if something is kept there already, or there is nothing that could learn. Integers whose scales have no
    free values (`mxfp4`) keep theirs.

    Args:
        windows_WT: token ids, those that the integers were chosen on.
        schemes: module name to form.
        thrift: windows that the model as it was runs on at once, and whether its hidden states wait in a file.
        scratch: where that goes.
        weighting: what errors of a table's weight count, as it will be made with.
    """
    if integers.attuned is not None:
        return
    thrift = thrift or Thrift()
    spill = Spill(scratch if thrift.spill else None, watch)
    with Anew(watch, "attune") as anew, attention_by_products(), one_text_a_row(dry=is_fake(windows_WT)):
        streamed = Streamed(source)
        grown, moved = _learners(streamed, schemes, integers)
        parameters = [one.parameter for one in grown.values()] + [one.parameter for one in moved.values()]
        if not parameters:
            return
        wanted = _answers(streamed, windows_WT, spill, anew, batch=thrift.batch)
        streamed.rounded = LookedUp(streamed, schemes, weighting).round
        fixed = [name for name in schemes if name in integers and name not in grown]
        streamed.given = {
            **{f"{name}.weight": partial(integers.weight, name, schemes, _shape(streamed, name)) for name in fixed},
            **{f"{name}.weight": one.weight for name, one in grown.items()},
            **{name: one.value for name, one in moved.items()},
        }
        learns = _Learns(streamed, windows_WT, wanted, spill, attuning.positions)
        before = learns.mean(anew)
        _learn(parameters, learns, attuning, anew)
        after = learns.mean(anew)
        streamed.given = {}  # else what learned would live on in a ring with the model until it is collected
        helped = after <= before  # not, if it is NaN
        integers.attune(
            {name: one.learned() for name, one in grown.items()} if helped else {},
            {name: one.learned() for name, one in moved.items()} if helped else {},
            {"before": before, "after": after},
        )


def _learn(parameters: list[Tensor], learns: "_Learns", attuning: Attuning, anew: Callable[[], None]) -> None:
    optimizer = torch.optim.Adam(parameters, lr=attuning.rate, betas=(0.9, 0.95), fused=True)
    chance, order = random.Random(0), list[int]()
    for step in blocks_to_run(range(attuning.steps)):
        anew()
        if not order:
            order = list(range(learns.parts))
            chance.shuffle(order)
        optimizer.param_groups[0]["lr"] = attuning.rate_at(step)
        learns.step(order.pop(), chance)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class _Learns:
    """How far what the model answers to a window is from what it answered as it was."""

    def __init__(self, streamed: Streamed, windows_WT: Tensor, wanted: Tensor, spill: Spill, positions: int) -> None:
        self._streamed, self._windows, self._wanted, self._spill = streamed, windows_WT, wanted, spill
        self._batch = 1 if wanted.shape[1] > 1 else _CLASSIFIED
        self.parts = -(-windows_WT.shape[0] // self._batch)
        """Parts of the text that a step may be made for."""
        self._positions = min(positions, wanted.shape[1])

    def step(self, part: int, chance: random.Random) -> None:
        """Add the gradients of one part, at positions that are drawn."""
        places = sorted(chance.sample(range(self._wanted.shape[1]), self._positions))
        with torch.enable_grad():
            self._apart(part, places).backward()  # type: ignore[no-untyped-call]

    def mean(self, anew: Callable[[], None]) -> float:
        """Over the first windows, at the same positions of each."""
        count = self._wanted.shape[1]
        places = list(range(0, count, -(-count // self._positions)))
        total, parts = 0.0, range(min(_JUDGED, self.parts))
        for part in blocks_to_run(parts):
            anew()
            found = self._apart(part, places)
            total += 0.0 if is_fake(found) else float(found)
        return total / len(parts)

    def _answer(self, part: int, places: list[int]) -> tuple[Tensor, Tensor]:
        """Of some positions of a window, what the head is to read, and what it read [P, D]; of a classifier the scores
        of some windows [W, C]."""
        rows = slice(part * self._batch, (part + 1) * self._batch)
        ids = self._windows[rows]
        out = hidden_of(self._streamed.model(ids, **arguments_of(self._streamed.model, ids)))[0]
        wanted = self._spill.rows(self._wanted, rows)
        if out.dim() == 2:
            return out, wanted[:, 0]
        picked = torch.tensor(places)
        return out[0, picked], wanted[0, picked].to(self._streamed.dtype)

    def _apart(self, part: int, places: list[int]) -> Tensor:
        """KL at some positions of a window, or of a classifier's scores; of hidden states that no head reads their
        squared error beside their size."""
        out, wanted = self._answer(part, places)
        if self._streamed.head is not None:
            # Some models make their logits in float32 (Mamba); the head's rows come in the model's own type.
            return divergence(self._streamed, out.to(self._streamed.dtype), wanted)
        if self._wanted.shape[1] > 1:
            return relative_error(out, wanted)
        ours, theirs = (F.log_softmax(scores.to(torch.float32), -1) for scores in (out, wanted))
        return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _answers(
    streamed: Streamed, windows_WT: Tensor, spill: Spill, anew: Callable[[], None], *, batch: int
) -> Tensor:
    """What the head of the model as it was read of each window [W, T, D]; of a classifier its scores [W, 1, C]."""
    found: Tensor | None = None
    for start in blocks_to_run(range(0, windows_WT.shape[0], batch)):
        anew()
        ids = windows_WT[start : start + batch]
        out = hidden_of(streamed.model(ids, **arguments_of(streamed.model, ids)))[0]
        out = out.unsqueeze(1) if out.dim() == 2 else out
        if found is None:
            found = spill.empty((windows_WT.shape[0], *out.shape[1:]), out.dtype)
        found[start : start + batch] = out
        spill.let_go(found)
        del out
    assert found is not None
    return found


def _learners(
    streamed: Streamed, schemes: Mapping[str, Form], integers: Integers
) -> tuple[dict[str, Grown], dict[str, Moved]]:
    """By module, the integers that learn; by parameter, the norms' weights and the biases."""
    grown: dict[str, Grown] = {}
    moved: dict[str, Moved] = {}
    for name, module in streamed.model.named_modules():
        form = schemes.get(name)
        if isinstance(form, Scheme) and is_tunable(form) and name in integers:
            grown[name] = Grown(partial(integers.rows, name, form), integers.scale(name), module.in_features)
        for parameter in _vectors(name, module):
            if name != streamed.head and stored_alone(streamed.source, parameter):
                dtype = streamed.model.get_parameter(parameter).dtype
                moved[parameter] = Moved(streamed.source.read_parameter(parameter, dtype=dtype))
    return grown, moved


def _vectors(name: str, module: nn.Module) -> Iterator[str]:
    """Parameters of a norm, and the bias of a linear layer."""
    norm = "Norm" in type(module).__name__
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 1 and (norm or (leaf == "bias" and isinstance(module, nn.Linear))):
            yield f"{name}.{leaf}"


def _shape(streamed: Streamed, layer: str) -> tuple[int, int]:
    """[N, K]"""
    rows, inputs = streamed.model.get_submodule(layer).get_parameter("weight").shape
    return rows, inputs


__all__ = ["attune"]
