"""In-place changes through views, and assignment to a part: the gradients must be right."""

import gc
import itertools

import numpy as np
import pytest
import torch

import nnmirror

from .parity import parity

MASK = torch.tensor([True, False, True, False])

PARTS = {
    "a tuple": ((0, 1),),
    "two tuples": ((0, 1), (1, 2)),
    "a tuple and a number": ((0, 1), 1),
    "a list": ([0, 1],),
    "a tensor": (torch.tensor([0, 1]),),
    "a mask": (MASK,),
    "slice and tuple": (slice(0, 2), (0, 1)),
}


@pytest.mark.parametrize("parts", PARTS)
@parity
def test_a_part_by_a_tuple_of_indices(nn, optim, parts):
    x = nn.Parameter(torch.randn(4, 3))
    y = (x * 2)[PARTS[parts]] + x[PARTS[parts]]
    y.backward(torch.randn(y.shape))
    return y, x.grad


# In-place changes of h, a (4, 3) result; y is of shape (3,), s a scalar, both require grad.
CHANGES = {
    "row": lambda h, y, s: h.__setitem__(0, y),
    "row of a number": lambda h, y, s: h.__setitem__(1, s),
    "constant": lambda h, y, s: h.__setitem__((slice(1, 3), 0), 2.5),
    "everything": lambda h, y, s: h.__setitem__(Ellipsis, y),
    "everything constant": lambda h, y, s: h.__setitem__(slice(None), 0),
    "column": lambda h, y, s: h.__setitem__((slice(None), 1), y[:1]),
    "new axis": lambda h, y, s: h.__setitem__((None, 2), y),
    "leading ones": lambda h, y, s: h.__setitem__(0, y[None, None]),
    "mask": lambda h, y, s: h.__setitem__(h > 0, 0),
    "mask of a number": lambda h, y, s: h.__setitem__(h > 0, s),
    "row mask": lambda h, y, s: h.__setitem__(MASK, y),
    "index list": lambda h, y, s: h.__setitem__([0, 2], y),
    "index tensors": lambda h, y, s: h.__setitem__((torch.tensor([0, 3]), torch.tensor([1, 2])), s),
    "row and list": lambda h, y, s: h.__setitem__((2, [0, 1]), y[1:]),
    "slice and list": lambda h, y, s: h.__setitem__((slice(1, None), [2, 0]), y[:2]),
    "list after slice": lambda h, y, s: h.__setitem__((slice(None), torch.tensor([2])), y[:1]),
    "numpy index": lambda h, y, s: h.__setitem__(MASK.numpy(), 1.0),
    "true": lambda h, y, s: h.__setitem__(True, y),
    "other dtype": lambda h, y, s: h.__setitem__(0, y.double()),
    "nested list": lambda h, y, s: h.__setitem__([[0, 1], [1, 0]], 3.0),
    "range": lambda h, y, s: h.__setitem__(range(2), y),
    "nothing": lambda h, y, s: h.__setitem__([], y),
    "false": lambda h, y, s: h.__setitem__(False, y),
    "augmented": lambda h, y, s: h[0].__iadd__(y),
    "view": lambda h, y, s: h.view(-1)[2:6].mul_(s),
    "two views": lambda h, y, s: (h[0].add_(y), h[1:].t()[1].mul_(2)),
    "view twice": lambda h, y, s: h[0].mul_(2).add_(y),
    "relu_ on a view": lambda h, y, s: torch.relu_(h[1:]),
    "transposed": lambda h, y, s: h.t().copy_(y[:, None]),
    "narrowed": lambda h, y, s: h.narrow(1, 1, 2).zero_(),
    "diagonal": lambda h, y, s: h.diagonal().add_(y),
    "masked_fill_": lambda h, y, s: h.masked_fill_(h < 0, s),
    "masked_fill_ on a view": lambda h, y, s: h[1].masked_fill_(h[1] < 0, 0.5),
    "index_add_": lambda h, y, s: h.index_add_(0, torch.tensor([1, 1]), torch.stack([y, y * 2])),
    "scatter_ on a view": lambda h, y, s: h[:2].scatter_(1, torch.tensor([[0], [2]]), y[:2, None]),
    "fill_": lambda h, y, s: h[0].fill_(s),
    "copy_": lambda h, y, s: h.copy_(y),
    "unsqueeze_": lambda h, y, s: h.unsqueeze_(0),
    "t_": lambda h, y, s: h.t_(),
    "uniform_": lambda h, y, s: h[2].uniform_(),
    "in place after a saved use": lambda h, y, s: (h * h, h[0].mul_(2)),
    "unbind": lambda h, y, s: h.unbind()[0].mul_(2),
    "split": lambda h, y, s: h.split(2)[1].mul_(2),
    "expanded": lambda h, y, s: h[:1].expand(4, 3).mul_(2),
    "no_grad view": lambda h, y, s: _changed_in_grad_mode(h, y),
    "under no_grad": lambda h, y, s: _changed_under_no_grad(h, y),
    "wrong shape": lambda h, y, s: h.__setitem__(0, y[:2]),
    "index too large": lambda h, y, s: h.__setitem__(5, y),
    "index not an index": lambda h, y, s: h.__setitem__("a", y),
    "mask of a wrong shape": lambda h, y, s: h.__setitem__(MASK[:3], y),
    "value not a number": lambda h, y, s: h.__setitem__(0, "a"),
}  # fmt: skip


