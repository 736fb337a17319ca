"""A siamese net with a contrastive loss: do two pictures show the same stripes?"""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(2)


class ContrastiveLoss(nn.Module):
    def __init__(self, margin=1.0):
        super().__init__()
        self.margin = margin

    def forward(self, output1, output2, label):
        distance = F.pairwise_distance(output1, output2, keepdim=True)
        return torch.mean(
            (1 - label) * torch.pow(distance, 2)
            + label * torch.pow(torch.clamp(self.margin - distance, min=0.0), 2)
        )


class SiameseNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(1, 4, kernel_size=3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(4),
            nn.ReflectionPad2d(1),
            nn.Conv2d(4, 4, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(4),
        )
        self.fc = nn.Sequential(nn.Linear(4 * 5 * 5, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))

    def forward_once(self, x):
        output = self.cnn(x)
        return self.fc(output.view(output.size()[0], -1))

    def forward(self, input1, input2):
        return self.forward_once(input1), self.forward_once(input2)


def stripes(upright):
    images = 0.2 * torch.randn(len(upright), 1, 10, 10)
    images[upright, :, :, ::2] += 1
    images[~upright, :, ::2] += 1
    return images


net = SiameseNetwork()
criterion = ContrastiveLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
for step in range(6):
    a, b = torch.rand(16) < 0.5, torch.rand(16) < 0.5
    label = (a != b).float().unsqueeze(1)
    out1, out2 = net(stripes(a), stripes(b))
    optimizer.zero_grad()
    loss = criterion(out1, out2, label)
    loss.backward()
    optimizer.step()
    print(f"step {step} contrastive loss {loss.item():.4f}")
net.eval()
with torch.no_grad():
    same, other = stripes(torch.ones(4).bool()), stripes(torch.zeros(4).bool())
    u, v = net(same, other)
    print(
        f"apart {F.pairwise_distance(u, v).mean():.4f} close {F.pairwise_distance(u, u[0]).mean():.4f}"
    )
