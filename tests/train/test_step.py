"""A step computes what plain training computes: every lever that is exact, alone and together."""

import pytest
import torch
import torch.nn.functional as F

from memfit.errors import UsageError
from memfit.train.hyper import Hyper
from memfit.train.recipe import Recipe
from memfit.train.step import LossNotFinite, TrainStep

LAYERS = tuple(f"model.layers.{n}" for n in range(3))
EXACT = {
    "as it is": {"chunk_nbytes": None},
    "chunked loss": {"chunk_nbytes": 40_000},
    "micro-batches": {"micro_batch": 2},
    "micro-batches that do not divide the batch": {"micro_batch": 4, "gradients": "fp32"},
    "recomputed": {"recompute": LAYERS},
    "one block recomputed": {"recompute": LAYERS[1:2]},
    "recomputed in slices": {"recompute": LAYERS, "slices": 4},
    "inputs on the disk": {"recompute": LAYERS, "store": "disk"},
    "updated in the backward pass": {"recompute": LAYERS, "slices": 3, "in_backward": True},
    "updated in the backward pass, blocks kept": {"in_backward": True},
    "updated in the backward pass of the last micro-batch": {"in_backward": True, "micro_batch": 3},
    "rows": {"rows": True, "chunk_nbytes": 40_000},
    "rows of micro-batches": {"rows": True, "micro_batch": 2},
    "states on the disk": {"states": "disk"},
    "weights on the disk": {"recompute": LAYERS, "weights": "disk"},
    "weights of two blocks on the disk": {"recompute": LAYERS[:2], "weights": "disk", "in_backward": True},
    "weights on the host": {"recompute": LAYERS, "weights": "host", "slices": 2},
    "all": {
        "recompute": LAYERS, "slices": 6, "in_backward": True, "rows": True, "states": "disk", "store": "disk",
        "weights": "disk", "chunk_nbytes": 40_000,
    },
}  # fmt: skip


def plain_steps(model, batches, *, clip, lr=1e-3):
    """What a user would write: AdamW, the mean over all labels, norms not decayed."""
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    losses = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def steps(model, batches, *, clip=None, lr=1e-3, **settings):
    step = TrainStep(model, Recipe(**settings), hyper=Hyper(lr=lr, clip=clip))
    losses = [step(batch).loss for batch in batches]
    step.close()
    return losses


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_lever_learns_what_plain_training_learns(make_model, batches, name, clip):
    plain, model = make_model(torch.float64), make_model(torch.float64)
    expected = plain_steps(plain, batches[:4], clip=clip)
    found = steps(model, batches[:4], clip=clip, **EXACT[name])
    assert found == pytest.approx(expected, rel=1e-10)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_in_fp32_the_gap_is_that_of_splitting_a_batch_otherwise(make_model, batches, name):
    floor = max(
        abs(a - b)
        for a, b in zip(
            plain_steps(make_model(), batches, clip=1.0),
            steps(make_model(), batches, clip=1.0, micro_batch=3, chunk_nbytes=None),
            strict=True,
        )
    )
    expected = plain_steps(make_model(), batches, clip=1.0)
    found = steps(make_model(), batches, clip=1.0, **EXACT[name])
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 5 * max(floor, 5e-7 * expected[0])


LOSSY = {
    "autocast": ({"precision": "autocast"}, 2e-2),
    "bf16 with a master": ({"precision": "master"}, 2e-2),
    "stochastic": ({"precision": "stochastic"}, 2e-2),
    "kahan": ({"precision": "kahan"}, 2e-2),
    "fp16": ({"precision": "fp16"}, 5e-3),
    "16-bit states": ({"state_bits": 16}, 2e-3),
    "8-bit states": ({"state_bits": 8}, 5e-3),
    "4-bit states": ({"state_bits": 4}, 5e-2),
    "8-bit gradients": ({"gradients": "int8", "micro_batch": 2}, 2e-2),
    "8-bit inputs": ({"recompute": LAYERS, "store": "int8"}, 2e-2),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_lever_stays_near_plain_training(make_model, batches, name):
    """Of the same batch over and over, so that there is something to learn: the loss falls by more than 2."""
    same = [batches[0]] * 30
    expected = plain_steps(make_model(), same, clip=None, lr=1e-2)
    settings, gap = LOSSY[name]
    found = steps(make_model(), same, lr=1e-2, **settings)
    assert expected[0] - expected[-1] > 2
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= gap * expected[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "galore", "apollo", "muon"])
def test_every_optimizer_learns(make_model, batches, optimizer):
    model = make_model()
    step = TrainStep(model, Recipe(optimizer=optimizer), hyper=Hyper(lr=2e-2, rank=8))
    losses = [step(batches[0]).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("settings", [EXACT["all"], {}, {"rows": True, "in_backward": True}])
def test_the_norm_is_that_of_the_whole_gradient(make_model, batches, settings):
    model = make_model(torch.float64)
    logits = model(input_ids=batches[0]["input_ids"]).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batches[0]["labels"][:, 1:].flatten()).backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    found = TrainStep(make_model(torch.float64), Recipe(**settings), hyper=Hyper(clip=1.0))(batches[0])
    assert found.gradient_norm == pytest.approx(expected, rel=1e-10)


