"""A net with GroupNorm and Mish in channels_last, trained with a plain loop and gradient noise."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(5)


def block(inputs, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(2, outputs), nn.Mish()
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([block(3, 4, 1), block(4, 8, 2), block(8, 8, 2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x.mean(dim=(-2, -1)) * self.scale))


net = Net().to(memory_format=torch.channels_last)
decay = [p for p in net.parameters() if p.ndim > 1]
others = [p for p in net.parameters() if p.ndim <= 1]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=4e-3
)
labels = torch.arange(20) % 5
images = 0.3 * torch.randn(20, 3, 8, 8)
images += labels[:, None, None, None] / 5 * torch.linspace(0, 1, 8)
images = images.contiguous(memory_format=torch.channels_last)
for step in range(6):
    logits = net(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    for p in net.parameters():
        p.grad.add_(torch.randn_like(p) * 1e-4)
    optimizer.step()
    print(f"{step} {loss.item():.4f} {(logits.argmax(-1) == labels).float().mean().item():.2f}")
