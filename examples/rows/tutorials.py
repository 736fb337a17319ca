"""What tutorials train, as they write it: rows of the benchmark, each a step (see nets.py).

The data are random numbers of the shapes that the tutorials' have.
"""

from typing import Any

import torch

from .nets import Built, fit, in_batches, relu, row, sequential, tanh


@row("train", "linear regression, 3 weights, batch 32, SGD")
def linear_regression(nn: Any, optim: Any) -> Built:
    net = nn.Linear(3, 1)
    x = torch.randn(320, 3)
    target = x.sum(1, keepdim=True) + 0.1 * torch.randn(320, 1)
    optimizer = optim.SGD(net.parameters(), lr=1e-2)
    return fit(net, nn.MSELoss(), optimizer, in_batches(32, x, target))


@row("train", "curve fit, 1-32-32-1 by hand, 100 points, Adam")
def fit_curve(nn: Any, optim: Any) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden1 = nn.Linear(1, 32)
            self.hidden2 = nn.Linear(32, 32)
            self.out = nn.Linear(32, 1)

        def forward(self, x: Any) -> Any:
            x = torch.tanh(self.hidden1(x))
            x = torch.tanh(self.hidden2(x))
            return self.out(x)

    net = Net()
    x = torch.linspace(-3, 3, 100).unsqueeze(1)
    target = torch.sin(x) + 0.1 * torch.randn(100, 1)
    optimizer = optim.Adam(net.parameters(), lr=1e-3)
    return fit(net, nn.MSELoss(), optimizer, in_batches(100, x, target))


def classes(count: int, features: int, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many points, each near the middle of its class."""
    target = torch.randint(kinds, (count,))
    return torch.randn(kinds, features)[target] + torch.randn(count, features), target


@row("train", "classifier 4-16-16-3 by hand, CrossEntropyLoss, batch 16, Adam")
def irises(nn: Any, optim: Any) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 16)
            self.fc2 = nn.Linear(16, 16)
            self.fc3 = nn.Linear(16, 3)

        def forward(self, x: Any) -> Any:
            x = nn.functional.relu(self.fc1(x))
            x = nn.functional.relu(self.fc2(x))
            return self.fc3(x)

    net = Net()
    optimizer = optim.Adam(net.parameters(), lr=1e-3)
    return fit(net, nn.CrossEntropyLoss(), optimizer, in_batches(16, *classes(150, 4, 3)))


@row("train", "classifier 784-512-512-10, CrossEntropyLoss, batch 64, SGD")
def quickstart(nn: Any, optim: Any) -> Built:
    """PyTorch's quickstart."""

    class NeuralNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten = nn.Flatten()
            self.linear_relu_stack = nn.Sequential(
                nn.Linear(28 * 28, 512),
                nn.ReLU(),
                nn.Linear(512, 512),
                nn.ReLU(),
                nn.Linear(512, 10),
            )

        def forward(self, x: Any) -> Any:
            x = self.flatten(x)
            return self.linear_relu_stack(x)

    net = NeuralNetwork()
    x, target = classes(600, 784, 10)
    optimizer = optim.SGD(net.parameters(), lr=1e-3)
    batches = in_batches(64, x.view(-1, 1, 28, 28), target)
    return fit(net, nn.CrossEntropyLoss(), optimizer, batches)


@row("train", "classifier 784-128-64-10, LogSoftmax, NLLLoss, batch 64, momentum")
def log_softmax(nn: Any, optim: Any) -> Built:
    net = nn.Sequential(
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
        nn.LogSoftmax(dim=1),
    )
    optimizer = optim.SGD(net.parameters(), lr=3e-3, momentum=0.9)
    return fit(net, nn.NLLLoss(), optimizer, in_batches(64, *classes(600, 784, 10)))


@row("train", "classifier 784-256-128-10 by hand, Dropout, batch 64, Adam")
def with_dropout(nn: Any, optim: Any) -> Built:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(784, 256)
            self.fc2 = nn.Linear(256, 128)
            self.fc3 = nn.Linear(128, 10)
            self.dropout = nn.Dropout(p=0.2)

        def forward(self, x: Any) -> Any:
            x = x.view(x.shape[0], -1)
            x = self.dropout(nn.functional.relu(self.fc1(x)))
            x = self.dropout(nn.functional.relu(self.fc2(x)))
            return nn.functional.log_softmax(self.fc3(x), dim=1)

    net = Classifier()
    optimizer = optim.Adam(net.parameters(), lr=3e-3)
    return fit(net, nn.NLLLoss(), optimizer, in_batches(64, *classes(600, 784, 10)))


@row("train", "autoencoder 784-128-64-16-64-128-784, batch 64, Adam")
def autoencoder(nn: Any, optim: Any) -> Built:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = sequential(nn, (784, 128, 64, 16), relu)
            self.decoder = nn.Sequential(sequential(nn, (16, 64, 128, 784), relu), nn.Sigmoid())

        def forward(self, x: Any) -> Any:
            return self.decoder(self.encoder(x))

    net, images = Autoencoder(), torch.rand(600, 784)
    optimizer = optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-5)
    return fit(net, nn.MSELoss(), optimizer, in_batches(64, images, images))


