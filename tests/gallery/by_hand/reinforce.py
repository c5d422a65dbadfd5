from __future__ import annotations

from torch import nn, optim

from examples.gallery.reinforce import CartPoles, Policy, policy_loss


def train(n_epochs: int, valid: bool) -> nn.Module:
    env, model = CartPoles(16), Policy(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    opt = optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(n_epochs):
        for _ in range(10):
            opt.zero_grad()
            log_probs, rewards = model(env)
            loss = policy_loss(log_probs, rewards)
            loss.backward()
            opt.step()
        print(f"epoch {epoch}: {rewards.sum(0).float().mean():.0f} steps")
    return model
