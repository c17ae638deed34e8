import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from memfit.errors import BrokenInput, MemfitError, UsageError
from memfit.evaluate import outputs
from memfit.evaluate.divergence import compare_logits, compare_models, divergence, record_logits, recording

SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LLAMA = (LlamaForCausalLM, LlamaConfig(**SIZE, num_key_value_heads=1))
DECODERS: dict[str, tuple[Any, Any]] = {
    "llama": LLAMA,
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZE, num_key_value_heads=1, head_dim=16)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            word_embed_proj_dim=32,
        ),
    ),
    "mamba": (MambaForCausalLM, MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)),
}
T5 = T5Config(
    vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
)
OTHERS: dict[str, tuple[Any, Any]] = {
    "masked": (BertForMaskedLM, BertConfig(**SIZE)),
    "classifier": (BertForSequenceClassification, BertConfig(**SIZE)),
    "seq2seq": (T5ForConditionalGeneration, T5),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Five positions at a time, so that a window of 24 has whole chunks and a piece."""
    monkeypatch.setattr(outputs, "CHUNK_NBYTES", 300 * outputs.LOGIT_NBYTES * 5 * 2)
    yield


def windows(count: int = 3, length: int = 24) -> Tensor:
    return torch.randint(5, 300, (count, length), generator=torch.Generator().manual_seed(0))


def pair(made: tuple[Any, Any]) -> tuple[nn.Module, nn.Module]:
    """A model and another that is near it."""
    family, config = made
    models = []
    for noise in (0.0, 0.05):
        torch.manual_seed(1)
        model = family(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        models.append(model)
    return models[0], models[1]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", DECODERS)
def test_quality_is_the_definition_in_float64(family: str, tmp_path: Path) -> None:
    original, fitted = pair(DECODERS[family])
    ids = windows()
    record_logits(original, ids, tmp_path / "logits", batch=2)
    quality = compare_logits(tmp_path / "logits", fitted, ids)

    a = original(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    b = fitted(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    target = ids[:, 1:, None]
    before, after = (float((-x.gather(-1, target)).mean().exp()) for x in (a, b))
    assert quality.kl == pytest.approx(float((a.exp() * (a - b)).sum(-1).mean()), rel=1e-5)
    assert quality.perplexity == pytest.approx(after, rel=1e-6)
    assert quality.perplexity_reference == pytest.approx(before, rel=1e-6)
    assert quality.top1 == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert (quality.tokens, quality.windows) == (3 * 23, 3)
    assert quality.kl_interval is not None and quality.kl is not None
    assert 0 < quality.kl_interval[0] < quality.kl < quality.kl_interval[1]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["llama", "opt", *OTHERS])
def test_a_model_beside_itself_has_a_kl_of_exactly_zero(kind: str, tmp_path: Path) -> None:
    model, near = pair((DECODERS | OTHERS)[kind])
    record_logits(model, windows(), tmp_path / "logits", batch=2)
    quality = compare_logits(tmp_path / "logits", model, windows())
    assert (quality.kl, quality.kl_interval, quality.top1) == (0.0, (0.0, 0.0), 1.0)
    other = compare_logits(tmp_path / "logits", near, windows())
    assert other.kl is not None and other.kl > 0


def test_the_body_of_a_model_runs_once_for_each_batch(tmp_path: Path) -> None:
    for name in ("llama", "opt"):
        model, _ = pair(DECODERS[name])
        calls: list[int] = []
        model.get_input_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[operator]
        record_logits(model, windows(4), tmp_path / "logits", batch=2)
        assert len(calls) == 2


def test_an_encoder_is_compared_by_the_cosine_of_its_embeddings(tmp_path: Path) -> None:
    original, fitted = pair((BertModel, BertConfig(**SIZE)))
    record_logits(original, windows(), tmp_path / "logits", batch=2)
    same = compare_logits(tmp_path / "logits", original, windows())
    near = compare_logits(tmp_path / "logits", fitted, windows())
    assert same.cosine == pytest.approx(1) and same.kl is None and same.perplexity is None
    assert near.cosine is not None and near.cosine < 0.999


def test_a_plain_module_that_returns_logits_and_state_is_compared(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lstm, self.head = (
                nn.Embedding(300, 8),
                nn.LSTM(8, 8, batch_first=True),
                nn.Linear(8, 300),
            )

        def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            hidden, state = self.lstm(self.table(ids), state)
            return self.head(hidden), state

    model = Plain().eval()
    record_logits(model, windows(), tmp_path / "logits")
    quality = compare_logits(tmp_path / "logits", model, windows())
    assert quality.kl == 0 and quality.perplexity == quality.perplexity_reference


def test_what_the_cache_does_shows_in_the_quality(tmp_path: Path) -> None:
    class Forgetful(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys, values * 0.5, *args, **kwargs)

    model, _ = pair(LLAMA)
    record_logits(model, windows(), tmp_path / "logits")
    plain = compare_logits(tmp_path / "logits", model, windows(), make_cache=lambda: DynamicCache())
    forgetful = compare_logits(tmp_path / "logits", model, windows(), make_cache=lambda: Forgetful())
    assert plain.kl == pytest.approx(0, abs=1e-9)
    assert forgetful.kl is not None and forgetful.kl > 1e-8
    bert, _ = pair(OTHERS["masked"])
    record_logits(bert, windows(), tmp_path / "logits")
    assert compare_logits(tmp_path / "logits", bert, windows(), make_cache=lambda: DynamicCache()).kl == 0


def test_the_models_are_never_there_together_and_the_file_is_gone_at_the_end(tmp_path: Path) -> None:
    alive: list[str] = []

    def load(name: str) -> Any:
        assert not alive
        model = pair(LLAMA)[0]
        alive.append(name)
        weakref.finalize(model, alive.remove, name)
        return model

    quality = compare_models(lambda: load("a"), lambda: load("b"), windows(), directory=tmp_path)
    assert quality.kl == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), recording(tmp_path) as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_checked_before_it_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    model, _ = pair(LLAMA)
    with pytest.raises(UsageError, match="no recorded logits"):
        compare_logits(path, model, windows())
    record_logits(model, windows(), path)
    with pytest.raises(UsageError, match="other windows"):
        compare_logits(path, model, windows() + 1)
    with pytest.raises(UsageError, match="recorded from a causal model, this one is encoder"):
        compare_logits(path, pair((BertModel, BertConfig(**SIZE)))[0], windows())
    smaller = LlamaConfig(**(SIZE | {"vocab_size": 310}), num_key_value_heads=1)
    with pytest.raises(UsageError, match="300 logits a token, this model gives 310"):
        compare_logits(path, LlamaForCausalLM(smaller).eval(), windows())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BrokenInput, match=r"bytes, .* announced"):
        compare_logits(path, model, windows())
    path.write_bytes(b"x" * 5000)
    with pytest.raises(BrokenInput, match="header"):
        compare_logits(path, model, windows())
    with pytest.raises(UsageError, match="int64"):
        record_logits(model, windows().int(), path)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model, broken = pair(LLAMA)
    record_logits(model, windows(), tmp_path / "logits")
    broken.lm_head.weight.data[7] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(MemfitError, match="not finite"):
        compare_logits(tmp_path / "logits", broken, windows())


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    with FakeTensorMode():
        model = LlamaForCausalLM(LLAMA[1]).eval()
        record_logits(model, torch.ones(2, 8, dtype=torch.int64), tmp_path / "logits")
    assert (tmp_path / "logits").stat().st_size == 0


def test_kl_of_far_and_of_equal_distributions() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 1000) * 30, torch.randn(5, 1000) * 30
    x, y = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl, norm_a, norm_b, same = divergence(a, b)
    torch.testing.assert_close(kl, (x.exp() * (x - y)).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm_a, a.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm_b, b.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(same, a.argmax(-1) == b.argmax(-1))
    assert torch.equal(divergence(a.bfloat16(), a.bfloat16())[0], torch.zeros(5, dtype=torch.float64))
