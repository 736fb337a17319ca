"""A temporal convolutional net with growing dilation: the adding problem."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(1111)


class Chomp1d(nn.Module):
    def __init__(self, chomp_size):
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, n_inputs, n_outputs, kernel_size, dilation, dropout=0.1):
        super().__init__()
        padding = (kernel_size - 1) * dilation
        self.conv1 = nn.Conv1d(n_inputs, n_outputs, kernel_size, padding=padding, dilation=dilation)
        self.chomp1 = Chomp1d(padding)
        self.relu1 = nn.ReLU()
        self.dropout1 = nn.Dropout(dropout)
        self.conv2 = nn.Conv1d(
            n_outputs, n_outputs, kernel_size, padding=padding, dilation=dilation
        )
        self.chomp2 = Chomp1d(padding)
        self.net = nn.Sequential(
            self.conv1, self.chomp1, self.relu1, self.dropout1, self.conv2, self.chomp2, nn.ReLU()
        )
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()
        self.init_weights()

    def init_weights(self):
        self.conv1.weight.data.normal_(0, 0.05)
        self.conv2.weight.data.normal_(0, 0.05)

    def forward(self, x):
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(self.net(x) + res)


class TCN(nn.Module):
    def __init__(self, num_inputs, num_channels, kernel_size=3):
        super().__init__()
        layers = []
        for i, width in enumerate(num_channels):
            inputs = num_inputs if i == 0 else num_channels[i - 1]
            layers.append(TemporalBlock(inputs, width, kernel_size, dilation=2**i))
        self.network = nn.Sequential(*layers)
        self.linear = nn.Linear(num_channels[-1], 1)

    def forward(self, x):
        return self.linear(self.network(x)[:, :, -1])


def data_generator(n, length):
    values, mask = torch.rand(n, 1, length), torch.zeros(n, 1, length)
    places = torch.stack([torch.randperm(length)[:2] for _ in range(n)])
    mask.scatter_(2, places.unsqueeze(1), 1)
    return torch.cat((values, mask), dim=1), (values * mask).sum(dim=2)


X, Y = data_generator(60, 20)
model = TCN(2, [6, 6, 8])
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
for epoch in range(4):
    model.train()
    for i in range(0, 48, 12):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X[i : i + 12]), Y[i : i + 12])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        print(f"epoch {epoch} train {loss.item():.4f} test {F.mse_loss(model(X[48:]), Y[48:]):.4f}")
