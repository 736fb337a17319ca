"""A U-Net that cuts discs out of noise, with Dice and cross entropy."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)


class DoubleConv(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diffY = x2.size()[2] - x1.size()[2]
        diffX = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, n_channels, n_classes, w=4):
        super().__init__()
        self.inc = DoubleConv(n_channels, w)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(w, 2 * w))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * w, 4 * w))
        self.up1 = Up(4 * w, 2 * w)
        self.up2 = Up(2 * w, w)
        self.outc = nn.Conv2d(w, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


def dice_loss(logits, target, eps=1e-6):
    probs = F.softmax(logits, dim=1)[:, 1]
    inter = 2 * (probs * target).sum(dim=(1, 2))
    return 1 - ((inter + eps) / (probs.sum((1, 2)) + target.sum((1, 2)) + eps)).mean()


model = UNet(1, 2)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-8, momentum=0.9)
grid = torch.arange(14.0)
for step in range(4):
    centre = torch.randint(4, 10, (4, 2, 1, 1)).float()
    mask = ((grid - centre[:, 0]) ** 2 + (grid[:, None] - centre[:, 1]) ** 2 < 9).float()
    images = mask.unsqueeze(1) + 0.3 * torch.randn(4, 1, 14, 14)
    logits = model(images)
    loss = F.cross_entropy(logits, mask.long()) + dice_loss(logits, mask)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    iou = ((logits.argmax(1) == 1) & (mask == 1)).sum() / (
        (logits.argmax(1) == 1) | (mask == 1)
    ).sum()
    print(f"step {step}: loss {loss.item():.4f} IoU {iou.item():.3f}")
