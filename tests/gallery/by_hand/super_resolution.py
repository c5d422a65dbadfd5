from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F

from examples.gallery.super_resolution import ESPCN, make_loaders, psnr


def train(n_epochs: int) -> nn.Module:
    model, dls = ESPCN(), make_loaders()
    opt = optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(n_epochs):
        model.train()
        for small, large in dls.train:
            opt.zero_grad()
            loss = F.mse_loss(model(small), large)
            loss.backward()
            opt.step()
        model.eval()
        total = n = 0
        with torch.no_grad():
            for small, large in dls.valid:
                total += F.mse_loss(model(small), large).item() * len(small)
                n += len(small)
        print(f"epoch {epoch}: PSNR {psnr(total / n):.2f} dB")
    return model
