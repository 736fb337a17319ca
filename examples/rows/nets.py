"""Small nets, wired one way and another: rows of the benchmark, each a training step.

A row is a function of `(nn, optim)`, which are PyTorch's or the mirror's. It makes the net and the
data, and returns the step, to be called over and over, and what the step trains:

    step, net = by_hand_relu(torch.nn, torch.optim)
    step()

The step returns its loss (or its output), which benchmark.py compares between the libraries. The
caller of the function seeds the random generator. Further rows are in tutorials.py, updates.py,
loops.py, sizes.py and again.py.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Built = tuple[Any, ...]  # the step, then the modules and parameters that it trains
GROUPS = {
    "plain": "A Sequential of Linear and ReLU, MSELoss, SGD; forward under no_grad",
    "large": "The same with many weights, and the memory that the steps need at most",
    "threads": "In two threads; 'machine busy': beside two processes that count for ever",
    "wired": "A Module wired by hand, of the report's size: 2-25-25-25-1, batch 4, SGD",
    "small": "64-64-64-8, batch 32, MSELoss",
    "normed": "64-64-64-8 with a norm before each ReLU, Adam",
    "train": "What tutorials train",
    "second": "Gradients of gradients, create_graph=True",
    "rl": "Reinforcement learning, on made-up transitions",
    "loops": "Unrolled loops around a net",
    "sizes": "Batches of another size in each step",
    "again": "Nets and parameters that are made anew",
    "activations": "One Linear and an activation, wired by hand: forward and backward",
    "norms": "One Linear and a norm, wired by hand: forward and backward",
    "conv": "Convolutions and pools, SGD",
}


@dataclass(frozen=True)
class Row:
    group: str
    name: str
    variant: str
    function: Callable[..., Built]
    arguments: tuple[Any, ...] = ()
    threads: int = 1
    busy: int = 0  # other processes beside it

    def build(self, nn: Any, optim: Any) -> Built:
        return self.function(nn, optim, *self.arguments)


ROWS: list[Row] = []


def row(group: str, name: str, variants: dict[str, Any] | None = None) -> Any:
    """Declares a row, or one for each variant, whose value the function gets as third argument."""

    def declare(function: Callable[..., Built]) -> Callable[..., Built]:
        if variants is None:
            ROWS.append(Row(group, name, "", function))
        else:
            for variant, value in variants.items():
                ROWS.append(Row(group, name, variant, function, (value,)))
        return function

    return declare


def fit(net: Any, criterion: Any, optimizer: Any, batches: Iterator[Any]) -> Built:
    """The step that most training loops repeat."""

    def step() -> Any:
        x, target = next(batches)
        optimizer.zero_grad()
        loss = criterion(net(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step, net


def in_batches(size: int, *data: torch.Tensor) -> Iterator[Any]:
    """The data in batches, over and over; the last may be smaller, as a DataLoader's."""
    return itertools.cycle(list(zip(*(part.split(size) for part in data), strict=True)))


# Sequentials.

NETS = {
    "2-25-25-25-1": ((2, 25, 25, 25, 1), 4),
    "64-64-64-8": ((64, 64, 64, 8), 32),
    "784-512-512-10": ((784, 512, 512, 10), 64),
    "784-2048-2048-10": ((784, 2048, 2048, 10), 256),
    "1024-4096-4096-10": ((1024, 4096, 4096, 10), 1024),
}


def sequential(nn: Any, sizes: tuple[int, ...], *between: Callable[[Any, int], Any]) -> Any:
    """Linears of these sizes; after each but the last, what `between` makes of nn and the size."""
    layers: list[Any] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *(make(nn, b) for make in between)]
    return nn.Sequential(*layers[: -len(between)])


def relu(nn: Any, size: int) -> Any:
    return nn.ReLU()


def tanh(nn: Any, size: int) -> Any:
    return nn.Tanh()


def plain(nn: Any, optim: Any, asked: tuple[str, str]) -> Built:
    net, what = asked
    sizes, batch = NETS[net]
    model = sequential(nn, sizes, relu)
    x, target = torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])
    optimizer = optim.SGD(model.parameters(), lr=1e-3)

    def forward() -> Any:
        with torch.no_grad():
            return model(x)

    if what == "forward":
        return forward, model
    return fit(model, nn.MSELoss(), optimizer, in_batches(batch, x, target))


for _net, (_, _batch) in NETS.items():
    row(
        "large" if _batch >= 256 else "plain",
        f"{_net}, batch {_batch}",
        {what: (_net, what) for what in ("step", "forward")},
    )(plain)


# What small nets are trained with besides.


