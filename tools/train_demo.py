"""Train the demo model that ships with memfit, and write it to `src/memfit/demo`.

    python tools/train_demo.py --minutes 40 --compile

The text is the standard library of the Python that runs this: every machine has it. Files are held out by a
hash of their path; tokenizer, unigram model and network see the others only. The learning rate falls until
`--steps` or `--minutes`, whichever comes first, so a busy machine still ends its schedule.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# B batch, T time, V vocabulary
SEED, VOCAB, CONTEXT, WINDOW, BATCH = 0, 4096, 2048, 512, 8
MUON_LR, ADAMW_LR, WARMUP_STEPS, CHECKPOINT_STEPS = 8e-3, 5e-3, 100, 100
HELD_OUT_ONE_IN, TEXT_NBYTES, PIECE_NBYTES = 40, 300_000, 2_048
SEPARATOR = "<|endoftext|>"
# Tables, generated files and files that describe one machine: they teach nothing and some hold local paths.
LEFT_OUT = ("site-packages/", "encodings/", "pydoc_data/", "_sysconfigdata", "config-", "lib2to3/tests/data/")
OUTPUT = Path(__file__).parents[1] / "src" / "memfit" / "demo"
CHECKPOINT = Path(tempfile.gettempdir()) / "memfit-demo-checkpoint.pt"


def path_hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


def read_corpus(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out texts by path below `root`, each in the order of the path's hash."""
    training, held_out, seen = {}, {}, {""}
    paths = (file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    for path in sorted((path for path in paths if not path.startswith(LEFT_OUT)), key=path_hash):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # some tests are in other encodings on purpose
        if text not in seen:  # a copy on the other side of the split would not be held out
            seen.add(text)
            (held_out if path_hash(path) % HELD_OUT_ONE_IN == 0 else training)[path] = text
    return training, held_out


def join(texts: Iterator[str]) -> str:
    """As many of `texts` as fit in TEXT_NBYTES, a separator after each."""
    joined = ""
    for text in texts:
        if len((joined + text + SEPARATOR).encode()) <= TEXT_NBYTES:
            joined += text + SEPARATOR
    return joined


def pieces(files: dict[str, str]) -> Iterator[str]:
    """Whole lines from somewhere in each file, at most PIECE_NBYTES and at least half as much."""
    for path, text in files.items():
        lines = text.splitlines(keepends=True)
        piece = ""
        for line in lines[path_hash("piece of " + path) % len(lines) :]:
            if len((piece + line).encode()) > PIECE_NBYTES:
                break
            piece += line
        if len(piece) > PIECE_NBYTES // 2:
            yield piece


def train_tokenizer(files: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens, and decoding them gives back the same text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[SEPARATOR], initial_alphabet=alphabet)
    bpe.train_from_iterator(files.values(), trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=CONTEXT, **roles)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids)  # not verbose: texts exceed the context


def new_model() -> LlamaForCausalLM:
    """5.2 M parameters; every linear input is a multiple of 128, so group-wise quantizers need no padding."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def batches(tokens: Tensor) -> Iterator[Tensor]:
    """Endless BATCH x WINDOW batches: each epoch cuts the row at another offset and shuffles the windows."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        windows = tokens[offset:].unfold(0, WINDOW, WINDOW)
        order = torch.randperm(len(windows), generator=generator)
        yield from (windows[rows] for rows in order.split(BATCH) if len(rows) == BATCH)


def mean_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return cross_entropy(logits_BTV[:, :-1].reshape(-1, VOCAB), tokens_BT[:, 1:].reshape(-1))


