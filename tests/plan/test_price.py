"""Prices are the second-order divergence they say they are, and fall with bits."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.packed.scheme import Scheme
from memfit.plan.groups import Group, candidates, find_groups
from memfit.plan.price import prices, prices_without_weights, shares, weighting_of
from memfit.technique.quantize import dequantize, quantize

FOUR = Scheme(bits=4, group=32)


def linear(seed: int = 0, n: int = 48, k: int = 64) -> tuple[nn.ModuleDict, Group, Tensor]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(k, n, bias=False)})
    (group,) = find_groups(model)
    return model, group, model["a"].weight.detach()


def statistics(seed: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(k, generator=generator) + 0.1, torch.rand(n, generator=generator) ** 4


def test_the_price_is_half_the_sum_of_fisher_times_squared_error() -> None:
    _, group, w = linear()
    h, g = statistics(1, 64, 48)
    found = prices([group], {"a": (FOUR,)}, lambda _: w, {"a": (h, g)}, rows=20000)
    expected = 0.5 * (g[:, None] * h * (w - dequantize(quantize(w, FOUR, importance=h)).float()) ** 2).sum()
    # As many rows are drawn as there are, heavy ones more than once: an estimate still.
    assert found["a", FOUR] == pytest.approx(float(expected), rel=0.1)


def test_with_equal_rows_sampling_all_is_exact_and_some_is_near() -> None:
    _, group, w = linear(n=400)
    h, g = statistics(1, 64, 400)[0], torch.full((400,), 0.3)
    expected = 0.5 * (0.3 * h * (w - dequantize(quantize(w, FOUR, importance=h)).float()) ** 2).sum()
    schemes, measured = {"a": (FOUR,)}, {"a": (h, g)}
    whole, some = (prices([group], schemes, lambda _: w, measured, rows=n)["a", FOUR] for n in (400, 80))
    assert whole == pytest.approx(float(expected), rel=1e-4)
    assert some == pytest.approx(float(expected), rel=0.1)


def test_the_price_predicts_the_divergence_of_a_small_change() -> None:
    """A softmax over the outputs: the true divergence, against the price from sampled labels."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.Linear(64, 96, bias=False)})
    (group,) = find_groups(model)
    w = model["a"].weight.detach() * 4
    x = torch.randn(4000, 64) * (torch.rand(64) + 0.2)
    p = (x @ w.T).softmax(-1)
    labels = torch.multinomial(p, 1)[:, 0]
    gradient = p - nn.functional.one_hot(labels, 96)
    measured = {"a": (x.square().mean(0), gradient.square().mean(0))}
    scheme = Scheme(bits=5, group=64)
    price = prices([group], {"a": (scheme,)}, lambda _: w, measured)["a", scheme]
    change = dequantize(quantize(w, scheme, importance=measured["a"][0])).float()
    q = (x @ change.T).log_softmax(-1)
    kl = float((p * (p.clamp_min(1e-30).log() - q)).sum(-1).mean())
    assert price == pytest.approx(kl, rel=0.35)


def test_an_embedding_is_a_linear_layer_of_one_hot_inputs() -> None:
    torch.manual_seed(4)
    model = nn.ModuleDict({"e": nn.Embedding(1024, 64)})
    (group,) = find_groups(model)
    w = model["e"].weight.detach()
    frequency, g = torch.zeros(1024), torch.rand(64) + 0.1
    frequency[:7] = 1 / 7
    found = prices([group], {"e": (FOUR,)}, lambda _: w, {"e": (frequency, g)}, rows=350)["e", FOUR]
    error = (w - dequantize(quantize(w, FOUR, importance=g)).float()) ** 2
    assert found == pytest.approx(0.5 * float((frequency[:, None] * g * error).sum()), rel=0.02)


def test_a_tied_head_pays_for_both_uses() -> None:
    torch.manual_seed(5)
    model = nn.ModuleDict({"e": nn.Embedding(1024, 64), "h": nn.Linear(64, 1024, bias=False)})
    model["h"].weight = model["e"].weight
    (group,) = find_groups(model)
    w = model["e"].weight.detach()
    f, ge = torch.rand(1024) / 1024, torch.rand(64)
    h, gh = torch.rand(64), torch.rand(1024)
    found = prices([group], {group.name: (FOUR,)}, lambda _: w, {"e": (f, ge), "h": (h, gh)}, rows=1024)[
        group.name, FOUR
    ]
    weighting = weighting_of(group, "e.weight", {"e": (f, ge), "h": (h, gh)})
    assert weighting is not None
    importance = weighting.importance()
    torch.testing.assert_close(importance, f.mean() * ge + gh.mean() * h)
    torch.testing.assert_close(weighting.rows(), ge.mean() * f + h.mean() * gh)
    error = (w - dequantize(quantize(w, FOUR, importance=importance)).float()) ** 2
    assert found == pytest.approx(0.5 * float(((f[:, None] * ge + gh[:, None] * h) * error).sum()), rel=0.1)


