import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from memfit.account.account import Account
from memfit.account.dry_run import dry_run, hold_model
from memfit.account.meter import Meter
from memfit.models import load_model
from memfit.source.source import source_from_config

DECODER = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def configs() -> dict[str, Any]:
    return {
        "llama": hf.LlamaConfig(**DECODER),
        "gemma3": hf.Gemma3TextConfig(**(DECODER | {"num_hidden_layers": 7}), head_dim=16, sliding_window=8),
        "mixtral": hf.MixtralConfig(**DECODER, num_local_experts=4),
        "mamba": hf.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=4, state_size=8),
        "t5": hf.T5Config(
            vocab_size=512, d_model=64, d_ff=128, num_layers=3, num_heads=4, d_kv=16,
            architectures=["T5ForConditionalGeneration"],
        ),
        "bert": hf.BertConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            architectures=["BertModel"],
        ),
    }  # fmt: skip


class StackedLstm(nn.Module):
    """The width is a multiple of 16 and the batch is not: both kinds of oneDNN's blocks."""

    def __init__(self, *, modules: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 48)
        self.stack = nn.ModuleList(nn.LSTM(48, 48, layers, batch_first=True) for _ in range(modules))
        self.head = nn.Linear(48, 128)

    def forward(self, ids: torch.Tensor, state: Any = None) -> Any:
        x, ends = self.embedding(ids), []
        for number, lstm in enumerate(self.stack):
            x, end = lstm(x, None if state is None else state[number])
            ends.append(end)
        return self.head(x[:, -1:]), ends


Maker = Callable[[], nn.Module]


@pytest.fixture(scope="session")
def maker_of(configs: dict[str, Any]) -> Callable[[str, str], Maker]:
    def find(name: str, dtype: str) -> Maker:
        made = StackedLstm if name == "lstm" else source_from_config(configs[name])
        return lambda: load_model(made, dtype=dtype)

    return find


def measure(make: Maker, task: Any) -> Account:
    gc.collect()
    meter = Meter()
    with meter.phase("load"):
        model = make()
        hold_model(model, meter)
    task.run(model, meter)
    return meter.account()


@pytest.fixture(scope="session")
def measured() -> Callable[[Maker, Any], Account]:
    return measure


@pytest.fixture(scope="session")
def predicted() -> Callable[..., Account]:
    return dry_run
