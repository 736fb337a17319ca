"""The tape: any wiring of modules gets the right gradients, or an error that says why."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import nnmirror

from .parity import both, normal, parity, same

GLUE = {
    "add": lambda a, b: a + b,
    "add scalar": lambda a, b: 1 + (a + 2),
    "add alpha": lambda a, b: torch.add(a, b, alpha=3),
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: 1 - a,
    "sub alpha": lambda a, b: torch.sub(a, b, alpha=0.5),
    "mul": lambda a, b: a * b,
    "mul scalar": lambda a, b: 3 * a * 2.5,
    "square by mul": lambda a, b: a * a,
    "div": lambda a, b: a / b,
    "div scalar": lambda a, b: a / 3,
    "rdiv": lambda a, b: 2 / a,
    "neg": lambda a, b: -a,
    "pow 2": lambda a, b: a**2,
    "pow 3.5": lambda a, b: (a * a) ** 3.5,
    "pow 0": lambda a, b: a**0,
    "pow -1": lambda a, b: a.pow(-1),
    "rpow": lambda a, b: 2**a,
    "rpow 0": lambda a, b: 0 ** (a * a),
    "pow tensor": lambda a, b: (a * a) ** b,
    "square": lambda a, b: torch.square(a),
    "broadcast": lambda a, b: a * b[0] + b[:, :1],
    "plain operand": lambda a, b: a * torch.arange(3.0) + torch.ones(4, 1),
    "double operand": lambda a, b: a * torch.arange(3, dtype=torch.float64),
    "integer operand": lambda a, b: a * torch.arange(3),
    "sum": lambda a, b: a.sum(),
    "sum dim": lambda a, b: a.sum(0) + a.sum(dim=-2),
    "sum keepdim": lambda a, b: a.sum((0, 1), keepdim=True),
    "sum axis": lambda a, b: a.sum(axis=1),
    "sum dtype": lambda a, b: a.sum(dtype=torch.float64),
    "sum function": lambda a, b: torch.sum(a, [1]),
    "mean": lambda a, b: a.mean(),
    "mean dim": lambda a, b: a.mean(1, True) + torch.mean(a, (0, 1)),
    "exp": lambda a, b: a.exp() + (torch.exp(b) * 0.1).exp_(),
    "exp of a saved result": lambda a, b: torch.exp(b).exp_(),
    "log": lambda a, b: (a * a).log() + torch.log((b * b).add_(1)),
    "log of negatives": lambda a, b: a.log(),
    "log1p": lambda a, b: torch.log1p(a * a),
    "sqrt": lambda a, b: (a * a).sqrt() * torch.sqrt(b.abs()),
    "sqrt at 0": lambda a, b: (a - a).sqrt(),
    "rsqrt": lambda a, b: (a * a + 1).rsqrt(),
    "abs": lambda a, b: abs(a) + b.abs() + torch.abs(a - a),
    "sin": lambda a, b: a.sin() + torch.sin(b),
    "cos": lambda a, b: torch.cos(a) * b.cos(),
    "steps": lambda a, b: a.sign() + a.floor() + torch.ceil(b) + (b * 1).trunc_() + a,
    "var of no dimension": lambda a, b: a.var(dim=()) + b.std(dim=[]),
    "atan2 at 0": lambda a, b: torch.atan2(a - a, b - b) + torch.atan2(a, b),
    "narrow from the end": lambda a, b: a.narrow(0, -2, 1),
    "sigmoid": lambda a, b: a.sigmoid() * torch.sigmoid(b),
    "sigmoid_": lambda a, b: (a * 3).sigmoid_(),
    "maximum": lambda a, b: torch.maximum(a, b) + a.maximum(a.detach()),
    "minimum": lambda a, b: torch.minimum(a, b[0]) * b.minimum(torch.zeros(3)),
    "where": lambda a, b: torch.where(a > 0, a, b) + torch.where(b > 0, 1.0, a),
    "where method": lambda a, b: a.where(a > 0, b),
    "where plain": lambda a, b: torch.where(torch.arange(3) > 1, torch.ones(1), b),
    "cat": lambda a, b: torch.cat([a, b, a], dim=1),
    "cat one plain": lambda a, b: torch.cat((torch.ones(2, 3), a)),
    "cat with empty": lambda a, b: torch.cat([torch.empty(0), a]),
    "cat axis": lambda a, b: torch.cat([a, b], axis=1),
    "stack": lambda a, b: torch.stack([a, b], 1),
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "clamp min": lambda a, b: a.clamp(min=0),
    "clamp max": lambda a, b: torch.clamp(a, max=0.1),
    "clamp tensors": lambda a, b: a.clamp(b, b + 0.5),
    "clamp crossed": lambda a, b: torch.clamp(a, b + 0.5, b),
    "clamp_min": lambda a, b: a.clamp_min(0.1),
    "clamp_max": lambda a, b: a.clamp_max(b),
    "relu": lambda a, b: a.relu(),
    "torch.relu": lambda a, b: torch.relu(a),
    "tanh": lambda a, b: a.tanh(),
    "matmul": lambda a, b: a @ b.t(),
    "matmul T": lambda a, b: a.T @ b,
    "matmul vector": lambda a, b: a @ b[0],
    "vector matmul": lambda a, b: a[:, 0] @ b,
    "dot": lambda a, b: a[0] @ b[1],
    "mm": lambda a, b: torch.mm(a, b.transpose(0, 1)),
    "matmul batch": lambda a, b: a.expand(2, 4, 3) @ b.t(),
    "matmul batch both": lambda a, b: torch.stack([a, b]) @ torch.stack([b.t(), a.t()]),
    "matmul broadcast": lambda a, b: torch.matmul(
        torch.stack([a, b]).unsqueeze(1), b.t().unsqueeze(0)
    ),
    "matmul 2d 3d": lambda a, b: a @ torch.stack([b.t(), a.t()]),
    "matmul 1d 3d": lambda a, b: a[0] @ torch.stack([b.t(), a.t()]),
    "matmul 3d 1d": lambda a, b: torch.stack([a, b]) @ a[0],
    "matmul plain": lambda a, b: torch.ones(2, 4) @ a,
    "view": lambda a, b: a.view(-1),
    "view sizes": lambda a, b: a.view(2, 6),
    "view tuple": lambda a, b: a.view((3, 4)),
    "view_as": lambda a, b: a.view_as(b),
    "reshape": lambda a, b: a.reshape(3, -1),
    "reshape copies": lambda a, b: a.t().reshape(4, 3),
    "flatten": lambda a, b: a.flatten(),
    "flatten transposed": lambda a, b: torch.flatten(a.t()),
    "squeeze": lambda a, b: a[:1].squeeze(),
    "squeeze dim": lambda a, b: a[:, :1].squeeze(1).squeeze(0),
    "squeeze dims": lambda a, b: a[:1, :1].squeeze((0, 1)),
    "unsqueeze": lambda a, b: a.unsqueeze(-1),
    "transpose": lambda a, b: a.transpose(0, 1),
    "t": lambda a, b: a.t(),
    "T": lambda a, b: a.T,
    "mT": lambda a, b: a.mT,
    "permute": lambda a, b: a.permute(1, 0),
    "expand": lambda a, b: a.unsqueeze(0).expand(2, -1, -1),
    "index": lambda a, b: a[1],
    "index negative": lambda a, b: a[-1, 2],
    "slice": lambda a, b: a[1:, ::2],
    "ellipsis": lambda a, b: a[..., 0],
    "none": lambda a, b: a[None, :, None],
    "colon": lambda a, b: a[:],
    "list": lambda a, b: a[[0, 2, 0]],
    "tensor": lambda a, b: a[torch.tensor([3, 1, 1])],
    "two tensors": lambda a, b: a[torch.tensor([3, 1, 1]), torch.tensor([0, 0, 0])],
    "tensor and slice": lambda a, b: a[torch.tensor([1, 1]), 1:],
    "tensor number": lambda a, b: a[torch.tensor(2)],
    "mask": lambda a, b: a[a > 0],
    "row mask": lambda a, b: a[torch.tensor([True, False, True, True])],
    "iterate": lambda a, b: sum(row.sum() * i for i, row in enumerate(a)),
    "unbind": lambda a, b: a.unbind(1)[2] * a.unbind(1)[0],
    "contiguous": lambda a, b: a.t().contiguous() + a.contiguous().t(),
    "clone": lambda a, b: a.clone() * 2,
    "double": lambda a, b: a.double().float(),
    "detach": lambda a, b: a * b.detach(),
    "in place": lambda a, b: (a * 1).add_(b).mul_(2).sub_(1).div_(b),
    "in place operators": lambda a, b: _inplace_operators(a * 1, b),
    "in place clamp": lambda a, b: (a * 1).clamp_(min=0),
    "relu_": lambda a, b: torch.relu_(a * 2) + (b * 2).relu_(),
    "tanh_": lambda a, b: (a * 2).tanh_(),
    "accumulate into a plain tensor": lambda a, b: _total(a, b),
}


def _inplace_operators(a, b):
    a += b
    a *= 2
    a -= b
    a /= 3
    return a


def _total(a, b):
    total = torch.zeros(4, 3)
    total += a
    total += b
    return total


def _two_layers(nn, x, op):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    return first, second, op(first(x), second(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GLUE)
@parity
def test_glue_dtypes(nn, optim, name, dtype):
    leaves = [torch.randn(4, 3).to(dtype).requires_grad_() for _ in range(2)]
    out = GLUE[name](*[nn.functional.leaky_relu(x, 1.0) for x in leaves])
    out.backward(torch.randn(out.shape).to(out.dtype))
    return out, leaves


@pytest.mark.parametrize("name", GLUE)
@parity
def test_glue(nn, optim, name):
    x = torch.randn(4, 3, requires_grad=True)
    first, second, out = _two_layers(nn, x, GLUE[name])
    made = out.grad_fn.name()
    out.backward(torch.randn(out.shape).to(out.dtype))
    return made, out, x, dict(first.named_parameters()), dict(second.named_parameters())


@pytest.mark.parametrize("name", GLUE)
@parity
def test_glue_without_grad(nn, optim, name):
    with torch.no_grad():
        return _two_layers(nn, torch.randn(4, 3), GLUE[name])[2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@parity
def test_softmax_of_every_width(nn, optim, name, rows, threads):
    """The kernel's order of summation depends on the width, the rows and the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for n in (1, 2, 7, 8, 9, 15, 16, 17, 18, 24, 31, 32, 33, 40, 47, 65, 100, 257):
            for g in (torch.randn(rows, n), torch.randn(rows, 1).expand(rows, n)):
                p = nn.Parameter(torch.randn(rows, n).to(dtype))
                getattr(p, name)(-1).backward(g.to(dtype))
                found.append(p.grad)
            p = nn.Parameter(torch.randn(n, rows).to(dtype))
            y = p.t()
            (y.exp() * getattr(y, name)(-1)).sum(-1).backward(torch.ones(rows).to(dtype))
            found.append(p.grad)
    torch.set_num_threads(before)
    return found


