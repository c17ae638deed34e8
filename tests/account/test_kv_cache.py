"""A packed cache grows by leaps, and its account is exact all the same."""

from typing import Any

import pytest
import transformers as hf

from memfit.account.account import Account
from memfit.account.follow import Follow
from memfit.models import load_model
from memfit.source.source import source_from_config
from memfit.task.infer import Infer

from .conftest import DECODER

SMALL = DECODER | {"num_hidden_layers": 2, "max_position_embeddings": 512}
CONFIGS = {
    "llama": hf.LlamaConfig(**SMALL),
    "gemma3": hf.Gemma3TextConfig(
        **SMALL, head_dim=16, sliding_window=128, layer_types=["sliding_attention", "full_attention"]
    ),
    "t5": hf.T5Config(
        vocab_size=512, d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16,
        architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip

TASKS = [
    ("llama", Infer(prompt=90, new_tokens=12, kv_bits=4)),  # the first group, amid the steps that are jumped
    ("llama", Infer(prompt=120, new_tokens=46, kv_bits=2)),  # ends just behind the second
    ("llama", Infer(batch=3, prompt=300, new_tokens=3, kv_bits=8)),
    ("gemma3", Infer(prompt=110, new_tokens=25, kv_bits=4)),  # the window is full, its first tokens go
    ("gemma3", Infer(batch=2, prompt=250, new_tokens=60, kv_bits=2)),  # groups come and go
    ("t5", Infer(prompt=170, new_tokens=100, kv_bits=4)),
]


def maker_of(name: str) -> Any:
    source = source_from_config(CONFIGS[name])
    return lambda: load_model(source, dtype="bfloat16")


def peaks(account: Account) -> dict[str, tuple[int, int]]:
    return {phase.name: (phase.peak_nbytes, phase.end_nbytes) for phase in account.phases}


@pytest.mark.parametrize(("name", "task"), TASKS, ids=lambda value: value if isinstance(value, str) else "")
def test_predicted_equals_measured_to_the_byte(name: str, task: Infer, predicted: Any, measured: Any) -> None:
    make = maker_of(name)
    assert peaks(predicted(make, task)) == peaks(measured(make, task))


def test_jumping_over_leaps_equals_stepping(predicted: Any, monkeypatch: Any) -> None:
    make, task = maker_of("gemma3"), Infer(prompt=93, new_tokens=42, kv_bits=4)
    jumped = predicted(make, task)
    monkeypatch.setattr(Follow, "may_skip", False)
    assert peaks(jumped) == peaks(predicted(make, task))


def test_a_prompt_is_never_there_twice(predicted: Any) -> None:
    """Attention reads a prompt as it came: packing it makes no dense copy."""
    plain, packed = (predicted(maker_of("llama"), Infer(prompt=480, new_tokens=0, kv_bits=bits)) for bits in (16, 2))
    assert packed.phase("prefill").peak_nbytes < plain.phase("prefill").peak_nbytes
