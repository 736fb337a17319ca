"""Two fully connected layers with a ReLU written as a clamp."""

import argparse

import torch
from torch import nn, optim


class TwoLayerNet(nn.Module):
    def __init__(self, d_in, h, d_out):
        super(TwoLayerNet, self).__init__()  # noqa: UP008  as scripts of that age have it
        self.linear1 = nn.Linear(d_in, h)
        self.linear2 = nn.Linear(h, d_out)

    def forward(self, x):
        h_relu = self.linear1(x).clamp(min=0)
        return self.linear2(h_relu)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    N, D_in, H, D_out = 64, 100, 50, 10
    x = torch.randn(N, D_in)
    y = torch.randn(N, D_out)

    model = TwoLayerNet(D_in, H, D_out)
    criterion = nn.MSELoss(reduction="sum")
    optimizer = optim.SGD(model.parameters(), lr=args.lr)
    for t in range(args.steps):
        loss = criterion(model(x), y)
        if t % 10 == 9:
            print(t, loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(model)
    torch.save(model, "two_layers.pt")
