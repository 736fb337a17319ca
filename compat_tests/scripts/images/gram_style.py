"""Style transfer's losses: an image is optimised so that its Gram matrices are another's."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

torch.manual_seed(0)


def gram_matrix(input):
    a, b, c, d = input.size()
    features = input.view(a * b, c * d)
    G = torch.mm(features, features.t())
    return G.div(a * b * c * d)


class StyleLoss(nn.Module):
    def __init__(self, target_feature):
        super().__init__()
        self.target = gram_matrix(target_feature).detach()

    def forward(self, input):
        self.loss = F.mse_loss(gram_matrix(input), self.target)
        return input


class ContentLoss(nn.Module):
    def __init__(self, target):
        super().__init__()
        self.target = target.detach()

    def forward(self, input):
        self.loss = F.mse_loss(input, self.target)
        return input


class Image(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.pixels = nn.Parameter(start.clone())

    def forward(self):
        return self.pixels.clamp(0, 1)


cnn = nn.Sequential(
    nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.ReLU()
).eval()
cnn.requires_grad_(False)
content, style = torch.rand(1, 3, 12, 12), torch.rand(1, 3, 12, 12).round()
model, style_losses, content_losses = nn.Sequential(), [], []
for i, layer in enumerate(cnn.children()):
    name = f"{type(layer).__name__.lower()}_{i}"
    model.add_module(name, layer)
    if isinstance(layer, nn.Conv2d):
        style_losses.append(StyleLoss(model(style)))
        model.add_module(f"style_{i}", style_losses[-1])
        if i:
            content_losses.append(ContentLoss(model(content)))
            model.add_module(f"content_{i}", content_losses[-1])
print([name for name, _ in model.named_children()])

image = Image(content)
optimizer = optim.LBFGS(image.parameters(), max_iter=3)
for run in range(3):

    def closure():
        optimizer.zero_grad()
        model(image())
        style_score = sum(layer.loss for layer in style_losses) * 1e4
        content_score = sum(layer.loss for layer in content_losses)
        loss = style_score + content_score
        loss.backward()
        return loss

    print(f"run {run}: {optimizer.step(closure).item():.3f}")
print(f"changed by {(image() - content).abs().mean().item():.3f}")