def _changed_in_grad_mode(h, y):
    """A view made under no_grad is a plain tensor here: a change by a number would be missed."""
    with torch.no_grad():
        view = h[0]
    view.mul_(y)


def _changed_under_no_grad(h, y):
    view = h[1]
    with torch.no_grad():
        h[0] = y
        view.mul_(2)


@pytest.mark.parametrize("name", CHANGES)
@parity
def test_change_of_a_result(nn, optim, name):
    """The changed tensor, views of it from before and after, and all gradients."""
    x, y, s = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3,), ()))
    h = nn.functional.leaky_relu(x, 1.0)
    before = h[1:, :2]
    CHANGES[name](h, nn.functional.tanh(y), nn.functional.tanh(s))
    after = h.sum(0)
    names = [t.grad_fn.name() for t in (h, before, after)]
    (h.sum() * 2 + (before * before).sum() + after[0]).backward()
    return names, h, before, after, x, y, s


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in ("uniform_", "expanded")])
@parity
def test_repeated_change(nn, optim, name):
    """Repeated calls are recorded in a faster way, with the same values and second derivatives."""
    x, y, s = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3,), ()))
    found = []
    for _ in range(4):
        h = nn.functional.tanh(x)
        part = h[1:]
        h[0] = y * 2
        CHANGES[name](h, nn.functional.tanh(y), nn.functional.tanh(s))
        names = [t.grad_fn.name() for t in (h, part)]
        (g,) = torch.autograd.grad((h * h).sum() + part.sum(), x, create_graph=True)
        (g * g).sum().backward()
        found += [names, h, part, g]
    return found, x, y, s


@pytest.mark.parametrize("name", CHANGES)
@parity
def test_change_of_a_plain_tensor(nn, optim, name):
    """A plain tensor into which a tracked one is written gets a gradient."""
    y, s = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
    buffer = torch.randn(4, 3)
    CHANGES[name](buffer, nn.functional.tanh(y), nn.functional.tanh(s))
    loss = (buffer * buffer).sum()
    if loss.requires_grad:
        loss.backward()
    return buffer, y, s


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in ("uniform_", "expanded")])
@parity
def test_change_of_a_plain_tensor_again_and_again(nn, optim, name):
    """A buffer made anew in each step, to which the same is done, and then the same again."""
    y, s = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
    start, found = torch.randn(4, 3), []
    for i in range(4):
        buffer = start.clone() if i < 3 else start.t().clone().t()
        view = buffer[1:] if i == 2 else None  # is searched for
        for _ in range(2):
            CHANGES[name](buffer, nn.functional.tanh(y), nn.functional.tanh(s))
        loss = (buffer * buffer).sum() + (0 if view is None else view.sum())
        found += [buffer._version, buffer.detach(), view]
        if loss.requires_grad:
            leaves = [t for t in (y, s) if i % 2 or t is y]
            loss.backward(retain_graph=True)
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            found += [buffer.grad_fn.name(), *grads]
    return found, y, s


