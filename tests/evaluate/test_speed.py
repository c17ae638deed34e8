import pytest
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from memfit.evaluate.speed import measure_speed

SIZE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_a_decoder_reads_and_writes(kv_bits: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZE)).bfloat16().eval()
    speed = measure_speed(model, batch=2, prompt=8, new_tokens=3, kv_bits=kv_bits, repeats=2)
    assert speed.prompt_tokens_per_s > 0
    assert speed.decode_tokens_per_s is not None and speed.decode_tokens_per_s > 0
    assert (speed.to_json()["repeats"], speed.to_json()["new_tokens"]) == (2, 3)


def test_an_encoder_only_reads() -> None:
    speed = measure_speed(BertModel(BertConfig(**SIZE)).eval(), prompt=8, new_tokens=3, repeats=1)
    assert speed.prompt_tokens_per_s > 0
    assert speed.decode_tokens_per_s is None


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure_speed(BertModel(BertConfig(**SIZE)), repeats=0)