EQUATIONS = ["ij,kj->ik", "bij,bj->bi", "ij,jk", "i,j->ij", "ij->ji", "ij->", "aec,dc->dae", "cb,ca->bac",
             "bc,bda->ab", "bed,ed->", "eb,b->e", "cba,cd->adb", "cdb,aeb->cead", "bhqd,bhkd->bhqk"]  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 3, 5, 8, 4), (1, 3, 1, 8, 2), (4, 1, 2, 1, 3)])
@pytest.mark.parametrize("equation", EQUATIONS)
@parity
def test_einsum(nn, optim, equation, sizes):
    terms = equation.partition("->")[0].split(",")
    size = {c: sizes[i % 5] for i, c in enumerate(sorted(set("".join(terms))))}
    ps = [nn.Parameter(torch.randn([size[c] for c in term])) for term in terms]
    z = torch.einsum(equation, *ps)
    z.backward(torch.randn(z.shape))
    return z, [p.grad for p in ps]


@parity
def test_module_used_twice_and_branches_added(nn, optim):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(3, 3)
            self.left = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))
            self.right = nn.Tanh()

        def forward(self, x):
            h = self.shared(x)
            for _ in range(3):
                h = self.right(self.shared(h)) + x
            return self.left(h) * self.right(h) + self.shared(h.detach())

    net = Net()
    x = torch.randn(4, 3, requires_grad=True)
    out = net(x)
    out.pow(2).sum().backward()
    return out, x, dict(net.named_parameters()), repr(net)


