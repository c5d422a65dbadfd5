from __future__ import annotations

import torch
from eventrain.engine import no_decay_groups
from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.datasets import digits
from examples.gallery.references import make_model, mixed_up


def train(n_epochs: int) -> tuple[nn.Module, ...]:
    model, dls = make_model(), mixed_up(digits())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    loss_func = nn.CrossEntropyLoss(label_smoothing=0.1)
    opt = optim.SGD(no_decay_groups(model, 1e-4), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = CosineAnnealingLR(opt, n_epochs * len(dls.train))
    for epoch in range(n_epochs):
        model.train()
        for x, y in dls.train:
            opt.zero_grad()
            loss = loss_func(model(x), y)
            loss.backward()
            opt.step()
            scheduler.step()
            average.update_parameters(model)
        own = accuracy(model, dls)
        with torch.random.fork_rng(devices=[]):  # the training does not notice the average
            print(f"epoch {epoch}: accuracy {own:.3f}, of the average {accuracy(average, dls):.3f}")
    return model, average


def accuracy(model: nn.Module, dls) -> float:
    model.eval()
    correct = n = 0
    with torch.no_grad():
        for x, y in dls.valid:
            correct += (model(x).argmax(1) == y).sum().item()
            n += len(y)
    return correct / n
