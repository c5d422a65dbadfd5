from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F

from examples.gallery.time_sequence_prediction import Sequence, make_loaders


def train(n_epochs: int) -> nn.Module:
    model, dls = Sequence(), make_loaders()
    [(x, y)], [(x_valid, y_valid)] = dls.train, dls.valid
    opt = optim.LBFGS(model.parameters(), lr=0.8)
    for epoch in range(n_epochs):

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        with torch.no_grad():
            loss = F.mse_loss(model(x_valid), y_valid)
            print(f"epoch {epoch}: loss {loss:.6f}")
    return model
