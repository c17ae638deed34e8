"""Learning from a teacher: gradients as in a few lines, whatever the levers; predicted as all training is."""

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import memfit
from memfit.account.dry_run import dry_run
from memfit.account.meter import Meter
from memfit.account.structure import stacked_blocks
from memfit.models import load_to_train
from memfit.source.source import source_from_config
from memfit.technique.distil import Distil, attention_loss, hidden_loss, matched_layers
from memfit.train.hyper import Hyper
from memfit.train.recipe import Recipe
from memfit.train.task import Train

SIZE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LAYERS = tuple(f"model.layers.{n}" for n in range(3))
TOLERANCE = 8192
"""Bytes: what chance draws keep its state, and numbers of a few bytes."""


def llama(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(**SIZE | {"tie_word_embeddings": True} | settings)
    return hf.LlamaForCausalLM(config).to(dtype).requires_grad_(True)


def batch_of(rows=6, tokens=24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (rows, tokens), generator=generator)
    ignored = torch.rand(rows, tokens, generator=generator) < torch.linspace(0, 0.6, rows).unsqueeze(1)
    return {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}


def plain_gradients(student, teacher, batch, distil):
    """A few lines, of the whole batch at once."""
    looked = "attention" in distil.match
    more = {"output_attentions": looked, "use_cache": False}
    for model in (student, teacher):
        model.set_attn_implementation("eager" if looked else "sdpa")  # as transformers has it, the one is in fp32
    ours, ours_l = asked(student, batch, more)
    with torch.no_grad():
        theirs, theirs_l = asked(teacher, batch, more)
    labels = batch["labels"][:, 1:].flatten()
    z, z_t = (out.logits[:, :-1].flatten(0, 1) for out in (ours, theirs))
    counted, t = labels.ne(-100), distil.temperature
    log_p, log_q = torch.log_softmax(z_t / t, -1), torch.log_softmax(z / t, -1)
    first, second = (log_p, log_q) if distil.kl == "forward" else (log_q, log_p)
    kl = (first.exp() * (first - second)).sum(-1)[counted].mean()
    loss = distil.alpha * F.cross_entropy(z, labels) + (1 - distil.alpha) * t * t * kl
    weights = F.pad(counted.view(len(batch["labels"]), -1).double(), (0, 1)) / counted.sum()
    layers = matched_layers(len(student.model.layers), len(teacher.model.layers))
    if "hidden" in distil.match:
        loss = loss + distil.match_weight * hidden_loss(ours_l, [theirs_l[i] for i in layers], weights)
    if "attention" in distil.match:
        chosen = [theirs.attentions[i] for i in layers]
        loss = loss + distil.match_weight * attention_loss(ours.attentions, chosen, weights)
    return float(loss.detach()), torch.autograd.grad(loss, list(student.parameters()))


def asked(model, batch, more):
    """Its outputs, and what its blocks gave: the last of transformers' own hidden states has gone through the norm."""
    found = []
    hooks = [layer.register_forward_hook(lambda m, g, out: found.append(out)) for layer in model.model.layers]
    out = model(input_ids=batch["input_ids"], **more)
    for hook in hooks:
        hook.remove()
    return out, found


def gradients_of(model, recipe, distil, batch, teacher):
    """What one step of plain descent moved the weights by."""
    recipe = replace(recipe, optimizer="sgd")
    before = [p.detach().clone() for p in model.parameters()]
    hyper = Hyper(lr=1.0, weight_decay=0, momentum=0, clip=None)
    task = Train(batch=6, sequence=24, recipe=recipe, hyper=hyper, distil=distil)
    step = memfit.train_step(model, task, teacher=teacher)
    loss = step(batch).loss
    step.close()
    return loss, [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


RECIPES = {
    "plain": Recipe(chunk_nbytes=None),
    "chunked": Recipe(chunk_nbytes=1 << 15),
    "micro": Recipe(micro_batch=2),
    "recomputed": Recipe(recompute=LAYERS, slices=4, in_backward=True),
    "rows": Recipe(recompute=LAYERS, in_backward=True, rows=True, chunk_nbytes=1 << 15),
    "micro rows": Recipe(micro_batch=4, rows=True, recompute=LAYERS[1:]),
}  # fmt: skip


@pytest.mark.parametrize("match", [(), ("hidden",), ("attention",), ("hidden", "attention")])
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_those_of_a_few_lines_whatever_the_levers(name, match):
    recipe = RECIPES[name]
    if "attention" in match and recipe.recompute:
        return
    kl = "reverse" if name in ("micro", "rows") else "forward"
    distil = Distil(teacher="t", alpha=0.3, kl=kl, match=match, match_weight=0.7)
    teacher, batch = llama(1, num_hidden_layers=5), batch_of()
    right, gradients = plain_gradients(llama(), teacher, batch, distil)
    loss, found = gradients_of(llama(), recipe, distil, batch, teacher)
    assert loss == pytest.approx(right, rel=1e-10)
    for one, gradient in zip(found, gradients, strict=True):
        assert float((one - gradient).norm() / gradient.norm()) < 1e-10


# -- what it takes -------------------------------------------------------------------------------------

ALL = "all blocks"
WIDE = SIZE | {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128}
PREDICTED = {
    "chunked, autocast": (Recipe(chunk_nbytes=1 << 17, precision="autocast"), {}),
    "by entries": (Recipe(chunk_nbytes=1 << 10, precision="master"), {"kl": "reverse", "temperature": 2.0}),
    "micro": (Recipe(micro_batch=1, gradients="fp32", precision="bf16"), {"alpha": 0.5}),
    "frugal": (
        Recipe(
            recompute=(ALL,), slices=4, in_backward=True, rows=True, chunk_nbytes=1 << 17, precision="stochastic",
            state_bits=8,
        ), {"match": ("hidden",)},
    ),
    "attention": (Recipe(chunk_nbytes=1 << 17), {"match": ("hidden", "attention")}),
    "answers": (
        Recipe(recompute=(ALL,), in_backward=True, rows=True, chunk_nbytes=1 << 17, micro_batch=2),
        {"place": "disk", "kl": "reverse", "top": 9},
    ),
    "answers, logits": (Recipe(chunk_nbytes=None), {"place": "disk", "alpha": 0.3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Directories of teachers by chance: a language model of five blocks, and a classifier."""
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(1)
    made = {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE | {"num_hidden_layers": 5})),
        "classes": hf.LlamaForSequenceClassification(hf.LlamaConfig(**WIDE | {"num_labels": 3})),
    }
    for name, model in made.items():
        model.to(torch.bfloat16).save_pretrained(root / name)
    return {name: str(root / name) for name in made}


def both(config, recipe, distil):
    source = source_from_config(config)
    names = tuple(name for name, _ in stacked_blocks(source.build(dtype=torch.float32)))
    recipe = replace(recipe, recompute=names) if recipe.recompute else recipe
    task = Train(batch=4, sequence=32, recipe=recipe, hyper=Hyper(clip=None), distil=distil)
    predicted = dry_run(lambda: load_to_train(source, task.recipe), task)
    gc.collect()  # what an earlier test left in cycles must not end within this measurement
    meter = Meter()
    with meter.phase("load"):
        model = load_to_train(source, task.recipe)
    task.run(model, meter)
    return predicted, meter.account()


def check(predicted, measured):
    assert [phase.name for phase in predicted.phases] == [phase.name for phase in measured.phases]
    for phase in predicted.phases:
        assert abs(phase.peak_nbytes - measured.phase(phase.name).peak_nbytes) <= TOLERANCE, phase.name
        assert abs(phase.end_nbytes - measured.phase(phase.name).end_nbytes) <= TOLERANCE, phase.name


@pytest.mark.parametrize("name", PREDICTED)
def test_what_a_distillation_takes_is_predicted(name, teachers):
    recipe, settings = PREDICTED[name]
    distil = Distil(teacher=teachers["llama"], **{"place": "memory"} | settings)
    predicted, measured = both(hf.LlamaConfig(**WIDE), recipe, distil)
    check(predicted, measured)
    held = sum(entry.nbytes for entry in predicted.entries if entry.module.startswith("teacher"))
    weights = sum(p.numel() for p in hf.AutoModelForCausalLM.from_pretrained(teachers["llama"]).parameters())
    assert (held >= 2 * weights) == (distil.place == "memory")


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_a_classifiers_distillation_takes_is_predicted(place, teachers):
    config = hf.LlamaConfig(**WIDE, num_labels=3, architectures=["LlamaForSequenceClassification"])
    match = ("hidden",) if place == "memory" else ()
    check(*both(config, Recipe(), Distil(teacher=teachers["classes"], place=place, match=match)))
