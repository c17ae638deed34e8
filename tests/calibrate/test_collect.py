"""Statistics gathered block by block are those of the whole model run plainly."""

import gc
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from memfit.account.account import Account
from memfit.account.follow import Follow
from memfit.account.meter import Meter
from memfit.account.settle import settle
from memfit.calibrate import collect as room
from memfit.calibrate.collect import collect, heads_of
from memfit.calibrate.statistics import Moments, Statistics
from memfit.calibrate.stream import Streamed
from memfit.plan.groups import find_groups
from memfit.source.load import load
from memfit.source.source import Source, source_from_config

# Legend: W windows, T time, N positions, D width, V vocabulary

DECODER = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**DECODER),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **DECODER, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma2": lambda: hf.Gemma2Config(
        **DECODER, head_dim=32, sliding_window=8, final_logit_softcapping=0.5, initializer_range=0.2
    ),
    "phi": lambda: hf.PhiConfig(**DECODER, tie_word_embeddings=False),
    "mixtral": lambda: hf.MixtralConfig(**DECODER, num_local_experts=4),
    "opt": lambda: hf.OPTConfig(
        vocab_size=512, hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=128, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "mamba": lambda: hf.MambaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=4, pad_token_id=0
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=512, d_model=128, d_ff=256, num_layers=2, num_heads=4, d_kv=32, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ),
    "bert": lambda: hf.BertConfig(**BERT, architectures=["BertModel"]),
}  # fmt: skip
WITH_HEAD = ["llama", "gemma2", "gemma3", "phi", "opt", "mamba", "t5"]


def windows(count: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(0))


def arguments(model: Any, ids: Tensor) -> dict[str, Any]:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids} | more | ({"use_cache": False} if model.config.model_type != "bert" else {})


def wanted_of(source: Source) -> frozenset[str]:
    groups = find_groups(source.build(dtype=torch.float32))
    return frozenset(m for g in groups if g.kind != "experts" and g.blocked is None for m in g.members)


