from __future__ import annotations

import torch
from torch import nn, optim

from examples.gallery.vae import VAE, loss_func, make_loaders


def train(n_epochs: int) -> nn.Module:
    model, dls = VAE(), make_loaders()
    opt = optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(n_epochs):
        model.train()
        for x, _ in dls.train:
            opt.zero_grad()
            loss = loss_func(model(x), x)
            loss.backward()
            opt.step()
        model.eval()
        total = n = 0
        with torch.no_grad():
            for x, _ in dls.valid:
                total += loss_func(model(x), x).item() * len(x)
                n += len(x)
        print(f"epoch {epoch}: loss {total / n:.4f}")
    return model
