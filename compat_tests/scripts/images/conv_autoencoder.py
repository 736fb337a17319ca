"""A denoising autoencoder: strided convolutions in, transposed ones out."""

import torch
from torch import nn, optim

torch.manual_seed(1)
y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
centres = torch.rand(64, 2, 1, 1) - 0.5
images = torch.exp(-8 * ((x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2)).unsqueeze(1)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(True),
            nn.Conv2d(8, 4, 3, stride=2, padding=1),
            nn.ReLU(True),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 1, 3, stride=2, padding=1, output_padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


model = Autoencoder()
criterion = nn.BCELoss()
optimizer = optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-5)

for epoch in range(4):
    running = 0.0
    for batch in images.split(16):
        noisy = (batch + 0.2 * torch.randn_like(batch)).clamp(0, 1)
        optimizer.zero_grad()
        loss = criterion(model(noisy), batch)
        loss.backward()
        optimizer.step()
        running += loss.item()
    print(f"epoch [{epoch + 1}/{4}], loss: {running / 4:.4f}")
with torch.no_grad():
    code = model.encoder(images[:1])
print(tuple(code.shape), f"{nn.functional.mse_loss(model(images), images).item():.4f}")
