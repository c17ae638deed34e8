import copy
import gc
import importlib.util
import json
import warnings
from contextlib import contextmanager

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memfit.account.dry_run import dry_run, hold_model
from memfit.account.meter import Meter
from memfit.errors import UsageError
from memfit.models import load_model
from memfit.packed.lora import AdaptedLinear
from memfit.packed.modules import PackedLinear, packed_modules
from memfit.packed.scheme import Scheme
from memfit.source.source import source_from_config
from memfit.technique.adapters import Adapters, save
from memfit.technique.quantize import quantize as search

DECODER = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": hf.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "biased": hf.LlamaConfig(**DECODER, attention_bias=True, mlp_bias=True),
    "gpt2": hf.GPT2Config(
        vocab_size=160, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=2,
    ),
    "t5": hf.T5Config(
        vocab_size=160, d_model=64, d_ff=96, num_layers=2, num_heads=2, d_kv=32, dropout_rate=0,
        decoder_start_token_id=0,
    ),
    "bert": hf.BertConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    ),
    "mixtral": hf.MixtralConfig(**DECODER, num_local_experts=4),
    "mamba": hf.MambaConfig(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8),
}  # fmt: skip
CLASSES = {"t5": hf.AutoModelForSeq2SeqLM, "bert": hf.AutoModelForSequenceClassification}
IDS = torch.randint(1, 160, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = CLASSES.get(name, hf.AutoModelForCausalLM).from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    if name == "mixtral":
        model.set_experts_implementation("eager")
    return model


def quantize(weight, scheme):
    found = search(weight, scheme=scheme)
    return found.q, found.scale, found.zero


def plain_peft(model, config):
    """The reference."""
    with quiet():
        return peft.get_peft_model(model, config)


@contextmanager
def quiet():
    """`PeftModel` asks transformers 5.23 for a name that it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def parameters(model):
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}


def stir(*models):
    """Move every trained parameter, B from zero, and all models alike."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in parameters(models[0]).items():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
                for model in models:
                    parameters(model)[name].add_(noise.to(parameter.dtype))


def loss_and_gradients(model, name):
    model.train()
    torch.manual_seed(5)
    labels = torch.tensor([0, 1]) if name == "bert" else IDS
    loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in parameters(model).items() if p.requires_grad}


def relative(found, expected):
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_plain_peft(name, kind, dropout):
    if name == "mamba" and dropout:
        return  # it calls layers with turned inputs, whose random numbers are drawn in another order
    technique = Adapters(kind=kind, rank=4, alpha=7, dropout=dropout)
    model, base = make_model(name), make_model(name)
    reference_config = technique.config(base)
    torch.manual_seed(1)
    assert technique.apply(model) is model
    torch.manual_seed(1)
    reference = plain_peft(base, reference_config)
    found, expected = parameters(model), parameters(reference)
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.allclose(found[key], expected[key], rtol=1e-13), key
        assert found[key].requires_grad == expected[key].requires_grad, key
    stir(model, reference)
    (loss, grads), (expected_loss, expected_grads) = (loss_and_gradients(m, name) for m in (model, reference))
    assert abs(loss - expected_loss) <= 1e-10 and grads.keys() == expected_grads.keys()
    for key, gradient in expected_grads.items():
        assert (grads[key] - gradient).abs().max() <= 1e-10 * max(1.0, float(gradient.abs().max())), key


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_saved_files_are_those_that_peft_saves(name, kind, tmp_path):
    technique = Adapters(kind=kind, rank=4)
    model, base = make_model(name, torch.float32), make_model(name, torch.float32)
    config = technique.config(base)
    technique.apply(model)
    reference = plain_peft(base, config)
    with torch.no_grad():
        for key, parameter in parameters(model).items():
            parameters(reference)[key].copy_(parameter)
    save(model, tmp_path / "ours", base="some/base")
    reference.peft_config["default"].base_model_name_or_path = "some/base"
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("ours", "theirs")
    )
    for read in (ours, theirs):
        for key in ("target_modules", "modules_to_save"):
            read[key] = sorted(set(read[key] or ()) - {"score"})  # peft names both heads that a class may have
    assert ours == theirs


