"""What is missed least goes, and the layers that read it make up for it, as the plainest formulas in float64 say."""

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memfit.account.watch import Unwatched
from memfit.errors import UsageError
from memfit.source.cuts import Counts, counts_of
from memfit.source.load import load
from memfit.source.narrowed import Kept, live_source
from memfit.source.source import source_from_config
from memfit.technique.gptq import DAMPING
from memfit.technique.narrow import Narrow, best, channel_scores, choose_blocks, choose_heads
from memfit.technique.narrowing import choose_kept, correct, narrow_model

DECODER: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip


def windows(count: int = 6, length: int = 32) -> Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(0))


def model_of(config: Any, *, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return made.requires_grad_(False)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


# -- scores and choices -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 5), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_channels_score_is_half_the_squares_of_what_the_outputs_lose(rows, width, seed):
    draw = torch.Generator().manual_seed(seed)
    weight, inputs, gradients = (
        torch.rand(shape, generator=draw, dtype=torch.float64) for shape in ((rows, width), (width,), (rows,))
    )
    plain = [
        sum(0.5 * float(gradients[o]) * float(weight[o, k]) ** 2 * float(inputs[k]) for o in range(rows))
        for k in range(width)
    ]
    torch.testing.assert_close(channel_scores(weight, inputs, gradients), torch.tensor(plain, dtype=torch.float64))


def test_the_best_are_told_rising_and_of_equal_ones_the_first():
    assert best(torch.tensor([1.0, 5.0, 3.0, 5.0, 1.0]), 3) == (1, 2, 3)
    assert best(torch.tensor([2.0, 2.0, 2.0]), 2) == (0, 1)


def test_heads_go_with_their_groups_where_whole_groups_can():
    whole = Counts(blocks=1, heads=6, kv_heads=3)
    scores = torch.tensor([9.0, 0.0, 1.0, 1.0, 3.0, 4.0])
    assert choose_heads(scores, Counts(blocks=1, heads=4, kv_heads=2), whole) == ((0, 1, 4, 5), (0, 2))
    assert choose_heads(scores, Counts(blocks=1, heads=3, kv_heads=3), whole) == ((0, 2, 5), (0, 1, 2))


def test_blocks_go_one_by_one_by_what_is_measured_of_those_of_least_influence():
    asked: list[tuple[int, ...]] = []

    def loss(blocks: tuple[int, ...]) -> float:
        asked.append(blocks)
        return sum({0: 5.0, 1: 2.0, 2: 0.0, 3: 1.0}[number] for number in range(4) if number not in blocks)

    assert choose_blocks([0.9, 0.1, 0.3, 0.2], 2, loss, candidates=3) == (0, 1)
    assert all(0 in blocks for blocks in asked[:3]), "the block of most influence is not tried first"


@pytest.mark.parametrize(
    ("narrow", "counts"),
    [
        ({"blocks": "50%"}, {"blocks": 1}),
        ({"heads": "50%"}, {"heads": 2, "kv_heads": 1}),
        ({"heads": 2}, {"heads": 2, "kv_heads": 1}),
        ({"channels": "70%"}, {"channels": 34}),
        ({"channels": 33}, {"channels": 33}),
        ({"dropped": (1,)}, {"blocks": 1}),
        ({"channels": "100%"}, {}),
    ],
)
def test_shares_come_to_numbers_that_work(narrow, counts):
    config = hf.LlamaConfig(**DECODER)
    whole = {"blocks": 2, "heads": 4, "kv_heads": 2, "channels": 48, "experts": None}
    assert Narrow(**narrow).counts(config) == Counts(**(whole | counts))


@pytest.mark.parametrize(
    ("narrow", "told"),
    [
        ({}, "nothing is to be dropped: give --blocks"),
        ({"blocks": 3}, "--blocks 3: of 2 blocks, 1 to 2 can stay"),
        ({"heads": 3}, "--heads 3: of 4 heads, 2, 4 can stay"),
        ({"channels": 49}, "of 48 channels, 1 to 48 can stay"),
        ({"channels": "70"}, "a number from 1 or a share as 70%, got '70'"),
        ({"channels": "120%"}, "got '120%'"),
        ({"channels": 0}, "got 0"),
        ({"experts": 2}, "counts no experts. Leave --experts out"),
        ({"dropped": (2,)}, "blocks 2 are to go, of 2 from 0 on"),
        ({"dropped": (0, 1)}, "blocks 0, 1 are to go"),
        ({"dropped": (0,), "blocks": 1}, "not both"),
    ],
)
def test_what_cannot_be_is_told_with_what_can(narrow, told):
    with pytest.raises(UsageError, match=told):
        Narrow(**narrow).counts(hf.LlamaConfig(**DECODER))


@pytest.mark.parametrize(("whole", "stay"), [(2048, 1408), (640, 448), (256, 176), (14336, 9984)])
def test_shares_of_channels_are_such_as_groups_take(whole, stay):
    assert Narrow(channels="70%").counts(hf.LlamaConfig(**DECODER | {"intermediate_size": whole})).channels == stay


def test_as_many_experts_stay_as_a_token_takes():
    config = hf.MixtralConfig(**DECODER, num_local_experts=4)
    with pytest.raises(UsageError, match="--experts 1: of 4 experts, 2 to 4 can stay"):
        Narrow(experts=1).counts(config)


def test_settings_survive_json_and_others_are_refused():
    narrow = Narrow(channels="70%", dropped=(1,), correct=False)
    assert Narrow.from_json(narrow.to_json()) == narrow
    with pytest.raises(UsageError, match="got channels, width"):
        Narrow.from_json({"channels": 3, "width": 2})


# -- on models --------------------------------------------------------------------------------------------


def heard(model: Any, layer: str, ids: Tensor) -> Tensor:
    """What comes to a layer, [T, K]."""
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].flatten(0, 1))

    handle = model.get_submodule(layer).register_forward_pre_hook(hook)
    logits(model, ids)
    handle.remove()
    return found[0]