@row("train", "VAE 784-400-20-400-784, batch 128, Adam")
def vae(nn: Any, optim: Any) -> Built:
    """PyTorch's example of a variational autoencoder."""
    F = nn.functional

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(784, 400)
            self.fc21 = nn.Linear(400, 20)
            self.fc22 = nn.Linear(400, 20)
            self.fc3 = nn.Linear(20, 400)
            self.fc4 = nn.Linear(400, 784)

        def encode(self, x: Any) -> tuple[Any, Any]:
            h1 = F.relu(self.fc1(x))
            return self.fc21(h1), self.fc22(h1)

        def reparameterize(self, mu: Any, logvar: Any) -> Any:
            std = torch.exp(0.5 * logvar)
            return mu + torch.randn_like(std) * std

        def decode(self, z: Any) -> Any:
            return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

        def forward(self, x: Any) -> tuple[Any, Any, Any]:
            mu, logvar = self.encode(x.view(-1, 784))
            return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    def criterion(out: tuple[Any, Any, Any], x: Any) -> Any:
        recon_x, mu, logvar = out
        bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return bce + kld

    net, images = VAE(), torch.rand(640, 784)
    optimizer = optim.Adam(net.parameters(), lr=1e-3)
    return fit(net, criterion, optimizer, in_batches(128, images, images))


# The generator's noise and layers, and the discriminator's layers.
GANS = {
    "images, BatchNorm1d, 784": ((100, 128, 256, 512, 784), (784, 512, 256, 1)),
    "points in the plane": ((2, 16, 32, 2), (2, 32, 16, 1)),
}