def test_two_saves_are_the_same_bytes(tmp_path):
    model = Adapters(rank=4).apply(make_model("llama"))
    for folder in ("a", "b"):
        save(model, tmp_path / folder, base=None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def unpacked(packed, dtype):
    """The plain model that a packed one with adapters stands for."""
    plain = make_model("biased", torch.bfloat16)
    for name, module in packed_modules(packed).items():
        weight = plain.get_submodule(name.removesuffix(".base_layer")).weight
        weight.data.copy_(module.store.dense_rows(0, module.store.shape[0]))
    return plain.to(dtype)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_over_packed_weights_are_those_over_the_unpacked(kind, bits, tmp_path):
    model = Adapters(kind=kind, rank=4, base_bits=bits).apply(make_model("biased", torch.bfloat16), quantize=quantize)
    stir(model)
    assert not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if n.endswith("base_layer"))
    save(model, tmp_path, base="some/base")
    models = [model]
    for dtype in (torch.bfloat16, torch.float64):
        with quiet():
            loaded = peft.PeftModel.from_pretrained(
                unpacked(model, dtype), tmp_path, is_trainable=True, autocast_adapter_dtype=False
            )
        models.append(loaded)
    ours, theirs, exact = ([*loss_and_gradients(m, "biased"), m.eval()(IDS).logits] for m in models)
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    # Packed weights run in bf16: as near to what is exact as peft's own layers in bf16, over the unpacked model.
    assert abs(ours[0] - exact[0]) < 0.01 and relative(ours[2], exact[2]) < 0.02
    distance, expected = (
        sum(float((grads[key].double() - exact[1][key]).square().sum()) for key in grads) ** 0.5
        for grads in (ours[1], theirs[1])
    )
    assert distance < 1.5 * expected


def test_all_is_frozen_but_adapters_and_ties_stay():
    model = make_model("llama", torch.bfloat16)
    Adapters(rank=4, base_bits=4).apply(model, quantize=quantize)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(model.lm_head, AdaptedLinear) and type(model) is hf.LlamaForCausalLM
    assert all(isinstance(m.base_layer, PackedLinear) for m in model.modules() if isinstance(m, AdaptedLinear))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_parameters_in_fp32_over_a_bf16_model_have_the_same_gradients_to_bf16():
    found = []
    for dtype in ("model", "float32"):
        torch.manual_seed(1)
        model = Adapters(rank=4, kind="dora", dtype=dtype).apply(make_model("llama", torch.bfloat16))
        stir(model)
        found.append(loss_and_gradients(model, "llama"))
        assert {g.dtype for g in found[-1][1].values()} == {torch.float32 if dtype == "float32" else torch.bfloat16}
    for key, gradient in found[0][1].items():
        assert relative(gradient, found[1][1][key]) < 0.05


def test_a_new_head_is_trained_whole():
    model = Adapters(rank=4).apply(make_model("bert"))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointed_blocks_have_the_same_gradients(kind):
    found = []
    for wraps in (False, True):
        torch.manual_seed(1)
        model = Adapters(rank=4, kind=kind, base_bits=4).apply(make_model("biased", torch.bfloat16), quantize=quantize)
        stir(model)
        if wraps:
            for block in model.model.layers:
                block.forward = _checkpointed(block.forward)
        found.append(loss_and_gradients(model, "biased")[1])
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["biased", "gpt2"])
@torch.no_grad()
def test_merged_adapters_compute_the_same(name, kind):
    model = Adapters(rank=4, kind=kind).apply(make_model(name)).eval()
    stir(model)
    expected = model(IDS).logits
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.merge()
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-10, atol=1e-12)


