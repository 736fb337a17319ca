"""An exponential moving average of the weights, kept by a class of one's own."""

from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)


class ModelEMA:
    def __init__(self, model, decay=0.9):
        self.ema = deepcopy(model).eval()
        for p in self.ema.parameters():
            p.requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        d = self.decay * (1 - 0.5**self.updates)
        msd = model.state_dict()
        for k, v in self.ema.state_dict().items():
            if v.dtype.is_floating_point:
                v.mul_(d).add_(msd[k].detach(), alpha=1 - d)
            else:
                v.copy_(msd[k])


class Detector(nn.Module):
    """Where is the dot? Each cell says whether it is there, and how far off."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1, bias=False),
            nn.BatchNorm2d(6, eps=1e-3, momentum=0.03),
            nn.SiLU(),
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(6, 8, 2, 2),
            nn.PReLU(8),
        )
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        out = self.head(self.body(x))
        return out[:, 0], out[:, 1:].sigmoid()


model = Detector()
ema = ModelEMA(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(6):
    at = torch.randint(0, 12, (16, 2))
    images = torch.zeros(16, 1, 12, 12)
    images[torch.arange(16), 0, at[:, 0], at[:, 1]] = 1
    there, off = model(images)
    cell = at // 4
    n, i, j = torch.arange(16), cell[:, 0], cell[:, 1]
    target = torch.zeros_like(there)
    target[n, i, j] = 1
    loss = F.binary_cross_entropy_with_logits(there, target, pos_weight=torch.tensor(3.0))
    loss += F.smooth_l1_loss(off[n, :, i, j], (at % 4) / 4)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model)
    with torch.no_grad():
        averaged = ema.ema(images)[0]
    print(
        f"{step} loss {loss.item():.4f} ema {F.binary_cross_entropy_with_logits(averaged, target):.4f}"
    )
print(ema.updates, all(not p.requires_grad for p in ema.ema.parameters()))
