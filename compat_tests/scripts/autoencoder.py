# An autoencoder on 8x8 digits (scikit-learn's, or drawn ones where it is not installed).
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
np.random.seed(0)

try:
    from sklearn.datasets import load_digits

    images = load_digits().data.astype(np.float32) / 16
except ImportError:
    segments = [(0, slice(1, 7)), (slice(0, 4), 6), (slice(4, 8), 6), (7, slice(1, 7))]
    segments += [(slice(4, 8), 1), (slice(0, 4), 1), (3, slice(1, 7))]
    lit = ["012345", "12", "01643", "01623", "1256", "05623", "023456", "012", "0123456", "012356"]
    images = np.zeros((1000, 8, 8), dtype=np.float32)
    for i, image in enumerate(images):
        for segment in lit[i % 10]:
            image[segments[int(segment)]] = 1
    images = (0.9 * images + 0.1 * np.random.rand(1000, 8, 8).astype(np.float32)).reshape(-1, 64)


class Autoencoder(nn.Module):
    def __init__(self, code=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, code), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(code, 32), nn.LeakyReLU(0.1), nn.Linear(32, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x)).sigmoid()


loader = DataLoader(TensorDataset(torch.from_numpy(images)), batch_size=50, shuffle=True)
model = Autoencoder()
optimizer = optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True)
criterion = nn.MSELoss()
for epoch in range(4):
    total = 0.0
    for (batch,) in loader:
        loss = criterion(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    print("epoch {}: {}".format(epoch, total / len(images)))  # noqa: UP032

model.eval()
with torch.no_grad():
    codes = model.encoder(torch.from_numpy(images[:10]))
np.save("codes.npy", codes.numpy())
print(codes)
