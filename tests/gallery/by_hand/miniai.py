from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from examples.datasets import digits
from examples.gallery.miniai import make_model


def train(n_epochs: int) -> nn.Module:
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model, dls = make_model().to(device), digits()
    opt = optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = OneCycleLR(opt, 1e-2, total_steps=n_epochs * len(dls.train))
    for epoch in range(n_epochs):
        model.train()
        for x, y in dls.train:
            opt.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            opt.step()
            scheduler.step()
        model.eval()
        loss = correct = n = 0
        with torch.no_grad():
            for x, y in dls.valid:
                preds, y = model(x.to(device)), y.to(device)
                loss += F.cross_entropy(preds, y, reduction="sum").item()
                correct += (preds.argmax(1) == y).sum().item()
                n += len(y)
        print(f"epoch {epoch}: loss {loss / n:.4f}, accuracy {correct / n:.3f}")
    return model
