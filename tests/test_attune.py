"""Scales and vectors of a whole model learn: what is written then is nearer to the original, in the same bytes."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from memfit.account.meter import Meter
from memfit.account.settle import settle
from memfit.account.watch import Unwatched, Watch
from memfit.attune import attune
from memfit.compensate import Thrift, compensate
from memfit.format.integers import Integers
from memfit.models import load_model
from memfit.packed.scheme import Scheme
from memfit.source.source import Source, open_source
from memfit.steps import on_fakes
from memfit.technique.attune import Attuning

SIZES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **SIZES,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, sliding_window=8, sliding_window_pattern=2, **SIZES,
        )
    ),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "encoder": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **BERT)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=128, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=32, decoder_start_token_id=0)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **SIZES,
        )
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8, **SIZES)
    ),
}  # fmt: skip
ATTUNING = Attuning(steps=24, rate=0.01, positions=16)


def made(name: str, directory: Path) -> Source:
    torch.manual_seed(0)
    return saved(MODELS[name](), directory)


def saved(model: hf.PreTrainedModel, directory: Path) -> Source:
    with torch.no_grad():
        for parameter in model.parameters():  # sharper answers than a model by chance gives
            if parameter.dim() > 1:
                parameter.mul_(4)
        if hasattr(model, "classifier"):
            model.classifier.weight.mul_(20)
    model.to(torch.bfloat16).save_pretrained(directory)
    return open_source(directory)


def windows(count: int = 8) -> torch.Tensor:
    return torch.randint(3, 128, (count, 24), generator=torch.Generator().manual_seed(1))


def schemes_of(source: Source, bits: int = 2) -> dict[str, Scheme]:
    model = source.build(dtype=torch.bfloat16)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: Scheme(bits=bits, group=32, symmetric=False)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % 32 == 0
    }


def chosen(source: Source, directory: Path | None) -> tuple[dict[str, Scheme], Integers]:
    schemes, integers = schemes_of(source), Integers(directory)
    compensate(source, windows(), schemes, integers, watch=Unwatched())
    return schemes, integers


def learn(
    source: Source, schemes: dict[str, Scheme], integers: Integers, *, attuning: Attuning = ATTUNING,
    watch: Watch | None = None, scratch: Path | None = None, ids: torch.Tensor | None = None,
) -> None:  # fmt: skip
    attune(
        source, windows() if ids is None else ids, schemes, integers, watch=watch or Unwatched(), attuning=attuning,
        thrift=Thrift(spill=scratch is not None), scratch=scratch,
    )  # fmt: skip


@torch.no_grad()
def apart(source: Source, integers: Integers, schemes: dict[str, Scheme]) -> float:
    """How far the model with what is stored answers from the original, both whole and by their own forward passes."""
    answers = []
    for fitted in (False, True):
        model = load_model(source, dtype=torch.float32)
        if fitted:
            for name, scheme in schemes.items():
                if name in integers:
                    model.get_parameter(f"{name}.weight").copy_(integers.weight(name, scheme))
            for name, vector in integers.vectors.items():
                model.get_parameter(name).copy_(vector)
        more = {"decoder_input_ids": windows()} if model.config.is_encoder_decoder else {}
        out = model(windows(), **more)
        answers.append(out.logits if "logits" in out else out.last_hidden_state)
    if answers[0].shape[-1] == 64:
        return float(((answers[1] - answers[0]).square().sum(-1) / answers[0].square().sum(-1)).mean())
    p, q = (logits.log_softmax(-1) for logits in answers)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_that_has_learned_is_nearer_to_the_original(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "model")
    schemes, integers = chosen(source, tmp_path / "integers")
    before = apart(source, integers, schemes)
    learn(source, schemes, integers)
    after = apart(source, integers, schemes)
    assert integers.attuned is not None and integers.vectors
    # Learning runs in bf16, and is judged here in fp32: of a classifier's few scores that is a third of what is left.
    assert integers.attuned["before"] == pytest.approx(before, rel=0.1, abs=5e-4)
    assert integers.attuned["after"] == pytest.approx(after, rel=0.1, abs=1e-3 if name == "classifier" else 5e-4)
    assert after < 0.95 * before


def test_what_is_learned_is_kept_and_learned_once(tmp_path: Path) -> None:
    source = made("llama", tmp_path / "model")
    schemes, integers = chosen(source, tmp_path / "integers")
    name = next(iter(schemes))
    found = integers.read(name, schemes[name])
    learn(source, schemes, integers, scratch=tmp_path)
    file = tmp_path / "integers" / "attuned.safetensors"
    first = file.read_bytes()
    learned = integers.read(name, schemes[name])
    assert torch.equal(learned.q, found.q) and not torch.equal(learned.scale, found.scale)
    assert learned.scale.dtype == found.scale.dtype and learned.scale.shape == found.scale.shape
    (tmp_path / "integers" / "attuned.safetensors.part").write_bytes(b"cut off")
    again = Integers(tmp_path / "integers")
    assert again.attuned == integers.attuned and torch.equal(again.read(name, schemes[name]).scale, learned.scale)
    learn(source, schemes, again, attuning=Attuning(steps=1))
    assert file.read_bytes() == first, "what is there is not learned again"
    file.unlink()
    learn(source, schemes, Integers(tmp_path / "integers"))
    assert file.read_bytes() == first, "what is learned anew is the same"


def test_what_learning_made_worse_is_not_kept(tmp_path: Path) -> None:
    source = made("llama", tmp_path / "model")
    schemes, integers = chosen(source, tmp_path / "integers")
    name = next(iter(schemes))
    found = integers.read(name, schemes[name])
    learn(source, schemes, integers, attuning=Attuning(steps=6, rate=1.0, positions=4))
    assert integers.attuned is not None and integers.attuned["after"] > integers.attuned["before"]
    assert not integers.vectors and torch.equal(integers.read(name, schemes[name]).scale, found.scale)
    assert not load_file(tmp_path / "integers" / "attuned.safetensors")


def test_where_nothing_can_learn_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("llama", tmp_path / "model")
    monkeypatch.setattr("memfit.attune._vectors", lambda name, module: iter(()))
    integers = Integers(tmp_path / "integers")
    learn(source, {}, integers)
    assert integers.attuned is None and not list((tmp_path / "integers").iterdir())


def test_a_dry_run_tells_what_learning_takes(tmp_path: Path) -> None:
    # Of blocks that are equal a dry run goes through two alone.
    config = MODELS["llama"]().config
    config.num_hidden_layers = 6
    source = saved(hf.LlamaForCausalLM(config), tmp_path / "model")
    schemes, integers = chosen(source, tmp_path / "integers")
    with on_fakes() as follow:
        announced = Integers(None)
        ids = torch.zeros(8, 24, dtype=torch.int64)
        compensate(source, ids, schemes, announced, watch=follow)
        learn(source, schemes, announced, watch=follow, ids=ids)
    meter = Meter()
    learn(source, schemes, integers, watch=meter)
    told = {phase.name: phase.peak_nbytes for phase in settle(follow.ledger).phases}
    assert told["attune"] == pytest.approx(meter.account().phase("attune").peak_nbytes, rel=0.02)
