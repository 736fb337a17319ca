"""Reinforcement learning as people write it: rows of the benchmark, each an update (see nets.py).

There is no real environment: observations and rewards are random numbers. A net learns nothing from
them, but the calls are the same.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributions import Categorical, Normal

from .nets import Built, row, sequential


@row("rl", "DQN, 4-128-128-2 by hand, SmoothL1Loss, AdamW, clipping, soft update")
def dqn(nn: Any, optim: Any) -> Built:
    """An update of PyTorch's tutorial on deep Q learning."""
    F = nn.functional

    class DQN(nn.Module):
        def __init__(self, n_observations: int, n_actions: int) -> None:
            super().__init__()
            self.layer1 = nn.Linear(n_observations, 128)
            self.layer2 = nn.Linear(128, 128)
            self.layer3 = nn.Linear(128, n_actions)

        def forward(self, x: Any) -> Any:
            x = F.relu(self.layer1(x))
            x = F.relu(self.layer2(x))
            return self.layer3(x)

    policy_net, target_net = DQN(4, 2), DQN(4, 2)
    target_net.load_state_dict(policy_net.state_dict())
    optimizer = optim.AdamW(policy_net.parameters(), lr=3e-4, amsgrad=True)
    criterion = nn.SmoothL1Loss()
    states, next_states = torch.randn(2, 10_000, 4)
    actions, rewards = torch.randint(2, (10_000, 1)), torch.ones(10_000)
    ends = torch.rand(10_000) < 0.05

    def step() -> Any:
        batch = torch.randint(10_000, (128,))
        state_action_values = policy_net(states[batch]).gather(1, actions[batch])
        non_final = ~ends[batch]
        next_state_values = torch.zeros(128)
        with torch.no_grad():
            after = next_states[batch][non_final]
            next_state_values[non_final] = target_net(after).max(1).values
        expected = (next_state_values * 0.99) + rewards[batch]
        loss = criterion(state_action_values, expected.unsqueeze(1))

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(policy_net.parameters(), 100)
        optimizer.step()

        target_weights, policy_weights = target_net.state_dict(), policy_net.state_dict()
        for key in policy_weights:
            target_weights[key] = policy_weights[key] * 0.005 + target_weights[key] * 0.995
        target_net.load_state_dict(target_weights)
        return loss

    return step, policy_net, target_net


@row("rl", "PPO, 64-64 with Tanh, clipped loss, batch 64, Adam", {"Categorical": 4, "Normal": 17})
def ppo(nn: Any, optim: Any, observed: int) -> Built:
    """CleanRL's update on one minibatch: of CartPole, or of HalfCheetah."""
    acts = 2 if observed == 4 else 6

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic = sequential(nn, (observed, 64, 64, 1), lambda nn, size: nn.Tanh())
            self.actor = sequential(nn, (observed, 64, 64, acts), lambda nn, size: nn.Tanh())
            self.actor_logstd = nn.Parameter(torch.zeros(1, acts))

        def get_value(self, x: Any) -> Any:
            return self.critic(x)

        def get_action_and_value(self, x: Any, action: Any = None) -> Any:
            if observed == 4:
                probs = Categorical(logits=self.actor(x))
                action = probs.sample() if action is None else action
                return action, probs.log_prob(action), probs.entropy(), self.critic(x)
            action_mean = self.actor(x)
            action_std = torch.exp(self.actor_logstd.expand_as(action_mean))
            normal = Normal(action_mean, action_std)
            action = normal.sample() if action is None else action
            log_prob, entropy = normal.log_prob(action).sum(1), normal.entropy().sum(1)
            return action, log_prob, entropy, self.critic(x)

    agent = Agent()
    optimizer = optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5)

    def minibatches() -> Iterator[Any]:
        """Ten epochs over each 2,048 transitions."""
        while True:
            obs, (advantages, returns) = torch.randn(2048, observed), torch.randn(2, 2048)
            with torch.no_grad():
                actions, log_probs, _, values = agent.get_action_and_value(obs)
            rollout = obs, actions, log_probs, advantages, returns, values.view(-1)
            for _ in range(10):
                for inds in torch.randperm(2048).split(64):
                    yield [part[inds] for part in rollout]

    batches = minibatches()

    def step() -> Any:
        obs, actions, log_probs, advantages, returns, values = next(batches)
        _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
        logratio = newlogprob - log_probs
        ratio = logratio.exp()
        with torch.no_grad():
            approx_kl = ((ratio - 1) - logratio).mean()
            clipfrac = ((ratio - 1.0).abs() > 0.2).float().mean().item()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        pg_loss1 = -advantages * ratio
        pg_loss2 = -advantages * torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
        pg_loss = torch.max(pg_loss1, pg_loss2).mean()

        newvalue = newvalue.view(-1)
        v_loss_unclipped = (newvalue - returns) ** 2
        v_clipped = values + torch.clamp(newvalue - values, -0.2, 0.2)
        v_loss_clipped = (v_clipped - returns) ** 2
        v_loss = 0.5 * torch.max(v_loss_unclipped, v_loss_clipped).mean()

        loss = pg_loss - 0.01 * entropy.mean() + v_loss * 0.5
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()
        return loss, approx_kl, torch.tensor(clipfrac)

    return step, agent