@parity
def test_gradients_accumulate_over_backward_calls(nn, optim):
    net, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    first = None
    for _ in range(3):
        net(x).sum().backward()
        first = net.weight.grad if first is None else first
        assert net.weight.grad is first  # accumulated in place
    return x, dict(net.named_parameters())


@parity
def test_two_losses_share_a_trunk(nn, optim):
    trunk, a, b = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 1)
    h = trunk(torch.randn(4, 3))
    (a(h).mean() + b(h).sum()).backward(retain_graph=True)
    b(h).mean().backward()
    return [dict(m.named_parameters()) for m in (trunk, a, b)]


@parity
def test_first_gradient_is_not_shared_between_leaves(nn, optim):
    """In x + y both inputs have the same gradient, but each .grad must be its own tensor."""
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    out = a + b
    start = torch.ones(3)
    out.backward(start)
    a.grad.mul_(5)
    c = nn.Parameter(torch.randn(4, 3))
    c.view(-1).sum().backward()
    c.grad.add_(1)
    return a, b, start, c


@parity
def test_retain_grad(nn, optim):
    net = nn.Linear(3, 3)
    h = net(torch.randn(4, 3))
    before = h.retains_grad
    h.retain_grad()
    (h * h).sum().backward(retain_graph=True)
    (h * h).sum().backward()
    return before, h.retains_grad, h.grad, h.is_leaf, net.weight.is_leaf


@parity
def test_grad_of_a_non_leaf_warns(nn, optim):
    return nn.Linear(3, 3)(torch.randn(4, 3)).grad


