"""Pruning while training: masks keep their pattern and exact sparsity at every step, gates close under a penalty."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memfit.packed.forms import BLOCK, Sparse
from memfit.technique.gates import Gates
from memfit.technique.gradual import Gradual
from memfit.technique.made import dense
from memfit.technique.masks import Masks, weights_of
from memfit.technique.prune import prune
from memfit.technique.regrow import Regrow
from memfit.technique.threshold import forms_below, l1, shrink, threshold_of

FORMS = [Sparse(sparsity=0.8), Sparse(sparsity=0.55), Sparse(pattern="2:4"), Sparse(pattern="blocks", sparsity=0.75)]
CASES = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))


def steps(model: nn.Module, count: int, seed: int = 1):
    """Train on inputs of which a third matters; after each step, its number."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for n in range(1, count + 1):
        x = torch.randn(32, 64, generator=generator)
        loss = (model(x) - x[:, :32].roll(3, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield n, float(loss.detach())


def require_pattern(weight: Tensor, pattern: str, kept: int) -> None:
    """Each row keeps `kept` units, of blocks whole ones, of 2:4 so many whole fours and two of each other."""
    here = weight != 0
    if pattern == "blocks":
        inside = here.view(weight.shape[0] // BLOCK[0], BLOCK[0], -1, BLOCK[1]).sum((1, 3))
        assert set(inside.unique().tolist()) <= {0, BLOCK[0] * BLOCK[1]}
        assert (inside > 0).sum(1).unique().tolist() == [kept]
    elif pattern == "2:4":
        by_four = here.view(weight.shape[0], -1, 4).sum(2)
        assert set(by_four.unique().tolist()) <= {2, 4}
        assert (by_four == 4).sum(1).unique().tolist() == [kept]
    else:
        assert here.sum(1).unique().tolist() == [kept]


@CASES
def test_gradual_pruning_keeps_to_its_schedule_at_every_step(form: Sparse) -> None:
    model = small()
    pruning = Gradual(model, form, begin=2, end=14, every=3)
    before = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in pruning.weights.items()}
    told = []
    for n, _ in steps(model, 18):
        pruning.step(n)
        told.append(pruning.sparsity(n))
        for name, weight in pruning.weights.items():
            require_pattern(weight, form.pattern, pruning.kept(n, weight.shape[1]))
            assert not ((weight != 0) & ~before[name]).any()  # what is gone stays gone
            before[name] = weight != 0
    assert told[:2] == [0.0, 0.0] and told == sorted(told)
    assert told[13:] == [form.sparsity] * 5
    assert told[7] == pytest.approx(form.sparsity * (1 - (1 - 6 / 12) ** 3))
    for name, weight in pruning.weights.items():
        assert torch.equal(dense(pruning.made(name)), weight.detach().to(torch.bfloat16))


def test_gradual_pruning_is_magnitude_pruning_where_it_happens_at_once() -> None:
    for form in FORMS:
        model = small()
        due = {name: dense(prune(weight, form)) for name, weight in weights_of(model, form, None).items()}
        Gradual(model, form, begin=0, end=0).step(0)
        for name, weight in weights_of(model, form, None).items():
            assert torch.equal(weight.detach().to(torch.bfloat16), due[name])


@CASES
def test_regrowing_moves_places_and_no_counts(form: Sparse) -> None:
    model = small()
    pruning = Regrow(model, form, end=16, every=2, share=0.4)
    moved = 0
    for n, _ in steps(model, 20):
        before = {name: mask.clone() for name, mask in pruning.masks.items()}
        pruning.step(n)
        for name, weight in pruning.weights.items():
            mask = pruning.masks[name]
            count = form.kept(weight.shape[1])
            per_row = mask.view(-1, 4) if form.pattern == "2:4" else mask
            assert per_row.sum(1).unique().tolist() == [2 if form.pattern == "2:4" else count]
            here = weight != 0
            whole = mask if form.pattern != "blocks" else mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
            assert not (here & ~whole).any()
            off = int((mask & ~before[name]).sum())
            assert off == int((before[name] & ~mask).sum())
            assert (n % 2 == 0 and n < 16) or off == 0
            moved += off
            assert n < 20 or torch.equal(dense(pruning.made(name)), weight.detach().to(torch.bfloat16))
    assert moved > 0
    assert pruning.share(8) == pytest.approx(0.2 * (1 + math.cos(math.pi / 2)))


def test_regrowing_is_that_of_its_definition() -> None:
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    model[0].weight.data = torch.tensor([[8.0, -7.0, 6.0, 5.0, 0.4, 0.3, 0.2, 0.1]])
    pruning = Regrow(model, Sparse(), end=100, every=1, share=1.0)
    assert model[0].weight.tolist() == [[8.0, -7.0, 6.0, 5.0, 0.0, 0.0, 0.0, 0.0]]
    model[0].weight.grad = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, -4.0, 2.0, 3.0]])
    pruning.step(50)  # half of what is kept moves: 6 and 5 go, places 5 and 7 grow, from 0
    assert pruning.masks["0"].tolist() == [[True, True, False, False, False, True, False, True]]
    assert model[0].weight.tolist() == [[8.0, -7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    model[0].weight.grad = None
    with pytest.raises(ValueError, match="0 has no gradient after step 50: call `step` before `zero_grad`"):
        pruning.step(50)


@CASES
@pytest.mark.parametrize("kind", ["gradual", "regrow"])
def test_a_run_that_was_saved_goes_on_to_the_same_weights(form: Sparse, kind: str) -> None:
    def begin(model: nn.Module) -> Gradual | Regrow:
        if kind == "gradual":
            return Gradual(model, form, begin=0, end=8)
        return Regrow(model, form, end=8, every=2)

    model = small()
    pruning = begin(model)
    for n, _ in steps(model, 4):
        pruning.step(n)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = pruning.state_dict()
    again = small(5)
    other = begin(again)
    other.load_state_dict(masks)
    again.load_state_dict(weights)
    ends = []
    for one, by in ((model, pruning), (again, other)):
        for n, _ in steps(one, 4, seed=9):
            by.step(n + 4)
        ends.append(one.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name])
    with pytest.raises(ValueError, match=r"masks of 0 have the shape None, its layer takes \("):
        other.load_state_dict({"2": masks["2"]})


def test_what_cannot_be_pruned_is_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="1 is ReLU, no linear layer"):
        Masks(model, FORMS[0], ["1"])
    with pytest.raises(ValueError, match="7 is no module"):
        Masks(model, FORMS[0], ["7"])
    with pytest.raises(ValueError, match=r"0 \[4, 12\] cannot be sparse 80%: 12 inputs are not a multiple of 8"):
        Masks(nn.Sequential(nn.Linear(12, 4)), FORMS[0])
    with pytest.raises(ValueError, match="no linear layers"):
        Masks(nn.Sequential(nn.ReLU()), FORMS[0])
    with pytest.raises(ValueError, match=r"wanted: 0 <= begin <= end and every >= 1, got 5, 4 and 1"):
        Gradual(model, FORMS[0], begin=5, end=4)
    with pytest.raises(ValueError, match=r"first must be 0 to 0.8, where it ends, got 0.9"):
        Gradual(model, FORMS[0], begin=0, end=4, first=0.9)
    with pytest.raises(ValueError, match="share above 0 to 1, got 4, 100, 0"):
        Regrow(model, FORMS[0], end=4, share=0.0)
    with pytest.raises(ValueError, match=r"0: its rows keep up to 64, sparse 80% is to keep 13"):
        Masks(model, FORMS[0]).made("0")


