"""Every rank's price, in one pass, is what factoring with the inputs' own H errs by; a dry run tells what it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.account.dry_run import dry_run, hold_model
from memfit.account.meter import Meter
from memfit.account.watch import Unwatched, Watch
from memfit.models import load_model
from memfit.packed.scheme import Scheme
from memfit.plan.groups import find_groups
from memfit.plan.sharing import narrowings
from memfit.source.source import Source, open_source
from memfit.spectra import Spectra, spectra
from memfit.technique.gptq import factor, gptq
from memfit.technique.heads import narrow_errors
from memfit.technique.low_rank import errors_by_rank
from memfit.technique.quantize import dequantize

INT3 = Scheme(bits=3, group=32)


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path]) -> Source:
    return open_source(make_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=3))


def run(
    source: Source, windows: Tensor, watch: Watch | None = None, bases: tuple[Scheme | None, ...] = (None, INT3)
) -> Spectra:
    model = source.build()
    wanted = {m: bases for group in find_groups(model) if group.kind == "linear" for m in group.members}
    heads = {one.output: (one.value, one.width) for one in narrowings(model)}
    counts = lambda name: torch.ones(model.get_submodule(name).weight.shape[0])  # noqa: E731
    return spectra(source, windows, wanted, counts, heads=heads, batch=2, watch=watch or Unwatched())


def test_prices_are_those_of_each_layer_by_its_own_inputs(source: Source, tmp_path: Path) -> None:
    windows = torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    found = run(source, windows)
    model = load_model(source, dtype=torch.bfloat16)
    heard: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: heard.update({name: inputs[0].flatten(0, 1).float()})
            )
    with torch.no_grad():
        model(windows)
    layer = "model.layers.1"
    for leaf in ("self_attn.o_proj", "mlp.up_proj"):
        x = heard[f"{layer}.{leaf}"]
        made, weight = factor(x.t() @ x / len(x)), model.get_submodule(f"{layer}.{leaf}").weight.detach()
        told = errors_by_rank(weight, factor=made).mul_(0.5)
        torch.testing.assert_close(found.alone[f"{layer}.{leaf}", None], told, rtol=0.02, atol=1e-3 * float(told[0]))
        lost = weight.float() - dequantize(gptq(weight, made, INT3).quantized)
        told = errors_by_rank(lost, factor=made).mul_(0.5)
        torch.testing.assert_close(found.alone[f"{layer}.{leaf}", INT3], told, rtol=0.1, atol=0.1 * float(told[0]))
    value = model.get_submodule(f"{layer}.self_attn.v_proj").weight.detach()
    output = model.get_submodule(f"{layer}.self_attn.o_proj").weight.detach()
    x = heard[f"{layer}.self_attn.o_proj"]
    told = narrow_errors(value, output, width=16, factor_Q=factor(x.t() @ x / len(x))).mul_(0.5)
    pair = (f"{layer}.self_attn.v_proj", f"{layer}.self_attn.o_proj")
    torch.testing.assert_close(found.heads[pair], told, rtol=0.02, atol=1e-3 * float(told[0]))
    assert len(found.alone) == 3 * 7 * 2 and len(found.heads) == 3 and len(found.basis) == 6
    first = tuple(f"{layer}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj"))
    total = sum(found.alone[name, None][0] for name in first)
    torch.testing.assert_close(found.basis[first][0], total, rtol=1e-4, atol=0)
    found.save(tmp_path / "spectra")
    again = Spectra.read(tmp_path / "spectra")
    for kind in ("alone", "basis", "heads"):
        one, other = getattr(found, kind), getattr(again, kind)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Task:
    """The pass as a task."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def run(self, model: nn.Module, watch: Watch) -> None:
        run(self.source, torch.ones(4, 64, dtype=torch.int64), watch, (None,))

    def to_json(self) -> dict[str, Any]:
        return {}


def test_a_dry_run_tells_what_it_takes(source: Source) -> None:
    with FakeTensorMode():
        found = run(source, torch.ones(4, 64, dtype=torch.int64), None, (None,))
    # Of equal blocks two are run.
    assert len(found.alone) == 2 * 7
    task, meter = Task(source), Meter()
    told = dry_run(lambda: nn.Linear(4, 4), task)
    with meter.phase("load"):
        model = nn.Linear(4, 4)
        hold_model(model, meter)
    task.run(model, meter)
    measured = meter.account()
    assert abs(told.peak_nbytes - measured.peak_nbytes) <= 0.01 * measured.peak_nbytes