@row("rl", "SAC, batch 256, Adam", {"width 256": 256, "width 64": 64})
def sac(nn: Any, optim: Any, width: int) -> Built:
    """CleanRL's update for continuous actions, of the size of HalfCheetah."""
    F, observed, acts, batch = nn.functional, 17, 6, 256

    class SoftQNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(observed + acts, width)
            self.fc2 = nn.Linear(width, width)
            self.fc3 = nn.Linear(width, 1)

        def forward(self, x: Any, a: Any) -> Any:
            x = torch.cat([x, a], 1)
            x = F.relu(self.fc1(x))
            x = F.relu(self.fc2(x))
            return self.fc3(x)

    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(observed, width)
            self.fc2 = nn.Linear(width, width)
            self.fc_mean = nn.Linear(width, acts)
            self.fc_logstd = nn.Linear(width, acts)

        def forward(self, x: Any) -> tuple[Any, Any]:
            x = F.relu(self.fc1(x))
            x = F.relu(self.fc2(x))
            log_std = torch.tanh(self.fc_logstd(x))
            return self.fc_mean(x), -5 + 0.5 * (2 - -5) * (log_std + 1)

        def get_action(self, x: Any) -> tuple[Any, Any]:
            mean, log_std = self(x)
            normal = Normal(mean, log_std.exp())
            x_t = normal.rsample()
            action = torch.tanh(x_t)
            log_prob = normal.log_prob(x_t)
            log_prob -= torch.log((1 - action.pow(2)) + 1e-6)
            return action, log_prob.sum(1, keepdim=True)

    actor = Actor()
    qf1, qf2, qf1_target, qf2_target = (SoftQNetwork() for _ in range(4))
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    q_optimizer = optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=1e-3)
    actor_optimizer = optim.Adam(actor.parameters(), lr=3e-4)
    log_alpha = nn.Parameter(torch.zeros(1))
    a_optimizer = optim.Adam([log_alpha], lr=1e-3)
    alpha = 1.0
    observations, next_observations = torch.randn(2, 10_000, observed)
    done, rewards = (torch.rand(10_000) < 0.05).float(), torch.randn(10_000)
    actions = torch.rand(10_000, acts) * 2 - 1

    def step() -> Any:
        nonlocal alpha
        data = torch.randint(10_000, (batch,))
        obs, next_obs = observations[data], next_observations[data]
        with torch.no_grad():
            next_action, next_log_pi = actor.get_action(next_obs)
            qf1_next, qf2_next = (
                qf1_target(next_obs, next_action),
                qf2_target(next_obs, next_action),
            )
            min_qf_next = torch.min(qf1_next, qf2_next) - alpha * next_log_pi
            next_q_value = rewards[data] + (1 - done[data]) * 0.99 * min_qf_next.view(-1)

        qf1_loss = F.mse_loss(qf1(obs, actions[data]).view(-1), next_q_value)
        qf2_loss = F.mse_loss(qf2(obs, actions[data]).view(-1), next_q_value)
        qf_loss = qf1_loss + qf2_loss
        q_optimizer.zero_grad()
        qf_loss.backward()
        q_optimizer.step()

        pi, log_pi = actor.get_action(obs)
        min_qf_pi = torch.min(qf1(obs, pi), qf2(obs, pi))
        actor_loss = ((alpha * log_pi) - min_qf_pi).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()

        with torch.no_grad():
            _, log_pi = actor.get_action(obs)
        alpha_loss = (-log_alpha.exp() * (log_pi - acts)).mean()
        a_optimizer.zero_grad()
        alpha_loss.backward()
        a_optimizer.step()
        alpha = log_alpha.exp().item()

        for net, target_net in ((qf1, qf1_target), (qf2, qf2_target)):
            for param, target_param in zip(net.parameters(), target_net.parameters(), strict=True):
                target_param.data.copy_(0.005 * param.data + (1 - 0.005) * target_param.data)
        return qf_loss, actor_loss, alpha_loss

    return step, actor, qf1, qf2, qf1_target, qf2_target, log_alpha