@row("train", "GAN, BCELoss, batch 64, Adam", {name: name for name in GANS})
def gan(nn: Any, optim: Any, kind: str) -> Built:
    layers, judging = GANS[kind]

    def leaky(nn: Any, size: int) -> Any:
        return nn.LeakyReLU(0.2)

    def normed(nn: Any, size: int) -> Any:
        return nn.BatchNorm1d(size) if "BatchNorm1d" in kind else nn.Identity()

    generator = nn.Sequential(sequential(nn, layers, normed, leaky), nn.Tanh())
    discriminator = nn.Sequential(sequential(nn, judging, leaky), nn.Sigmoid())
    adversarial_loss = nn.BCELoss()
    optimizer_g = optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    batches = in_batches(64, torch.rand(640, judging[0]) * 2 - 1)
    valid, fake = torch.ones(64, 1), torch.zeros(64, 1)

    def step() -> Any:
        (real,) = next(batches)
        optimizer_g.zero_grad()
        generated = generator(torch.randn(64, layers[0]))
        g_loss = adversarial_loss(discriminator(generated), valid)
        g_loss.backward()
        optimizer_g.step()

        optimizer_d.zero_grad()
        real_loss = adversarial_loss(discriminator(real), valid)
        fake_loss = adversarial_loss(discriminator(generated.detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        d_loss.backward()
        optimizer_d.step()
        return g_loss, d_loss

    return step, generator, discriminator


@row(
    "second",
    "heat equation, 2-20-20-20-1 by hand, float64, Adam",
    {"50 points": 50, "1,000 points": 1000},
)
def heat_equation(nn: Any, optim: Any, points: int) -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 20)
            self.second = nn.Linear(20, 20)
            self.third = nn.Linear(20, 20)
            self.out = nn.Linear(20, 1)

        def forward(self, x: Any) -> Any:
            for layer in (self.first, self.second, self.third):
                x = torch.tanh(layer(x))
            return self.out(x)

    net = Net().to(torch.float64)
    x, t = (torch.rand(points, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Any:
        optimizer.zero_grad()
        u = net(torch.cat([x, t], 1))
        ones = torch.ones_like(u)
        u_x, u_t = torch.autograd.grad(u, [x, t], ones, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x, x, ones, create_graph=True)
        loss = (u_t - 0.1 * u_xx).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step, net


@row(
    "second",
    "Burgers' equation, 2-20-20-1, coordinates scaled before the net, 100 points, Adam",
    {"torch.cat": False, "torch.stack": True},
)
def burgers(nn: Any, optim: Any, stacked: bool) -> Built:
    """As by Raissi et al.: the net is given 2 (x - lb) / (ub - lb) - 1."""
    net = sequential(nn, (2, 20, 20, 1), tanh)
    points = torch.rand(100, 2)
    lowest, highest = points.min(0).values, points.max(0).values
    u0 = -torch.sin(torch.pi * points[:, :1])
    optimizer = optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Any:
        x = points[:, :1].clone().requires_grad_()
        t = points[:, 1:].clone().requires_grad_()
        points_of = torch.stack([x[:, 0], t[:, 0]], 1) if stacked else torch.cat([x, t], 1)
        h = 2.0 * (points_of - lowest) / (highest - lowest) - 1.0
        u = net(h)
        ones = torch.ones_like(u)
        (u_t,) = torch.autograd.grad(u, t, ones, create_graph=True)
        (u_x,) = torch.autograd.grad(u, x, ones, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x, x, ones, create_graph=True)
        loss = (u - u0).pow(2).mean() + (u_t + u * u_x - 0.01 * u_xx).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step, net


@row("second", "product with the Hessian of CrossEntropyLoss, 6-16-3 with Tanh, batch 8")
def hessian_vector(nn: Any, optim: Any) -> Built:
    """As PyHessian computes it."""
    net = sequential(nn, (6, 16, 3), tanh)
    x, target = torch.randn(8, 6), torch.randint(3, (8,))
    params = list(net.parameters())
    vector = [torch.randn_like(p) for p in params]

    def step() -> Any:
        loss = nn.functional.cross_entropy(net(x), target)
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        return torch.autograd.grad(gradients, params, grad_outputs=vector)

    return step, net


@row(
    "second",
    "critic 64-128-128-1 with a gradient penalty, batch 64, Adam",
    {"": False, "LayerNorm": True},
)
def critic(nn: Any, optim: Any, norm: bool) -> Built:
    net = sequential(nn, (64, 128, 128, 1), relu)
    if norm:
        net[0] = nn.Sequential(net[0], nn.LayerNorm(128))
    optimizer = optim.Adam(net.parameters(), lr=1e-4, betas=(0.5, 0.9))
    real, fake = torch.randn(64, 64), torch.rand(64, 64)

    def step() -> Any:
        optimizer.zero_grad()
        share = torch.rand(64, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(net(between).sum(), between, create_graph=True)
        penalty = (slope.norm(2, dim=1) - 1).pow(2).mean()
        loss = net(fake).mean() - net(real).mean() + 10 * penalty
        loss.backward()
        optimizer.step()
        return loss

    return step, net
