"""Small pictures of three shapes, with augmentations made by hand."""

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.utils.data import DataLoader, Dataset

random.seed(0)
torch.manual_seed(0)


class Shapes(Dataset):
    def __init__(self, n, train):
        self.train = train
        self.images = 0.1 * torch.rand(n, 1, 12, 12)
        self.labels = torch.randint(0, 3, (n,))
        for image, label in zip(self.images, self.labels, strict=True):
            if label == 0:
                image[0, 3:9, 3:9] += 1
            elif label == 1:
                image[0, 5:7, :] += 1
            else:
                image[0] += torch.eye(12)

    def __len__(self):
        return len(self.images)

    def augment(self, image):
        if random.random() < 0.5:
            image = torch.flip(image, dims=[-1])
        top, left = random.randint(0, 2), random.randint(0, 2)
        image = F.pad(image, (1, 1, 1, 1))[:, top : top + 12, left : left + 12]
        return image + 0.05 * torch.randn_like(image)

    def __getitem__(self, i):
        image = self.augment(self.images[i]) if self.train else self.images[i]
        return (image - 0.2) / 0.4, self.labels[i]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, 1)
        self.conv2 = nn.Conv2d(6, 8, 3, 1)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(8 * 4 * 4, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = torch.flatten(self.dropout(x), 1)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), dim=1)


train_loader = DataLoader(Shapes(96, True), batch_size=16, shuffle=True)
test_loader = DataLoader(Shapes(48, False), batch_size=48)
model = Net()
optimizer = optim.Adadelta(model.parameters(), lr=1.0)
scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)

for epoch in range(1, 4):
    model.train()
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            correct += model(data).argmax(dim=1).eq(target).sum().item()
    print(f"epoch {epoch}: loss {loss.item():.4f}, accuracy {correct}/48")