def experts() -> Group:
    return Group(
        name="x", kind="experts", members=("x",), parameters=("x.gate_up_proj", "x.down_proj"),
        shapes=((3, 128, 64), (3, 64, 64)),
    )  # fmt: skip


def test_each_expert_may_have_its_own_statistics() -> None:
    torch.manual_seed(6)
    weights = {"x.gate_up_proj": torch.randn(3, 128, 64), "x.down_proj": torch.randn(3, 64, 64)}
    h, g = torch.rand(3, 64), torch.rand(3, 128) + 0.5
    measured = {"x.gate_up_proj": (h, g), "x.down_proj": (torch.rand(64), torch.zeros(64))}
    found = prices([experts()], {"x": (FOUR,)}, weights.__getitem__, measured)["x", FOUR]
    w = weights["x.gate_up_proj"]
    weighting = weighting_of(experts(), "x.gate_up_proj", measured)
    assert weighting is not None
    importance = weighting.importance()
    error = (w - dequantize(quantize(w.view(-1, 64), FOUR, importance=importance)).float().view(w.shape)) ** 2
    assert found == pytest.approx(0.5 * float((g[..., None] * h[:, None] * error).sum()), rel=0.05)


@pytest.mark.parametrize("weighted", [False, True])
def test_prices_fall_with_bits(weighted: bool) -> None:
    _, group, w = linear(n=64, k=256)
    measured = {"a": statistics(2, 256, 64)} if weighted else None
    schemes = candidates(group)
    found = prices([group], {"a": schemes}, lambda _: w, measured)
    best = [min(found["a", s] for s in schemes if s.bits == bits) for bits in (8, 6, 5, 4, 3, 2)]
    assert all(0 < a < b for a, b in itertools.pairwise(best))


def test_without_weights_the_prices_are_those_of_normal_ones() -> None:
    torch.manual_seed(7)
    weights = {"a.weight": torch.randn(128, 256), "b.weight": torch.randn(128, 256) * 0.02}
    groups = find_groups(nn.ModuleDict({"a": nn.Linear(256, 128), "b": nn.Linear(256, 128)}))
    schemes = {group.name: candidates(group, bits=(8, 4, 2)) for group in groups}
    guessed = prices_without_weights(groups, schemes)
    before = {name: weight.clone() for name, weight in weights.items()}
    found = prices(groups, schemes, weights.__getitem__)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert guessed.keys() == found.keys()
    for key, price in found.items():
        assert guessed[key] == pytest.approx(price, rel=0.08)


def test_shares_sum_to_one_and_prefer_the_ends_and_the_head() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(1024, 64),
            "layers": nn.ModuleList(nn.ModuleDict({"o": nn.Linear(64, 64)}) for _ in range(16)),
            "head": nn.Linear(64, 1024),
        }
    )
    found = shares(find_groups(model))
    assert sum(found.values()) == pytest.approx(1)
    assert found["head"] > found["embed"]
    layers = [found[f"layers.{n}.o"] for n in range(16)]
    assert layers[0] == layers[1] == layers[14] == layers[15] == 2 * layers[2] == 2 * layers[13]
    assert shares([]) == {}


def test_the_same_weights_get_the_same_price() -> None:
    _, group, w = linear(n=300)
    measured = {"a": statistics(2, 64, 300)}
    first, second = (prices([group], {"a": (FOUR,)}, lambda _: w, measured, rows=50) for _ in range(2))
    assert first == second


def test_pricing_can_be_followed_on_fake_tensors() -> None:
    _, group, _ = linear(n=300)
    with FakeTensorMode():
        measured = {"a": (torch.empty(64), torch.empty(300))}
        for given in (None, measured):
            found = prices([group], {"a": (FOUR,)}, lambda _: torch.empty(300, 64), given, rows=50)
            assert found == {("a", FOUR): 0.0}


def test_statistics_that_do_not_fit_are_refused() -> None:
    _, group, w = linear()
    with pytest.raises(KeyError, match="no statistics of a"):
        prices([group], {"a": (FOUR,)}, lambda _: w, {})
    with pytest.raises(ValueError, match=r"a: statistics H \[3\]"):
        prices([group], {"a": (FOUR,)}, lambda _: w, {"a": (torch.ones(3), torch.ones(48))})
