"""A graph network labels digits, of which it knows the labels of a few.

After the GCN of Kipf and Welling, on the graph of the nearest neighbours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

FIT: dict[str, Any] = {"n_epochs": 200}


class GCN(nn.Module):
    """Maps nodes, by number, to logits of 10 classes; the graph is a part of the model.

    Args:
        x: the features of all nodes, of shape (nodes, features).
        adjacency: the normalized adjacency matrix.
    """

    def __init__(self, x: torch.Tensor, adjacency: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x, persistent=False)
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.first, self.second = nn.Linear(x.shape[1], 16), nn.Linear(16, 10)

    def forward(self, nodes: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(self.adjacency @ self.first(self.x), 0.5, self.training).relu()
        logits: torch.Tensor = self.adjacency @ self.second(hidden)
        return logits[nodes]


def make_data() -> tuple[nn.Module, DataLoaders]:
    """Return the model with its graph, and batches of all nodes with a label, and all without."""
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16
    edges = torch.zeros(len(x), len(x))
    edges.scatter_(1, torch.cdist(x, x).topk(9, largest=False).indices, 1.0)  # and itself
    edges = edges.maximum(edges.T)
    scale = edges.sum(1) ** -0.5
    mask = torch.arange(len(x)) < 100
    train, test = ([(nodes, y[nodes])] for nodes in (m.nonzero()[:, 0] for m in (mask, ~mask)))
    return GCN(x, (scale[:, None] * edges * scale).to_sparse()), DataLoaders(train, test)


def make_learner() -> TrainLearner:
    """Return the learner."""
    model, dls = make_data()
    cbs, opt_func = MetricsCB(accuracy=MulticlassAccuracy()), partial(optim.Adam, weight_decay=5e-4)
    return TrainLearner(model, dls, F.cross_entropy, lr=0.01, cbs=cbs, opt_func=opt_func)


def main() -> None:
    """Train, and print the accuracy on the nodes without a label."""
    torch.manual_seed(1)
    print(f"accuracy {make_learner().run(**FIT).history[-1]['accuracy']:.3f}")


if __name__ == "__main__":
    main()
