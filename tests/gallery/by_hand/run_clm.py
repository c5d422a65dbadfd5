from __future__ import annotations

import math

import torch
from eventrain.engine import no_decay_groups
from torch import nn, optim
from transformers import get_linear_schedule_with_warmup

from examples.gallery.run_clm import make_loaders, make_model


def train(n_epochs: int) -> nn.Module:
    model, dls = make_model(), make_loaders()
    opt = optim.AdamW(no_decay_groups(model, 0.1), lr=5e-3)
    parameters = [p for group in opt.param_groups for p in group["params"]]
    n_steps = n_epochs * math.ceil(len(dls.train) / 2)
    scheduler = get_linear_schedule_with_warmup(opt, n_steps // 10, n_steps)
    for epoch in range(n_epochs):
        model.train()
        batches = list(dls.train)
        for group in (batches[i : i + 2] for i in range(0, len(batches), 2)):
            counts = [(batch["labels"][:, 1:] != -100).sum() for batch in group]
            weights = [n / counts[0] / len(group) for n in counts]  # about 1 in all
            for batch, weight in zip(group, weights, strict=True):
                (model(**batch).loss * weight).backward()
            for p in parameters:
                p.grad /= sum(weights)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad()
        model.eval()
        loss = n = 0
        with torch.no_grad():
            for batch in dls.valid:
                n_targets = (batch["labels"][:, 1:] != -100).sum().item()
                loss += model(**batch).loss.item() * n_targets
                n += n_targets
        print(f"epoch {epoch}: perplexity {math.exp(loss / n):.1f}")
    return model