def test_layers_that_are_packed_already_are_adapted_as_they_are():
    model = Adapters(rank=4, base_bits=4).apply(make_model("biased", torch.bfloat16), quantize=quantize)
    packed = make_model("biased", torch.bfloat16)
    for name, module in packed_modules(model).items():
        name = name.removesuffix(".base_layer")
        setattr(packed.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
    technique = Adapters(rank=4, base_bits=4)
    assert technique.packs(packed) == {} and technique.why_not(packed) is None
    technique.apply(packed)
    assert sum(isinstance(m, AdaptedLinear) for m in packed.modules()) == 14


def test_experts_are_packed_and_routers_are_not():
    technique = Adapters(rank=4, base_bits=4)
    model = make_model("mixtral", torch.bfloat16)
    left = technique.left_out(model)
    assert technique.packs(model)["model.layers.0.mlp.experts"] == Scheme(bits=4, group=32)
    assert "no linear layer" in left["model.layers.1.mlp.experts"]
    technique.apply(model, quantize=quantize)
    stir(model)
    _, grads = loss_and_gradients(model, "mixtral")
    assert len(grads) == 16 and all(g.isfinite().all() and g.any() for g in grads.values())


class Steps:
    """Forward and backward, twice, the gradients dropped between; told to a watch."""

    def run(self, model, watch):
        with watch.phase("load"):
            hold_model(model, watch)
            ids = torch.zeros(4, 40, dtype=torch.long)
            model.train()
        for _ in range(2):
            with watch.phase("forward"):
                out = model(input_ids=ids).logits
            with watch.phase("backward"):
                out.float().square().mean().backward()
                del out
                model.zero_grad()


@pytest.mark.parametrize(
    ("name", "kind", "dropout", "bits"),
    [
        ("biased", "lora", 0.0, 16), ("biased", "lora", 0.1, 4), ("biased", "dora", 0.0, 4),
        ("biased", "dora", 0.1, 16), ("bert", "lora", 0.0, 8), ("bert", "dora", 0.1, 16),
    ],
)  # fmt: skip
def test_memory_is_predicted_to_the_byte(name, kind, dropout, bits):
    technique = Adapters(rank=4, kind=kind, dropout=dropout, base_bits=bits)
    config = copy.deepcopy(CONFIGS[name])
    if name == "bert":
        config.architectures = ["BertForSequenceClassification"]
    made = source_from_config(config)

    def make():
        return technique.apply(load_model(made, dtype="bfloat16"), quantize=quantize)

    gc.collect()  # what earlier tests left would be freed in the middle
    meter = Meter()
    with meter.phase("load"):
        model = make()
    Steps().run(model, meter)
    measured, predicted = meter.account(), dry_run(make, Steps(), whole=True)
    peaks = [{p.name: p.peak_nbytes for p in account.phases} for account in (measured, predicted)]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fake_models_get_the_same_adapters(name, kind):
    technique = Adapters(rank=4, kind=kind)
    real = technique.apply(make_model(name, torch.bfloat16))
    with FakeTensorMode() as mode:
        fake = technique.apply(make_model(name, torch.bfloat16))
    # A head that peft copied has no mode of its own: its storages' counts would be given back twice.
    assert {id(p.fake_mode) for p in fake.parameters()} == {id(mode)}
    shapes = [
        {n: (p.shape, p.dtype, p.requires_grad, p.device) for n, p in model.named_parameters()}
        for model in (real, fake)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"targets": ("nowhere",)}, r"no layer 'nowhere'; its blocks have down_proj, gate_proj, k_proj"),
        ("llama", {"targets": ("lm_head",)}, r"lm_head \[160, 64\]: it is tied to the embedding"),
        ("llama", {"targets": ("embed_tokens",)}, r"model\.embed_tokens \[160, 64\]: Embedding is no linear layer"),
        ("mamba", {"targets": ("dt_proj",)}, r"mixer\.dt_proj \[128, 4\]: the model reads this weight itself"),
        ("mamba", {"targets": ("out_proj",)}, r"mixer\.out_proj \[64, 128\]: fused kernels of mamba"),
        ("gpt2", {"base_bits": 4}, r"packed in 4 bits; .*c_attn.*Conv1D .*has no packed form"),
        ("llama", {"base_bits": 4}, r"q_proj \[64, 64\] is in float64, and packed weights run in bfloat16"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_shape(name, options, message):
    model = make_model(name)
    before = list(model.state_dict())
    with pytest.raises(UsageError, match=message):
        Adapters(**options).apply(model)
    assert list(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_other_refusals(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="no blocks"):
        Adapters().apply(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="no adapters to save"):
        save(nn.Linear(4, 4), tmp_path, base=None)
    model = Adapters().apply(make_model("llama"))
    with pytest.raises(UsageError, match="adapters already"):
        Adapters().apply(model)
    packed = Adapters(base_bits=4).apply(make_model("llama", torch.bfloat16), quantize=quantize)
    with pytest.raises(UsageError, match=r"cannot be merged into a packed weight \[64, 64\]"):
        packed.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ValueError, match="needs `quantize`"):
        Adapters(base_bits=4).apply(make_model("llama", torch.bfloat16))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"peft is not installed.*memfit\[train\]"):
        Adapters().apply(make_model("llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pissa"}, "kind must be one of lora, dora, got 'pissa'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
        ({"base_bits": 9}, "base_bits must be one of 16, 8, 6, 5, 4, 3, 2, got 9"),
        ({"targets": ()}, r"targets must be a tuple of names, or None for all, got \(\)"),
        ({"targets": "q_proj"}, "targets must be a tuple of names, or None for all, got 'q_proj'"),
    ],
)
def test_settings_are_checked_when_they_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        Adapters(**options)


def test_layers_are_named_as_the_model_names_them():
    model = make_model("llama")
    assert Adapters(targets=("q_proj", "v_proj")).layers(model) == tuple(
        f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qv"
    )
    assert len(Adapters().layers(model)) == 14 and Adapters().left_out(model) == {}
