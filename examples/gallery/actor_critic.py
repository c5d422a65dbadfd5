"""A policy and a critic, in one network, learn to balance poles on carts.

After actor_critic in pytorch/examples.
"""

from __future__ import annotations

from typing import Any

import torch
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.distributions import Categorical
from torch.nn import functional as F

from .reinforce import CartPoles

FIT: dict[str, Any] = {"n_epochs": 6, "valid": False}


class ActorCritic(nn.Module):
    """Plays an episode; returns log probabilities, values and rewards: (time, carts) each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 128), nn.ReLU())
        self.actor, self.critic = nn.Linear(128, 2), nn.Linear(128, 1)

    def forward(self, env: CartPoles) -> tuple[torch.Tensor, ...]:
        env.reset()
        steps: list[tuple[torch.Tensor, ...]] = []
        while env.stands.any() and len(steps) < 200:
            hidden = self.body(env.state)
            choice = Categorical(logits=self.actor(hidden))
            actions = choice.sample()
            log_probs, values = choice.log_prob(actions), self.critic(hidden).squeeze(1)
            steps.append((log_probs, values, env.stands))
            env.step(actions)
        return tuple(map(torch.stack, zip(*steps, strict=True)))


def losses_of(
    log_probs: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of the policy and of the critic, which is to know the returns."""
    discount = 0.99 ** torch.arange(len(rewards))[:, None]
    returns = ((rewards * discount).flip(0).cumsum(0).flip(0) / discount)[rewards]
    returns, values = (returns - returns.mean()) / returns.std(), values[rewards]
    advantages = returns - values.detach()
    return -(log_probs[rewards] * advantages).mean(), F.smooth_l1_loss(values, returns)


class ActorCriticLearner(TrainLearner):
    """A learner whose batches are environments."""

    def get_loss(self) -> None:
        self.loss = sum(losses_of(*self.preds))


def make_learner() -> ActorCriticLearner:
    """Return the learner; each batch is an episode, whose random generator is saved."""
    dls = DataLoaders([CartPoles(16)] * 10)
    return ActorCriticLearner(ActorCritic(), dls, lr=0.01, opt_func=optim.Adam)


def main() -> None:
    """Train, and print how long the poles of another episode stand."""
    torch.manual_seed(1)
    learner = make_learner()
    learner.run(**FIT)
    print(f"{learner.model(learner.dls.train[0])[2].sum(0).float().mean():.0f} of 200 steps")


if __name__ == "__main__":
    main()
