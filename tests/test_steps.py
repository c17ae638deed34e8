"""What of calibration is read by the jobs that follow it, and so gathered."""

from dataclasses import replace

import pytest
import transformers as hf

from memfit.plan.allowed import Allowed
from memfit.planning import uniform_plan
from memfit.source.source import source_from_config
from memfit.steps import Algorithm, Statistic, statistics_read
from memfit.study import Study
from memfit.task.infer import Infer

FOUR = Allowed(bits=(4,), groups={4: (64,)}, kv_bits=(16,))
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL = hf.MixtralConfig(num_key_value_heads=1, num_local_experts=2, **SIZES)
BERT = hf.BertConfig(architectures=["BertModel"], **SIZES | {"vocab_size": 4096})
MASKED = hf.BertConfig(architectures=["BertForMaskedLM"], **SIZES)


@pytest.mark.parametrize(
    ("config", "keep", "algorithm", "reads"),
    [
        (MIXTRAL, (), "gptq", "all"),
        (MIXTRAL, ("experts",), "gptq", "weighing"),
        (BERT, ("embeddings",), "gptq", "none"),
        (BERT, ("embeddings",), "gptq-plain", "none"),
        (BERT, ("embeddings",), "search", "all"),
        (BERT, (), "rtn", "none"),
        (BERT, (), "gptq", "all"),
        (MASKED, ("embeddings",), "gptq", "none"),
        (MASKED, (), "gptq", "weighing"),
    ],
)
def test_what_is_read_of_calibration(
    config: hf.PretrainedConfig, keep: tuple[str, ...], algorithm: Algorithm, reads: Statistic
) -> None:
    """Experts see little of a text, and an encoder's pooled output is of one token a window: all of it is read. What a
    linear layer outside of the blocks reads is found where its integers are."""
    source = source_from_config(config)
    given = uniform_plan(Study(source, Infer(batch=1, prompt=8, new_tokens=2), replace(FOUR, keep=keep)), 1 << 40)
    assert statistics_read(source, given, algorithm) == reads