@settings(max_examples=30, deadline=None)
@given(st.floats(0.02, 0.98), st.integers(0, 10**6))
def test_the_penalty_is_how_often_gates_are_open(share: float, seed: int) -> None:
    model = nn.Sequential(nn.Linear(512, 2))
    gates = Gates(model, {"0": 1}, open_share=share)
    assert gates.penalty().item() == pytest.approx(share, abs=1e-5)
    torch.manual_seed(seed)
    drawn = torch.stack([gates.value(0, learns=True) for _ in range(20)])
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    assert float((drawn > 0).float().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / 10240) ** 0.5)


def test_gates_are_open_at_first_and_leave_an_evaluated_model_as_it_is() -> None:
    model = small().eval()
    x = torch.randn(4, 64)
    due = model(x)
    Gates(model, {"0": 4, "2": 0})
    assert torch.equal(model(x), due)


@pytest.mark.parametrize(("size", "rate"), [(4, 0.3), (0, 1.0)])
def test_a_penalty_closes_the_gates_of_what_does_not_matter(size: int, rate: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 8))
    gates = Gates(model, {"0": size})
    target = torch.zeros(8, 32)
    target[:, :8] = torch.randn(8, 8)
    optimizer = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.05)
    generator = torch.Generator().manual_seed(4)
    first = gates.penalty().item()
    for _ in range(250):
        x = torch.randn(64, 32, generator=generator)
        loss = (model(x) - x @ target.t()).square().mean() + rate * gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gates.penalty().item() < first / 2
    model.eval()
    x = torch.randn(64, 32, generator=generator)
    before = model(x)
    open_ = gates.finish()["0"]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    whole = open_ if size == 0 else open_.repeat_interleave(size).expand(8, 32)
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter) and not model[0]._forward_pre_hooks
    assert not weight[~whole].any()
    assert whole[:, 8:].float().mean() < 0.25 and whole[:, :8].float().mean() > 0.7
    assert torch.equal(model(x), nn.functional.linear(x, weight, model[0].bias))


