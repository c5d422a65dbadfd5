from __future__ import annotations

from torch import nn, optim

from examples.gallery.actor_critic import ActorCritic, losses_of
from examples.gallery.reinforce import CartPoles


def train(n_epochs: int, valid: bool) -> nn.Module:
    env, model = CartPoles(16), ActorCritic()
    opt = optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(n_epochs):
        for _ in range(10):
            opt.zero_grad()
            log_probs, values, rewards = model(env)
            loss = sum(losses_of(log_probs, values, rewards))
            loss.backward()
            opt.step()
        print(f"epoch {epoch}: {rewards.sum(0).float().mean():.0f} steps")
    return model
