"""Label smoothing, mixup and OneCycleLR; the best weights are kept."""

import copy

import torch
import torch.nn as nn
from torch.optim.lr_scheduler import OneCycleLR

torch.manual_seed(42)
EPOCHS, BATCH = 3, 10

model = nn.Sequential(
    nn.Conv2d(1, 6, 3, padding="same"),
    nn.BatchNorm2d(6),
    nn.SiLU(),
    nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=1),
    nn.BatchNorm2d(8),
    nn.SiLU(),
    nn.Dropout2d(0.1),
    nn.Flatten(),
    nn.Linear(8 * 16, 5),
)
labels = torch.arange(50) % 5
images = torch.zeros(50, 1, 8, 8)
images[torch.arange(50), 0, labels] = 1
images += 0.3 * torch.randn_like(images)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = OneCycleLR(optimizer, max_lr=0.2, epochs=EPOCHS, steps_per_epoch=len(images) // BATCH)
best, best_loss = None, float("inf")

for epoch in range(EPOCHS):
    for batch in torch.randperm(50).split(BATCH):
        x, y = images[batch], labels[batch]
        lam = torch.distributions.Beta(0.4, 0.4).sample().item()
        index = torch.randperm(BATCH)
        output = model(lam * x + (1 - lam) * x[index])
        loss = lam * criterion(output, y) + (1 - lam) * criterion(output, y[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    with torch.inference_mode():
        val = nn.functional.cross_entropy(model(images), labels).item()
    model.train()
    if val < best_loss:
        best, best_loss = copy.deepcopy(model), val
    lr, momentum = (optimizer.param_groups[0][k] for k in ("lr", "momentum"))
    print(f"epoch {epoch}: val {val:.4f} lr {lr:.4f} momentum {momentum:.4f}")
print(f"{nn.functional.cross_entropy(best.eval()(images), labels).item():.4f}", best_loss < 2)