def test_no_gradient_is_left_and_blocks_are_whole_again(make_model, batches):
    model = make_model()
    step = TrainStep(model, Recipe(recompute=LAYERS, in_backward=True, rows=True))
    step(batches[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    step.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_tied_weights_stay_tied_in_every_precision(make_model, batches):
    for precision in ("fp32", "master", "fp16"):
        model = make_model()
        TrainStep(model, Recipe(precision=precision, rows=True))(batches[0])
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_shared_block_is_updated_once_with_all_of_its_gradient(make_model, batches):
    def shared():
        model = make_model(torch.float64)
        model.model.layers[2] = model.model.layers[0]
        return model

    plain, model = shared(), shared()
    expected = plain_steps(plain, batches[:3], clip=None)
    found = steps(model, batches[:3], recompute=("model.layers.0", "model.layers.1"), in_backward=True)
    assert found == pytest.approx(expected, rel=1e-10)


def test_dropout_draws_the_same_again_when_a_block_runs_again(batches):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )

    def run(**settings):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().requires_grad_(True)
        torch.manual_seed(5)
        return steps(model, batches[:3], **settings)

    plain = run()
    assert run(recompute=("transformer.h.0", "transformer.h.1")) == pytest.approx(plain, rel=1e-10)
    assert run(in_backward=True, recompute=("transformer.h.1",), clip=1e9) == pytest.approx(plain, rel=1e-10)


def test_a_loss_that_is_no_number_updates_nothing(make_model, batches):
    model = make_model()
    step = TrainStep(model, Recipe(recompute=LAYERS, in_backward=True, rows=True))
    step(batches[0])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(LossNotFinite, match="step 2"):
        step(batches[1])
    for one, other in zip(before, model.parameters(), strict=True):
        assert torch.equal(one, other) or one.isnan().any()
    assert step.steps == 1


def test_a_batch_whose_labels_are_all_ignored_is_refused(make_model, batches):
    batch = {"input_ids": batches[0]["input_ids"], "labels": torch.full((6, 24), -100)}
    with pytest.raises(UsageError, match="all labels"):
        TrainStep(make_model(), Recipe())(batch)


def test_fp16_skips_a_step_that_overflows_and_goes_on(make_model, batches):
    step = TrainStep(make_model(), Recipe(precision="fp16"), hyper=Hyper(clip=None))
    step.scaler.value = 2.0**40
    outcomes = [step(batches[0]) for _ in range(40)]
    assert outcomes[0].skipped and not outcomes[-1].skipped
    assert step.scaler.value < 2.0**40


def test_evaluation_is_the_loss_without_learning(make_model, batches):
    model = make_model(torch.float64)
    logits = model.eval()(input_ids=batches[0]["input_ids"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batches[0]["labels"][:, 1:].flatten()).item()
    step = TrainStep(model, Recipe(recompute=LAYERS, micro_batch=4, rows=True))
    assert step.evaluate(batches[0])[0] == pytest.approx(expected, rel=1e-10)


def test_out_of_memory_in_a_block_is_answered_by_smaller_slices(make_model, batches, monkeypatch):
    plain, model = make_model(torch.float64), make_model(torch.float64)
    expected = plain_steps(plain, batches[:2], clip=None)
    step = TrainStep(model, Recipe(recompute=LAYERS, in_backward=True), hyper=Hyper(lr=1e-3, clip=None))
    segment = step.segments[1]
    forward = segment.plain

    def starved(hidden, *args, **kwargs):
        if torch.is_grad_enabled() and hidden.shape[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return forward(hidden, *args, **kwargs)

    segment.plain = starved
    found = [step(batch).loss for batch in batches[:2]]
    assert found == pytest.approx(expected, rel=1e-10)
    assert [s.slices for s in step.segments] == [1, 4, 1]


def test_a_model_whose_weights_are_away_is_not_saved_until_they_are_back(make_model, batches, tmp_path):
    plain, model = make_model(torch.float64), make_model(torch.float64)
    expected = plain_steps(plain, batches[:2], clip=None)
    step = TrainStep(model, Recipe(recompute=LAYERS, weights="disk"), hyper=Hyper(lr=1e-3, clip=None))
    assert [step(batch).loss for batch in batches[:2]] == pytest.approx(expected, rel=1e-10)
    for save in (lambda: model.save_pretrained(tmp_path / "out"), model.state_dict):
        with pytest.raises(UsageError, match=r"weights wait elsewhere .* close\(\) first"):
            save()
    step.close()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=0, atol=1e-10)
