"""An LSTM that predicts the next word of Python's manual, whose text ships with Python.

After word_language_model in pytorch/examples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import torch
from eventrain.callbacks import GradientClippingCB, MetricsCB, SchedulerCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import BeforeEpoch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

FIT: dict[str, Any] = {"n_epochs": 12}
N_WORDS, BATCH, STEPS, HIDDEN = 1000, 20, 35, 100


class WordModel(nn.Module):
    """Maps words (N, T) to logits (N, words, T); its state goes on from batch to batch."""

    state: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Embedding(N_WORDS, HIDDEN), nn.Dropout(0.2))
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.decoder = nn.Sequential(nn.Dropout(0.2), nn.Linear(HIDDEN, N_WORDS))
        self.register_buffer("state", torch.zeros(2, 1, BATCH, HIDDEN))  # which checkpoints have

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        out, state = self.lstm(self.embedding(words), tuple(self.state))
        self.state = torch.stack(state).detach()
        logits: torch.Tensor = self.decoder(out)
        return logits.transpose(1, 2)


def make_loaders(n_words: int = 20_000) -> DataLoaders:
    """Return batches of (words, next words): each row of a batch continues that of the last."""
    text = re.findall(r"\w+|[^\w\s]", " ".join(topics[key] for key in sorted(topics)))[:n_words]
    number = {word: i for i, (word, _) in enumerate(Counter(text).most_common(N_WORDS - 1), 1)}
    columns = torch.tensor([number.get(word, 0) for word in text]).view(BATCH, -1)
    x, y = (part.split(STEPS, 1)[:-1] for part in (columns[:, :-1], columns[:, 1:]))
    batches, split = list(zip(x, y, strict=True)), len(x) * 4 // 5
    return DataLoaders(batches[:split], batches[split:])


def make_learner() -> TrainLearner:
    """Return the learner."""
    plateau = SchedulerCB(
        lambda opt: ReduceLROnPlateau(opt, factor=0.25, patience=0, threshold=0),
        every="epoch",
        monitor="loss",
    )
    cbs = [MetricsCB(), GradientClippingCB(0.25), plateau]
    learner = TrainLearner(WordModel(), make_loaders(), F.cross_entropy, lr=20, cbs=cbs)
    learner.on(BeforeEpoch)(lambda event: event.learner.model.state.zero_())
    return learner


def main() -> None:
    """Train, and print the perplexity of text that it was not trained on."""
    torch.manual_seed(1)
    print(f"perplexity {math.exp(make_learner().run(**FIT).history[-1]['loss']):.1f}")


if __name__ == "__main__":
    main()