@pytest.mark.parametrize("name", CHANGES)
@parity
def test_change_of_a_leaf(nn, optim, name):
    x, y, s = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3,), ()))
    CHANGES[name](x, nn.functional.tanh(y), nn.functional.tanh(s))
    return x


@parity
def test_recurrent_states_written_into_a_buffer(nn, optim):
    cell, states, h = nn.Linear(3, 3), torch.zeros(6, 2, 3), torch.zeros(2, 3)
    for t in range(6):
        h = nn.functional.tanh(cell(h) + t)
        states[t] = h
    states[2:4] *= 0.5
    states[states > 0.9] = 0.9
    (states * torch.randn(6, 2, 3)).sum().backward()
    return states, dict(cell.named_parameters())


@parity
def test_view_of_a_parameter_lives_through_steps(nn, optim):
    p = nn.Parameter(torch.randn(4, 3))
    row, sgd = p[0], optim.SGD([p], lr=0.1)
    seen = []
    for _ in range(3):
        sgd.zero_grad()
        (row * row).sum().backward()
        sgd.step()
        seen.append((row.grad_fn.name(), p.detach().clone(), p.grad.clone()))
    return seen


@parity
def test_retained_gradient_follows_the_tensor(nn, optim):
    x = nn.Parameter(torch.randn(4, 3))
    h = nn.functional.tanh(x)
    h.retain_grad()
    row = h[0]
    row.retain_grad()
    h.mul_(2)
    h[1] = 3.0
    h.sum().backward()
    return h.retains_grad, h.grad, row.retains_grad, row.grad, x


@parity
def test_view_of_a_base_that_was_detached(nn, optim):
    x = nn.Parameter(torch.randn(4, 3))
    h = nn.functional.tanh(x)
    row = h[0]
    h.mul_(3)
    h.detach_()
    row.sum().backward()
    return x.grad is None, h, row


@parity
def test_hook_on_a_changed_view(nn, optim):
    x = nn.Parameter(torch.randn(4, 3))
    h, seen = nn.functional.tanh(x), []
    row = h[0]
    h.mul_(2)
    assert row.grad_fn is not None  # without this, PyTorch 2.13 itself crashes
    row.register_hook(lambda g: seen.append(g.clone()))
    (row * 3).sum().backward()
    return seen, x


@parity
def test_second_backward_through_a_changed_view(nn, optim):
    h = nn.functional.tanh(nn.Parameter(torch.randn(4, 3)))
    h[0] = 1.0
    h.sum().backward()
    h.sum().backward()


@pytest.mark.parametrize("how", ["view", "base", "input handed on"])
@parity
def test_view_made_by_a_function_of_your_own(nn, optim, how):
    base = torch.autograd.Function if nn is torch.nn else nnmirror.Function

    class Seen(base):
        @staticmethod
        def forward(ctx, x):
            return x if how == "input handed on" else x.view(-1)

        @staticmethod
        def backward(ctx, g):
            return g.view(4, 3)

    h = nn.functional.tanh(nn.Parameter(torch.randn(4, 3)))
    view = Seen.apply(h)
    (h if how == "base" else view).mul_(2)
    view.sum().backward()


@parity
def test_expanded_view_of_a_changed_base(nn, optim):
    x = nn.Parameter(torch.randn(1, 3))
    h = nn.functional.tanh(x)
    wide, windows = h.expand(4, 3), h.as_strided((2, 2), (1, 1))
    h.mul_(3)
    (wide * torch.randn(4, 3)).sum().backward(retain_graph=True)
    (windows * torch.randn(2, 2)).sum().backward()
    return wide.grad_fn.name(), x


