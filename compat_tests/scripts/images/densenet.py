"""A dense block: every layer sees all before it."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)


class DenseLayer(nn.Module):
    def __init__(self, num_input_features, growth_rate, drop_rate):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.conv = nn.Conv2d(num_input_features, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, *prev_features):
        x = self.conv(F.relu(self.norm(torch.cat(prev_features, 1)), inplace=True))
        return F.dropout(x, p=self.drop_rate, training=self.training)


class DenseBlock(nn.Module):
    def __init__(self, num_layers, num_input_features, growth_rate, drop_rate=0.1):
        super().__init__()
        for i in range(num_layers):
            layer = DenseLayer(num_input_features + i * growth_rate, growth_rate, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, init_features):
        features = [init_features]
        for layer in self._modules.values():
            features.append(layer(*features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, growth=3, num_classes=4):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block1 = DenseBlock(3, 4, growth)
        self.trans = nn.Sequential(nn.Conv2d(13, 6, 1), nn.AvgPool2d(2, 2))
        self.block2 = DenseBlock(2, 6, growth)
        self.norm = nn.BatchNorm2d(12)
        self.classifier = nn.Linear(12, num_classes)

    def forward(self, x):
        x = self.block2(self.trans(self.block1(self.conv0(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).squeeze(-1).squeeze(-1)
        return self.classifier(x)


net = DenseNet()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.1)
labels = torch.arange(12) % 4
images = 0.3 * torch.randn(12, 3, 8, 8)
images[:, 0] += torch.linspace(-1, 1, 8) * labels[:, None, None]
for epoch in range(5):
    net.train()
    loss = F.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(images).argmax(1) == labels).float().mean()
    print(
        "epoch",
        epoch,
        f"loss {loss.item():.4f} accuracy {accuracy:.2f}",
        scheduler.get_last_lr(),
    )
print(net.block1)
