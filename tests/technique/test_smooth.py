"""Smoothing changes nothing: the same function in float64, and where it could not be the same it is not done."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from memfit.technique.smooth import (
    ALPHAS,
    Reader,
    activation_noise,
    choose,
    expected_error,
    factors,
    find_feeds,
    folded,
    gain_offset,
    smooth_,
)

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
OPT = {
    "vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "pad_token_id": 0, "max_position_embeddings": 64, "dropout": 0.0,
}  # fmt: skip
CONFIGS = {
    "llama": hf.LlamaConfig(**SIZES),
    "gemma3": hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "opt": hf.OPTConfig(**OPT),
    "bert": hf.BertConfig(**(SIZES | {"num_key_value_heads": None}), architectures=["BertModel"]),
    "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=4),
}
IDS = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(0))
QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
EXPECTED = {
    "llama": {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    "gemma3": {"input_layernorm": QKV, "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    "opt": {"self_attn_layer_norm": (QKV[1], QKV[2], QKV[0]), "final_layer_norm": ("fc1",)},
    "bert": {},
    "mixtral": {"input_layernorm": QKV},
}


def make(name):
    torch.manual_seed(0)
    auto = hf.AutoModel if name == "bert" else hf.AutoModelForCausalLM
    model = auto.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float64).eval().requires_grad_(False)
    if name == "mixtral":
        model.set_experts_implementation("eager")
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            weight.normal_(std=0.3).add_(0.0 if name == "gemma3" else 1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
    return model


def answer(model):
    out = model(input_ids=IDS)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


@pytest.fixture(autouse=True)
def gemma_in_float64(monkeypatch):
    """As transformers computes it, but nothing in float32, whose rounding would hide what is looked for."""

    def forward(norm, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * (1.0 + norm.weight)

    monkeypatch.setattr(Gemma3RMSNorm, "forward", forward)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_smoothed_model_is_the_same_function(name):
    model = make(name)
    feeds = find_feeds(model, lambda: model(input_ids=IDS))
    by_block = {f"{n}": parts for n in range(2) for parts in [EXPECTED[name]]}
    found = {}
    for feed in feeds:
        head, _, norm = feed.norm.rpartition(".")
        found.setdefault(head.rpartition(".")[2], {})[norm] = tuple(x.removeprefix(f"{head}.") for x in feed.layers)
        assert feed.offset == (1.0 if name == "gemma3" else 0.0)
    assert found == (by_block if EXPECTED[name] else {})
    before = answer(model)
    generator = torch.Generator().manual_seed(1)
    for feed in feeds:
        width = model.get_submodule(feed.norm).weight.shape[0]
        smooth_(model, feed, torch.randn(width, generator=generator, dtype=torch.float64).exp())
    after = answer(model)
    assert (before - after).abs().max() <= 1e-10 * before.abs().max()


def test_feeds_are_the_same_on_meta():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from memfit.source.live import fake_copy

    model = make("llama")
    real = find_feeds(model, lambda: model(input_ids=IDS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fake_copy(model)
        assert find_feeds(fake, lambda: fake(input_ids=torch.ones(1, 4, dtype=torch.int64))) == real


class _Block(nn.Module):
    def __init__(self, also):
        super().__init__()
        self.norm, self.linear, self.also = nn.LayerNorm(16), nn.Linear(16, 16), also

    def forward(self, x):
        y = self.norm(x)
        out = self.linear({"part": y[:, :4], "turned": y.mT}.get(self.also, y))
        if self.also == "twice":
            return out + self.linear(x)
        if self.also == "residual":
            return x + y + out
        return out if self.also in ("part", "turned") else x + out


@pytest.mark.parametrize(("also", "count"), [("", 2), ("residual", 0), ("twice", 0), ("turned", 0), ("part", 2)])
def test_what_anything_else_reads_is_left_alone(also, count):
    model = nn.Sequential(nn.ModuleList(_Block(also) for _ in range(2)))
    blocks = model[0]

    def run():
        x = torch.randn(2, 16, 16)
        for block in blocks:
            x = block(x)
        return x

    assert len(find_feeds(model, run)) == count


def test_a_norm_is_known_by_what_it_computes():
    class Squared(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) ** 2

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return torch.cat([x, x * self.weight], -1)

    assert gain_offset(nn.LayerNorm(8)) == 0.0 and gain_offset(nn.RMSNorm(8)) == 0.0
    assert gain_offset(Gemma3RMSNorm(8)) == 1.0
    assert gain_offset(Squared(8)) is None and gain_offset(Wide()) is None
    assert gain_offset(nn.PReLU(8)) is None


def test_rounding_of_the_gain_is_made_up_for_and_dead_channels_stay():
    gain = torch.randn(64).to(torch.bfloat16)
    gain[3] = -1.0  # a gain of 0
    made = torch.randn(64).mul(2).exp()
    weight, used = folded(gain, made, offset=1.0, dtype=torch.bfloat16)
    now, was = weight.float() + 1, gain.float() + 1
    assert torch.allclose(now * used, was, rtol=1e-6, atol=0)
    assert used[3] == 1 and weight[3] == -1 and torch.isfinite(used).all()
    squares, largest = torch.rand(64), torch.rand(64)
    squares[5] = largest[6] = 0
    found = factors(squares, largest, 0.5)
    assert found[5] == found[6] == 1 and torch.isfinite(found).all() and (found > 0).all()


def test_an_outlier_channel_is_evened_out_and_equal_ones_are_not_made_worse():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(128, 256, generator=generator) * 0.05
    reader = Reader(rows=rows, costs=torch.ones(128))
    plain = torch.ones(256)
    for scale in (1.0, 60.0):
        squares = torch.ones(256)
        squares[7] = scale**2
        made, alpha = choose(squares, rows.abs().amax(0), [reader])
        assert float(alpha) in ALPHAS or min(abs(float(alpha) - a) for a in ALPHAS) < 1e-6
        assert expected_error(squares, made, [reader]) <= expected_error(squares, plain, [reader])
        # What the formula expects is what happens.
        x = torch.randn(4096, 256, generator=generator) * squares.sqrt() / made
        s = x.abs().amax(1, keepdim=True) / 127.5
        noise = ((x / s).round().clamp(-128, 127) * s - x).square().mean()
        assert noise == pytest.approx(float(activation_noise(squares / made.square())), rel=0.35)
    assert made[7] > 4 and alpha > 0
