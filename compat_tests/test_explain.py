"""nnmirror.explain: the backward written out, which a reader may trust and run by itself."""

import runpy

import pytest
import torch

import nnmirror

# -- the nets: each gives a loss, a module, and the tensors that get a gradient ------------------


def hand_wired(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(2, 25), nn.Linear(25, 25)
            self.act, self.out = nn.Tanh(), nn.Linear(25, 1)

        def forward(self, x):
            h = self.act(self.fc1(x))
            h = torch.relu(self.fc2(h))
            return self.out(h)

    net = Net()
    return nn.MSELoss()(net(torch.randn(4, 2)), torch.randn(4, 1)), net, [*net.parameters()]


def sequential(nn):
    net = nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.Sigmoid()), nn.Linear(4, 2)
    )
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for _ in range(5):  # until its layers are called as one
        loss = nn.MSELoss()(net(x), y)
    return loss, net, [*net.parameters()]


def shared_module(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)

        def forward(self, x):
            for _ in range(3):
                x = self.act(self.fc(x))
            return self.out(x)

    net = Net()
    return net(torch.randn(5, 4)).mean(), net, [*net.parameters()]


def branches_and_scalars(nn):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    x = torch.randn(4, 3)
    h = a(x)
    h = h + torch.tanh(b(h)) * 0.5 - h[:, :1]
    u, v = h.chunk(2, 0)
    scale = (u * v).sum() / 3
    loss = scale * scale + h.t().reshape(-1)[2:7].prod() + (2 - h).exp().mean()
    return loss, (a, b), [a.weight, a.bias, b.weight]


def loss_written_out(nn):
    net = nn.Linear(3, 2)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    out = net(x)
    loss = ((out - y) ** 2).sum(dim=1).sqrt().mean() + 0.01 * sum(
        p.pow(2).sum() for p in net.parameters()
    )
    return loss, net, [*net.parameters()]


def layer_norm(nn):
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ELU(), nn.Linear(8, 2))
    return net(torch.randn(6, 3)).square().mean(), net, [*net.parameters()]


def batch_norm(nn):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return net(torch.randn(6, 3)).square().mean(), net, [*net.parameters()]


def dropout(nn):
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.LeakyReLU(0.1), nn.Linear(8, 2))
    return net(torch.randn(6, 3)).sum(), net, [*net.parameters()]


def embedding(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3)

        def forward(self, ids):
            return self.out(self.words(ids).mean(1))

    net, ids = Net(), torch.randint(0, 11, (5, 4))
    return nn.MSELoss()(net(ids), torch.randn(5, 3)), net, [*net.parameters()]


def cross_entropy(nn):
    net = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 5))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return criterion(net(torch.randn(8, 4)), torch.randint(0, 5, (8,))), net, [*net.parameters()]


def attention(nn):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
            self.out = nn.Linear(6, 6)

        def forward(self, x):
            q, k, v = (f(x).view(2, 5, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = q @ k.transpose(-2, -1) / 3**0.5
            mask = torch.ones(5, 5).tril() == 0
            weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).reshape(2, 5, 6))

    net = Attention()
    return net(torch.randn(2, 5, 6)).pow(2).mean(), net, [*net.parameters()]


def fifty_layers(nn):
    layers = []
    for _ in range(50):
        layers += [nn.Linear(6, 6), nn.Tanh()]
    net = nn.Sequential(*layers)
    return net(torch.randn(3, 6)).sum(), net, [*net.parameters()]


def double_precision_and_inputs(nn):
    net = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    h = net(x)
    h = h.clone()
    h[:, 0] = h[:, 1] * 2
    h[1:].mul_(3)
    return (h * x).sum(), net, [*net.parameters(), x]


NETS = [
    hand_wired,
    sequential,
    shared_module,
    branches_and_scalars,
    loss_written_out,
    layer_norm,
    batch_norm,
    dropout,
    embedding,
    cross_entropy,
    attention,
    fifty_layers,
    double_precision_and_inputs,
]


def made(net, nn):
    torch.manual_seed(3)
    return net(nn)


@pytest.mark.parametrize("net", NETS)
@nnmirror.exact()
def test_the_saved_file_gives_pytorchs_gradients(net, tmp_path):
    expected, _, theirs = made(net, torch.nn)
    expected.backward()
    loss, _module, mine = made(net, nnmirror)
    explanation = nnmirror.explain(loss)
    explanation.save(tmp_path / "backward.py")
    text = (tmp_path / "backward.py").read_text()
    assert not [line for line in text.splitlines() if line.startswith("import nnmirror")]
    ran = runpy.run_path(str(tmp_path / "backward.py"))
    found = ran["backward"](**ran["values"]())
    loss.backward()
    assert len(found) == len(theirs) == len(explanation.leaves)
    for p, q in zip(theirs, mine, strict=True):
        (name,) = [n for n, leaf in explanation.leaves.items() if torch.equal(leaf.value, q)]
        assert torch.equal(found[name], p.grad), name
        assert torch.equal(q.grad, p.grad), name
