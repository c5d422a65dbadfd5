"""A small GPT on the characters of Python's manual, which ships with Python. After nanoGPT."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from eventrain.callbacks import GradientClippingCB, MetricsCB, SchedulerCB, ValidateCB
from eventrain.engine import DataLoaders, TrainLearner, no_decay_groups
from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader, RandomSampler
from torchvision.ops import MLP

FIT: dict[str, Any] = {"max_steps": 500, "valid": False}
TEXT = "".join(topics[key] for key in sorted(topics))[:100_000]
CHARS = sorted(set(TEXT))
LENGTH, D = 32, 64
CODES = torch.tensor([CHARS.index(char) for char in TEXT])


class Block(nn.Module):
    """Attention of 4 heads to what is before, and a perceptron; keeps the shape (N, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Unflatten(2, (3, 4, -1)))
        self.project = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1))
        self.mlp = nn.Sequential(nn.LayerNorm(D), MLP(D, [4 * D, D], activation_layer=nn.GELU))

    def forward(self, x: torch.Tensor) -> Any:
        query, key, value = self.qkv(x).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Maps characters (N, T) to logits (N, characters, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(len(CHARS), D), nn.Embedding(LENGTH, D)
        self.layers = nn.Sequential(Block(), Block(), nn.LayerNorm(D), nn.Linear(D, len(CHARS)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(self.tokens(x) + self.places.weight[: x.shape[1]]).transpose(1, 2)


def make_loaders() -> DataLoaders:
    """Return batches of (characters, next characters) that begin anywhere in the text."""
    blocks: Any = [(block[:-1], block[1:]) for block in CODES.unfold(0, LENGTH + 1, 1)]
    train, valid = blocks[:90_000], blocks[90_000::LENGTH]
    anywhere = RandomSampler(train, replacement=True, num_samples=10**10)
    return DataLoaders(DataLoader(train, 16, sampler=anywhere), DataLoader(valid, 16))


def schedule(opt: optim.Optimizer, n_steps: int) -> LRScheduler:
    """Return a scheduler whose rate rises in the first tenth, then falls to a tenth."""
    rise = LinearLR(opt, 0.01, total_iters=n_steps // 10)
    fall = CosineAnnealingLR(opt, n_steps - n_steps // 10, eta_min=3e-4)
    return SequentialLR(opt, [rise, fall], milestones=[n_steps // 10])


def make_learner() -> TrainLearner:
    """Return the learner."""
    model, dls = GPT(), make_loaders()
    validate = ValidateCB(dls.valid, every_steps=100, name="valid")
    cbs = [MetricsCB(), GradientClippingCB(1.0), SchedulerCB(schedule), validate]
    opt = optim.AdamW(no_decay_groups(model, weight_decay=0.1), lr=3e-3, betas=(0.9, 0.95))
    return TrainLearner(model, dls, nn.functional.cross_entropy, cbs=cbs, opt=opt)


def main() -> None:
    """Train, and print the loss of text that it was not trained on."""
    torch.manual_seed(1)
    print(f"loss {make_learner().run(**FIT).history[-1]['valid.loss']:.3f}")


if __name__ == "__main__":
    main()
