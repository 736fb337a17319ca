# Fit y = a + b x + c x^2 + d x^3 to sin(x).
import math

import torch

torch.manual_seed(42)

x = torch.linspace(-math.pi, math.pi, 2000)
y = torch.sin(x)

powers = torch.tensor([1, 2, 3])
xx = x.unsqueeze(-1).pow(powers)

model = torch.nn.Sequential(
    torch.nn.Linear(3, 1),
    torch.nn.Flatten(0, 1),
)
loss_fn = torch.nn.MSELoss(reduction="sum")

learning_rate = 1e-6
for t in range(1, 501):
    y_pred = model(xx)
    loss = loss_fn(y_pred, y)
    if t % 100 == 0:
        print(t, loss.item())

    model.zero_grad()
    loss.backward()

    with torch.no_grad():
        for param in model.parameters():
            param -= learning_rate * param.grad

layer = model[0]
print(f"y = {layer.bias.item()} + {layer.weight[:, 0].item()} x")
print(f"    + {layer.weight[:, 1].item()} x^2 + {layer.weight[:, 2].item()} x^3")
torch.save(model.state_dict(), "polynomial.pt")