@parity
def test_leaf_attributes(nn, optim):
    p = nn.Parameter(torch.randn(3))
    q = nn.Parameter(torch.randn(3), requires_grad=False)
    y = nn.functional.tanh(p)
    return (
        [
            (t.requires_grad, t.is_leaf, t.grad_fn is None, t.output_nr)
            for t in (p, q, y, p.detach())
        ],
        type(p).__name__,
        isinstance(p, torch.nn.Parameter),
        isinstance(p, nn.Parameter),
        isinstance(y, nn.Parameter),
        y.data.requires_grad,
        torch.is_tensor(y),
        len(y),
        float(y[0].item()),
        y.tolist(),
        bool(y[0] > 5),
        y.shape,
        y.argmax(),
        (y > 0),
        torch.zeros_like(y),
        y.new_ones(2),
    )


@parity
def test_hooks_on_tensors(nn, optim):
    net, seen = nn.Linear(3, 2), []
    x = torch.randn(4, 3, requires_grad=True)
    x.register_hook(lambda g: seen.append(("x", g.clone())))
    net.weight.register_hook(lambda g: g * 2)
    net.bias.register_post_accumulate_grad_hook(lambda p: seen.append(("bias", p.grad.clone())))
    h = net(x)
    handle = h.register_hook(lambda g: g + 1)
    h.register_hook(lambda g: seen.append(("h", g.clone())))
    h.sum().backward(retain_graph=True)
    handle.remove()
    h.sum().backward()
    return seen, x, dict(net.named_parameters())


@parity
def test_backward_into_chosen_inputs(nn, optim):
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(4, 3)
    seen = []
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad)))
    net(x).sum().backward(inputs=[net[0].weight, net[2].bias])
    return dict(net.named_parameters()), seen