# Views and aliases of a plain 4 x 3 buffer, made before the buffer gets a gradient.
EARLIER = {
    "row": lambda b: b[1],
    "rows": lambda b: b[1:3],
    "slice of a slice": lambda b: b[1:][:2, 1:],
    "column": lambda b: b[:, 0],
    "every other": lambda b: b[::2],
    "transposed": lambda b: b.t(),
    "flat": lambda b: b.reshape(-1),
    "view": lambda b: b.view(2, 6),
    "diagonal": lambda b: b.diagonal(),
    "expanded": lambda b: b[:1].expand(4, 3),
    "unfolded": lambda b: b.view(-1).unfold(0, 3, 1),
    "as_strided": lambda b: b.as_strided((2, 2), (1, 1), 2),
    "unsqueezed": lambda b: b[None],
    "itself": lambda b: b,
    "detached": lambda b: b.detach()[1],
    "data": lambda b: b.data[1],
    "copied": lambda b: b[1].clone(),
    "of no elements": lambda b: b[:0],
    "split": lambda b: b.split(2)[0],
    "unbind": lambda b: list(b)[1],
    "part of a split": lambda b: b.split(2)[0][0],
    "under no_grad": lambda b: _under(torch.no_grad(), b),
    "in inference mode": lambda b: _under(torch.inference_mode(), b),
    "split under no_grad": lambda b: _under(torch.no_grad(), b.view(2, 6).split(1)[0]),
}
WRITES = {
    "row": lambda b, y: b.__setitem__(0, y),
    "all": lambda b, y: b.copy_(y),
    "number": lambda b, y: b.__setitem__((1, 1), y[0]),
    "add_": lambda b, y: b.add_(y),
    "view": lambda b, y: b[1:].mul_(y),
    "view of a view": lambda b, y: b.t()[0, 1:].copy_(y),
    "mask": lambda b, y: b.__setitem__(b > 0, y[0]),
    "masked_fill_": lambda b, y: b.masked_fill_(b > 0, y[0]),
    "index_put_": lambda b, y: b.index_put_((torch.tensor([0, 1]),), y),
    "twice": lambda b, y: (b.__setitem__(0, y), b.__setitem__(1, y * 2)),
}


def _under(mode, b):
    with mode:
        return b[1]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", EARLIER)
@parity
def test_view_made_before_its_base_had_a_gradient(nn, optim, name, write):
    """The view shows the change of its base, so it gets the gradient too."""
    w = nn.Parameter(torch.randn(3))
    buffer = torch.randn(4, 3)
    view = EARLIER[name](buffer)
    WRITES[write](buffer, nn.functional.tanh(w))
    about = [(t.requires_grad, t.is_leaf, t._is_view(), t._version) for t in (buffer, view)]
    shown = str(view).replace("AsStridedBackward0", "")
    names = [t.grad_fn and t.grad_fn.name() for t in (buffer, view)]
    ((view * view).sum() * 3 + (buffer * torch.arange(3)).sum()).backward()
    return about, shown, names, buffer, view, w


@pytest.mark.parametrize("name", sorted(set(EARLIER) - {"itself"}))
@parity
def test_write_through_a_view_that_others_see(nn, optim, name):
    w = nn.Parameter(torch.randn(3))
    buffer = torch.randn(4, 3)
    view, other = EARLIER[name](buffer), buffer[1:]
    value = nn.functional.tanh(w)
    view.copy_(value[: view.shape[-1]] if name != "flat" else value.repeat(4))
    loss = (buffer * buffer).sum() + (other * 2).sum() + view.sum()
    loss.backward()
    return buffer, other, view, loss, w


@pytest.mark.parametrize("use", ["window", "copy of a window", "base read later", "overwritten"])
@parity
def test_buffer_continued_by_predictions(nn, optim, use):
    """Right gradients, or PyTorch's error where a value that was read is overwritten later."""
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    series = torch.zeros(9)
    series[:3] = torch.randn(3)
    windows = []
    for i in range(3, 9):
        window = series[i - 3 : i]
        if use == "copy of a window":
            window = window.clone()
        windows.append(window)
        series[i] = net(window.reshape(1, -1)).squeeze()
        if use == "base read later" and i == 4:
            break
    if use == "overwritten":
        series[4] = 0.0
    about = [(t.requires_grad, t.is_leaf) for t in (series, *windows)]
    if use == "base read later":
        return about, series, windows
    (series.sum() + sum(w.sum() for w in windows)).backward()
    return about, series, dict(net.named_parameters())


