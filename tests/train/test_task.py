"""The account of training: predicted on fakes, measured by the allocator's own events, phase by phase."""

import gc
import json
from dataclasses import replace

import pytest
import torch
import transformers as hf

import memfit
from memfit.account.dry_run import dry_run, trace
from memfit.account.meter import Meter
from memfit.account.settle import settle
from memfit.account.structure import stacked_blocks
from memfit.errors import UsageError
from memfit.format.directory import OutputDirectory
from memfit.models import load_to_train
from memfit.packed.modules import packed_modules
from memfit.source.source import open_source, source_from_config
from memfit.technique.adapters import Adapters
from memfit.train.hyper import Hyper
from memfit.train.output import write_model
from memfit.train.plan import TrainPlan
from memfit.train.recipe import Recipe
from memfit.train.save import restore_states, save_states
from memfit.train.task import Train, make_trainable

DECODER = {
    "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ALL = "all blocks"
RECIPES = {
    "plain": Recipe(chunk_nbytes=None),
    "chunked": Recipe(chunk_nbytes=1 << 17),
    "micro": Recipe(micro_batch=1, gradients="fp32"),
    "recomputed": Recipe(recompute=(ALL,), slices=2),
    "frugal": Recipe(
        recompute=(ALL,), slices=4, in_backward=True, rows=True, chunk_nbytes=1 << 17, precision="stochastic",
        state_bits=8,
    ),
    "master": Recipe(recompute=(ALL,), precision="master", state_bits=4, in_backward=True),
    "autocast": Recipe(precision="autocast", recompute=(ALL,), state_bits=16),
    "int8": Recipe(gradients="int8", micro_batch=2, recompute=(ALL,), store="int8"),
    "disk": Recipe(states="disk", recompute=(ALL,), store="disk"),
    "kahan": Recipe(precision="kahan", optimizer="sgd"),
    "weights away": Recipe(
        recompute=(ALL,), slices=2, in_backward=True, rows=True, chunk_nbytes=1 << 17, precision="master",
        states="disk", store="disk", weights="disk",
    ),
    "weights away, lora": Recipe(
        recompute=(ALL,), adapters=Adapters(rank=4), weights="disk", precision="master", chunk_nbytes=1 << 17
    ),
    "adafactor": Recipe(optimizer="adafactor"),
    "galore": Recipe(optimizer="galore"),
    "apollo": Recipe(optimizer="apollo"),
    "muon": Recipe(optimizer="muon"),
    "lora": Recipe(adapters=Adapters(rank=4), recompute=(ALL,), in_backward=True),
    "dora": Recipe(adapters=Adapters(kind="dora", rank=4), precision="master", chunk_nbytes=1 << 17),
    "qlora": Recipe(
        adapters=Adapters(rank=4, base_bits=4), precision="master", state_bits=8, recompute=(ALL,), chunk_nbytes=1 << 17
    ),
}  # fmt: skip
TOLERANCE = 8192
"""Bytes: what chance draws keep its state, and numbers of a few bytes."""


def configs():
    return {
        "llama": hf.LlamaConfig(**DECODER),
        "gemma3": hf.Gemma3TextConfig(**DECODER, head_dim=16, sliding_window=8),
        "mixtral": hf.MixtralConfig(**DECODER, num_local_experts=4),
        "llama, classes": hf.LlamaConfig(
            **DECODER | {"num_key_value_heads": 4}, architectures=["LlamaForSequenceClassification"]
        ),
        "gpt2": hf.GPT2Config(vocab_size=2000, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
        "bert": hf.BertConfig(
            vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            architectures=["BertForSequenceClassification"],
        ),
    }  # fmt: skip


def both(config, recipe, *, clip=None, whole=False):
    source = source_from_config(config)
    names = tuple(name for name, _ in stacked_blocks(source.build(dtype=torch.float32)))
    if recipe.recompute:
        recipe = replace(recipe, recompute=names)
    task = Train(batch=4, sequence=32, recipe=recipe, hyper=Hyper(clip=clip, rank=16))
    predicted = dry_run(lambda: load_to_train(source, task.recipe), task, whole=whole)
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


@pytest.mark.parametrize("name", RECIPES)
def test_every_lever_is_predicted(name):
    check(*both(hf.LlamaConfig(**DECODER), RECIPES[name]))


@pytest.mark.parametrize("recipe", ["plain", "frugal", "master", "weights away"])
@pytest.mark.parametrize("name", ["gemma3", "mixtral", "gpt2", "bert", "llama, classes"])
def test_every_kind_of_model_is_predicted(name, recipe):
    chosen = RECIPES[recipe]
    if name in ("bert", "llama, classes"):
        chosen = replace(chosen, rows=False)
    check(*both(configs()[name], chosen))


def test_clipping_in_two_passes_is_predicted():
    check(*both(hf.LlamaConfig(**DECODER), RECIPES["frugal"], clip=1.0))


def test_a_recomputed_block_does_not_fill_a_cache_twice():
    """A loss of one's own may call the model as it is: with a cache, by its config."""
    source = source_from_config(hf.LlamaConfig(**DECODER))
    names = tuple(name for name, _ in stacked_blocks(source.build()))
    ids = torch.randint(0, 2000, (4, 16), generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=True).loss

    found = []
    for recompute in ((), names):
        task = Train(batch=4, sequence=16, recipe=Recipe(recompute=recompute), hyper=Hyper(lr=1e-3))
        step = memfit.train_step(load_to_train(source, task.recipe), task, loss=loss)
        found.append([step({"input_ids": ids}).loss for _ in range(3)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_batch_larger_than_planned_is_refused():
    source = source_from_config(hf.LlamaConfig(**DECODER))
    step = memfit.train_step(load_to_train(source, Recipe()), Train(batch=2, sequence=16))
    ids = torch.zeros(3, 16, dtype=torch.long)
    with pytest.raises(UsageError, match="a batch of 3 x 16 tokens, and the plan is for 2 x 16"):
        step({"input_ids": ids, "labels": ids})
    assert step({"input_ids": ids[:1], "labels": ids[:1]}).labels == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: {"input_ids": ids}, "has no tensor 'labels'; it has input_ids"),
        (lambda ids: {"labels": ids}, "has no tensor 'input_ids'"),
        (lambda ids: {"input_ids": ids + 5000, "labels": ids}, "input_ids hold 5000, and the vocabulary has"),
        (lambda ids: {"input_ids": ids, "labels": ids - 1}, r"labels hold -1; they count from 0 \(-100 is ignored\)"),
        (lambda ids: {"input_ids": ids, "labels": ids + 5000}, "labels hold 5000"),
        (lambda ids: {"input_ids": ids, "labels": ids[:, :4]}, r"labels of \[2, 4\]"),
        (lambda ids: {"input_ids": ids, "labels": ids[:, 0]}, r"both must be \[batch, tokens\]"),
        (lambda ids: {"input_ids": ids.float(), "labels": ids}, "input_ids are of torch.float32"),
    ],
)
def test_what_is_no_batch_for_the_model_is_told(change, message):
    source = source_from_config(hf.LlamaConfig(**DECODER))
    step = memfit.train_step(load_to_train(source, Recipe()), Train(batch=2, sequence=16))
    with pytest.raises(UsageError, match=message):
        step(change(torch.zeros(2, 16, dtype=torch.long)))


def test_a_classifiers_labels_are_its_classes():
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    step = memfit.train_step(hf.BertForSequenceClassification(config), Train(batch=2, sequence=8))
    ids = torch.zeros(2, 8, dtype=torch.long)
    for labels, message in ((torch.tensor([0, 3]), "hold 3, and the model has 3 classes"), (ids, r"\[batch\] were")):
        with pytest.raises(UsageError, match=message):
            step({"input_ids": ids, "labels": labels})
    assert step({"input_ids": ids, "labels": torch.tensor([0, 2])}).labels == 2


def test_states_are_named_and_the_first_step_makes_them():
    predicted, _ = both(hf.LlamaConfig(**DECODER), RECIPES["plain"])
    weights = sum(entry.nbytes for entry in predicted.entries if entry.kind == "parameter")
    states = sum(entry.nbytes for entry in predicted.entries if entry.kind == "optimizer")
    assert states == 2 * weights
    assert predicted.phase("forward").peak_nbytes - predicted.phase("first forward").peak_nbytes == states


def test_each_lever_lowers_the_peak_it_is_for():
    def peak(**settings):
        return both(hf.LlamaConfig(**DECODER), Recipe(**settings))[0].peak_nbytes

    plain = peak(chunk_nbytes=None, precision="master")
    chunked = peak(chunk_nbytes=1 << 17, precision="master")
    rows = peak(chunk_nbytes=1 << 17, precision="master", rows=True, recompute=(ALL,), in_backward=True)
    low = peak(
        chunk_nbytes=1 << 17, precision="master", rows=True, recompute=(ALL,), in_backward=True, state_bits=8
    )
    assert plain > chunked > rows > low


def test_a_packed_model_is_packed_while_it_is_loaded():
    """So loading takes the packed blocks and one weight, and the packed weights are those that packing later makes."""
    config = hf.LlamaConfig(**DECODER | {"num_hidden_layers": 8})
    source, recipe = source_from_config(config), RECIPES["qlora"]
    predicted, measured = both(config, replace(recipe, micro_batch=1))
    check(predicted, measured)
    loaded, whole = load_to_train(source, recipe), load_to_train(source, replace(recipe, adapters=None))
    nbytes = {name: sum(b.nbytes for b in model.state_dict().values()) for name, model in (("p", loaded), ("w", whole))}
    largest = 2 * DECODER["hidden_size"] * DECODER["intermediate_size"]
    assert (
        nbytes["p"] < predicted.phase("load").peak_nbytes < min(nbytes["w"], predicted.phase("load").end_nbytes * 1.2)
    )
    assert largest < nbytes["w"] - nbytes["p"]
    make_trainable(whole, recipe)
    make_trainable(loaded, recipe)
    packed, later = packed_modules(loaded), packed_modules(whole)
    assert packed.keys() == later.keys() and len(packed) == 8 * 7
    for name, module in packed.items():
        for part, buffer in module.store.named_buffers():
            assert torch.equal(buffer, getattr(later[name].store, part)), (name, part)


def test_a_plan_loads_a_model_as_it_trains_it(tmp_path):
    """So a loop of one's own begins with no more than the plan says."""
    from memfit import demo

    task = Train(batch=2, sequence=32, hyper=Hyper(lr=3e-3))
    source = demo.model_directory()
    names = tuple(name for name, _ in stacked_blocks(open_source(source).build()))
    kept = {name: p.shape for name, p in memfit.load(source).named_parameters()}
    for recipe in (RECIPES["weights away"], RECIPES["qlora"], RECIPES["plain"]):
        recipe = replace(recipe, recompute=names if recipe.recompute else ())
        plan = TrainPlan(
            model="demo", task=task.with_recipe(recipe), budget_nbytes=1 << 30, predicted={}, changes=(), seconds=1.0,
            slowdown=1.0, device="cpu", rungs=(),
        )  # fmt: skip
        learner = memfit.load(source, plan)
        assert {p.dtype for p in learner.parameters()} == {recipe.dtype}
        assert bool(packed_modules(learner)) == (recipe.adapters is not None)
        step = memfit.train_step(learner, plan, directory=str(tmp_path))
        ids = torch.randint(0, 100, (2, 32), generator=torch.Generator().manual_seed(0))
        losses = [step({"input_ids": ids, "labels": ids}).loss for _ in range(3)]
        assert losses[2] < losses[0]
        step.close()
        if recipe.adapters is None:
            assert {name: p.shape for name, p in learner.named_parameters()} == kept
            assert all(p.untyped_storage().nbytes() == p.nbytes for p in learner.parameters())


def test_what_is_saved_is_the_same_wherever_the_weights_wait(tmp_path):
    source = source_from_config(hf.LlamaConfig(**DECODER))
    ids = torch.randint(0, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
    names = tuple(name for name, _ in stacked_blocks(source.build()))
    for name in ("weights away", "weights away, lora"):
        files = []
        for place in ("memory", "disk"):
            recipe = replace(RECIPES[name], recompute=names, weights=place)
            torch.manual_seed(0)
            model = load_to_train(source, recipe)
            step = memfit.train_step(model, Train(batch=4, sequence=32, recipe=recipe, hyper=Hyper(lr=1e-2)))
            for _ in range(2):
                step({"input_ids": ids, "labels": ids})
            out = tmp_path / f"{name} {place}"
            with OutputDirectory(out) as directory:
                write_model(model, directory, source=source)
            saved = tmp_path / f"{name} {place} states"
            saved.mkdir()
            save_states(step, saved)
            files.append(
                [file.read_bytes() for folder in (out, saved) for file in sorted(folder.glob("*.safetensors"))]
            )
            if recipe.adapters is None:
                again = memfit.train_step(load_to_train(source, recipe), Train(batch=4, sequence=32, recipe=recipe))
                restore_states(again, saved)
                again.close()
                step.close()
                for one, other in zip(again.model.parameters(), model.parameters(), strict=True):
                    assert torch.equal(one, other)
        assert files[0] == files[1] and len(files[0]) == 2


def test_weights_that_wait_on_the_disk_are_never_all_in_memory():
    """From loading to resuming, a block's weights at a time, whatever else there is."""
    config = hf.LlamaConfig(**DECODER | {"vocab_size": 100, "num_hidden_layers": 24})
    predicted, measured = both(config, RECIPES["weights away"])
    check(predicted, measured)
    blocks = sum(p.numel() for p in source_from_config(config).build().parameters()) * 2
    assert measured.phase("load").end_nbytes < blocks / 10
    peak = max(p.peak_nbytes for p in measured.phases if p.name in ("load", "forward", "step", "save", "resume"))
    assert peak < blocks / 2


def test_saving_and_resuming_take_a_tile_however_large_a_tensor_is():
    """States on the disk go to the checkpoint, and come back, without ever being whole in memory."""
    config = hf.LlamaConfig(**DECODER | {"vocab_size": 60_000})
    predicted, measured = both(config, RECIPES["disk"])
    check(predicted, measured)
    table = 4 * 60_000 * DECODER["hidden_size"]
    for name in ("save", "resume"):
        assert measured.phase(name).peak_nbytes - measured.phase("step").end_nbytes < table / 4


def test_traces_of_one_recipe_share_what_is_alike():
    """What an earlier trace has told is the same for a deeper model, and for other blocks that are recomputed."""
    shallow, deep = (source_from_config(hf.LlamaConfig(**DECODER | {"num_hidden_layers": n})) for n in (2, 5))
    for name in ("frugal", "qlora", "master"):
        products, repeats = {}, {}

        def traced(source, count, **known):
            blocks = tuple(name for name, _ in stacked_blocks(source.build(dtype=torch.float32)))
            recipe = replace(RECIPES[name], recompute=blocks[:count])
            task = Train(batch=4, sequence=32, recipe=recipe, hyper=Hyper(clip=1.0))
            return settle(trace(lambda: load_to_train(source, recipe), task, **known))

        traced(shallow, 2, products=products, repeats=repeats)
        assert repeats
        for count in (5, 3):
            first, later = traced(deep, count), traced(deep, count, products=products, repeats=repeats)
            assert first.kernels == later.kernels
            for phase in first.phases:
                assert abs(phase.peak_nbytes - later.phase(phase.name).peak_nbytes) <= 64, (name, count, phase.name)
                assert abs(phase.end_nbytes - later.phase(phase.name).end_nbytes) <= 64, (name, count, phase.name)


def test_a_sequence_longer_than_the_context_is_refused():
    config = hf.LlamaConfig(**DECODER, max_position_embeddings=16)
    with pytest.raises(UsageError, match="32 tokens, and the model's context has 16"):
        both(config, RECIPES["plain"])


def test_a_task_is_read_back_from_json():
    for recipe in RECIPES.values():
        task = Train(batch=2, sequence=8, recipe=recipe, hyper=Hyper(clip=None, betas=(0.8, 0.9)))
        assert Train.from_json(json.loads(json.dumps(task.to_json()))) == task


@pytest.mark.parametrize(
    "name", ["recomputed", "frugal", "master", "int8", "disk", "qlora", "muon", "plain", "weights away"]
)
def test_work_like_earlier_work_is_told_from_it(name):
    """Blocks and updates that are not traced again take what they took: event by event, under their own names."""
    config = hf.LlamaConfig(**DECODER | {"num_hidden_layers": 5})
    source = source_from_config(config)
    names = tuple(name for name, _ in stacked_blocks(source.build(dtype=torch.float32)))
    recipe = RECIPES[name]
    recipe = replace(recipe, recompute=names) if recipe.recompute else recipe
    task = Train(batch=4, sequence=32, recipe=recipe, hyper=Hyper(clip=1.0))
    every, once = (dry_run(lambda: load_to_train(source, task.recipe), task, whole=whole) for whole in (True, False))
    assert [phase.name for phase in once.phases] == [phase.name for phase in every.phases]
    for phase in once.phases:
        other = every.phase(phase.name)
        # Numbers of 8 bytes end when Python drops them.
        assert abs(phase.peak_nbytes - other.peak_nbytes) <= 64
        assert abs(phase.end_nbytes - other.end_nbytes) <= 64
        assert sum(phase.alive.values()) == phase.peak_nbytes
        for kind, nbytes in phase.alive.items():
            assert abs(nbytes - other.alive[kind]) <= 64


def test_fewer_tokens_never_take_more():
    """Rows of a table's gradient are made in tiles; what a tile takes is bounded, however few the tokens."""
    from memfit import demo
    from memfit.train_planning import shape_of

    source = open_source(demo.model_directory())
    blocks = shape_of(lambda recipe: load_to_train(source, recipe)).blocks
    recipe = memfit.Recipe(
        precision="master", recompute=blocks, in_backward=True, rows=True, states="disk", store="disk", weights="disk",
    )  # fmt: skip
    peaks = [
        memfit.account(demo.model_directory(), memfit.Train(batch=batch, sequence=32, recipe=recipe)).peak_nbytes
        for batch in (1, 2, 4)
    ]
    assert peaks == sorted(peaks)


def test_what_is_recomputed_brings_no_shapes_of_its_own():
    source = source_from_config(configs()["mixtral"])
    names = tuple(name for name, _ in stacked_blocks(source.build(dtype=torch.float32)))
    plain, again = (
        dry_run(lambda recipe=recipe: load_to_train(source, recipe), Train(batch=4, sequence=32, recipe=recipe)).kernels
        for recipe in (Recipe(precision="kahan"), Recipe(precision="kahan", recompute=names))
    )
    assert again == plain > 0
