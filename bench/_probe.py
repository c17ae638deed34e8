"""Accuracy of a linear probe for sentiment on a model's sentence embeddings (means over tokens, of unit length).

    python bench/_probe.py MODEL ORIGINAL DATA THREADS

DATA has train.tsv and dev.tsv: a sentence and its label a line.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfit
from memfit.source.source import open_source

ANSWER = "probe:"
_ROWS, _BATCH = 4000, 32


def sentences(file: Path, most: int) -> tuple[list[str], Tensor]:
    with file.open(encoding="utf-8", newline="") as lines:
        read = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [row for row in read if row[-1] in ("0", "1")][:most]
    return [row[0] for row in rows], torch.tensor([int(row[-1]) for row in rows])


@torch.no_grad()
def embedded(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """[n, D], float32."""
    found = []
    for start in range(0, len(texts), _BATCH):
        some = texts[start : start + _BATCH]
        given = tokenizer(some, padding=True, truncation=True, max_length=64, return_tensors="pt")
        states = model(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def main() -> None:
    directory, original, data, threads = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    model, tokenizer = memfit.load(directory), open_source(original).tokenizer()
    (x, y), (dev_x, dev_y) = (
        (embedded(model, tokenizer, texts), labels.double())
        for texts, labels in (sentences(Path(data) / name, _ROWS) for name in ("train.tsv", "dev.tsv"))
    )
    # Logistic regression, to its optimum: the same for all models.
    x, dev_x = x.double(), dev_x.double()
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    learner = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        learner.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight[1:] + weight[0], y) + 1e-4 * weight[1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    learner.step(loss)  # type: ignore[arg-type]
    right = ((dev_x @ weight[1:] + weight[0] > 0).double() == dev_y).double().mean()
    print(ANSWER + json.dumps(float(right.detach())))


if __name__ == "__main__":
    main()
