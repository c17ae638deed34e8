"""Stock transformers, in a process that never imports memfit, loads what the writer wrote."""

import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from memfit.format import (
    OutputDirectory,
    TensorSpec,
    Writer,
    model_config,
    packed_buffers,
    packed_specs,
    save_companions,
)
from memfit.packed.scheme import Scheme

STOCK = textwrap.dedent("""
    import sys, torch
    from transformers import AutoModelForCausalLM
    for path in sys.argv[1:]:
        model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
        ids = torch.arange(64).view(2, 32) * 7 % 256
        with torch.no_grad():
            torch.save(model.eval()(input_ids=ids, use_cache=False).logits, path + "/logits.pt")
    assert "memfit" not in sys.modules
""")

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.3,
}


def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers, scales in bf16, zero points, and the weight that they stand for: (q − z) · s."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, scheme.groups(columns), -1)
    top = 2 ** (scheme.bits - 1)
    # A negative scale, as the format allows: the one level more then serves positive weights.
    scale = (-groups.abs().amax(-1, keepdim=True).clamp_min(1e-6) / top).bfloat16()
    zero = (
        torch.zeros_like(scale).float() if scheme.symmetric else (torch.arange(rows) % 3 - 1.0)[:, None, None]
    )
    zero = zero.expand_as(scale)
    q = ((groups / scale.float()).round() + zero).clamp(-top, top - 1)
    dense = ((q - zero) * scale.float()).view(rows, columns).bfloat16()
    return (
        q.view(rows, columns).to(torch.int8),
        scale[..., 0],
        zero[..., 0].to(torch.int8).contiguous(),
        dense,
    )


def write_packed(model: PreTrainedModel, schemes: dict[str, Scheme], path: Path) -> None:
    """Write `model` quantized, and put the weights that the integers stand for into it."""
    parts: dict[str, Tensor] = {}
    specs: list[TensorSpec] = []
    tied = {"lm_head": "model.embed_tokens"} if "model.embed_tokens" in schemes else {}
    for name, scheme in schemes.items():
        if name in tied:
            continue
        module = model.get_submodule(name)
        assert isinstance(module.weight, nn.Parameter)
        q, scale, zero, dense = quantize(module.weight.data, scheme)
        module.weight.data.copy_(dense)
        embedding = isinstance(module, nn.Embedding)
        others = list(tied) if embedding else []
        specs += packed_specs(name, q.shape, scheme, embedding=embedding, tied=others)
        # More than is written: the specs choose.
        parts |= {f"{n}.weight_scale": scale for n in (name, *others)}
        parts |= {f"{n}.weight_zero_point": zero for n in (name, *others)}
        parts |= {f"{name}.weight": q, f"{name}.weight_packed": pack_to_int32(q, scheme.bits)}
        parts[f"{name}.weight_shape"] = torch.tensor(q.shape)
    dense_tensors = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in schemes}
    for name, tensor in (dense_tensors | packed_buffers(model, schemes)).items():
        specs.append(TensorSpec(name=name, dtype=torch.bfloat16, shape=tuple(tensor.shape)))
        parts[name] = tensor
    embeddings = {*tied, *tied.values()}
    config = model_config(
        model.config, schemes=schemes, version="0", tied=tied, embeddings=embeddings, kv_bits=8
    )
    with OutputDirectory(path) as out:
        with Writer(out.path, specs, shard_nbytes=40_000) as writer:
            for spec in specs:
                writer.write(spec.name, parts[spec.name])
        out.write_json("config.json", config)
        save_companions(out.path, generation_config=model.generation_config)


def test_stock_transformers_loads_mixed_bits_and_tied_quantized_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Made in bf16, not turned into it: that would round the rotary frequencies too.
    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, tie_word_embeddings=False), dtype=torch.bfloat16
    )
    gemma = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SIZES), dtype=torch.bfloat16)
    int8, int3 = Scheme(bits=8, group=None), Scheme(bits=3, group=64)
    int4, asym = Scheme(bits=4, group=32), Scheme(bits=4, group=32, symmetric=False)
    mixed: dict[str, Scheme] = {}
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            mixed[name] = int4 if "layers.0" in name else int8
            if "mlp" in name:
                mixed[name] = int3 if "down_proj" in name else asym
    write_packed(llama, mixed, tmp_path / "llama")
    packed = {
        "model.embed_tokens": asym,
        "lm_head": asym,
        **{n: int8 for n, m in gemma.named_modules() if isinstance(m, nn.Linear) and "mlp" in n},
    }
    write_packed(gemma, packed, tmp_path / "gemma")

    paths = [str(tmp_path / name) for name in ("llama", "gemma")]
    done = subprocess.run([sys.executable, "-c", STOCK, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.arange(64).view(2, 32) * 7 % 256
    for path, model in zip(paths, (llama, gemma), strict=True):
        stock = torch.load(path + "/logits.pt").float()
        with torch.no_grad():
            dense = model.eval()(input_ids=ids, use_cache=False).logits.float()
        assert dense.std() > 0.1
        assert float((stock - dense).norm() / dense.norm()) < 1e-2
