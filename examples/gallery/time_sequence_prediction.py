"""LSTM cells learn to continue sine waves, by LBFGS.

After time_sequence_prediction in pytorch/examples.
"""

from __future__ import annotations

from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.nn import functional as F

FIT: dict[str, Any] = {"n_epochs": 8}
HIDDEN, LENGTH = 32, 80


class Sequence(nn.Module):
    """Maps waves (N, T) to what comes next at each time, (N, T), and as far ahead as asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(1, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)])
        self.head = nn.Linear(HIDDEN, 1)
        self.double()

    def forward(self, waves: torch.Tensor, ahead: int = 0) -> torch.Tensor:
        states: list[Any] = [None] * len(self.cells)
        out: list[torch.Tensor] = []
        for t in range(waves.shape[1] + ahead):
            x = waves[:, t, None] if t < waves.shape[1] else out[-1]
            for i, cell in enumerate(self.cells):
                states[i] = cell(x, states[i])
                x = states[i][0]
            out.append(self.head(x))
        return torch.cat(out, dim=1)


def make_waves(ahead: int = 0) -> torch.Tensor:
    """Return 23 sine waves (23, LENGTH + ahead) that begin at random phases."""
    phases = torch.randint(-40, 40, (23, 1), generator=torch.Generator().manual_seed(2))
    return ((torch.arange(LENGTH + ahead) + phases).double() / 10).sin()


def make_loaders() -> DataLoaders:
    """Return loaders of one batch each, of waves and the same waves one step later."""
    valid, train = make_waves().split([3, 20])
    return DataLoaders([(train[:, :-1], train[:, 1:])], [(valid[:, :-1], valid[:, 1:])])


def make_learner() -> TrainLearner:
    """Return the learner."""
    return TrainLearner(
        Sequence(), make_loaders(), F.mse_loss, lr=0.8, cbs=MetricsCB(), opt_func=optim.LBFGS
    )


def main() -> None:
    """Train, and print the error of continuing waves that it was not trained on."""
    torch.manual_seed(1)
    learner = make_learner()
    learner.run(**FIT)
    right = make_waves(ahead=LENGTH)[:3]
    preds = learner.model(right[:, :LENGTH], ahead=LENGTH - 1)
    error = F.l1_loss(preds[:, -LENGTH:], right[:, -LENGTH:])
    print(f"mean absolute error {error:.3f} over {LENGTH} further steps")


if __name__ == "__main__":
    main()
