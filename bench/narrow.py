"""What does a narrower model lose, by what goes and how: measured importance beside chance, corrected or not?

    python bench/narrow.py [--model DIR_OR_GGUF] [--text FILE] [--windows 16] [--judge 8]
                           [--only channels=70% heads=50% blocks=70% ...] [--output FILE]

KL divergence from the whole model in nats a token, on windows that nothing was chosen on. Default: the demo
model and text.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _common import verdict, write_result
from memfit import demo
from memfit.account.watch import Unwatched
from memfit.evaluate.divergence import compare_logits, record_logits
from memfit.evaluate.text import windows
from memfit.source import load, open_source
from memfit.source.cuts import Counts, counts_of
from memfit.source.narrowed import Kept, LiveCheckpoint, narrowed
from memfit.source.source import Source
from memfit.technique.narrow import Narrow, choose_heads
from memfit.technique.narrowing import choose_kept, correct
from memfit.text import Text

WAYS = ("channels=70%", "heads=50%", "blocks=70%")


def by_chance(kept: Kept, whole: Counts, seed: int) -> Kept:
    """As much as in `kept`, which of it by chance."""
    draw = random.Random(seed)
    counts = kept.counts(whole)

    def some(count: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(of), count)))

    blocks = None if kept.blocks is None else some(counts.blocks, whole.blocks)
    channels = {number: some(len(found), whole.channels or 0) for number, found in kept.channels.items()}
    both = {number: choose_heads(torch.rand(whole.heads or 1), counts, whole) for number in kept.heads}
    return Kept(
        blocks=blocks, channels=channels, heads={number: found[0] for number, found in both.items()},
        kv_heads={number: found[1] for number, found in both.items()},
    )  # fmt: skip


def losses(source: Source, kept: Kept, ids_WT: Tensor, judge: Any) -> dict[str, float]:
    """KL plain and corrected, and the seconds of the processor that the correction took."""
    began, made = time.process_time(), {}  # type: tuple[float, dict[str, Tensor]]
    correct(source, kept, ids_WT, made.__setitem__, watch=Unwatched())
    found = {"plain": judge(narrowed(source, kept))}
    if made:
        found |= {"seconds": time.process_time() - began}
        found |= {"corrected": judge(narrowed(source, kept, instead=LiveCheckpoint(state=made)))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.model_directory()))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--judge", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=WAYS)
    parser.add_argument("--name", default="narrow")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    cut = Text.of_demo() if asked.text is None else Text.from_file(asked.text)
    source = open_source(asked.model)
    tokenizer = source.tokenizer()
    ids_WT = windows(tokenizer, cut.calibration, length=cut.length)[: asked.windows].clone()
    judged_WT = windows(tokenizer, cut.evaluation, length=cut.length)[: asked.judge].clone()
    whole, rows = counts_of(source.config), []
    with tempfile.TemporaryDirectory() as work:
        logits = Path(work) / "logits"
        record_logits(load(source, dtype=torch.bfloat16), judged_WT, logits)

        def judge(narrower: Source) -> float:
            quality = compare_logits(logits, load(narrower, dtype=torch.bfloat16), judged_WT)
            assert quality.kl is not None
            return quality.kl

        for way in asked.only:
            what, _, size = way.partition("=")
            began = time.process_time()
            settings: Mapping[str, Any] = {what: size}
            kept = choose_kept(source, ids_WT, Narrow(**settings), watch=Unwatched())
            row: dict[str, Any] = {"way": way, "counts": asdict(kept.counts(whole))}
            row |= {"blocks": kept.blocks, "choosing_seconds": time.process_time() - began}
            torch.manual_seed(0)
            row |= {"measured": losses(source, kept, ids_WT, judge)}
            row |= {"by_chance": losses(source, by_chance(kept, whole, 0), ids_WT, judge)}
            rows.append(row)
            for how in ("measured", "by_chance"):
                told = ", ".join(f"{name} {value:.4f}" for name, value in row[how].items())
                print(f"{way:14} {how:10} {told}", flush=True)
    verdicts = [
        verdict(
            f"{row['way']}: measured below chance",
            row["measured"]["plain"] < row["by_chance"]["plain"],
            f"{row['measured']['plain']:.4f} and {row['by_chance']['plain']:.4f}",
        )
        for row in rows
    ]
    write_result(asked.name, {"model": source.stem, "rows": rows, "verdicts": verdicts}, output=asked.output)


if __name__ == "__main__":
    main()
