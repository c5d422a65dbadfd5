from __future__ import annotations

import torch
from torch import nn, optim
from torch.nn import functional as F

from examples.datasets import digits
from examples.gallery.distillation import make_model

T, HARD = 4.0, 0.3


def train(n_epochs: int) -> tuple[nn.Module, ...]:
    dls, teacher = digits(), make_model(256)
    train_one(teacher, dls, 10, lambda preds, _x, y: F.cross_entropy(preds, y))
    teacher.eval().requires_grad_(False)

    def loss_func(preds: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hard = F.cross_entropy(preds, y)
        right = F.softmax(teacher(x) / T, dim=1)
        soft = F.kl_div(F.log_softmax(preds / T, dim=1), right, reduction="batchmean")
        return HARD * hard + (1 - HARD) * T * T * soft

    student = make_model(16)
    train_one(student, dls, n_epochs, loss_func)
    return student, teacher


def train_one(model: nn.Module, dls, n_epochs: int, loss_func) -> None:
    opt = optim.Adam(model.parameters(), lr=4e-3)
    for epoch in range(n_epochs):
        model.train()
        for x, y in dls.train:
            opt.zero_grad()
            loss = loss_func(model(x), x, y)
            loss.backward()
            opt.step()
        model.eval()
        total = correct = n = 0
        with torch.no_grad():
            for x, y in dls.valid:
                preds = model(x)
                total += loss_func(preds, x, y).item() * len(y)
                correct += (preds.argmax(1) == y).sum().item()
                n += len(y)
        print(f"epoch {epoch}: loss {total / n:.4f}, accuracy {correct / n:.3f}")
