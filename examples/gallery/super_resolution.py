"""A sub-pixel network that doubles the resolution of photographs.

After super_resolution in pytorch/examples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from sklearn.datasets import load_sample_images
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FIT: dict[str, Any] = {"n_epochs": 20}


def resized(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return images in another size, by bicubic interpolation."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic", antialias=factor < 1)


class ESPCN(nn.Module):
    """Maps images (N, 1, H, W) to images (N, 1, 2H, 2W): what a bicubic interpolation misses."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 32, 5), (32, 32, 3), (32, 16, 3), (16, 4, 3)]
        convs = [
            nn.Conv2d(n_in, n_out, k, padding=k // 2, padding_mode="replicate")
            for n_in, n_out, k in sizes
        ]
        layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1], nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing: torch.Tensor = self.layers(x)
        return resized(x, 2) + missing


def make_loaders() -> DataLoaders:
    """Return (small, large) patches of two photographs, of which every fifth validates."""
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images])
    brightness = photos.float().mean(3) / 255
    large = brightness.unfold(1, 32, 32).unfold(2, 32, 32).reshape(-1, 1, 32, 32)
    fifth = torch.arange(len(large)) % 5 == 0
    train, valid = (TensorDataset(resized(x, 0.5), x) for x in (large[~fifth], large[fifth]))
    return DataLoaders(DataLoader(train, 16, shuffle=True), DataLoader(valid, 16))


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB, for brightness between 0 and 1."""
    return -10 * math.log10(mse)


def make_learner() -> TrainLearner:
    """Return the learner."""
    return TrainLearner(
        ESPCN(), make_loaders(), F.mse_loss, lr=2e-3, cbs=MetricsCB(), opt_func=optim.Adam
    )


def main() -> None:
    """Train, and print the quality of patches that it was not trained on."""
    torch.manual_seed(1)
    learner = make_learner()
    small, large = learner.dls.valid.dataset.tensors
    bicubic = psnr(F.mse_loss(resized(small, 2), large).item())
    mse = learner.run(**FIT).history[-1]["loss"]
    print(f"PSNR {psnr(mse):.2f} dB, bicubic {bicubic:.2f} dB")


if __name__ == "__main__":
    main()
