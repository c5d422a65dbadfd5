from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F

from examples.gallery.gcn import make_data


def train(n_epochs: int) -> nn.Module:
    model, dls = make_data()
    ((known, labels),), ((others, right),) = dls.train, dls.valid
    opt = optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for epoch in range(n_epochs):
        model.train()
        opt.zero_grad()
        loss = F.cross_entropy(model(known), labels)
        loss.backward()
        opt.step()
        model.eval()
        with torch.no_grad():
            preds = model(others)
            loss = F.cross_entropy(preds, right)
            correct = (preds.argmax(1) == right).float().mean()
        print(f"epoch {epoch}: loss {loss:.4f}, accuracy {correct:.3f}")
    return model
