from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F

from examples.gallery.word_language_model import WordModel, make_loaders


def train(n_epochs: int) -> nn.Module:
    model, dls = WordModel(), make_loaders()
    opt = optim.SGD(model.parameters(), lr=20)
    best = float("inf")
    for epoch in range(n_epochs):
        model.train()
        model.state.zero_()
        for x, y in dls.train:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            opt.step()
        model.eval()
        model.state.zero_()
        total = n = 0
        with torch.no_grad():
            for x, y in dls.valid:
                total += F.cross_entropy(model(x), y).item() * len(x)
                n += len(x)
        print(f"epoch {epoch}: loss {total / n:.4f}")
        if total / n < best:
            best = total / n
        else:
            opt.param_groups[0]["lr"] /= 4
    return model
