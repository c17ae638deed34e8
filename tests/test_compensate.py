"""GPTQ for whole models: every architecture, less loss than rounding, and the same bytes after a kill."""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from memfit.account.meter import Meter
from memfit.account.structure import inside_blocks
from memfit.account.watch import Unwatched
from memfit.calibrate.collect import arguments_of
from memfit.compensate import Thrift, compensate
from memfit.errors import UsageError
from memfit.format.integers import Integers
from memfit.models import load_model
from memfit.packed.scheme import Scheme
from memfit.plan.allowed import Allowed
from memfit.planning import uniform_plan
from memfit.source.source import Source, open_source
from memfit.steps import Algorithm, predict_choosing
from memfit.study import Study
from memfit.task.infer import Infer
from memfit.technique.gptq import damping_for, gptq
from memfit.technique.quantize import dequantize, quantize

SIZES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": hf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **SIZES,
    ),
    "gemma3": hf.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=8, sliding_window_pattern=2, **SIZES,
    ),
    "bert": hf.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    ),
    "t5": hf.T5Config(
        vocab_size=128, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=32, decoder_start_token_id=0,
    ),
    "mamba": hf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8, **SIZES),
    "mixtral": hf.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **SIZES,
    ),
}  # fmt: skip
CLASSES = {
    "llama": hf.LlamaForCausalLM, "gemma3": hf.Gemma3ForCausalLM, "bert": hf.BertForMaskedLM,
    "t5": hf.T5ForConditionalGeneration, "mamba": hf.MambaForCausalLM, "mixtral": hf.MixtralForCausalLM,
}  # fmt: skip
SCHEME = Scheme(bits=3, group=32)


def made(name: str, directory: Path) -> Source:
    torch.manual_seed(0)
    CLASSES[name](CONFIGS[name]).to(torch.bfloat16).save_pretrained(directory)
    return open_source(directory)


