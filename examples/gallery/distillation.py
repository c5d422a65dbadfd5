"""A small student learns the digits from a large teacher.

After Hinton, Vinyals and Dean: Distilling the Knowledge in a Neural Network.
"""

from __future__ import annotations

from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import Callback, GetLoss
from torch import nn, optim
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

from ..datasets import digits

FIT: dict[str, Any] = {"n_epochs": 20}


def make_model(width: int) -> nn.Module:
    """Return a network from images (N, 1, 8, 8) to logits (N, 10)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class DistillationCB(Callback):
    """Adds the distance to the teacher's predictions to the loss of the learner.

    Args:
        teacher: the model to learn from, which is not trained.
        temperature: what the logits of both are divided by.
        hard: the weight of the learner's own loss.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 4.0, hard: float = 0.3) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.hard = temperature, hard

    def get_loss(self, event: GetLoss) -> None:
        event.proceed()
        learner, t = event.learner, self.temperature
        right = F.softmax(self.teacher(learner.batch[0]) / t, dim=1)
        soft = F.kl_div(F.log_softmax(learner.preds / t, dim=1), right, reduction="batchmean")
        learner.loss = self.hard * learner.loss + (1 - self.hard) * t * t * soft


def learner_for(model: nn.Module, dls: DataLoaders, *cbs: Callback) -> TrainLearner:
    """Return a learner that measures the accuracy."""
    cbs = (MetricsCB(accuracy=MulticlassAccuracy()), *cbs)
    return TrainLearner(model, dls, F.cross_entropy, lr=4e-3, cbs=cbs, opt_func=optim.Adam)


def make_learner() -> TrainLearner:
    """Train a teacher, and return the learner of the student."""
    dls, teacher = digits(), make_model(256)
    learner_for(teacher, dls).run(10)
    return learner_for(make_model(16), dls, DistillationCB(teacher))


def main() -> None:
    """Train both, and print their accuracies on images that neither was trained on."""
    torch.manual_seed(1)
    learner = make_learner()
    student = learner.run(**FIT).history[-1]["accuracy"]
    [teacher] = [cb.teacher for cb in learner.cbs if isinstance(cb, DistillationCB)]
    right = learner_for(teacher, learner.dls).run_validate()["accuracy"]
    print(f"accuracy {student:.3f}, of the teacher {right:.3f}")


if __name__ == "__main__":
    main()
