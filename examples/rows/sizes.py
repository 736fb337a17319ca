"""Batches of another size in each step: rows of the benchmark, each a training step (see nets.py).

They are measured after 500 steps, when the mirror has met most sizes.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .nets import Built, fit, row


def warm(step: Callable[[], Any], *trained: Any) -> Built:
    for _ in range(500):
        step()
    return step, *trained


def by_hand(nn: Any, inputs: int, outputs: int) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(inputs, 32), nn.Linear(32, 32)
            self.c = nn.Linear(32, outputs)

        def forward(self, x: Any) -> Any:
            return self.c(nn.functional.relu(self.b(nn.functional.relu(self.a(x)))))

    return Net()


def batches(target: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[Any, Any]]:
    sizes = random.Random(0)
    while True:
        x = torch.randn(sizes.randint(10, 110), 8)
        yield x, target(x[:, :4])


def layers(nn: Any) -> Any:
    hidden = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(32, 4))


@row("sizes", "8-32-32-4 by hand, 10 to 110 rows, MSELoss, Adam")
def regression(nn: Any, optim: Any) -> Built:
    net = by_hand(nn, 8, 4)
    return warm(*fit(net, nn.MSELoss(), optim.Adam(net.parameters()), batches(torch.sin)))


@row("sizes", "Sequential 8-32-32-4, 10 to 110 rows, CrossEntropyLoss, Adam")
def classifier(nn: Any, optim: Any) -> Built:
    net, data = layers(nn), batches(lambda x: x.argmax(1))
    return warm(*fit(net, nn.CrossEntropyLoss(), optim.Adam(net.parameters()), data))


@row("sizes", "Sequential 8-32-32-4, 1 to 100 rows, forward under no_grad")
def prediction(nn: Any, optim: Any) -> Built:
    net, sizes, data = layers(nn), random.Random(0), torch.randn(100, 8)

    def step() -> Any:
        with torch.no_grad():
            return net(data[: sizes.randint(1, 100)])

    return warm(step, net)


@row("sizes", "REINFORCE, whole episodes of 8 to 60 steps, 4-32-32-2 by hand, Adam")
def reinforce(nn: Any, optim: Any) -> Built:
    F = nn.functional
    policy, lengths = by_hand(nn, 4, 2), random.Random(0)
    optimizer = optim.Adam(policy.parameters(), lr=1e-3)

    def step() -> Any:
        n = lengths.randint(8, 60)
        observations, actions = torch.randn(n, 4), torch.randint(2, (n,))
        returns = torch.arange(n, 0, -1.0)
        log_probs = F.log_softmax(policy(observations), 1)
        chosen = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
        optimizer.zero_grad()
        loss = -(chosen * (returns - returns.mean()) / returns.std()).mean()
        loss.backward()
        optimizer.step()
        return loss

    return warm(step, policy)


@row("sizes", "graphs of 40 to 120 nodes, 2 to 4 edges each, sums of messages, Adam")
def graphs(nn: Any, optim: Any) -> Built:
    """Eight graphs in a batch, which are classified."""
    F = nn.functional

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.hidden = nn.Linear(8, 32), nn.Linear(32, 32)
            self.out = nn.Linear(32, 4)

        def forward(self, x: Any, source: Any, target: Any, graph: Any) -> Any:
            h = F.relu(self.inp(x))
            h = h + torch.zeros(len(x), 32).index_add(0, target, h[source])
            h = F.relu(self.hidden(h))
            return self.out(torch.zeros(8, 32).index_add(0, graph, h))

    net, criterion, sizes = Net(), nn.CrossEntropyLoss(), random.Random(0)
    optimizer = optim.Adam(net.parameters())

    def step() -> Any:
        n = sizes.randint(40, 120)
        edges = torch.randint(n, (2, sizes.randint(2 * n, 4 * n)))
        graph = torch.randint(8, (n,)).sort().values
        optimizer.zero_grad()
        loss = criterion(net(torch.randn(n, 8), edges[0], edges[1], graph), torch.randint(4, (8,)))
        loss.backward()
        optimizer.step()
        return loss

    return warm(step, net)