@parity
def test_a_hook_on_a_parameter_runs_before_the_layers_further_back(nn, optim):
    """If a hook changes a weight that the rest of backward needs, backward raises an error."""
    net, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1)), []
    net[3].weight.register_post_accumulate_grad_hook(lambda p: seen.append(net[2].weight.mul_(2)))
    net(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize("value", [3, torch.ones(2), torch.ones(3)])
@parity
def test_what_a_post_accumulate_hook_may_not_return(nn, optim, value):
    p, seen = nn.Parameter(torch.ones(2)), []
    p.register_post_accumulate_grad_hook(lambda p: value)
    p.register_post_accumulate_grad_hook(seen.append)
    nn.functional.tanh(p).sum().backward()


@parity
def test_grad_function(nn, optim):
    take = torch.autograd.grad if nn is torch.nn else nnmirror.grad
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(4, 3)
    x.requires_grad_()
    h = net[1](net[0](x))
    y = net[2](h)
    found = take(y.sum(), [x, h, net[0].weight], retain_graph=True)
    more = take([y, h], x, grad_outputs=[torch.randn(4, 1), torch.randn(4, 3)], retain_graph=True)
    unused = take(y.sum(), [nn.Linear(2, 2).weight, x], allow_unused=True, retain_graph=True)
    zeros = take(y.sum(), nn.Parameter(torch.ones(2)), materialize_grads=True, retain_graph=True)
    twice = take(y.sum(), [x, h, x])
    return found, more, unused, zeros, twice, dict(net.named_parameters())


ERRORS = {
    "backward of a vector": lambda nn, p: nn.functional.tanh(p).backward(),
    "gradient of another shape": lambda nn, p: nn.functional.tanh(p).backward(torch.ones(2)),
    "gradient not a tensor": lambda nn, p: nn.functional.tanh(p).backward(1.0),
    "second backward": lambda nn, p: _twice(nn.functional.tanh(p).sum()),
    "leaf in place": lambda nn, p: p.add_(1),
    "leaf in place operator": lambda nn, p: p.__iadd__(1),
    "leaf zero_": lambda nn, p: p.zero_(),
    "leaf set item": lambda nn, p: p.__setitem__(0, 1.0),
    "view of a leaf in place": lambda nn, p: p.view(-1).mul_(2),
    "saved output changed": lambda nn, p: _changed(nn.functional.tanh(p)),
    "saved relu changed": lambda nn, p: _changed(nn.functional.relu(p)),
    "saved input changed": lambda nn, p: _changed_input(nn, p),
    "saved weight changed": lambda nn, p: _changed_weight(nn),
    "saved index changed": lambda nn, p: _changed_index(nn, lambda index: index),
    "index among several changed": lambda nn, p: _changed_index(nn, lambda index: (0, index)),
    "mask changed": lambda nn, p: _changed_index(nn, lambda index: index, torch.ones(3).bool()),
    "numpy": lambda nn, p: p.numpy(),
    "numpy of an output": lambda nn, p: nn.functional.tanh(p).numpy(),
    "freeze an output": lambda nn, p: nn.functional.tanh(p).requires_grad_(False),
    "requires_grad of integers": lambda nn, p: nn.Parameter(torch.arange(3)),
    "requires_grad not a bool": lambda nn, p: setattr(p, "requires_grad", 2),
    "grad of another shape": lambda nn, p: setattr(p, "grad", torch.ones(5)),
    "grad not a tensor": lambda nn, p: setattr(p, "grad", 1.0),
    "deepcopy of an output": lambda nn, p: copy.deepcopy(nn.functional.tanh(p)),
    "retain_grad without grad": lambda nn, p: nn.Parameter(torch.ones(1), False).retain_grad(),
    "hook without grad": lambda nn, p: nn.Parameter(torch.ones(1), False).register_hook(print),
    "post hook on an output": lambda nn, p: nn.functional.tanh(
        p
    ).register_post_accumulate_grad_hook(print),
    "parameter from a list": lambda nn, p: nn.Parameter([1.0]),
    "view of another size": lambda nn, p: nn.functional.tanh(p).view(2, 2),
    "view of strided": lambda nn, p: nn.functional.tanh(p.expand(2, 3)).t().view(-1),
    "index out of range": lambda nn, p: nn.functional.tanh(p)[3],
    "shapes do not broadcast": lambda nn, p: nn.functional.tanh(p) + torch.ones(2),
    "matmul shapes": lambda nn, p: nn.functional.tanh(p) @ torch.ones(2),
    "matmul of a scalar": lambda nn, p: nn.functional.tanh(p).sum() @ torch.ones(2),
    "cat of other dims": lambda nn, p: torch.cat([nn.functional.tanh(p), torch.ones(2, 2)]),
    "stack of a tensor": lambda nn, p: torch.stack(nn.functional.tanh(p).sum()),
    "sum of a wrong dim": lambda nn, p: nn.functional.tanh(p).sum(3),
    "sum with an unknown keyword": lambda nn, p: nn.functional.tanh(p).sum(dims=0),
    "out": lambda nn, p: torch.add(nn.functional.tanh(p), 1, out=torch.empty(3)),
    "out of matmul": lambda nn, p: torch.matmul(nn.functional.tanh(p), p, out=torch.empty(())),
    "out of linear": lambda nn, p: torch._C._nn.linear(p, p.reshape(1, 3), out=torch.empty(1)),
    "out of sort": lambda nn, p: torch.sort(
        nn.functional.tanh(p), out=(torch.empty(3), torch.empty(3, dtype=torch.int64))
    ),
    "require grad of a result": lambda nn, p: setattr(p * 1, "requires_grad", True),
    "no grad of a result": lambda nn, p: setattr(p * 1, "requires_grad", False),
    "H of a tensor of three": lambda nn, p: (p * torch.ones(2, 3, 3)).H,
    "volatile": lambda nn, p: setattr(p * 1, "volatile", False),
    "add a string": lambda nn, p: nn.functional.tanh(p) + "a",
    "iterate over a number": lambda nn, p: list(p.sum()),
    "bool of many": lambda nn, p: bool(nn.functional.tanh(p)),
    "item of many": lambda nn, p: nn.functional.tanh(p).item(),
    "in place result dtype": lambda nn, p: nn.functional.tanh(p).add_(torch.ones(3).double() * 1j),
    "empty inputs": lambda nn, p: nn.functional.tanh(p).sum().backward(inputs=[]),
    "frozen input": lambda nn, p: nn.functional.tanh(p).sum().backward(inputs=[torch.ones(2)]),
    "hook returns another shape": lambda nn, p: _hooked(nn, p, lambda g: g[:1]),
    "hook returns no tensor": lambda nn, p: _hooked(nn, p, lambda g: 3),
    "wrong grad count": lambda nn, p: torch.nn.functional.tanh(p).sum().backward(torch.ones(2)),
}


def _twice(loss):
    loss.backward()
    loss.backward()


def _changed(y):
    y.detach().add_(1)
    y.sum().backward()


def _changed_input(nn, p):
    x = nn.functional.tanh(nn.Parameter(torch.randn(4, 3)))
    y = nn.Linear(3, 2)(x)
    x.detach().mul_(2)
    y.sum().backward()


def _changed_index(nn, made_of, index=None):
    index = torch.tensor([0, 2]) if index is None else index.clone()
    y = nn.Parameter(torch.randn(3, 3))[made_of(index)]
    index.fill_(1)
    y.sum().backward()


def _changed_weight(nn):
    layer = nn.Linear(3, 2)
    y = layer(torch.randn(4, 3, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    y.sum().backward()


def _hooked(nn, p, hook):
    y = nn.functional.tanh(p)
    y.register_hook(hook)
    y.sum().backward()


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_errors(nn, optim, name):
    return ERRORS[name](nn, nn.Parameter(torch.randn(3)))


@parity
def test_failed_backward_changes_no_gradient(nn, optim):
    """A backward that raises because of its gradient's shape leaves .grad unchanged."""
    p = nn.Parameter(torch.randn(3))
    y = nn.functional.tanh(p)
    try:
        y.backward(torch.ones(7))
    except RuntimeError as e:
        return str(e), p.grad, y


@parity
def test_weights_change_between_forward_and_backward_where_not_saved(nn, optim):
    """A weight that no gradient needs may be changed in place before backward."""
    layer = nn.Linear(3, 2)
    y = layer(torch.ones(4, 3))
    with torch.no_grad():
        layer.weight.add_(1)
    y.sum().backward()
    return dict(layer.named_parameters())


@parity
def test_frozen_between_forward_and_backward(nn, optim):
    layer = nn.Linear(3, 3)
    y = layer(torch.ones(1, 3))
    layer.weight.requires_grad_(False)
    y.sum().backward()
    return dict(layer.named_parameters())


@parity
def test_backward_inside_a_hook(nn, optim):
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    y, modes = nn.functional.tanh(p), []

    def hook(g):
        modes.append(torch.is_grad_enabled())
        modes.append((nn.functional.tanh(q) * 2).requires_grad)
        with torch.enable_grad():
            nn.functional.tanh(q).sum().backward()

    y.register_hook(hook)
    y.sum().backward()
    return p, q, modes


@pytest.mark.slow
def test_converting_to_a_number_warns_once():
    """float(y) of a tensor that requires grad warns once a process, with PyTorch's text."""
    code = "import sys, warnings, torch; nn = __import__(sys.argv[1], fromlist=['x']); "
    code += "y = nn.functional.tanh(nn.Parameter(torch.ones(1)))\n"
    code += "with warnings.catch_warnings(record=True) as w:\n warnings.simplefilter('always')\n"
    code += " print(float(y), int(y), complex(y), y.item())\n"
    code += "print([str(x.message).split(' (Trig')[0] for x in w])"
    said = [
        subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        for name in ("torch.nn", "nnmirror")
    ]
    assert said[0].stdout == said[1].stdout, said[1].stderr
    assert "Converting a tensor" in said[0].stdout


@pytest.mark.parametrize("kind", [float, int, complex, bool])
@parity
def test_which_conversions_to_a_number_warn(nn, optim, kind):
    y = nn.functional.tanh(nn.Parameter(torch.ones(1)))
    with torch.no_grad():
        kind(y)
    return kind(y), kind(y.detach())


@parity
def test_update_by_hand(nn, optim):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    for _ in range(3):
        net.zero_grad()
        net(torch.randn(4, 3)).sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
                p.data.mul_(0.99)
    return dict(net.named_parameters())


@parity
def test_printing(nn, optim):
    torch.manual_seed(3)
    layer = nn.Linear(3, 2)
    y = layer(torch.ones(1, 3))
    loss = nn.MSELoss()(y, torch.zeros(1, 2))
    wide = nn.functional.tanh(nn.Parameter(torch.randn(3, 20)))
    return [
        repr(loss),
        str(y),
        f"{loss:.4f} {loss}",
        str(layer.weight),
        repr(layer.bias),
        str(nn.Parameter(torch.ones(2), requires_grad=False)),
        repr(nn.Parameter()),
        repr(wide),
        repr(wide.double()),
        repr(y.detach()),
        repr(layer),
        repr(y[0].view(2, 1)),
        str(loss.grad_fn),
        loss.grad_fn.next_functions[0][0].name(),
        repr(nn.functional.tanh(nn.Parameter(torch.empty(0, 3)))),
        repr(nn.functional.tanh(nn.Parameter(torch.tensor([float("nan"), 1e10])))),
    ]


@parity
def test_copies(nn, optim):
    p = nn.Parameter(torch.randn(3))
    nn.functional.tanh(p).sum().backward()
    q = copy.deepcopy(p)
    r = pickle.loads(pickle.dumps(p))
    s = copy.copy(p)
    frozen = copy.deepcopy(nn.Parameter(torch.ones(1), requires_grad=False))
    leaf = pickle.loads(pickle.dumps(nn.functional.tanh(p)))
    return q, r, s, frozen, leaf, [type(t).__name__ for t in (q, r, s, frozen)], q is p


@parity
def test_functional_and_init_of_torch(nn, optim):
    """A script that imports nnmirror as nn may still call torch.nn.functional and torch.nn.init."""
    import torch.nn.functional as F

    layer = nn.Linear(3, 2)
    torch.nn.init.xavier_uniform_(layer.weight)
    torch.nn.init.constant_(layer.bias, 0.5)
    x = torch.randn(4, 3, requires_grad=True)
    y = F.leaky_relu(F.relu(F.linear(x, layer.weight, layer.bias)), 0.2) + F.tanh(layer(x))
    F.mse_loss(y, torch.ones(4, 2)).backward()
    return y, x, dict(layer.named_parameters())


@parity
def test_input_from_pytorchs_own_graph(nn, optim):
    """The gradient continues into PyTorch's own graph that made the input."""
    w = torch.randn(3, 3, requires_grad=True)
    h = torch.sin(w * 2)
    y = nn.Linear(3, 2)(h)
    y.sum().backward()
    return w


def test_refused_operation_is_named():
    """An operation without a rule raises, as its gradient would silently be lost."""
    y = nnmirror.Tanh()(nnmirror.Parameter(torch.rand(3)))
    for refused, name in (
        (lambda: torch.special.bessel_j0(y), "bessel_j0"),
        (lambda: y.mvlgamma(2), "mvlgamma"),  # not i0, the example in rules/README.md
        (lambda: y.mvlgamma_(2), "mvlgamma_"),
        (lambda: torch.nn.functional.rrelu(y, training=True), "rrelu"),
        (lambda: torch.nn.functional.multi_margin_loss(y, torch.tensor(1)), "multi_margin_loss"),
        (lambda: y.as_subclass(torch.Tensor), "as_subclass"),
    ):
        with pytest.raises(NotImplementedError, match=rf"{name}.*detach.*Function.*issue"):
            refused()
    before = y.detach().clone()
    with pytest.raises(NotImplementedError):
        y.mvlgamma_(2)
    assert torch.equal(y.detach(), before), "a refused operation must not have happened"


def test_functions_derived_from_torch_autograd_are_refused():
    """torch.autograd.Function bypasses __torch_function__: gradients would silently be lost."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -g

    class Helped(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return sum(v * 2 for v in [x])

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g * 2

    y = nnmirror.Linear(3, 3)(torch.randn(2, 3))
    for function in (Reversed, Helped):
        with pytest.raises(NotImplementedError, match="Derive it from nnmirror"):
            function.apply(y)
        assert function.apply(y.detach()).requires_grad is False
    with pytest.raises(NotImplementedError, match="use_reentrant"):
        torch.utils.checkpoint.checkpoint(torch.tanh, y, use_reentrant=True)
    torch.utils.checkpoint.checkpoint(torch.tanh, y, use_reentrant=False).sum().backward()


def test_vmap_is_refused():
    """If a script imported it before nnmirror, which replaces it."""
    vmap = torch._functorch.apis.vmap
    with pytest.raises(NotImplementedError, match="vmap"):
        vmap(lambda row: row * 2)(nnmirror.Linear(3, 3)(torch.randn(2, 3)))
    with pytest.raises(NotImplementedError, match="vmap"), torch.device("cpu"):  # inside a mode
        vmap(lambda row: row * 2)(nnmirror.Linear(3, 3)(torch.randn(2, 3)))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
@pytest.mark.parametrize("net", ["Linear", "Sequential", "MSELoss", "operation"])
def test_parameters_inside_a_transform_are_refused(transform, net):
    """Results of vmap and the like have no graph: the parameters' gradients would be lost."""
    p = nnmirror.Parameter(torch.randn(3))
    model = {
        "Linear": nnmirror.Linear(3, 3),
        "Sequential": nnmirror.Sequential(nnmirror.Linear(3, 3), nnmirror.ReLU()),
        "MSELoss": lambda a: nnmirror.MSELoss()(p, torch.ones(3)) * a,
        "operation": lambda a: p * a,
    }[net]
    run = {
        "vmap": lambda x: torch.vmap(lambda a: model(a))(x),
        "grad": lambda x: torch.func.grad(lambda a: model(a).sum())(x),
        "jvp": lambda x: torch.func.jvp(lambda a: model(a), (x,), (x,)),
        "functionalize": lambda x: torch.func.functionalize(model)(x),
    }[transform]
    with pytest.raises(NotImplementedError, match="nnmirror"):
        run(torch.randn(2, 3))
    if net != "MSELoss" and transform in ("vmap", "functionalize"):
        with torch.no_grad():
            x = torch.randn(2, 3)
            assert torch.allclose(run(x), torch.stack([model(row) for row in x]))


@parity
def test_function_of_your_own(nn, optim):
    base = torch.autograd.Function if nn is torch.nn else nnmirror.Function

    class Cube(base):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x)
            ctx.scale = scale
            return x * x * x * scale

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 3 * x * x * ctx.scale, None

    class Split(base):
        @staticmethod
        def forward(x):
            return x * 2, x + 1, x.argmax()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output[2])

        @staticmethod
        def backward(ctx, a, b, _):
            return a * 2 + b

    x = torch.randn(3, requires_grad=True)
    h = nn.functional.tanh(nn.Parameter(x.detach()))
    y = Cube.apply(h, 2.0)
    two, one, most = Split.apply(h)
    (y.sum() + two.sum()).backward()
    return y, y.grad_fn.name(), two, one, most, y.grad_fn.needs_input_grad


FUNCTION_ERRORS = {
    "too few": lambda ctx, g: g,
    "too many": lambda ctx, g: (g, g, g),
    "wrong shape": lambda ctx, g: (g[:1].expand(7), None),
}


@pytest.mark.parametrize("name", FUNCTION_ERRORS)
@parity
def test_function_of_your_own_that_is_wrong(nn, optim, name):
    base = torch.autograd.Function if nn is torch.nn else nnmirror.Function

    class Wrong(base):
        @staticmethod
        def forward(ctx, a, b):
            return a * b

        backward = staticmethod(FUNCTION_ERRORS[name])

    Wrong.apply(nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))).sum().backward()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_finite_differences(shape):
    """Each backward against central differences, independently of PyTorch."""
    nn = nnmirror
    torch.manual_seed(0)
    functions = {
        "tanh": nn.functional.tanh,
        "relu": nn.functional.relu,
        "leaky": lambda x: nn.functional.leaky_relu(x, 0.3),
        "mse": lambda x: nn.functional.mse_loss(x, torch.full(shape, 0.3, dtype=torch.float64)),
    }
    if shape:
        layer = nn.Linear(3, 2, dtype=torch.float64)
        functions["linear"] = layer
        functions["weight"] = lambda w: nn.functional.linear(
            torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), w.expand(2, 3)
        )
    for name, function in functions.items():
        x = nn.Parameter(torch.randn(shape, dtype=torch.float64) + 0.1)
        out = function(x)
        g = torch.randn(out.shape, dtype=torch.float64)
        out.backward(g)
        step = 1e-6
        for i in range(x.numel()):
            delta = torch.zeros(x.numel(), dtype=torch.float64)
            delta[i] = step
            delta = delta.view(shape)
            with torch.no_grad():
                high, low = function(x.detach() + delta), function(x.detach() - delta)
            slope = ((high - low) * g).sum().item() / (2 * step)
            assert abs(slope - x.grad.reshape(-1)[i].item()) < 1e-8, name


