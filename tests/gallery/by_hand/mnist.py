from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from examples.datasets import digits
from examples.gallery.mnist import make_model


def train(n_epochs: int) -> nn.Module:
    model, dls = make_model(), digits()
    opt = optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(opt, step_size=1, gamma=0.7)
    for epoch in range(n_epochs):
        model.train()
        for x, y in dls.train:
            opt.zero_grad()
            loss = F.nll_loss(model(x), y)
            loss.backward()
            opt.step()
        scheduler.step()
        model.eval()
        loss = correct = n = 0
        with torch.no_grad():
            for x, y in dls.valid:
                preds = model(x)
                loss += F.nll_loss(preds, y, reduction="sum").item()
                correct += (preds.argmax(1) == y).sum().item()
                n += len(y)
        print(f"epoch {epoch}: loss {loss / n:.4f}, accuracy {correct / n:.3f}")
    return model
