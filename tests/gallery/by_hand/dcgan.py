from __future__ import annotations

import torch
from torch import nn, optim

from examples.datasets import digits
from examples.gallery.dcgan import N_Z, loss_func, make_networks


def train(n_epochs: int, valid: bool) -> nn.Module:
    networks, dls = make_networks(), digits()
    judge, maker = networks["D"], networks["G"]
    opt_d = optim.Adam(judge.parameters(), lr=2e-3, betas=(0.5, 0.999))
    opt_g = optim.Adam(maker.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for epoch in range(n_epochs):
        says_real = says_fake = n = 0
        for x, _ in dls.train:
            fakes = maker(torch.randn(len(x), N_Z, 1, 1))
            opt_d.zero_grad()
            real, fake = judge(x), judge(fakes.detach())
            loss_d = loss_func(real, 1) + loss_func(fake, 0)
            loss_d.backward()
            opt_d.step()
            opt_g.zero_grad()
            fake = judge(fakes)
            loss_g = loss_func(fake, 1)
            loss_g.backward()
            opt_g.step()
            says_real += real.sum().item()
            says_fake += fake.sum().item()
            n += len(x)
        print(f"epoch {epoch}: D(x) {says_real / n:.2f}, D(G(z)) {says_fake / n:.2f}")
    return networks
