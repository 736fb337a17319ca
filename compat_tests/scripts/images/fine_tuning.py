"""Train a net on one task; freeze its features, and fine-tune a new head on another."""

import copy

import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(3)


class SmallNet(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


def train(model, optimizer, x, y, epochs):
    criterion = nn.CrossEntropyLoss()
    best_acc, best = 0.0, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        optimizer.zero_grad()
        outputs = model(x)
        _, preds = torch.max(outputs, 1)
        loss = criterion(outputs, y)
        loss.backward()
        optimizer.step()
        acc = torch.sum(preds == y.data).double() / len(y)
        print(f"  {epoch}: loss {loss.item():.4f} acc {acc:.4f}")
        if acc > best_acc:
            best_acc, best = acc, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return model


x = torch.randn(24, 3, 8, 8)
first, second = torch.arange(24) % 4, torch.arange(24) // 12
x += torch.eye(4)[first][:, :3, None, None]
model = SmallNet()
print("from scratch")
model = train(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), x, first, 3)

print("the head alone")
for param in model.features.parameters():
    param.requires_grad = False
before = model.features[0].weight.clone()
model.classifier = nn.Linear(model.classifier.in_features, 2)
trainable = [p for p in model.parameters() if p.requires_grad]
print(sum(p.numel() for p in trainable), "of", sum(p.numel() for p in model.parameters()))
model = train(model, optim.Adam(trainable, lr=0.05), x, second, 3)
print("features as before:", torch.equal(before, model.features[0].weight))

print("all of it, at two rates")
for module in model.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.eval()
for param in model.parameters():
    param.requires_grad_(True)
groups = [
    {"params": model.features.parameters(), "lr": 0.001},
    {"params": model.classifier.parameters()},
]
train(model, optim.SGD(groups, lr=0.05, momentum=0.9), x, second, 3)
