from __future__ import annotations

import torch
from eventrain.callbacks import def_device
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from examples.datasets import digits
from examples.gallery.imagenet import make_model


def train(n_epochs: int) -> nn.Module:
    last = torch.channels_last
    model, dls = make_model().to(def_device, memory_format=last), digits()
    opt = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = StepLR(opt, step_size=2, gamma=0.1)
    for epoch in range(n_epochs):
        model.train()
        for x, y in dls.train:
            x, y = x.to(def_device).contiguous(memory_format=last), y.to(def_device)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
        scheduler.step()
        model.eval()
        loss = top1 = top5 = n = 0
        with torch.no_grad():
            for x, y in dls.valid:
                x, y = x.to(def_device).contiguous(memory_format=last), y.to(def_device)
                preds = model(x)
                loss += F.cross_entropy(preds, y, reduction="sum").item()
                best = preds.topk(5, dim=1).indices == y[:, None]
                top1 += best[:, 0].sum().item()
                top5 += best.sum().item()
                n += len(y)
        print(f"epoch {epoch}: loss {loss / n:.4f}, top-1 {top1 / n:.3f}, top-5 {top5 / n:.3f}")
    return model
