"""Depthwise separable convolutions with squeeze and excitation."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)


class SeparableConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU6()

    def forward(self, x):
        x = self.act(self.bn1(self.depthwise(x)))
        return self.act(self.bn2(self.pointwise(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, reduction=2):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        s = F.hardsigmoid(self.fc2(F.relu(self.fc1(s))))
        return x * s


class MobileNet(nn.Module):
    def __init__(self, n_classes, width_mult=1.0):
        super().__init__()
        c = [int(v * width_mult) for v in (4, 8, 8)]
        self.stem = nn.Sequential(
            nn.Conv2d(1, c[0], 3, 2, 1, bias=False), nn.BatchNorm2d(c[0]), nn.Hardswish()
        )
        self.blocks = nn.Sequential(
            SeparableConv2d(c[0], c[1]), SqueezeExcite(c[1]), SeparableConv2d(c[1], c[2], 2)
        )
        self.classifier = nn.Linear(c[2], n_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.classifier(x.mean([2, 3]))


model = MobileNet(3)
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=4e-5)
sched = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.9)
y = torch.arange(18) % 3
x = 0.2 * torch.randn(18, 1, 12, 12) + torch.linspace(-1, 1, 12) * (y - 1)[:, None, None, None]
for epoch in range(5):
    opt.zero_grad()
    out = model(x)
    loss = F.cross_entropy(out, y)
    loss.backward()
    opt.step()
    sched.step()
    print(f"epoch {epoch} loss {loss.item():.4f} lr {opt.param_groups[0]['lr']:.4f}")
model.eval()
print(
    f"params {sum(p.numel() for p in model.parameters())}, eval {F.cross_entropy(model(x), y).item():.4f}"
)
