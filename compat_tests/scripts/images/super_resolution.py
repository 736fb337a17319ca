"""Super resolution by sub-pixel convolution (ESPCN)."""

from math import log10

import torch
import torch.nn as nn
import torch.nn.init as init
import torch.optim as optim

torch.manual_seed(123)


class Net(nn.Module):
    def __init__(self, upscale_factor):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(1, 8, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(8, 8, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(8, upscale_factor**2, (3, 3), (1, 1), (1, 1))
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)
        self._initialize_weights()

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.pixel_shuffle(self.conv3(x))

    def _initialize_weights(self):
        init.orthogonal_(self.conv1.weight, init.calculate_gain("relu"))
        init.orthogonal_(self.conv2.weight, init.calculate_gain("relu"))
        init.orthogonal_(self.conv3.weight)


def pictures(n):
    t = torch.linspace(0, 3, 16)
    a, b = torch.rand(n, 1, 1, 1) + 0.5, torch.rand(n, 1, 1, 1)
    return 0.5 + 0.5 * torch.sin(a * t + b * 3) * torch.cos(b * t[:, None])


model = Net(upscale_factor=2)
criterion = nn.MSELoss()
optimizer = optim.Adam(model.parameters(), lr=0.01)
high = pictures(24)
low = high.unflatten(-2, (8, 2)).unflatten(-1, (8, 2)).mean((-3, -1))
for epoch in range(1, 5):
    epoch_loss = 0
    for i in range(0, 24, 8):
        optimizer.zero_grad()
        loss = criterion(model(low[i : i + 8]), high[i : i + 8])
        epoch_loss += loss.item()
        loss.backward()
        optimizer.step()
    psnr = 10 * log10(1 / (epoch_loss / 3))
    print(f"===> Epoch {epoch} Complete: Avg. Loss: {epoch_loss / 3:.4f} Avg. PSNR: {psnr:.2f} dB")