@parity
def test_module_that_keeps_views_of_its_buffer(nn, optim):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(4, 3))
            self.last = self.state[-1]
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            self.state[:] = self.lin(x)
            return self.last * 2

    net = Net()
    out = net(torch.randn(4, 3))
    out.sum().backward()
    return out, net.state, net.last, dict(net.named_parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_view_of_a_frozen_parameter_is_announced_when_it_thaws(whole):
    """PyTorch's view becomes a part of the parameter when that changes, so its gradient would be
    missing here."""
    net = nnmirror.Linear(4, 3)
    thawed = net if whole else net.weight
    thawed.requires_grad_(False)
    part = net.weight[0]
    with pytest.warns(UserWarning, match="views of this tensor .* make them again"):
        thawed.requires_grad_(True)
    assert not part.requires_grad
    del part
    alias = net.weight.detach()  # no view, in PyTorch either
    thawed.requires_grad_(False)
    thawed.requires_grad_(True)
    assert not alias.requires_grad


def test_view_of_a_parameter_under_no_grad_is_a_constant():
    """As nnmirror/refused.md says; the parameter's own gradient is PyTorch's."""

    def run(nn):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        with torch.no_grad():
            part = net.weight[0]
        (net(torch.ones(2, 4)) * part[0]).sum().backward()
        return part.requires_grad, net.weight.grad

    (theirs, expected), (ours, grad) = run(torch.nn), run(nnmirror)
    assert theirs
    assert not ours
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("how", ["weight", "bias", "detached again", "view before"])
@parity
def test_frozen_parameter_that_gets_a_gradient(nn, optim, how):
    """A frozen parameter becomes a non-leaf; a net that has already used it stays right."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    w, x = nn.Parameter(torch.randn(3)), torch.randn(2, 3)
    for _ in range(4):
        net(x).sum().backward()
    frozen = net[0].bias if how == "bias" else net[0].weight
    frozen.requires_grad_(False)
    net.zero_grad()
    row = frozen[0]
    if how == "bias":
        frozen.copy_(w)
    else:
        frozen[0] = w * 2
    if how == "detached again":
        frozen.detach_()
    out = net(x)
    out.sum().backward()
    extra = (row * 2).sum() if how == "view before" else out.detach().sum()
    if extra.requires_grad:
        extra.backward()
    seen = [p.grad for p in (w, net[0].bias, net[2].weight) if p.is_leaf]
    return out, seen, frozen.requires_grad, row.detach()


@parity
def test_views_held_indirectly(nn, optim):
    """Views get the gradient though only they hold the base, or though only a list holds them."""
    w = nn.Parameter(torch.randn(2))
    a = torch.zeros(6)[1:]
    held = {"views": [[a[:2]], (a[2:],)]}
    a[1:3].copy_(w)
    loss = sum((v * v).sum() for v in (held["views"][0][0], held["views"][1][0]))
    loss.backward()
    return a, held, w


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (7, 3), (2, 5), (3, 3, 3)])
@parity
def test_fill_diagonal(nn, optim, shape, wrap):
    w, weights = nn.Parameter(torch.rand(shape)), torch.rand(shape)
    for transposed in (False, True, False, True):
        x = w * 2
        y = x.transpose(0, 1) if transposed else x
        filled = y.fill_diagonal_(0.5, wrap)
        (x.square() * weights).sum().backward()
    return x, filled is y, w.grad


@parity
def test_data_changed_in_place_by_a_result(nn, optim):
    """As where a moving average is updated: the buffer itself gets no gradient."""
    layer = nn.Linear(3, 4)
    layer.register_buffer("mean", torch.zeros(4))
    for _ in range(5):
        y = layer(torch.randn(2, 3))
        data = layer.mean.data
        part = data[1:]
        data.lerp_(y.mean(0), 0.1)
        layer.mean.data.lerp_(y.mean(0), 0.1)
        (y.square().sum() + data.sum() * part.sum()).backward()
    return layer.mean, layer.mean.requires_grad, data, part, layer.weight.grad


def test_detached_tensors_are_not_searched_for(monkeypatch):
    """In a large process, a search through all objects takes longer than the training step."""
    monkeypatch.setattr(gc, "get_objects", lambda *generation: pytest.fail("a search"))
    layer, buffer = nnmirror.Linear(3, 4), torch.zeros(4)
    buffer.data.lerp_(layer(torch.randn(2, 3)).mean(0), 0.1)
    part = buffer.data[:2]
    part.add_(layer(torch.randn(3))[:2])
    assert part.requires_grad
    assert not buffer.requires_grad


@parity
def test_views_from_long_ago(nn, optim):
    w = nn.Parameter(torch.randn(3))
    buffer = torch.zeros(4, 3)
    row = buffer[1]
    gc.collect()
    column = buffer[:, 1]
    gc.collect(0)
    buffer[1] = w
    (row.sum() + column.sum()).backward()
    return row, column, w


@pytest.mark.parametrize("asked", [True, False])
@parity
def test_loop_over_rows_that_are_written(nn, optim, asked):
    """The gradient is right only if each row's grad_fn was read in between, as in PyTorch."""
    w = nn.Parameter(torch.randn(3))
    buffer = torch.zeros(4, 3)
    rows = [buffer[i] for i in range(4)]
    for i, row in enumerate(rows):
        _ = asked and row.grad_fn
        row += w * i
    (buffer * torch.randn(4, 3)).sum().backward()
    return buffer, rows, w


@parity
def test_in_place_on_views_of_a_plain_tensor(nn, optim):
    x, w = torch.randn(4, 3), nn.Parameter(torch.randn(3))
    first, second = x[:, 0], x[:, 1]
    nn.functional.relu_(x[:, 0])
    nn.ReLU(inplace=True)(x[0])
    first.mul_(w[0].tanh())
    x[:, 1].relu_()
    assert second.grad_fn is not None
    torch.relu_(second)
    nn.functional.leaky_relu_(x[:, 2], 0.5)
    x[1:][1:].sub_(w)
    second[second > -0.5] = w[1]
    (x * x).sum().backward()
    return x, first, second, w


def test_buffer_seen_by_a_subclass_is_refused():
    """A view of a tensor subclass cannot be given the gradient, so the assignment raises."""

    class Special(torch.Tensor):
        pass

    w = nnmirror.Parameter(torch.randn(3))
    buffer = torch.zeros(4, 3)
    row = buffer.as_subclass(Special)[1]
    assert row._base is not None
    with pytest.raises(RuntimeError, match="clone"):
        buffer[0] = w
    assert torch.equal(buffer, torch.zeros(4, 3))


@pytest.mark.parametrize("n", [1, 9])
@parity
def test_loop_that_writes_into_slices(nn, optim, n):
    """A fractional derivative: each element is a sum over all earlier ones."""
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
    c = torch.randn(n)
    u = net(torch.linspace(0, 1, n)[:, None]).squeeze(1)
    d = torch.zeros(n)
    for k in range(n):
        d[k] = c[: k + 1] @ u[: k + 1].flip(0)
    (d * d).mean().backward()
    return d, dict(net.named_parameters())


ASSIGNED = {
    "element": ((1, 2), lambda w: w[0]),
    "row": (1, lambda w: w),
    "negative row": (-1, lambda w: w * 2),
    "row of a number": (2, lambda w: w[0]),
    "rows": (slice(1, 3), lambda w: torch.stack([w, w * 2])),
    "rows of a number": (slice(1, None), lambda w: w.sum()),
    "column": ((slice(None), 1), lambda w: w.sum().expand(4)),
    "every other": ((slice(0, 4, 2), slice(1, None)), lambda w: torch.stack([w, w])[:, 1:]),
    "nothing": (slice(2, 2), lambda w: w[:0].reshape(0, 3)),
    "all": (slice(None), lambda w: w),
    "a leaf": (0, lambda w: w),
    "a plain tensor": (0, lambda w: torch.ones(3)),
    "a number": ((3, 0), lambda w: 2.5),
    "of another dtype": (0, lambda w: w.double()),
    "broadcast": (slice(1, 3), lambda w: w),
    "bounds of tensors": (slice(torch.tensor(1), torch.tensor(2)), lambda w: w[None]),
    "beyond": (4, lambda w: w),
    "too many": ((1, 2, 0), lambda w: w[0]),
    "of a wrong shape": (slice(1, 3), lambda w: w[:2]),
}


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", ASSIGNED)
@parity
def test_assignment_to_a_result(nn, optim, name, layout):
    """Two assignments to one result, with a hook, retain_grad and a view between them."""
    index, value = ASSIGNED[name]
    x, w = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    h = nn.functional.tanh(x if layout == "rows" else x.t().reshape(3, 4).contiguous().t())
    seen = []
    h[0, 0] = w[1]
    h.retain_grad()
    h.register_hook(lambda g: seen.append(g.clone()))
    row = h[1]
    h[index] = w if name == "a leaf" else value(w)
    made = h.grad_fn
    after = made.name(), [f and f.name() for f, _ in made.next_functions][:1], h._version
    (h * torch.arange(12.0).reshape(4, 3)).sum().backward(retain_graph=True)
    row.sum().backward()
    return after, h, h.grad, seen, row, x, w


# Plain 4 x 3 tensors of different layouts and origins to write to.
BUFFERS = {
    "rows": lambda: torch.randn(4, 3),
    "columns": lambda: torch.randn(3, 4).t().clone(),
    "with gaps": lambda: torch.empty_strided((4, 3), (6, 2)).fill_(0.5),
    "double": lambda: torch.randn(4, 3).double(),
    "a view": lambda: torch.randn(5, 3)[1:],
    "a transposed view": lambda: torch.randn(3, 4).t(),
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "several elements in one place": lambda: torch.zeros(3).as_strided((4, 3), (0, 1)),
    "detached": lambda: torch.randn(4, 3).detach(),
    "of a numpy array": lambda: torch.from_numpy(torch.randn(4, 3).numpy()),
    "made in inference mode": lambda: _made_in_inference_mode(),
}


def _made_in_inference_mode():
    with torch.inference_mode():
        return torch.randn(4, 3)


@pytest.mark.parametrize("name", ASSIGNED)
@parity
def test_assignment_to_a_plain_tensor(nn, optim, name):
    """The first assignment of a tracked tensor: graph, values, first and second derivatives."""
    index, value = ASSIGNED[name]
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))  # their sums are exact in any order
    found = []
    for kind, shared in itertools.product(BUFFERS, [False, True]):
        buffer, v = BUFFERS[kind](), w if name == "a leaf" else value(w)
        old = buffer.detach() if shared else None  # others with this memory are looked for
        try:
            buffer[index] = v
        except (RuntimeError, IndexError, TypeError) as error:
            found.append((kind, type(error), str(error)))
            continue
        made = buffer.grad_fn
        names = made and (made.name(), [f and f.name() for f, _ in made.next_functions][:1])
        about = kind, buffer.requires_grad, buffer.is_leaf, buffer._version, names
        found += [about, buffer.detach(), old]
        if buffer.requires_grad:
            loss = (buffer * buffer * torch.arange(12.0).reshape(4, 3)).sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            (g * g).sum().backward()
            found += [g, w.grad.clone()]
    return found


