"""3-D convolution on clips, with gradients accumulated over batches, clipped, and checkpoints."""

import io

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(7)
ACCUMULATE = 3


class ClipNet(nn.Module):
    """Does the dot move to the left or to the right?"""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 4, kernel_size=(2, 3, 3), padding=(0, 1, 1))
        self.bn = nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 4, kernel_size=2, stride=(1, 2, 2))
        self.drop = nn.Dropout3d(0.1)
        self.fc = nn.LazyLinear(1)

    def forward(self, x):
        x = F.leaky_relu(self.bn(self.conv1(x)), 0.1)
        x = self.drop(F.leaky_relu(self.conv2(x), 0.1))
        return self.fc(x.flatten(1)).squeeze(1)


way = torch.randint(0, 2, (36,))
clips = torch.zeros(36, 1, 4, 6, 6)
for n in range(36):
    for t in range(4):
        clips[n, 0, t, n % 6, t + 1 if way[n] else 4 - t] = 1
loader = DataLoader(TensorDataset(clips, way.float()), batch_size=4, shuffle=True)
net = ClipNet()
net(clips[:2])  # gives the lazy layer its shape
optimizer = torch.optim.Adagrad(net.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)

for epoch in range(3):
    total, norms = 0.0, []
    optimizer.zero_grad()
    for i, (x, y) in enumerate(loader):
        loss = F.binary_cross_entropy_with_logits(net(x), y) / ACCUMULATE
        loss.backward()
        total += loss.item() * ACCUMULATE
        if (i + 1) % ACCUMULATE == 0:
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.5).item())
            optimizer.step()
            optimizer.zero_grad()
    scheduler.step(total)
    print(f"epoch {epoch} loss {total / len(loader):.4f} norms {[round(n, 3) for n in norms]}")

saved = io.BytesIO()
torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
saved.seek(0)
checkpoint = torch.load(saved)
again = ClipNet()
again.load_state_dict(checkpoint["model"])
print(torch.equal(net.eval()(clips), again.eval()(clips)), optimizer.param_groups[0]["lr"])
