"""Statistics of fused experts are those of transformers' own eager experts."""

import torch
from torch import nn

from memfit.calibrate import collect as room
from memfit.calibrate.collect import collect
from memfit.plan.groups import find_groups
from memfit.source.load import load
from memfit.source.source import source_from_config

from .test_collect import CONFIGS, windows


def heard_by_linear(model, ids, labels, monkeypatch):
    """Inputs and gradients of every product with an expert's weight, by its place in the parameter."""
    plain = nn.functional.linear
    owners = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim() == 3}
    heard = []

    def linear(x, weight, *more):
        out = plain(x, weight, *more)
        name = owners.get(weight.untyped_storage().data_ptr())
        if name is not None:
            entry = [name, weight.storage_offset() // weight.numel(), x.detach(), None]
            out.register_hook(lambda g: entry.__setitem__(3, g))
            heard.append(entry)
        return out

    monkeypatch.setattr(nn.functional, "linear", linear)
    logits = model(ids, use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    monkeypatch.undo()
    return heard


def test_moments_of_experts_are_those_of_the_eager_model(monkeypatch):
    source = source_from_config(CONFIGS["mixtral"]())
    groups = find_groups(source.build(dtype=torch.float32))
    wanted = frozenset(member for group in groups for member in group.members)
    drawn, draw = [], room._draw
    monkeypatch.setattr(room, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    found = collect(source, windows(), wanted, batch=2, dtype=torch.float32)
    monkeypatch.undo()
    labels = torch.cat([tokens for tokens, _ in drawn])
    model = load(source, dtype=torch.float32).double().requires_grad_()
    model.set_experts_implementation("eager")
    seen = 0
    for name, expert, x, g in heard_by_linear(model, windows(), labels, monkeypatch):
        moments = found.moments[name]
        expected = x.square().mean(0).float()
        torch.testing.assert_close(moments.inputs[expert], expected, rtol=2e-3, atol=float(expected.max()) * 1e-4)
        expected = (g.square().sum(0) / labels.numel()).float()
        torch.testing.assert_close(
            moments.gradients[expert], expected, rtol=5e-3, atol=float(expected.max()) * 1e-3
        )
        seen += 1
    assert seen == 2 * 2 * 4  # layers, weights, experts: with 96 tokens all are seen
