"""What a model that is trained is worth, on what was held out: by its loss, and as a classifier by its guesses."""

from collections.abc import Callable, Mapping

import torch

from memfit.data.batches import Batches
from memfit.evaluate.classification import Classification, classify_score

from .step import TrainStep


def judge_on(batches: Batches, most: int) -> Callable[[TrainStep], Mapping[str, float]]:
    """A function that scores a model on the first `most` batches held out."""

    def judge(step: TrainStep) -> Mapping[str, float]:
        total, labels = 0.0, 0
        guessed: list[int] = []
        known: list[int] = []
        device, classes = next(step.model.parameters()).device, 2
        for number in range(min(most, len(batches))):
            batch = {name: tensor.to(device) for name, tensor in batches.batch(0, number).items()}
            loss, count, scores = step.evaluate(batch)
            total, labels = total + loss * count, labels + count
            if scores is not None and batches.kind == "classifier":
                classes = scores.shape[-1]
                guessed += scores.argmax(-1).tolist()
                known += batch["labels"].tolist()
        mean = total / max(labels, 1)
        if batches.kind != "classifier" or not guessed:
            return {"loss": mean, "perplexity": float(torch.tensor(mean).exp()), "score": mean}
        found = classify_score(guessed, known, classes)
        return {"loss": mean, "accuracy": found.accuracy, "f1": found.f1, "score": 1.0 - found.f1}

    return judge


def classification_of(step: TrainStep, batches: Batches) -> Classification:
    """A classifier's scores on all of the batches."""
    guessed: list[int] = []
    known: list[int] = []
    classes = 2
    for number in range(len(batches)):
        batch = batches.batch(0, number)
        scores = step.evaluate({n: t.to(next(step.model.parameters()).device) for n, t in batch.items()})[2]
        assert scores is not None
        classes = scores.shape[-1]
        guessed += scores.argmax(-1).tolist()
        known += batch["labels"].tolist()
    return classify_score(guessed, known, classes)