def test_the_comparison_finds_differences():
    """The comparison itself finds a difference between the two libraries."""
    expected, actual = both(lambda nn, optim: torch.ones(2) * (1 if nn is torch.nn else -1))
    with pytest.raises(AssertionError):
        same(expected.value, actual.value, "result")
    assert normal("nnmirror.modules.linear.Linear") == normal("torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("size", [(0, 3), (2, 0, 3), (0, 2, 3)])
@parity
def test_gradient_of_an_empty_leaf_has_its_strides(nn, optim, size):
    x = nn.Parameter(torch.zeros(size))
    x.mT.exp().sum().backward()
    return x


ROW = torch.zeros(1, 3, dtype=torch.long)
# Operations that save tensors, and an in-place change of an argument or a result.
SAVED = {
    "an index found": (lambda x, y: x.max(1), lambda x, y, z: z[1].zero_()),
    "an index found, while sorting": (lambda x, y: x.sort(1), lambda x, y, z: z[1].zero_()),
    "the first result": (lambda x, y: x.aminmax(dim=1), lambda x, y, z: z[0].mul_(2)),
    "the second result": (lambda x, y: x.aminmax(dim=1), lambda x, y, z: z[1].mul_(2)),
    "the only result": (lambda x, y: x.amax(1), lambda x, y, z: z[0].mul_(2)),
    "an argument": (lambda x, y: x.gather(0, ROW), lambda x, y, z: x.mul_(2)),
    "a base summed into": (
        lambda x, y: x.scatter_reduce(0, ROW, y, "sum"),
        lambda x, y, z: x.mul_(2),
    ),
    "an average": (lambda x, y: x.scatter_reduce(0, ROW, y, "mean"), lambda x, y, z: z[0].mul_(2)),
    "nothing saved": (lambda x, y: x.index_put((ROW[0],), y[0]), lambda x, y, z: y.mul_(2)),
}


@pytest.mark.parametrize("name", SAVED)
@parity
def test_saved_tensor_changed_before_backward(nn, optim, name):
    """The error of a saved tensor that was changed names its shape and the node that made it."""
    call, change = SAVED[name]
    x, y = nn.Parameter(torch.randn(4, 3)) * 1, nn.Parameter(torch.randn(4, 3)) * 1
    z = call(x, y)
    z = z if isinstance(z, tuple) else (z,)
    change(x, y, z)
    sum(part.sum() for part in z).backward()