def schedule(step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, times a cosine from 1 to 0.01 over `progress`."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.505 + 0.495 * math.cos(math.pi * progress))


def new_optimizers(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the layers' matrices: perplexity 92 after 150 s, where AdamW for everything had 171."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2] + [model.model.embed_tokens.weight]
    return (
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def train(model: LlamaForCausalLM, tokens: Tensor, options: argparse.Namespace) -> tuple[int, float]:
    """Train `model` in place; returns the steps and the minutes taken."""
    optimizers = new_optimizers(model)
    step, elapsed = 0, 0.0
    if options.resume:
        step, elapsed, weights, states = torch.load(CHECKPOINT)
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    run = torch.compile(model) if options.compile else model
    source = islice(batches(tokens), step, None)
    start = time.monotonic() - elapsed
    while (progress := max(step / options.steps, elapsed / 60 / options.minutes)) < 1:
        tokens_BT = next(source)
        loss = mean_loss(run(tokens_BT, use_cache=False).logits, tokens_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(step, progress)
            optimizer.step()
            optimizer.zero_grad()
        step, elapsed = step + 1, time.monotonic() - start
        if step % 20 == 0:
            print(f"step {step}  {elapsed:.0f} s  loss {loss.item():.3f}", flush=True)
        if step % CHECKPOINT_STEPS == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save((step, elapsed, model.state_dict(), states), CHECKPOINT)
    return step, elapsed / 60


@torch.inference_mode()
def perplexities(model: LlamaForCausalLM, training: Tensor, windows: list[Tensor]) -> tuple[float, float]:
    """Of the model and of an add-one unigram model on the same tokens: all but the first of each window."""
    predicted = torch.cat([window[0, 1:] for window in windows])
    losses = [mean_loss(model(w, use_cache=False).logits, w).double() * (w.shape[1] - 1) for w in windows]
    counts_V = torch.bincount(training, minlength=VOCAB).double() + 1
    unigram_loss = -(counts_V / counts_V.sum()).log()[predicted].mean()
    return math.exp(sum(losses) / len(predicted)), math.exp(unigram_loss)


MODEL_CARD = """# memfit demo model

A small Llama decoder that writes what looks like Python. It lets memfit be tried and tested on a really
trained model without a download, and is of no other use.

| on `heldout.txt` | perplexity |
| --- | --- |
| this model | {perplexity:.2f} |
| unigram model | {unigram_perplexity:.1f} |

`heldout.txt` is cut into windows of {WINDOW} tokens that do not overlap (the last is shorter). Each window
is a sequence of its own; all its tokens but the first are predicted, {predicted:,} in all. The perplexity is
exp of their mean negative log-likelihood, with the bfloat16 weights shipped here and float32 arithmetic.
The unigram model has the same tokenizer, counts the training tokens and adds one to each count.

- **Shape**: `LlamaForCausalLM`, {parameters:,} parameters in bfloat16. Vocabulary {VOCAB}, width 256,
  6 layers, 4 query and 2 key-value heads of 64, feed-forward width 640, tied embeddings, {CONTEXT} positions.
- **Tokenizer**: byte-level BPE; `{SEPARATOR}` ends each file and is the first, last and padding token.
- **Text**: standard library of Python {python} with its tests; {training_files:,} files ({tokens:,} tokens)
  are for training, {held_out_files} are held out by a hash of the path. `heldout.txt` has those of them that
  fit in 300 kB, `calibration.txt` 300 kB of the training files in pieces of 2 kB.
- **Training**: {steps:,} steps of {BATCH} x {WINDOW} tokens, {tokens_seen:,} tokens in all, in {minutes:.0f}
  minutes on {threads} CPU cores in float32, with Muon and AdamW; seed {SEED}. The recipe is
  `tools/train_demo.py` in memfit's repository.
- **Licence**: the texts are copyright the Python Software Foundation and its contributors, under the PSF
  licence in `PYTHON_LICENSE.txt` beside them. The model is under the same licence.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model that ships with memfit.")
    parser.add_argument("--minutes", type=float, default=40.0, help="time to train at most")
    parser.add_argument("--steps", type=int, default=2000, help="steps to train at most")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory of the model and the texts")
    parser.add_argument("--resume", action="store_true", help=f"continue from {CHECKPOINT}")
    parser.add_argument("--compile", action="store_true", help="a quarter faster; needs a C++ compiler")
    options = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    training_files, held_out_files = read_corpus(library)
    tokenizer = train_tokenizer(training_files)
    training = torch.cat([encode(tokenizer, text + SEPARATOR) for text in training_files.values()])
    held_out_text = join(iter(held_out_files.values()))
    model = new_model()
    steps, minutes = train(model, training, options)

    # Written aside and moved, so that whoever loads meanwhile gets the old model or the new one.
    with tempfile.TemporaryDirectory(dir=options.output) as name:
        new = Path(name)
        model.to(torch.bfloat16).save_pretrained(new / "model")
        tokenizer.save_pretrained(new / "model")
        shipped = AutoModelForCausalLM.from_pretrained(new / "model", dtype=torch.float32).eval()
        windows = [w[None] for w in encode(tokenizer, held_out_text).split(WINDOW) if len(w) > 1]
        perplexity, unigram_perplexity = perplexities(shipped, training, windows)
        card = MODEL_CARD.format(
            **globals(), perplexity=perplexity, unigram_perplexity=unigram_perplexity, minutes=minutes,
            steps=steps, tokens_seen=steps * BATCH * WINDOW, python=platform.python_version(),
            training_files=len(training_files), held_out_files=len(held_out_files), tokens=len(training),
            parameters=model.num_parameters(), predicted=sum(w.shape[1] - 1 for w in windows),
            threads=torch.get_num_threads(),
        )  # fmt: skip
        (new / "model" / "README.md").write_text(card, encoding="utf-8")
        (new / "heldout.txt").write_text(held_out_text, encoding="utf-8")
        (new / "calibration.txt").write_text(join(pieces(training_files)), encoding="utf-8")
        shutil.copyfile(library / "LICENSE.txt", new / "PYTHON_LICENSE.txt")
        if (options.output / "model").exists():
            (options.output / "model").rename(new / "previous")
        for part in ("model", "heldout.txt", "calibration.txt", "PYTHON_LICENSE.txt"):
            (new / part).rename(options.output / part)


if __name__ == "__main__":
    main()
