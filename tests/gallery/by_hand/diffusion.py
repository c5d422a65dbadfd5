from __future__ import annotations

import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.datasets import digits
from examples.gallery.diffusion import Diffusion


def train(max_steps: int, epoch_length: int) -> tuple[nn.Module, ...]:
    model, dls = Diffusion(), digits()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    opt = optim.Adam(model.parameters(), lr=1e-3)
    scheduler = LambdaLR(opt, lambda i: min(1, 9 * i / max_steps))
    batches = endless(dls.train)
    for step in range(1, max_steps + 1):
        x, _ = next(batches)
        model.train()
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        scheduler.step()
        average.update_parameters(model)
        if step % epoch_length == 0 or step == max_steps:
            own = loss_of(model, dls)
            with torch.random.fork_rng(devices=[]):  # the training does not notice the average
                print(f"step {step}: loss {own:.4f}, of the average {loss_of(average, dls):.4f}")
    return model, average


def endless(loader):
    while True:
        yield from loader


def loss_of(model: nn.Module, dls) -> float:
    model.eval()
    total = n = 0
    with torch.no_grad():
        for x, _ in dls.valid:
            total += model(x).square().mean().item() * len(x)
            n += len(x)
    return total / n