def windows(count: int = 10) -> torch.Tensor:
    """Token ids with what a text has: some are frequent, and one follows another."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 128, (count, 1), generator=generator)
    jumps = torch.randint(0, 5, (count, 23), generator=generator)
    return torch.cat([start, start + jumps.cumsum(1)], 1).remainder_(125) + 3


def layers_of(source: Source) -> dict[str, Scheme]:
    model = source.build(dtype=torch.bfloat16)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: SCHEME
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % 32 == 0
    }


def chosen(source: Source, schemes: dict[str, Scheme], directory: Path, *, batch: int = 4, **how) -> Integers:
    integers = Integers(directory)
    thrift = Thrift(batch=batch, **how)
    compensate(source, windows(), schemes, integers, thrift=thrift, watch=Unwatched(), scratch=directory.parent)
    return integers


@torch.no_grad()
def outputs(source: Source, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = load_model(source, dtype=torch.bfloat16).eval()
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)
    ids = windows()
    return model(ids, **arguments_of(model, ids)).logits.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_is_nearer_than_rounding_brings_it(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "model")
    schemes = layers_of(source)
    integers = chosen(source, schemes, tmp_path / "integers")
    done = {module for module in schemes if module in integers and module.startswith(inside_blocks(source.build()))}
    assert len(done) >= 6
    assert set(integers.damping) == done
    for module in done:
        inputs = source.parameters[f"{module}.weight"][0][-1]
        assert integers.damping[module] == damping_for(inputs, windows().numel())
    right = outputs(source, {})
    found = outputs(source, {module: dequantize(integers.read(module, SCHEME)) for module in done})
    original = {module: source.read_parameter(f"{module}.weight", dtype=torch.bfloat16) for module in done}
    plain = outputs(source, {module: dequantize(quantize(weight, SCHEME)) for module, weight in original.items()})
    assert (found - right).square().mean() < (plain - right).square().mean()


def test_the_first_layers_are_those_of_their_inputs(tmp_path: Path) -> None:
    """q, k and v of the first block read what no rounding has changed: H is what a plain run of the model gives."""
    source = made("llama", tmp_path / "model")
    schemes = layers_of(source)
    integers = chosen(source, schemes, tmp_path / "integers")
    model = load_model(source, dtype=torch.bfloat16)
    heard = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    with torch.no_grad():
        for ids in windows().split(4):
            model(ids, use_cache=False)
    x = torch.cat([part.reshape(-1, 64) for part in heard]).double()
    for name in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.0.self_attn.{name}"
        weight, hessian = model.get_submodule(module).weight.detach(), (x.t() @ x / len(x)).float()
        right = gptq(weight, hessian, SCHEME, damping=damping_for(64, len(x))).quantized
        found = integers.read(module, SCHEME)
        assert torch.equal(found.scale, right.scale)
        assert (found.q != right.q).float().mean() < 0.01  # sums in another order: a tie may fall otherwise


@pytest.mark.parametrize("corrects", [True, False])
@torch.no_grad()
def test_a_layer_outside_of_the_blocks_is_searched_for_by_what_comes_to_it(corrects: bool, tmp_path: Path) -> None:
    """A pooler sees one token a window, a prediction's transformation all: weighed by that, in the model as it is by
    then."""
    for kind, name in ((hf.BertModel, "pooler.dense"), (hf.BertForMaskedLM, "cls.predictions.transform.dense")):
        torch.manual_seed(0)
        directory = tmp_path / kind.__name__
        kind(CONFIGS["bert"]).to(torch.bfloat16).save_pretrained(directory / "model")
        source = open_source(directory / "model")
        schemes, integers = layers_of(source), Integers(directory / "integers")
        compensate(source, windows(), schemes, integers, watch=Unwatched(), corrects=corrects)
        model = load_model(source, dtype=torch.bfloat16)
        for module in integers.damping:
            model.get_submodule(module).weight.copy_(dequantize(integers.read(module, SCHEME)))
        squares = read_by(model, name).double().square().mean(0)
        wanted = quantize(model.get_submodule(name).weight, SCHEME, importance=squares.float())
        found = integers.read(name, SCHEME)
        assert name not in integers.damping
        assert (found.q != wanted.q).float().mean() < 0.02, "sums in another order alone: a tie may fall otherwise"
        alike = quantize(model.get_submodule(name).weight, SCHEME)
        assert (found.q != alike.q).float().mean() > 0.04, "and not as if all inputs were alike"


@torch.no_grad()
def test_plain_gptq_rounds_layer_after_layer_for_what_it_now_reads(tmp_path: Path) -> None:
    """Beside the algorithm in a few lines, on the whole model at once."""
    source = made("llama", tmp_path / "model")
    schemes, damping = layers_of(source), 0.1
    plain, better = Integers(tmp_path / "plain"), Integers(tmp_path / "corrected")
    for corrects, integers in ((False, plain), (True, better)):
        compensate(source, windows(), schemes, integers, watch=Unwatched(), corrects=corrects, damping=damping)
    model = load_model(source, dtype=torch.bfloat16)
    equal: dict[bool, list[float]] = {True: [], False: []}
    for layer in range(2):
        for stage in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            names = [name for name in schemes if name.startswith(f"model.layers.{layer}.") and name.endswith(stage)]
            x = read_by(model, names[0]).double()
            for name in names:
                weight, hessian = model.get_submodule(name).weight, (x.t() @ x / len(x)).float()
                right = gptq(weight, hessian, SCHEME, damping=damping).quantized
                for corrects, integers in ((False, plain), (True, better)):
                    equal[corrects].append(float((integers.read(name, SCHEME).q == right.q).float().mean()))
                weight.copy_(dequantize(plain.read(name, SCHEME)))
    same, other = (sum(equal[corrects]) / len(equal[corrects]) for corrects in (False, True))
    assert same > 0.98, "sums in another order alone: a tie may fall otherwise"
    assert other < 0.9, "and to make up for the layers before is something else"


def test_plain_gptq_takes_less_and_that_is_predicted(tmp_path: Path) -> None:
    allowed = Allowed(bits=(4,), groups={4: (32,)})
    source = made("llama", tmp_path / "model")
    plan = uniform_plan(Study(source, Infer(prompt=8, new_tokens=2), allowed), 1 << 40)
    algorithms: tuple[Algorithm, ...] = ("gptq", "gptq-plain")
    told = [predict_choosing(source, plan, windows().shape, Thrift(), algorithm=by) for by in algorithms]
    meter = Meter()
    compensate(source, windows(), plan.schemes(), Integers(tmp_path / "integers"), watch=meter, corrects=False)
    assert told[1].peak_nbytes == pytest.approx(meter.account().peak_nbytes, rel=0.02)
    assert told[1].peak_nbytes < 0.9 * told[0].peak_nbytes


def read_by(model: torch.nn.Module, layer: str) -> torch.Tensor:
    """What comes to a layer [T, K]."""
    heard: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    model(windows(), use_cache=False)
    handle.remove()
    return heard[0].reshape(-1, heard[0].shape[-1])


def test_rows_looked_up_are_those_of_the_whole_table(tmp_path: Path, monkeypatch) -> None:
    """A codebook is learned from all of a table, and the text's first tokens are not all of it."""
    scheme = Scheme(bits=2, group=32, values="codebook")
    source = made("llama", tmp_path / "model")
    looked_up = []

    def heard(quantized):
        looked_up.append(dequantize(quantized))
        return looked_up[-1]

    monkeypatch.setattr("memfit.looked_up.weight_of", heard)
    monkeypatch.setattr("memfit.looked_up._TOKENS", 50)
    schemes = layers_of(source) | {"model.embed_tokens": scheme}
    chosen(source, schemes, tmp_path / "integers")
    table = source.read_parameter("model.embed_tokens.weight", dtype=torch.bfloat16)
    found, right = torch.cat(looked_up), dequantize(quantize(table, scheme))[windows().flatten()]
    assert torch.equal(found, right)


