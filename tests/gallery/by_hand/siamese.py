from __future__ import annotations

import torch
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR

from examples.gallery.siamese import Siamese, make_loaders


def train(n_epochs: int) -> nn.Module:
    model, dls, loss_func = Siamese(), make_loaders(), nn.BCELoss()
    opt = optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(opt, step_size=1, gamma=0.9)
    for epoch in range(n_epochs):
        model.train()
        for one, other, same in dls.train:
            opt.zero_grad()
            loss = loss_func(model(one, other), same)
            loss.backward()
            opt.step()
        scheduler.step()
        model.eval()
        loss = correct = n = 0
        with torch.no_grad():
            for one, other, same in dls.valid:
                preds = model(one, other)
                loss += loss_func(preds, same).item() * len(same)
                correct += (preds.round() == same).sum().item()
                n += len(same)
        print(f"epoch {epoch}: loss {loss / n:.4f}, accuracy {correct / n:.3f}")
    return model
