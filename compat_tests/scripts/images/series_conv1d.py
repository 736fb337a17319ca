"""A 1-D CNN that tells sawtooth, square and sine apart."""

import math

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
t = torch.linspace(0, 1, 40)
phase = torch.rand(90, 1)
frequency = 2 + 2 * torch.rand(90, 1)
kind = torch.arange(90) % 3
angle = (frequency * t + phase) % 1
waves = torch.stack([2 * angle - 1, (angle > 0.5).float() * 2 - 1, torch.sin(2 * math.pi * angle)])
series = waves[kind, torch.arange(90)].unsqueeze(1) + 0.1 * torch.randn(90, 1, 40)

model = nn.Sequential(
    nn.Conv1d(1, 8, kernel_size=5, stride=2, padding=2, padding_mode="circular"),
    nn.BatchNorm1d(8),
    nn.ReLU(),
    nn.Dropout1d(0.1),
    nn.Conv1d(8, 8, kernel_size=3, groups=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(8 * 18, 3),
)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
loader = DataLoader(TensorDataset(series[:72], kind[:72]), batch_size=24, shuffle=True)

for epoch in range(5):
    model.train()
    total = 0
    for xb, yb in loader:
        loss = criterion(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(xb)
    scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(series[72:]).argmax(1) == kind[72:]).float().mean()
    print(
        f"Epoch {epoch + 1}: {total / 72:.4f}, val acc {accuracy:.3f}, {scheduler.get_last_lr()[0]:.5f}"
    )
