"""A user's script, for `mypy --strict` against the installed package."""

import torch

import nnmirror.nn.functional as F
from nnmirror import nn, optim
from nnmirror.nn.utils import clip_grad_norm_
from nnmirror.optim import lr_scheduler


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 25), nn.ReLU(), nn.Linear(25, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.tanh(self.layers(x)) * self.scale


model = Net().to(torch.float64)
nn.init.xavier_normal_(model.scale.view(1, 1))
optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = lr_scheduler.StepLR(optimizer, 10)
criterion: nn.MSELoss = nn.MSELoss()
with nn.watch(model) as seen:
    optimizer.zero_grad()
    x = torch.ones(4, 2, dtype=torch.float64)
    loss = criterion(model(x), x[:, :1])
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
model.load_state_dict(model.state_dict())
print(seen.table(), loss.item(), scheduler.get_last_lr())
print(isinstance(model, nn.LSTM))  # type: ignore[attr-defined]  # an error, not Any
try:
    print(nn.LSTM(1, 1))  # type: ignore[attr-defined]
except NotImplementedError as e:
    print(e)
lbfgs: optim.LBFGS = optim.LBFGS(model.parameters())
print(isinstance(lbfgs, optim.Optimizer))