def listen(model: nn.Module, wanted: frozenset[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and gradients at the outputs of the modules of a whole model, as they come."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def hear(module: nn.Module, args: Any, out: Tensor) -> None:
            inputs[name] = args[0].detach()
            # The rows of a scaled table are its weights times the scale: so are their errors.
            scale = float(getattr(module, "embed_scale", 1.0))
            out.register_hook(lambda g: gradients.__setitem__(name, g.detach() * scale))

        return hear

    for name in wanted:
        model.get_submodule(name).register_forward_hook(hook(name))
    return inputs, gradients


def mean_square(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).square().mean(0)


def assert_same_moments(
    found: Statistics, inputs: dict[str, Tensor], gradients: dict[str, Tensor], *, rtol: float
) -> None:
    assert set(found) == set(gradients)
    for name, moments in found.moments.items():
        assert moments.gradients is not None
        seen = inputs[name]
        if not seen.is_floating_point():
            expected = torch.bincount(seen.flatten(), minlength=len(moments.inputs)) / seen.numel()
        else:
            expected = mean_square(seen)
        scale = expected.max()
        torch.testing.assert_close(moments.inputs / scale, (expected / scale).float(), rtol=rtol, atol=rtol * 1e-2)
        expected = mean_square(gradients[name])
        scale = expected.max()
        torch.testing.assert_close(moments.gradients / scale, (expected / scale).float(), rtol=rtol, atol=rtol * 1e-2)


def collect_with_labels(source: Source, monkeypatch: Any, **options: Any) -> tuple[Statistics, Tensor]:
    labels = []
    draw = room._draw

    def note(*args: Any) -> Any:
        token_N, log_total_N = draw(*args)
        labels.append(token_N)
        return token_N, log_total_N

    monkeypatch.setattr(room, "_draw", note)
    found = collect(source, windows(), wanted_of(source), batch=2, **options)
    return found, torch.cat(labels)


@pytest.mark.parametrize("family", WITH_HEAD)
def test_moments_are_those_of_plain_autograd_on_the_whole_model(family, monkeypatch):
    source = source_from_config(CONFIGS[family]())
    found, labels = collect_with_labels(source, monkeypatch, dtype=torch.float32)
    model = load(source, dtype=torch.float32).double()
    inputs, gradients = listen(model, wanted_of(source))
    for table in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        table.weight.requires_grad_()
    logits = model(**arguments(model, windows())).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    assert found.tokens == labels.numel() == windows().numel()
    assert_same_moments(found, inputs, gradients, rtol=2e-3)


def test_an_encoder_without_a_head_has_gradients_of_all_its_outputs(monkeypatch):
    source = source_from_config(CONFIGS["bert"]())
    made: list[Tensor] = []
    head_gradient = room._head_gradient
    monkeypatch.setattr(room, "_head_gradient", lambda *args: made.append(head_gradient(*args)) or made[-1])
    found = collect(source, windows(), wanted_of(source), batch=4, dtype=torch.float32)
    model = load(source, dtype=torch.float32).double()
    inputs, gradients = listen(model, wanted_of(source))
    for parameter in model.parameters():
        parameter.requires_grad_()
    out = model(windows())
    torch.autograd.backward([out.last_hidden_state, out.pooler_output], [g.double() for g in made])
    assert_same_moments(found, inputs, gradients, rtol=2e-3)


def test_in_bf16_moments_are_near_those_in_float32(monkeypatch):
    source = source_from_config(CONFIGS["llama"]())
    fine = collect(source, windows(), wanted_of(source), batch=2, dtype=torch.float32)
    coarse = collect(source, windows(), wanted_of(source), batch=2)
    for name, moments in fine.moments.items():
        near = coarse.moments[name].inputs
        assert (near - moments.inputs).norm() <= 0.03 * moments.inputs.norm(), name
        total = moments.gradients.sum()
        assert coarse.moments[name].gradients.sum() == pytest.approx(float(total), rel=0.2), name


def test_drawn_tokens_follow_the_models_own_prediction():
    config = CONFIGS["llama"]()
    config.vocab_size = 16
    streamed = Streamed(source_from_config(config), dtype=torch.float32)
    state_D = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 4
    draws = 20_000
    token_N, log_total_N = room._draw(
        streamed, state_D.expand(draws, -1), torch.Generator().manual_seed(0)
    )
    (_, rows_VD), = streamed.rows("lm_head.weight")
    logits_V = rows_VD @ state_D
    torch.testing.assert_close(log_total_N[0], logits_V.logsumexp(0))
    expected_V = logits_V.softmax(0) * draws
    counts_V = torch.bincount(token_N, minlength=16)
    chi_square = ((counts_V - expected_V).square() / expected_V).sum()
    assert 2 < chi_square < 45  # 15 degrees of freedom: outside in less than one of 5000 draws


def test_a_vocabulary_read_in_blocks_is_drawn_from_as_a_whole(monkeypatch):
    source = source_from_config(CONFIGS["llama"]())
    monkeypatch.setattr("memfit.calibrate.stream.ROWS_NBYTES", 100 * 128 * 4)
    monkeypatch.setattr(room, "LOGITS_NBYTES", 7 * 4 * 100)
    found, labels = collect_with_labels(source, monkeypatch, dtype=torch.float32)
    assert labels.max() > 100
    model = load(source, dtype=torch.float32).double()
    inputs, gradients = listen(model, frozenset({"lm_head"}))
    model.model.embed_tokens.weight.requires_grad_()
    logits = model(**arguments(model, windows())).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    assert_same_moments(Statistics(moments={"lm_head": found.moments["lm_head"]}), inputs, gradients, rtol=2e-3)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_streamed_outputs_are_the_whole_models_and_no_weight_stays(family):
    source = source_from_config(CONFIGS[family]())
    streamed, model = Streamed(source, dtype=torch.float32), load(source, dtype=torch.float32)
    with torch.no_grad():
        out, whole = (m(**arguments(model, windows())) for m in (streamed.model, model))
    if family == "bert":
        torch.testing.assert_close(out.last_hidden_state, whole.last_hidden_state)
        torch.testing.assert_close(out.pooler_output, whole.pooler_output)
    else:
        (head,) = heads_of(streamed)
        made = head.logits_at(out.logits.flatten(0, 1)).view(whole.logits.shape)
        torch.testing.assert_close(made, whole.logits, rtol=1e-4, atol=1e-5)
    collect(source, windows(), wanted_of(source), batch=4, dtype=torch.float32)
    assert all(p.device.type == "meta" for p in streamed.model.parameters())


def test_after_collecting_all_parameters_are_on_meta_again(monkeypatch):
    source = source_from_config(CONFIGS["llama"]())
    made = []
    monkeypatch.setattr(room, "Streamed", lambda *args, **more: made.append(Streamed(*args, **more)) or made[-1])
    collect(source, windows(), wanted_of(source), batch=2)
    (streamed,) = made
    assert all(p.device.type == "meta" and p.grad is None for p in streamed.model.parameters())


def test_the_same_text_and_seed_give_the_same_statistics():
    source = source_from_config(CONFIGS["llama"]())
    one, two = (collect(source, windows(), wanted_of(source), batch=2) for _ in range(2))
    assert all(torch.equal(one.moments[n].gradients, two.moments[n].gradients) for n in one)
    assert all(torch.equal(one.moments[n].inputs, two.moments[n].inputs) for n in one)


def test_statistics_read_back_are_those_saved(tmp_path):
    moments = {
        "a.b": Moments(inputs=torch.rand(5), gradients=torch.rand(3)),
        "head": Moments(inputs=torch.rand(2), gradients=None),
    }
    Statistics(moments=moments, tokens=7).save(tmp_path / "s.safetensors")
    read = Statistics.read(tmp_path / "s.safetensors")
    assert read.tokens == 7 and set(read) == set(moments) and set(read.pairs()) == {"a.b"}
    assert torch.equal(read.moments["a.b"].gradients, moments["a.b"].gradients)


def dry_and_real(source: Source, ids: Tensor) -> tuple[Account, Account]:
    wanted = wanted_of(source)
    follow = Follow()
    with FakeTensorMode(allow_non_fake_inputs=True), follow:
        fake = torch.zeros_like(torch.empty(ids.shape, dtype=torch.int64))
        with follow.phase("calibrate"):
            collect(source, fake, wanted, batch=2)
    gc.collect()
    meter = Meter()
    with meter.phase("calibrate"):
        fresh = ids.clone()
        collect(source, fresh, wanted, batch=2)
    return settle(follow.ledger), meter.account()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_dry_run_of_collecting_tells_what_it_takes(family):
    predicted, measured = dry_and_real(source_from_config(CONFIGS[family]()), windows(length=64))
    assert predicted.peak_nbytes == pytest.approx(measured.peak_nbytes, rel=0.03)
    assert predicted.phases[0].end_nbytes == pytest.approx(measured.phases[0].end_nbytes, abs=4096)