def small(
    nn: Any,
    optim: Any,
    optimizer: str,
    loss: str = "MSELoss",
    between: tuple[Callable[[Any, int], Any], ...] = (relu,),
    batch: int = 32,
) -> Built:
    net = sequential(nn, (64, 64, 64, 8), *between)
    x, target = torch.randn(batch, 64), torch.randn(batch, 8)
    if loss == "CrossEntropyLoss":
        target = torch.randint(8, (batch,))
    chosen = getattr(optim, optimizer)(net.parameters(), lr=1e-3)
    return fit(net, getattr(nn, loss)(), chosen, in_batches(batch, x, target))


@row("small", "ReLU", {name: name for name in ("SGD", "Adam", "RMSprop")})
def small_relu(nn: Any, optim: Any, optimizer: str) -> Built:
    return small(nn, optim, optimizer)


@row("small", "ReLU, CrossEntropyLoss", {"SGD": "SGD", "Adam": "Adam"})
def small_cross_entropy(nn: Any, optim: Any, optimizer: str) -> Built:
    return small(nn, optim, optimizer, "CrossEntropyLoss")


@row(
    "small", "ReLU, other losses", {f"{n}, Adam": n for n in ("BCEWithLogitsLoss", "SmoothL1Loss")}
)
def small_losses(nn: Any, optim: Any, loss: str) -> Built:
    return small(nn, optim, "Adam", loss)


@row("small", "other activations", {f"{n}, Adam": n for n in ("SiLU", "ELU", "GELU", "Tanh")})
def small_activations(nn: Any, optim: Any, activation: str) -> Built:
    return small(nn, optim, "Adam", between=(lambda nn, size: getattr(nn, activation)(),))


@row("small", "ReLU, Dropout", {"Adam": "Adam"})
def small_dropout(nn: Any, optim: Any, optimizer: str) -> Built:
    return small(nn, optim, optimizer, between=(relu, lambda nn, size: nn.Dropout()))


BATCHES = {f"batch {n}": n for n in (8, 32, 256, 2048)}


@row("normed", "LayerNorm", BATCHES)
def small_layer_norm(nn: Any, optim: Any, batch: int) -> Built:
    between = (lambda nn, size: nn.LayerNorm(size), relu)
    return small(nn, optim, "Adam", between=between, batch=batch)


@row("normed", "BatchNorm1d", BATCHES)
def small_batch_norm(nn: Any, optim: Any, batch: int) -> Built:
    between = (lambda nn, size: nn.BatchNorm1d(size), relu)
    return small(nn, optim, "Adam", between=between, batch=batch)


# Wired by hand.