@pytest.mark.parametrize("name", ["gemma3", "t5", "bert"])
def test_killed_after_any_block_it_goes_on_to_the_same_bytes(name: str, tmp_path: Path, monkeypatch) -> None:
    source = made(name, tmp_path / "model")
    schemes = layers_of(source)
    whole = chosen(source, schemes, tmp_path / "whole")
    blocks = sorted(path.name for path in (tmp_path / "whole").iterdir())
    finish = Integers.finish

    class Killed(BaseException):
        pass

    for at in range(len(blocks)):
        count = []

        def once(self, block, damping, at=at, count=count):
            count.append(block)
            if len(count) == at + 1:
                raise Killed
            finish(self, block, damping)

        monkeypatch.setattr(Integers, "finish", once)
        with pytest.raises(Killed):
            chosen(source, schemes, tmp_path / f"killed-{at}")
        monkeypatch.setattr(Integers, "finish", finish)
        again = chosen(source, schemes, tmp_path / f"killed-{at}")
        assert digest(tmp_path / f"killed-{at}") == digest(tmp_path / "whole")
        assert again.damping == whole.damping


def digest(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def test_how_many_windows_go_at_once_changes_no_more_than_sums_do(tmp_path: Path) -> None:
    source = made("t5", tmp_path / "model")
    schemes = layers_of(source)
    one, all_at_once = (chosen(source, schemes, tmp_path / f"{batch}", batch=batch) for batch in (3, 10))
    outs = [
        outputs(source, {module: dequantize(made.read(module, SCHEME)) for module in schemes if module in made})
        for made in (one, all_at_once)
    ]
    right = outputs(source, {})
    errors = [float((out - right).square().mean()) for out in outs]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CONFIGS)
def test_sparing_memory_changes_no_byte(name: str, tmp_path: Path, one_thread) -> None:
    """Weights read for each use, states in files, few rows at once: the same integers. On one thread, as several share
    a product by its rows, and sum in another order where there are few."""
    source = made(name, tmp_path / "model")
    schemes = layers_of(source) | {
        name: SCHEME
        for name, module in source.build().named_modules()
        if isinstance(module, torch.nn.Embedding) and module.embedding_dim % 32 == 0
    }
    chosen(source, schemes, tmp_path / "plain")
    chosen(source, schemes, tmp_path / "spared", hold=False, spill=True, wait=False, rows=16)
    assert digest(tmp_path / "plain") == digest(tmp_path / "spared")


def test_a_layer_outside_of_the_blocks_whose_inputs_are_not_finite_is_named(tmp_path: Path) -> None:
    """The last norm's weights are finite, and the squares of what they give are not."""
    source = made("bert", tmp_path / "model")
    file, norm = tmp_path / "model" / "model.safetensors", "bert.encoder.layer.1.output.LayerNorm.weight"
    tensors = load_file(file)
    save_file(tensors | {norm: torch.full_like(tensors[norm], 1e30)}, file)
    with pytest.raises(UsageError, match=r"cls\.predictions\.transform\.dense: .*finite"):
        chosen(open_source(tmp_path / "model"), layers_of(source), tmp_path / "out")


def test_a_layer_that_the_text_tells_nothing_is_named(tmp_path: Path) -> None:
    source = made("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.embed_tokens.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])}, file)
    with pytest.raises(UsageError, match=r"layers.0.self_attn.q_proj: the Hessian is 0"):
        chosen(open_source(tmp_path / "model"), layers_of(source), tmp_path / "out")
