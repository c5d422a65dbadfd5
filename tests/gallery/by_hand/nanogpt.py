from __future__ import annotations

from itertools import islice

import torch
from eventrain.engine import no_decay_groups
from torch import nn, optim
from torch.nn import functional as F

from examples.gallery.nanogpt import GPT, make_loaders, schedule


def train(max_steps: int, valid: bool = False) -> nn.Module:
    model, dls = GPT(), make_loaders()
    opt = optim.AdamW(no_decay_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95))
    parameters = [p for group in opt.param_groups for p in group["params"]]
    scheduler = schedule(opt, max_steps)
    for step, (x, y) in enumerate(islice(dls.train, max_steps), 1):
        model.train()
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            total = n = 0
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for x, y in dls.valid:
                    total += F.cross_entropy(model(x), y).item() * len(x)
                    n += len(x)
            print(f"step {step}: loss {total / n:.4f}")
    return model
