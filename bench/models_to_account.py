"""The models that `account.py` predicts and measures: each from a config, or from a factory."""

from typing import Any

DENSE = {"vocab_size": 32000, "max_position_embeddings": 2048}
ROOMY = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _decoder(kind: str, width: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv,
    } | DENSE | ROOMY | more  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _decoder("llama", 1024, 2816, 20, 16, 4),
    "qwen2": _decoder("qwen2", 512, 1408, 10, 8, 2, tie_word_embeddings=True),
    "qwen3": _decoder("qwen3", 640, 1792, 12, 10, 2, head_dim=64),
    "qwen3_moe": _decoder(
        "qwen3_moe", 384, 1024, 6, 6, 2, head_dim=64, num_experts=16, num_experts_per_tok=4,
        moe_intermediate_size=512, decoder_sparse_step=1,
    ),
    "mistral": _decoder("mistral", 192, 512, 6, 6, 2, sliding_window=128, vocab_size=8000),
    "mixtral": _decoder("mixtral", 512, 1024, 8, 8, 2, num_local_experts=8, sliding_window=None),
    "gemma3": _decoder(
        "gemma3_text", 640, 2048, 18, 4, 1, head_dim=256, vocab_size=262144, sliding_window=256,
    ),
    "phi3": _decoder("phi3", 512, 1536, 10, 8, 8),
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt_neox": _decoder("gpt_neox", 512, 2048, 6, 8, 8, vocab_size=50304),
    "opt": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
    },
    "falcon": {
        "model_type": "falcon", "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 10,
        "num_attention_heads": 8, "bos_token_id": 1, "eos_token_id": 2,
    },
    "mamba": {
        "model_type": "mamba", "vocab_size": 32000, "hidden_size": 256, "num_hidden_layers": 8, "state_size": 16,
    },
    "bert": {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "t5": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128,
        "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64,
    },
}  # fmt: skip

FACTORIES: dict[str, dict[str, Any]] = {
    "lstm": {
        "factory": "lstm:make",
        "settings": {"vocabulary": 20000, "width": 512, "modules": 3, "layers": 2},
    }
}

BIG: dict[str, dict[str, Any]] = {
    "Llama-3-70B": _decoder(
        "llama", 8192, 28672, 80, 64, 8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0
    ),
    "Mixtral-8x22B": _decoder(
        "mixtral", 6144, 16384, 56, 48, 8, vocab_size=32768, max_position_embeddings=65536, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=None,
    ),
}  # fmt: skip
BIG_BUDGETS = {"Llama-3-70B": "40GiB", "Mixtral-8x22B": "80GiB"}
BIG_TASK = {"batch": 1, "prompt": 2048, "new_tokens": 128}
SCALED = ("llama", "gemma3", "t5", "mixtral", "mamba", "lstm")

POINTS = (
    {"batch": 1, "prompt": 64, "new_tokens": 6},
    {"batch": 4, "prompt": 128, "new_tokens": 6},
    {"batch": 1, "prompt": 512, "new_tokens": 6},
)
DTYPES = ("float32", "bfloat16")


def specs() -> dict[str, dict[str, Any]]:
    """Name to what `memfit.models.loader_for` takes."""
    return {name: {"config": config} for name, config in CONFIGS.items()} | FACTORIES