def test_gates_that_cannot_be_are_refused_and_states_go_on() -> None:
    model = small()
    with pytest.raises(ValueError, match="0: 64 inputs are not a multiple of the 5 that share a gate"):
        Gates(model, {"0": 5})
    with pytest.raises(ValueError, match="1 is ReLU, no linear layer"):
        Gates(model, {"1": 5})
    with pytest.raises(ValueError, match="open_share must be above 0 and below 1, got 1"):
        Gates(model, {"0": 4}, open_share=1.0)
    gates = Gates(model, {"0": 4})
    with torch.no_grad():
        gates.logits[0].copy_(torch.randn(16))
    other = Gates(small(), {"0": 4})
    other.load_state_dict(gates.state_dict())
    assert torch.equal(other.open_gates()["0"], gates.open_gates()["0"])


def test_one_threshold_gives_each_layer_its_sparsity() -> None:
    model = small()
    with torch.no_grad():
        model[2].weight.mul_(3.0)
    weights = weights_of(model, None, None)
    together = torch.cat([weight.detach().abs().view(-1) for weight in weights.values()])
    threshold = threshold_of(weights, 0.6)
    assert float((together < threshold).float().mean()) == pytest.approx(0.6, abs=2e-3)
    forms = forms_below(weights, threshold)
    assert forms["0"].sparsity == pytest.approx(float((weights["0"].abs() < threshold).float().mean()))
    assert forms["0"].sparsity > forms["2"].sparsity
    assert dense(prune(weights["0"], forms["0"])).ne(0).sum(1).unique().tolist() == [forms["0"].kept(64)]
    assert forms_below(weights, 100.0)["0"].sparsity == 0.95
    assert threshold_of(weights, 0.0) == 0.0 and forms_below(weights, 0.0)["0"].sparsity == 0.0
    with pytest.raises(ValueError, match=r"sparsity must be 0 to 1, got 1\.2"):
        threshold_of(weights, 1.2)


def test_l1_and_its_exact_step() -> None:
    model = small()
    weights = weights_of(model, None, None)
    penalty = l1(model)
    assert penalty.item() == pytest.approx(sum(weight.abs().sum().item() for weight in weights.values()), rel=1e-5)
    penalty.backward()
    assert torch.equal(model[0].weight.grad, model[0].weight.sign())
    before = model[0].weight.detach().clone()
    shrink(model, 0.02, ["0"])
    after = model[0].weight.detach()
    assert (after[before.abs() <= 0.02] == 0).all() and (before.abs() <= 0.02).any()
    large = before.abs() > 0.02
    torch.testing.assert_close(after[large], (before - 0.02 * before.sign())[large])
    with pytest.raises(ValueError, match="amount must be 0 or more, got -1"):
        shrink(model, -1.0)
