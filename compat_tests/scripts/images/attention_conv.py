"""Self-attention over the places of a feature map (as in SAGAN), with a learned position."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 2, 1)
        self.key = nn.Conv2d(channels, channels // 2, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, c, h, w = x.shape
        q = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        k = self.key(x).view(b, -1, h * w)
        v = self.value(x).view(b, -1, h * w)
        attention = torch.softmax(torch.bmm(q, k) / (c // 2) ** 0.5, dim=-1)
        out = torch.bmm(v, attention.permute(0, 2, 1)).view(b, c, h, w)
        return self.gamma * out + x, attention


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 8, 4, 4))
        self.attention = SelfAttention(8)
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleDict({"what": nn.Linear(8, 2), "where": nn.Linear(8, 2)})

    def forward(self, x):
        x, attention = self.attention(F.gelu(self.stem(x)) + self.position)
        x = self.norm(x.flatten(2).transpose(1, 2))
        x = F.scaled_dot_product_attention(x, x, x).mean(dim=1)
        return {name: head(x) for name, head in self.heads.items()}, attention


net = Net()
optimizer = torch.optim.NAdam(net.parameters(), lr=0.02)
for step in range(6):
    what, where = torch.randint(0, 2, (16,)), torch.randint(0, 2, (16, 2))
    images = torch.zeros(16, 1, 8, 8)
    for i in range(16):
        top, left = 4 * where[i]
        images[i, 0, top : top + 4, left : left + 4] = 1 if what[i] else torch.eye(4)
    out, attention = net(images)
    loss = F.cross_entropy(out["what"], what)
    loss = loss + F.binary_cross_entropy_with_logits(out["where"], where.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    entropy = -(attention * attention.clamp_min(1e-9).log()).sum(-1).mean()
    print(
        f"{step}: {loss.item():.4f}, entropy {entropy.item():.4f}, gamma {net.attention.gamma.item():.4f}"
    )