def three_layers(nn: Any, forward: Callable[[Any, Any], Any]) -> Any:
    """A Module of the report's size with this forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(2, 25)
            self.fc2 = nn.Linear(25, 25)
            self.fc3 = nn.Linear(25, 25)
            self.out = nn.Linear(25, 1)

    Net.forward = forward
    return Net()


def four_points(nn: Any, optim: Any, net: Any) -> Built:
    optimizer = optim.SGD(net.parameters(), lr=1e-3)
    return fit(net, nn.MSELoss(), optimizer, in_batches(4, torch.randn(4, 2), torch.randn(4, 1)))


def chain(nn: Any, activation: Callable[[Any], Any]) -> Any:
    def forward(self: Any, x: Any) -> Any:
        x = activation(self.fc1(x))
        x = activation(self.fc2(x))
        x = activation(self.fc3(x))
        return self.out(x)

    return three_layers(nn, forward)


@row("wired", "F.relu between the layers")
def by_hand_relu(nn: Any, optim: Any) -> Built:
    return four_points(nn, optim, chain(nn, nn.functional.relu))


@row("wired", "torch.tanh between the layers")
def by_hand_tanh(nn: Any, optim: Any) -> Built:
    return four_points(nn, optim, chain(nn, torch.tanh))


@row("wired", "branches and scalars between the layers")
def by_hand_residual(nn: Any, optim: Any) -> Built:
    def forward(self: Any, x: Any) -> Any:
        h = torch.relu(self.fc1(x))
        h = h + torch.tanh(self.fc2(h)) * 0.5
        h = h + torch.tanh(self.fc3(h)) * 0.5
        return self.out(h)

    return four_points(nn, optim, three_layers(nn, forward))


@row("wired", "a Sequential with a forward hook")
def hooked(nn: Any, optim: Any) -> Built:
    net = sequential(nn, (2, 25, 25, 25, 1), relu)
    net[1].register_forward_hook(lambda module, args, out: None)
    return four_points(nn, optim, net)


@row("wired", "F.relu, one observation under no_grad")
def one_observation(nn: Any, optim: Any) -> Built:
    net, observation = chain(nn, nn.functional.relu), torch.randn(1, 2)

    def step() -> Any:
        with torch.no_grad():
            return net(observation)

    return step, net


@row("wired", "p.data = p.data - lr * p.grad")
def by_hand_sgd(nn: Any, optim: Any) -> Built:
    net, x, target = chain(nn, torch.relu), torch.randn(4, 2), torch.randn(4, 1)

    def step() -> Any:
        net.zero_grad()
        loss = ((net(x) - target) ** 2).mean()
        loss.backward()
        for p in net.parameters():
            p.data = p.data - 1e-3 * p.grad
        return loss

    return step, net


@row("wired", "vector_to_parameters and forward")
def evolution(nn: Any, optim: Any) -> Built:
    """An evolution strategy tries weights near the best ones."""
    net, x, target = chain(nn, torch.tanh), torch.randn(4, 2), torch.randn(4, 1)
    best = nn.utils.parameters_to_vector(net.parameters()).detach()

    def step() -> Any:
        tried = best + 0.01 * torch.randn_like(best)
        nn.utils.vector_to_parameters(tried, net.parameters())
        with torch.no_grad():
            return nn.functional.mse_loss(net(x), target)

    return step, net


@row("wired", "one pointwise operation on a Parameter, forward")
def one_operation(nn: Any, optim: Any) -> Built:
    weight = nn.Parameter(torch.randn(4, 25))
    return lambda: torch.exp(weight), weight


# One layer behind a Linear.

SHAPES = {str(shape): shape for shape in ((32, 64), (512, 64), (4096, 256), (16384, 256))}
ACTIVATIONS: dict[str, Callable[[Any, int], Any]] = {
    **{
        name: lambda nn, size, name=name: getattr(nn, name)()  # type: ignore[misc]
        for name in (
            *("ReLU", "LeakyReLU", "PReLU", "ReLU6", "ELU", "SELU", "CELU", "SiLU", "Mish"),
            *("GELU", "Tanh", "Tanhshrink", "Sigmoid", "LogSigmoid", "Softplus", "Softsign"),
            *("Hardtanh", "Hardsigmoid", "Hardswish", "Hardshrink", "Softshrink"),
        )
    },
    "GELU, approximate": lambda nn, size: nn.GELU(approximate="tanh"),
    "Threshold": lambda nn, size: nn.Threshold(0.1, 0.0),
    "GLU": lambda nn, size: nn.GLU(),
    "Softmax": lambda nn, size: nn.Softmax(dim=1),
    "Softmin": lambda nn, size: nn.Softmin(dim=1),
    "LogSoftmax": lambda nn, size: nn.LogSoftmax(dim=1),
}
NORMS: dict[str, Callable[[Any, int], Any]] = {
    "LayerNorm": lambda nn, size: nn.LayerNorm(size),
    "RMSNorm": lambda nn, size: nn.RMSNorm(size),
    "BatchNorm1d": lambda nn, size: nn.BatchNorm1d(size),
}


def behind_linear(layer: Callable[[Any, int], Any]) -> Callable[..., Built]:
    def build(nn: Any, optim: Any, shape: tuple[int, int]) -> Built:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(shape[1], shape[1])
                self.layer = layer(nn, shape[1])

            def forward(self, x: Any) -> Any:
                return self.layer(self.linear(x))

        net, x = Net(), torch.randn(shape)
        gradient = torch.randn_like(net(x).detach())

        def step() -> Any:
            net.zero_grad()
            y = net(x)
            y.backward(gradient)
            return y

        return step, net

    return build


for _group, _layers in (("activations", ACTIVATIONS), ("norms", NORMS)):
    for _name, _layer in _layers.items():
        row(_group, _name, SHAPES)(behind_linear(_layer))


# Nets for pictures.


def digits(batch: int) -> Iterator[Any]:
    return in_batches(batch, torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,)))


@row("conv", "LeNet, batch 32 of 28 x 28, CrossEntropyLoss")
def lenet(nn: Any, optim: Any) -> Built:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    return fit(model, nn.CrossEntropyLoss(), optimizer, digits(32))


@row("conv", "LeNet by hand, F.relu and F.max_pool2d")
def lenet_by_hand(nn: Any, optim: Any) -> Built:
    F = nn.functional

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
            self.fc1, self.fc2, self.fc3 = (
                nn.Linear(400, 120),
                nn.Linear(120, 84),
                nn.Linear(84, 10),
            )

        def forward(self, x: Any) -> Any:
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
            return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    return fit(model, nn.CrossEntropyLoss(), optimizer, digits(32))


@row("conv", "ResNet block of 32 channels, batch 16 of 16 x 16")
def resnet_block(nn: Any, optim: Any) -> Built:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
            self.bn1, self.relu = nn.BatchNorm2d(32), nn.ReLU()
            self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(32)

        def forward(self, x: Any) -> Any:
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(y)) + x)

    model, x = Block(), torch.randn(16, 32, 16, 16)
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    return fit(model, nn.MSELoss(), optimizer, in_batches(16, x, torch.randn(16, 32, 16, 16)))