def test_the_correction_is_the_damped_least_squares_one():
    model, ids = model_of(hf.LlamaConfig(**DECODER)), windows()
    kept = Kept(
        channels={0: tuple(range(0, 48, 2)), 1: tuple(range(24))},
        heads={0: (0, 1), 1: (2, 3)}, kv_heads={0: (0,), 1: (1,)},
    )  # fmt: skip
    made: dict[str, Tensor] = {}
    correct(live_source(model), kept, ids, made.__setitem__, watch=Unwatched(), batch=2, dtype=torch.float64)
    plain, becomes = model_of(hf.LlamaConfig(**DECODER)), model_of(hf.LlamaConfig(**DECODER))
    for block in range(2):
        read = (("self_attn.o_proj", kept.heads[block], 8), ("mlp.down_proj", kept.channels[block], 1))
        for name, numbers, each in read:
            layer = f"model.layers.{block}.{name}"
            stay = [number * each + n for number in numbers for n in range(each)]
            weight = plain.get_submodule(layer).weight
            x, given = heard(plain, layer, ids), heard(becomes, layer, ids)[:, stay]
            hessian = given.T @ given / len(given)
            damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(stay), dtype=torch.float64)
            missing = (x @ weight.T - given @ weight[:, stay].T).T @ given / len(given)
            wanted = weight[:, stay] + missing @ torch.linalg.inv(damped)
            torch.testing.assert_close(made[f"{layer}.weight"], wanted, rtol=1e-8, atol=1e-10)
            becomes.get_submodule(layer).weight.data.zero_()[:, stay] = wanted
    assert len(made) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_channels_that_do_nothing_are_those_that_go(family):
    config = hf.LlamaConfig(**DECODER)
    if family == "gpt2":
        config = hf.GPT2Config(vocab_size=128, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64)
    model, ids = model_of(config, dtype=torch.float32), windows()
    dead = {0: list(range(0, 48, 3)), 1: list(range(16))}
    for block, numbers in dead.items():
        if family == "gpt2":
            model.transformer.h[block].mlp.c_proj.weight[numbers] = 0
        else:
            model.model.layers[block].mlp.down_proj.weight[:, numbers] = 0
    kept = choose_kept(live_source(model), ids, Narrow(channels=32), watch=Unwatched(), dtype=torch.float32)
    assert {block: sorted(set(range(48)) - set(numbers)) for block, numbers in kept.channels.items()} == dead
    narrower = narrow_model(model, Narrow(channels=32), ids)
    torch.testing.assert_close(logits(narrower, ids), logits(model, ids), rtol=1e-3, atol=1e-4)


def test_the_block_that_changes_nothing_is_the_one_that_goes():
    model, ids = model_of(hf.LlamaConfig(**DECODER | {"num_hidden_layers": 4}), dtype=torch.float32), windows()
    for layer in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        layer.weight.zero_()
    narrower = narrow_model(model, Narrow(blocks=3), ids)
    assert narrower.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(narrower, ids), logits(model, ids))
    told = Narrow(blocks=3).found(Kept(blocks=(0, 1, 3)), model.config)
    assert told == Narrow(dropped=(2,))


def test_the_expert_whose_answers_are_small_is_the_one_that_goes():
    model, ids = model_of(hf.MixtralConfig(**DECODER, num_local_experts=4), dtype=torch.float32), windows()
    for block, number in ((0, 2), (1, 0)):
        model.model.layers[block].mlp.experts.down_proj[number] *= 1e-3
    kept = choose_kept(live_source(model), ids, Narrow(experts=3), watch=Unwatched(), dtype=torch.float32)
    assert kept.experts == {0: (0, 1, 3), 1: (1, 2, 3)}


@pytest.mark.parametrize("how", [{"channels": 24}, {"heads": 2}])
def test_corrected_it_is_nearer_to_the_whole_model(how):
    model, ids = model_of(hf.LlamaConfig(**DECODER), dtype=torch.float32), windows(count=16)
    wanted = logits(model, ids)
    plain, better = (
        (logits(narrow_model(model, Narrow(**how, correct=correct), ids), ids) - wanted).square().mean()
        for correct in (False, True)
    )
    assert better < 0.9 * plain


def test_a_bert_loses_channels_and_blocks():
    config = hf.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, architectures=["BertModel"],
    )  # fmt: skip
    model = load(source_from_config(config), dtype=torch.float32)
    narrower = narrow_model(model, Narrow(channels=32, blocks=2), windows())
    assert counts_of(narrower.config).channels == 32 and counts_of(narrower.config).blocks == 2
    assert tuple(narrower.get_parameter("encoder.layer.1.output.dense.weight").shape) == (32, 32)


def test_all_that_stays_is_the_model_bit_for_bit():
    model, ids = model_of(hf.LlamaConfig(**DECODER), dtype=torch.float32), windows()
    same = narrow_model(model, Narrow(channels="100%", blocks="100%", heads="100%"), ids)
    assert same is not model
    assert torch.equal(logits(same, ids), logits(model, ids))


def test_what_stays_needs_a_text_or_numbers():
    model = model_of(hf.LlamaConfig(**DECODER), dtype=torch.float32)
    with pytest.raises(UsageError, match="found on a text"):
        narrow_model(model, Narrow(channels=24))
    with pytest.raises(UsageError, match="has no config to be narrowed by"):
        narrow_model(nn.Linear(2, 2), Kept(blocks=(0,)))
    assert narrow_model(model, Kept(blocks=(1,))).config.num_hidden_layers == 1
