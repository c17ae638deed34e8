"""Whether an ONNX file gives what memfit's fitted model gives, and how fast, with how much memory.

B batch, T time, V vocabulary.
"""

import inspect
import statistics
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from memfit.account.meter import reset_resident_peak, resident_nbytes
from memfit.evaluate.onnx_model import Array, OnnxModel
from memfit.task.infer import vocabulary

LARGEST_DIFFERENCE: Final = 1e-2
"""Of a logit, in a file that is believed: what float32 sums in another order may come to."""
_TEXTS, _TOKENS, _STEPS = 2, 32, 8
"""What is compared: so many tokens, the last of them one by one."""
_REPEATS: Final = 3


def float32_answers(model: nn.Module, windows: dict[str, Tensor] | None) -> tuple[Array, Array]:
    """Token ids [B, T] and the model's own logits (or last hidden states) for them.

    Args:
        model: in float32, its packed weights computed with as such (`widen`).
        windows: of the text; its evaluation part is taken. None: tokens by chance.
    """
    config: Any = model.config
    length = min(_TOKENS, getattr(config.get_text_config(), "max_position_embeddings", None) or _TOKENS)
    if windows is not None:
        ids_BT = windows["evaluation"][:_TEXTS, :length]
    else:
        # Rows of a table may mean padding, which has a place of its own in some models: the first few are left out.
        size = vocabulary(model)
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(min(4, size - 1), size, (_TEXTS, length), generator=generator)
    rest = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        out = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **rest)
    answers = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    return ids_BT.numpy(), answers.numpy()


def compare_with_file(file: Path, ids_BT: Array, answers: Array, *, threads: int) -> float:
    """The largest difference from `answers`: all tokens at once, and the last ones step by step from the past."""
    model = OnnxModel(file, threads=threads)
    length = ids_BT.shape[1]
    found = [model.run(ids_BT)[0] - answers]
    if model.keeps_past:
        first = max(1, length - _STEPS)
        part, past = model.run(ids_BT[:, :first])
        found.append(part - answers[:, :first])
        for at in range(first, length):
            part, past = model.run(ids_BT[:, at : at + 1], past)
            found.append(part - answers[:, at : at + 1])
    # A number that is none wins over all others, as it should.
    return float(np.max([np.abs(one).max() for one in found]))


def measure_file(file: Path, task: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """Tokens a second of reading a prompt and of writing on, medians, and the resident bytes that both took.

    Args:
        file: model.onnx.
        task: `batch`, `prompt` and `new_tokens`.
        threads: of ONNX Runtime.
    """
    reset_resident_peak()
    before = resident_nbytes()["now"]
    model = OnnxModel(file, threads=threads)
    ids_BT = np.full((task["batch"], task["prompt"]), 5, np.int64)
    steps = task["new_tokens"] if model.keeps_past else 0
    read, wrote = [], []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        logits, past = model.run(ids_BT)
        read.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(steps):
            logits, past = model.run(logits[:, -1].argmax(-1)[:, None].astype(np.int64), past)
        wrote.append(time.perf_counter() - start)
    # One run before does not count: memory is mapped in it.
    tokens = task["batch"] * task["prompt"]
    return {
        "resident_nbytes": max(0, resident_nbytes()["peak"] - before),
        "prompt_tokens_per_s": tokens / statistics.median(read[1:]),
        "decode_tokens_per_s": task["batch"] * steps / statistics.median(wrote[1:]) if steps else None,
    }