@parity
def test_assignment_to_a_plain_tensor_in_other_modes(nn, optim):
    w = nn.Parameter(torch.randn(3))
    buffers = [torch.zeros(4, 3) for _ in range(4)]
    with torch.no_grad():
        buffers[0][1] = w
    with torch.no_grad(), torch.enable_grad():
        buffers[1][1] = w
    with torch.inference_mode():
        buffers[2][1] = w
    w.requires_grad_(False)
    buffers[3][1] = w
    w.requires_grad_(True)
    about = [(b.requires_grad, b._version, b.is_inference()) for b in buffers]
    for b in buffers[:2]:
        b[2] = w * 2
        b.sum().backward()
    return about, buffers, w


@parity
def test_buffer_made_anew_in_each_step(nn, optim):
    """A new buffer each step, written element by element, read in between, with an early view."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    opt = optim.SGD(net.parameters(), lr=0.1)
    found = []
    for step in range(5):
        u = net(torch.linspace(0, 1, 6)[:, None])[:, 0]
        d, rows = torch.zeros(6), torch.zeros(3, 6)
        for k in range(6):
            before = d[:k] if step == 3 and k == 1 else None
            d[k] = u[: k + 1].sum() + (0 if k == 0 else d[k - 1].clone())
            if before is not None:
                found.append(before.grad_fn is not None)
        rows[step % 3] = d * 2
        loss = (d * d).mean() + rows.sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        found += [d, rows, loss]
    return found, dict(net.named_parameters())


def names_behind(node):
    """The names of a node and of all nodes behind it."""
    return node and (node.name(), [names_behind(n) for n, _ in node.next_functions])


@pytest.mark.parametrize("seen", ["", "looked at", "hook", "retained", "used before", "kept"])
@parity
def test_part_is_changed_and_assigned(nn, optim, seen):
    """`x[index] += v` is recorded as one node, but shows PyTorch's nodes when inspected."""
    w = nn.Parameter(torch.randn(4, 3))
    h = nn.functional.tanh(w)
    found = []
    if seen == "retained":
        h.retain_grad()
    for k in range(3):
        h[k] += h[k + 1] * 2
        h[:, k] *= w[:, k]
        h[k : k + 2] -= h[:2].clone()
        if seen == "looked at":
            found.append(names_behind(h.grad_fn))
        if seen == "hook":
            h.register_hook(lambda g, found=found: found.append(g.clone()))
        if seen == "used before":
            part = h[k]
            part += w[k]
            found.append(h.sum())
            h[k] = part
        if seen == "kept":
            part = h[k]
            part /= 3
            h[k] = part
            found += [part, part * w[0]]
    found += [h._version, h.clone()]
    loss = (h * torch.arange(12.0).reshape(4, 3)).sum() - h[0, 0]
    (g,) = torch.autograd.grad(loss, w, retain_graph=True)
    loss.backward(retain_graph=True)
    (again,) = torch.autograd.grad((h * h).sum(), w, create_graph=True)
    (again * again).sum().backward()
    found += [g, again, w.grad, torch.signbit(g), names_behind(h.grad_fn)]
    return found, h.grad if seen == "retained" else None


@parity
def test_second_backward_through_an_assignment(nn, optim):
    w = nn.Parameter(torch.randn(3))
    h = w + 1
    h[0] = w[1]
    h[1:] = 2.0
    h.sum().backward()
    h.sum().backward()


@parity
def test_result_with_other_data_is_sliced(nn, optim):
    h = nn.functional.tanh(nn.Parameter(torch.randn(4)))
    h.data = torch.randn(4)
    z = h[1:].flip(0)
    h[0] = z[0]
    (z @ z + h.sum()).backward()
    return h, z


@pytest.mark.parametrize("index", [np.int64(1), np.array(1), (slice(None), np.int32(1))], ids=repr)
@parity
def test_an_integer_of_numpy_makes_a_view(nn, optim, index):
    """As from np.argmax: what is changed in place is seen through it, with its gradient."""
    w, found = nn.Parameter(torch.arange(6.0).reshape(2, 3)), []
    for _ in range(5):
        x = w * 2
        x[index].mul_(3)
        y = x[index]
        x.mul_(0.5)
        (x.sum() + (y * y).sum()).backward()
        found += [x.detach(), y.detach(), y.grad_fn.name(), w.grad.clone()]
    return found