class MadeUp:
    """An environment whose episodes are of 10 to 40 steps."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.observations = torch.randn(100, 4)

    def reset(self) -> torch.Tensor:
        self.left = self.random.randint(10, 40)
        return self.observations[self.left]

    def step(self, action: int) -> tuple[torch.Tensor, float, bool]:
        self.left -= 1
        return self.observations[self.left + action], 1.0, self.left == 0


def discounted(rewards: list[float]) -> torch.Tensor:
    """The return from each step on, over the episode made to have mean 0 and deviation 1."""
    returns: list[float] = []
    for reward in reversed(rewards):
        returns.insert(0, reward + 0.99 * (returns[0] if returns else 0.0))
    found = torch.tensor(returns)
    return (found - found.mean()) / (found.std() + 1e-8)


@row("rl", "REINFORCE, an episode by single steps, 4-128-2 by hand, Dropout, Adam")
def reinforce(nn: Any, optim: Any) -> Built:
    """PyTorch's example."""
    F = nn.functional

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.affine1 = nn.Linear(4, 128)
            self.dropout = nn.Dropout(p=0.6)
            self.affine2 = nn.Linear(128, 2)

        def forward(self, x: Any) -> Any:
            x = self.affine1(x)
            x = self.dropout(x)
            x = F.relu(x)
            action_scores = self.affine2(x)
            return F.softmax(action_scores, dim=1)

    policy, env = Policy(), MadeUp()
    optimizer = optim.Adam(policy.parameters(), lr=1e-3)

    def step() -> Any:
        state, done, log_probs, rewards = env.reset(), False, [], []
        while not done:
            m = Categorical(policy(state.unsqueeze(0)))
            action = m.sample()
            log_probs.append(m.log_prob(action))
            state, reward, done = env.step(action.item())
            rewards.append(reward)
        policy_loss = []
        for log_prob, R in zip(log_probs, discounted(rewards), strict=True):
            policy_loss.append(-log_prob * R)
        optimizer.zero_grad()
        loss = torch.cat(policy_loss).sum()
        loss.backward()
        optimizer.step()
        return loss

    return step, policy


@row("rl", "A2C, an episode by single steps, 4-128-(2, 1) by hand, Adam")
def actor_critic(nn: Any, optim: Any) -> Built:
    """PyTorch's example."""
    F = nn.functional

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.affine1 = nn.Linear(4, 128)
            self.action_head = nn.Linear(128, 2)
            self.value_head = nn.Linear(128, 1)

        def forward(self, x: Any) -> tuple[Any, Any]:
            x = F.relu(self.affine1(x))
            action_prob = F.softmax(self.action_head(x), dim=-1)
            return action_prob, self.value_head(x)

    model, env = Policy(), MadeUp()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)

    def step() -> Any:
        state, done, saved, rewards = env.reset(), False, [], []
        while not done:
            probs, state_value = model(state)
            m = Categorical(probs)
            action = m.sample()
            saved.append((m.log_prob(action), state_value))
            state, reward, done = env.step(action.item())
            rewards.append(reward)
        policy_losses, value_losses = [], []
        for (log_prob, value), R in zip(saved, discounted(rewards), strict=True):
            advantage = R - value.item()
            policy_losses.append(-log_prob * advantage)
            value_losses.append(F.smooth_l1_loss(value, torch.tensor([R])))
        optimizer.zero_grad()
        loss = torch.stack(policy_losses).sum() + torch.stack(value_losses).sum()
        loss.backward()
        optimizer.step()
        return loss

    return step, model
