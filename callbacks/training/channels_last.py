"""The channels-last memory format, in which convolutions are often faster."""

from __future__ import annotations

import torch

from ...engine.data.containers import map_tensors
from ...events import BeforeBatch, BeforeFit, Callback


class ChannelLastCB(Callback):
    """Keeps the model and the batches in the channels-last memory format.

    Tensors of shape (N, C, H, W) are converted, in any container that the batch may be; others
    stay as they are.

    Source: the post's `ChannelLastCB`, which fails on a tuple and on other shapes.
    """

    order: float = -10  # after DeviceCB
    shareable = True

    def before_fit(self, event: BeforeFit) -> None:
        event.learner.model.to(memory_format=torch.channels_last)

    def before_batch(self, event: BeforeBatch) -> None:
        event.learner.batch = map_tensors(event.learner.batch, _channels_last)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
