"""A language model of LSTM layers, as a factory: what `memfit account` takes besides transformers' models."""

import torch
from torch import Tensor, nn


class LstmLanguageModel(nn.Module):
    """Embedding, a stack of LSTM modules with a residual around each, a norm, a head.

    B batch, T time, D width, V vocabulary.
    """

    def __init__(self, *, vocabulary: int, width: int, modules: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.stack = nn.ModuleList(nn.LSTM(width, width, num_layers=layers, batch_first=True) for _ in range(modules))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, ids_BT: Tensor, state: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, 1, V] of the last position, and the state of each LSTM."""
        x_BTD = self.embedding(ids_BT)
        after = []
        for number, lstm in enumerate(self.stack):
            y_BTD, end = lstm(x_BTD, None if state is None else state[number])
            x_BTD = x_BTD + y_BTD
            after.append(end)
        return self.head(self.norm(x_BTD[:, -1:])), after


def make(*, vocabulary: int = 10_000, width: int = 256, modules: int = 2, layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return LstmLanguageModel(vocabulary=vocabulary, width=width, modules=modules, layers=layers)


class LearningLstm(LstmLanguageModel):
    """The same with logits at every position, to be trained."""

    def forward(self, ids_BT: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [B, T, V]."""
        x_BTD = self.embedding(ids_BT)
        for lstm in self.stack:
            x_BTD = x_BTD + lstm(x_BTD)[0]
        return self.head(self.norm(x_BTD))


def make_trainable(**settings: int) -> nn.Module:
    torch.manual_seed(0)
    return LearningLstm(**settings)
