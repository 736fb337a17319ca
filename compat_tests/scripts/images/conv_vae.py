"""A convolutional variational autoencoder on bars."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import optim

torch.manual_seed(0)


class VAE(nn.Module):
    def __init__(self, latent=4):
        super().__init__()
        self.enc1 = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.enc2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.mu = nn.Linear(8 * 2 * 2, latent)
        self.logvar = nn.Linear(8 * 2 * 2, latent)
        self.fc = nn.Linear(latent, 8 * 2 * 2)
        self.dec1 = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.dec2 = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)

    def encode(self, x):
        h = F.elu(self.enc2(F.elu(self.enc1(x)))).flatten(1)
        return self.mu(h), self.logvar(h)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        h = F.elu(self.fc(z)).view(-1, 8, 2, 2)
        return torch.sigmoid(self.dec2(F.elu(self.dec1(h))))

    def forward(self, x):
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    BCE = F.binary_cross_entropy(recon_x, x, reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return BCE + KLD, KLD


images = torch.zeros(32, 1, 8, 8)
for i in range(32):
    images[i, 0, :, i % 8] = 1
    images[i, 0, (i // 4) % 8] = 1
model = VAE()
optimizer = optim.Adam(model.parameters(), lr=5e-3)
for epoch in range(4):
    train_loss = 0
    for data in images[torch.randperm(32)].split(8):
        optimizer.zero_grad()
        recon, mu, logvar = model(data)
        loss, kld = loss_function(recon, data, mu, logvar)
        loss.backward()
        train_loss += loss.item()
        optimizer.step()
    print(f"====> Epoch: {epoch} Average loss: {train_loss / 32:.4f} KLD {kld.item():.3f}")
with torch.no_grad():
    sample = model.decode(torch.randn(4, 4))
print(tuple(sample.shape), f"{sample.mean().item():.4f}")
