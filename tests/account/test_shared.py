"""A model of factors, of layers that share and of narrower heads: its files hold what is shared once, come back to the
bit, and what it takes is predicted to the byte."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from memfit.errors import BrokenInput
from memfit.format.config import model_config
from memfit.format.output import stored_tensors
from memfit.format.packed import stored_values
from memfit.format.safetensors import Writer
from memfit.models import load_model
from memfit.packed.forms import Form, LowRank, Shared
from memfit.packed.scheme import Scheme
from memfit.source import check
from memfit.source.source import Source, open_source, source_from_config
from memfit.task.infer import Infer
from memfit.technique.heads import narrow_heads
from memfit.technique.install import install
from memfit.technique.low_rank import factorize
from memfit.technique.made import Made
from memfit.technique.quantize import Quantized, quantize
from memfit.technique.share import Member, share

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
INT4 = Scheme(bits=4, group=32)


def made_of(model: nn.Module) -> dict[str, Made | Quantized]:
    """Every way to share in some block, in two pairs of blocks alike; the head is its table and a difference."""
    take = lambda *names: {n: Member.of(model.get_submodule(n).get_parameter("weight")) for n in names}  # noqa: E731
    made: dict[str, Made | Quantized] = {}
    for first, second in (("model.layers.0", "model.layers.1"), ("model.layers.2", "model.layers.3")):
        made |= share(take(f"{first}.mlp.gate_proj", f"{first}.mlp.up_proj"), "right", 24)
        made |= share(take(f"{first}.mlp.down_proj", f"{second}.mlp.down_proj"), "left", 16)
        made |= share(take(f"{first}.self_attn.v_proj", f"{second}.self_attn.k_proj"), "weight", 4, base=INT4)
        made |= share(take(f"{first}.self_attn.o_proj", f"{second}.self_attn.q_proj"), "weight", 0)
        made |= share(take(f"{second}.mlp.gate_proj", f"{second}.mlp.up_proj"), "weight", 8)
        key = model.get_submodule(f"{first}.self_attn.k_proj").get_parameter("weight")
        made[f"{first}.self_attn.k_proj"] = factorize(key, LowRank(rank=8, base=INT4))
    # Of v and o, in blocks where they are not shared; a pair whose integers fill whole groups.
    for block, base in (("model.layers.1", None), ("model.layers.3", INT4)):
        names = [f"{block}.self_attn.v_proj", f"{block}.self_attn.o_proj"]
        value, output = (model.get_submodule(name).get_parameter("weight") for name in names)
        made |= dict(zip(names, narrow_heads(value, output, width=16, kept=8, base=base), strict=True))
    table, head = (model.get_submodule(n).get_parameter("weight") for n in ("model.embed_tokens", "lm_head"))
    made["model.embed_tokens"] = quantize(table, Scheme(bits=8, group=None))
    off = factorize(head.float() - table.float(), LowRank(rank=12))
    form = Shared(owner="model.embed_tokens", common="weight", rank=12)
    made["lm_head"] = Made(form=form, shape=off.shape, parts=off.parts)
    return made


def forms_of(made: dict[str, Made | Quantized]) -> dict[str, Form]:
    return {name: one.scheme if isinstance(one, Quantized) else one.form for name, one in made.items()}


def tensors_of(name: str, one: Made | Quantized) -> dict[str, Tensor]:
    """What is written of a module, by its name in the file."""
    integers, parts = (one, {}) if isinstance(one, Quantized) else (one.base, dict(one.parts))
    if integers is one:
        parts |= {"weight_scale": one.scale, "weight": one.q}
    elif integers is not None:
        parts |= {"weight_scale": integers.scale, "weight_packed": stored_values(integers, "memfit")}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: Any) -> tuple[Path, nn.Module, dict[str, Form]]:
    """The files, the model that they are of, and the forms of its modules."""
    path: Path = tmp_path_factory.mktemp("shared")
    source = source_from_config(CONFIG)
    model = load_model(source, dtype=torch.bfloat16)
    made = made_of(model)
    forms = forms_of(made)
    stored = stored_tensors(source.build(dtype=torch.bfloat16), forms)
    assert stored.own
    tensors = {name: tensor for module, one in made.items() for name, tensor in tensors_of(module, one).items()}
    with Writer(path, stored.specs, stem="memfit") as writer:
        for spec in stored.specs:
            tensor = tensors[spec.name] if spec.name in tensors else model.state_dict()[spec.name]
            writer.write(spec.name, tensor.detach())
    raw = model_config(
        CONFIG, schemes=forms, version="0", ignore=stored.ignore, embeddings=stored.embeddings, tied=stored.tied
    )
    (path / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForCausalLM"]}))
    install(model, made)
    return path, model, forms


def test_the_files_come_back_to_the_bit(fitted: tuple[Path, nn.Module, dict[str, Form]]) -> None:
    path, model, forms = fitted
    source = open_source(path)
    check(source)
    assert source.schemes == forms
    found = load_model(source)
    state, wanted = found.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)
    assert found.lm_head.store.owner is found.model.embed_tokens.store
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    with FakeTensorMode():
        fake = load_model(source)
    assert {n: (t.shape, t.dtype) for n, t in fake.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }


def test_what_is_shared_is_in_the_files_and_in_memory_once(fitted: tuple[Path, nn.Module, dict[str, Form]]) -> None:
    path, model, forms = fitted
    tensors = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    plain = source_from_config(CONFIG).build(dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    told = sum(form.nbytes(shapes[f"{name}.weight"]) for name, form in forms.items())
    told += sum(2 * math.prod(shape) for name, shape in shapes.items() if name.rpartition(".")[0] not in forms)
    assert sum(t.nbytes for t in tensors.values()) == told
    assert not any(name.startswith("model.layers.1.self_attn.q_proj") for name in tensors), "it is the other's"
    held = {id(t): t.nbytes for t in (*model.buffers(), *model.parameters())}
    held_once = sum(held.values()) - sum(b.nbytes for n, b in model.named_buffers() if "store" not in n)
    assert held_once == told


@pytest.mark.parametrize("prompt", [24, 200])
def test_prediction_equals_measurement_to_the_byte(
    fitted: tuple[Path, nn.Module, dict[str, Form]], prompt: int, predicted: Callable[..., Any],
    measured: Callable[..., Any],
) -> None:  # fmt: skip
    source = open_source(fitted[0])
    make, task = lambda: load_model(source), Infer(batch=1, prompt=prompt, new_tokens=3)
    told, found = predicted(make, task), measured(make, task)
    for one, other in zip(told.phases, found.phases, strict=True):
        assert (one.name, one.peak_nbytes, one.end_nbytes) == (other.name, other.peak_nbytes, other.end_nbytes)
    whole = predicted(make, task, whole=True)
    assert whole.phases == told.phases and whole.entries == told.entries


def broken(fitted: Path, to: Path, *, config: Callable[[str], str] = str, without: str = "") -> Source:
    """A copy with another config, or without a tensor."""
    for file in fitted.iterdir():
        if file.suffix == ".safetensors":
            save_file({n: t for n, t in load_file(file).items() if n != without}, to / file.name)
        else:
            (to / file.name).write_text(config(file.read_text()))
    return open_source(to)


@pytest.mark.parametrize(("change", "reason"), [
    (("model.layers.0.mlp.gate_proj", "model.layers.9.mlp.gate_proj"), "is stored in no form"),
    (('"common": "right"', '"common": "left"'), "weight_right' of the model is missing"),
    (('"common": "right", "rank": 24', '"common": "right", "rank": 23'), "has the shape"),
    (('"owner": "model.layers.0.mlp.gate_proj"', '"owner": "model.layers.0.mlp.up_proj"'), "has a part of"),
    (('"common": "right"', '"common": "top"'), "one of right, left, weight"),
    (('"form": "shared"', '"form": "lent"'), "form is 'lent'"),
])  # fmt: skip
def test_a_config_that_shares_what_is_not_there_is_refused(
    fitted: tuple[Path, nn.Module, dict[str, Form]], tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    with pytest.raises(BrokenInput, match=reason):
        check(broken(fitted[0], tmp_path, config=lambda text: text.replace(*change)))


@pytest.mark.parametrize("name", [
    "model.layers.0.mlp.gate_proj.weight_right", "model.layers.1.mlp.down_proj.weight_right",
    "model.layers.0.self_attn.o_proj.weight_whole", "model.layers.0.self_attn.v_proj.weight_packed",
    "model.layers.1.self_attn.o_proj.weight_narrow", "model.layers.3.self_attn.o_proj.weight_packed",
])  # fmt: skip
def test_a_missing_part_is_told(fitted: tuple[Path, nn.Module, dict[str, Form]], tmp_path: Path, name: str) -> None:
    with pytest.raises(BrokenInput, match=f"'{name}' of the model is missing"):
        check(broken(fitted[0], tmp_path, without=name))
