"""DQN from pixels: catch a falling dot with a paddle of three."""

import random
from collections import deque, namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

random.seed(0)
torch.manual_seed(0)
Transition = namedtuple("Transition", ("state", "action", "next_state", "reward"))


class Catch:
    size = 7

    def reset(self):
        self.row, self.col, self.paddle = 0, random.randrange(self.size), self.size // 2
        return self.screen()

    def screen(self):
        screen = torch.zeros(1, 1, self.size, self.size)
        screen[0, 0, self.row, self.col] = 1
        screen[0, 0, -1, max(0, self.paddle - 1) : self.paddle + 2] = 1
        return screen

    def step(self, action):
        self.paddle = min(self.size - 1, max(0, self.paddle + action - 1))
        self.row += 1
        done = self.row == self.size - 1
        caught = abs(self.paddle - self.col) <= 1
        return self.screen(), (1.0 if caught else -1.0) if done else 0.0, done


class DQN(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, kernel_size=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 2 * 2, outputs)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.view(x.size(0), -1))


policy_net, target_net = DQN(3), DQN(3)
target_net.load_state_dict(policy_net.state_dict())
target_net.eval()
optimizer = optim.RMSprop(policy_net.parameters(), lr=1e-3)
memory, env, steps = deque(maxlen=200), Catch(), 0


def select_action(state):
    if random.random() > max(0.1, 0.9 - steps / 60):
        policy_net.eval()
        with torch.no_grad():
            action = policy_net(state).max(1)[1].view(1, 1)
        policy_net.train()
        return action
    return torch.tensor([[random.randrange(3)]], dtype=torch.long)


def optimize_model():
    batch = Transition(*zip(*random.sample(memory, 12), strict=True))
    non_final_mask = torch.tensor([s is not None for s in batch.next_state])
    non_final_next_states = torch.cat([s for s in batch.next_state if s is not None])
    state_batch, action_batch = torch.cat(batch.state), torch.cat(batch.action)
    reward_batch = torch.cat(batch.reward)
    state_action_values = policy_net(state_batch).gather(1, action_batch)
    next_state_values = torch.zeros(12)
    next_state_values[non_final_mask] = target_net(non_final_next_states).max(1)[0].detach()
    expected = next_state_values * 0.9 + reward_batch
    loss = F.smooth_l1_loss(state_action_values, expected.unsqueeze(1))
    optimizer.zero_grad()
    loss.backward()
    for param in policy_net.parameters():
        param.grad.data.clamp_(-1, 1)
    optimizer.step()
    return loss.item()


for episode in range(8):
    state, done, loss = env.reset(), False, float("nan")
    while not done:
        action = select_action(state)
        steps += 1
        next_state, reward, done = env.step(action.item())
        memory.append(
            Transition(state, action, None if done else next_state, torch.tensor([reward]))
        )
        state = next_state
        if len(memory) >= 12:
            loss = optimize_model()
    if episode % 3 == 0:
        target_net.load_state_dict(policy_net.state_dict())
    print(f"episode {episode}: reward {reward:+.0f}, loss {loss:.4f}")
