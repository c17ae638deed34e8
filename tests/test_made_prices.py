"""What making a layer will err by is what it errs by when it is made; a dry run tells what finding out takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memfit.account.meter import Meter
from memfit.account.settle import settle
from memfit.account.watch import Unwatched
from memfit.compress import calibrate
from memfit.made_prices import RIDGE, made_prices
from memfit.models import load_model
from memfit.packed.forms import LowRank, Sparse
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.plan.groups import find_groups
from memfit.source.source import Source, open_source
from memfit.steps import fake_ids, on_fakes
from memfit.technique.gptq import damping_for, factor, gptq, integer_errors
from memfit.technique.making import make_for, order_of, weight_of

IDS = torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
ALLOWED = Allowed(
    techniques=("quantize", "prune", "low-rank", "share"), bits=(4, 3), values=("int", "codebook"), kv_bits=(16,)
)


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path]) -> Source:
    return open_source(make_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=3))


@pytest.mark.parametrize("symmetric", [True, False])
def test_schemes_side_by_side_err_as_each_alone(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(200, 64) @ torch.randn(64, 64)
    made = factor(x.t() @ x / 200)
    schemes = [
        Scheme(bits=bits, group=group, symmetric=symmetric) for bits, group in ((8, None), (4, 64), (3, 32), (2, 32))
    ]
    told = integer_errors(weight, made, schemes)
    alone = torch.stack([gptq(weight, made, scheme).error for scheme in schemes])
    torch.testing.assert_close(told, alone, rtol=1e-4, atol=1e-5)


def test_a_price_is_what_making_it_errs_by(source: Source) -> None:
    model = load_model(source, dtype=torch.bfloat16)
    groups = find_groups(model)
    schemes = ALLOWED.schemes_of(groups)
    found = made_prices(
        source, IDS, groups, schemes, lambda name: torch.ones(model.get_submodule(name).weight.shape[0]),
        watch=Unwatched(), batch=2, rows=256,
    )  # fmt: skip
    inside = [group for group in groups if ".layers." in group.name]
    assert found.keys() == {(group.name, form) for group in inside for form in schemes[group.name]}
    heard: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: heard.update({name: inputs[0].flatten(0, 1).float()})
            )
    with torch.no_grad():
        model(IDS)
    group = next(group for group in inside if group.members[0].endswith("1.self_attn.q_proj"))
    x = heard[group.members[0]]
    hessian = x.t() @ x / len(x)
    ridge = damping_for(len(hessian), IDS.numel(), ridge=RIDGE)
    damped = hessian + ridge * hessian.diagonal().mean() * torch.eye(len(hessian))
    for form in schemes[group.name]:
        if not isinstance(form, Scheme | Sparse) and not (isinstance(form, LowRank) and form.base is None):
            continue
        total = 0.0
        for member in group.members:
            weight = model.get_submodule(member).weight.detach()
            made = factor(hessian, damping=ridge, order=order_of([form], hessian))
            off = weight.float() - weight_of(make_for(weight, form, made)).float()
            total += 0.5 * float(((off @ damped) * off).sum())
        assert found[group.name, form] == pytest.approx(total, rel=0.05), form.name


def test_a_dry_run_tells_what_pricing_takes(source: Source) -> None:
    with on_fakes() as follow:
        told = calibrate(source, fake_ids(IDS), ALLOWED, batch=2, watch=follow, by_text=True)
    meter = Meter()
    found = calibrate(source, IDS, ALLOWED, batch=2, watch=meter, by_text=True)
    assert told.prices.keys() <= found.prices.keys()
    phases = [{p.name: p.peak_nbytes for p in sorted(account.phases, key=lambda p: p.peak_nbytes)}
              for account in (settle(follow.ledger), meter.account())]  # fmt: skip
    assert phases[0]["price"] == pytest.approx(phases[1]["price"], rel=0.03)
