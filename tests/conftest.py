"""What tests of whole runs share: a tiny model on the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from memfit import demo

SIZE: dict[str, Any] = {
    "vocab_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory) -> Callable[..., Path]:
    """Makes a directory with a tiny Llama by chance, with the demo's tokenizer; settings are its config's."""

    def make(**settings: Any) -> Path:
        directory = tmp_path_factory.mktemp("models") / "tiny"
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE | settings)).to(torch.bfloat16).save_pretrained(directory)
        hf.AutoTokenizer.from_pretrained(demo.model_directory()).save_pretrained(directory)
        return directory

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's sessions take longest of all files: where several run at once, they begin first."""
    items.sort(key=lambda item: "test_readme.py" not in item.nodeid)
