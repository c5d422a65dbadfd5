"""A policy learns to balance poles on carts; after reinforce in pytorch/examples."""

from __future__ import annotations

from typing import Any

import torch
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.distributions import Categorical

FIT: dict[str, Any] = {"n_epochs": 8, "valid": False}


class CartPoles:
    """Carts with poles: position, speed, angle and spin of each, in a tensor (carts, 4)."""

    def __init__(self, n: int) -> None:
        self.batch_size, self.generator = n, torch.Generator().manual_seed(543)

    def reset(self) -> None:
        self.state = torch.rand(self.batch_size, 4, generator=self.generator) / 10 - 0.05
        self.stands = torch.ones(self.batch_size, dtype=torch.bool)

    def step(self, right: torch.Tensor) -> None:
        """Push the carts to the right (1) or to the left (0)."""
        _, speed, angle, spin = self.state.T
        sin, cos = angle.sin(), angle.cos()
        push = (20.0 * right - 10 + 0.05 * spin**2 * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        self.state = self.state + 0.02 * torch.stack([speed, push - turn * cos / 22, spin, turn], 1)
        self.stands = self.stands & (self.state[:, ::2].abs() < torch.tensor([2.4, 0.21])).all(1)


class Policy(nn.Sequential):
    """Plays an episode; returns log probability and reward of each action: (time, carts)."""

    def forward(self, env: CartPoles) -> tuple[torch.Tensor, ...]:
        env.reset()
        steps: list[tuple[torch.Tensor, ...]] = []
        while env.stands.any() and len(steps) < 200:
            choice = Categorical(logits=super().forward(env.state))  # type: ignore[no-untyped-call]
            actions = choice.sample()
            steps.append((choice.log_prob(actions), env.stands))
            env.step(actions)
        return tuple(map(torch.stack, zip(*steps, strict=True)))


def policy_loss(log_probs: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Return the loss that makes those actions likelier which rewards followed."""
    discount = 0.99 ** torch.arange(len(rewards))[:, None]
    returns = ((rewards * discount).flip(0).cumsum(0).flip(0) / discount)[rewards]
    return -(log_probs[rewards] * (returns - returns.mean()) / returns.std()).mean()


class ReinforceLearner(TrainLearner):
    """A learner whose batches are environments."""

    env: CartPoles  # an attribute, so that checkpoints have its generator

    def get_loss(self) -> None:
        self.loss = policy_loss(*self.preds)


def make_learner() -> ReinforceLearner:
    """Return the learner; each batch is an episode."""
    env, model = CartPoles(16), Policy(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    learner = ReinforceLearner(model, DataLoaders([env] * 10), lr=0.01, opt_func=optim.Adam)
    learner.env = env
    return learner


def main() -> None:
    """Train, and print how long the poles of another episode stand."""
    torch.manual_seed(1)
    learner = make_learner()
    learner.run(**FIT)
    print(f"{learner.model(learner.env)[1].sum(0).float().mean():.0f} of 200 steps")


if __name__ == "__main__":
    main()
