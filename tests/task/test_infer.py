from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from memfit.account.watch import Unwatched
from memfit.models import load_model
from memfit.source.source import source_from_config
from memfit.task.infer import Infer, maker_of_caches, vocabulary

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class Phases(Unwatched):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.held: set[str] = set()

    @contextmanager
    def phase(self, name: str) -> Any:  # type: ignore[override]
        self.seen.append(name)
        yield

    def holds(self, kind: Any, module: str, tensor: Tensor) -> None:
        self.held.add(kind)


class Counts(nn.Module):
    """Takes and returns a state: how many tokens it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.reads: list[int] = []

    def forward(self, ids: Tensor, state: int | None = None) -> tuple[Tensor, int]:
        self.reads.append(ids.shape[1])
        return self.embedding(ids), (state or 0) + ids.shape[1]


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("prompt", 0), ("new_tokens", -1), ("kv_bits", 3)])
def test_a_task_that_cannot_be_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        Infer(**{field: value})


def test_a_decoder_reads_its_prompt_and_writes() -> None:
    model = load_model(source_from_config(hf.LlamaConfig(**SIZES)))
    watch = Phases()
    Infer(prompt=5, new_tokens=3).run(model, watch)
    assert watch.seen == ["prefill", "decode"]
    assert "kv_cache" in watch.held


def test_without_new_tokens_there_is_no_decode() -> None:
    watch = Phases()
    Infer(prompt=5, new_tokens=0).run(load_model(source_from_config(hf.LlamaConfig(**SIZES))), watch)
    assert watch.seen == ["prefill"]


def test_an_encoder_only_reads() -> None:
    watch = Phases()
    config = hf.BertConfig(**SIZES, architectures=["BertModel"])
    Infer(prompt=5, new_tokens=3).run(load_model(source_from_config(config)), watch)
    assert watch.seen == ["prefill"]


def test_a_module_with_a_state_gets_it_back_token_by_token() -> None:
    model = Counts()
    Infer(batch=2, prompt=7, new_tokens=3).run(model, Unwatched())
    assert model.reads == [7, 1, 1, 1]


def test_any_module_without_a_state_only_reads() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    watch = Phases()
    Infer(prompt=5, new_tokens=3).run(model, watch)
    assert watch.seen == ["prefill"]


def test_the_vocabulary_is_the_configs_or_the_first_embeddings() -> None:
    assert vocabulary(load_model(source_from_config(hf.LlamaConfig(**SIZES)))) == 64
    assert vocabulary(Counts()) == 10
    with pytest.raises(ValueError, match="no embedding"):
        vocabulary(nn.Linear(2, 2))


def test_models_without_a_cache_have_no_maker_of_one() -> None:
    assert maker_of_caches(Counts(), kv_bits=8) is None


def test_greedy_tokens_are_those_of_transformers() -> None:
    model = load_model(source_from_config(hf.LlamaConfig(**SIZES), seed=3))
    written: list[Tensor] = []
    forward = model.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        written.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    record.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    model.forward = record  # type: ignore[method-assign]
    Infer(batch=1, prompt=6, new_tokens=4).run(model, Unwatched())
    del model.forward
    with torch.no_grad():
        text = model.generate(  # type: ignore[operator]
            written[0], max_new_tokens=4, do_sample=False, eos_token_id=None, attention_mask=torch.ones(1, 6)
        )
    assert text[0, 6:].tolist() == [int(token) for token in written[1:]]
