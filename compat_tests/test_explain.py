"""nnmirror.explain: the backward written out as code, correct and able to run on its own."""

import bdb
import collections
import contextlib
import importlib.util
import inspect
import io
import pdb
import re
import runpy
import signal
import sys
import threading

import pytest
import torch

import nnmirror
from nnmirror._state import here
from nnmirror.exact import activation
from nnmirror.explaining import standalone
from nnmirror.rules import activation as rules
from nnmirror.rules import linear

from .parity import parity

# -- the nets: each gives a loss, a module, and the tensors that get a gradient ------------------


def hand_wired(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(2, 25), nn.Linear(25, 25)
            self.act, self.out = nn.Tanh(), nn.Linear(25, 1)

        def forward(self, x):
            h = self.act(self.fc1(x))
            h = torch.relu(self.fc2(h))
            return self.out(h)

    net = Net()
    return nn.MSELoss()(net(torch.randn(4, 2)), torch.randn(4, 1)), net, [*net.parameters()]


def sequential(nn):
    net = nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.Sigmoid()), nn.Linear(4, 2)
    )
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for _ in range(5):  # until its layers are run as one call
        loss = nn.MSELoss()(net(x), y)
    return loss, net, [*net.parameters()]


def shared_module(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)

        def forward(self, x):
            for _ in range(3):
                x = self.act(self.fc(x))
            return self.out(x)

    net = Net()
    return net(torch.randn(5, 4)).mean(), net, [*net.parameters()]


def branches_and_scalars(nn):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    x = torch.randn(4, 3)
    h = a(x)
    h = h + torch.tanh(b(h)) * 0.5 - h[:, :1]
    u, v = h.chunk(2, 0)
    scale = (u * v).sum() / 3
    loss = scale * scale + h.t().reshape(-1)[2:7].prod() + (2 - h).exp().mean()
    return loss, (a, b), [a.weight, a.bias, b.weight]


def loss_written_out(nn):
    net = nn.Linear(3, 2)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    out = net(x)
    loss = ((out - y) ** 2).sum(dim=1).sqrt().mean() + 0.01 * sum(
        p.pow(2).sum() for p in net.parameters()
    )
    return loss, net, [*net.parameters()]


def layer_norm(nn):
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ELU(), nn.Linear(8, 2))
    return net(torch.randn(6, 3)).square().mean(), net, [*net.parameters()]


def batch_norm(nn):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return net(torch.randn(6, 3)).square().mean(), net, [*net.parameters()]


def dropout(nn):
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.LeakyReLU(0.1), nn.Linear(8, 2))
    return net(torch.randn(6, 3)).sum(), net, [*net.parameters()]


def embedding(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3)

        def forward(self, ids):
            return self.out(self.words(ids).mean(1))

    net, ids = Net(), torch.randint(0, 11, (5, 4))
    return nn.MSELoss()(net(ids), torch.randn(5, 3)), net, [*net.parameters()]


def cross_entropy(nn):
    net = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 5))
    out, y = net(torch.randn(8, 4)), torch.randint(0, 5, (8,))
    each = nn.NLLLoss(reduction="none")(out.log_softmax(1), y)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)(out, y) + (each * torch.rand(8)).sum()
    return loss, net, [*net.parameters()]


def attention(nn):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
            self.out = nn.Linear(6, 6)

        def forward(self, x):
            q, k, v = (f(x).view(2, 5, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = q @ k.transpose(-2, -1) / 3**0.5
            mask = torch.ones(5, 5).tril() == 0
            weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).reshape(2, 5, 6))

    net = Attention()
    return net(torch.randn(2, 5, 6)).pow(2).mean(), net, [*net.parameters()]


def fifty_layers(nn):
    layers = []
    for _ in range(50):
        layers += [nn.Linear(6, 6), nn.Tanh()]
    net = nn.Sequential(*layers)
    return net(torch.randn(3, 6)).sum(), net, [*net.parameters()]


def double_precision_and_inputs(nn):
    net = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    h = net(x)
    h = h.clone()
    h[:, 0] = h[:, 1] * 2
    h[1:].mul_(3)
    return (h * x).sum(), net, [*net.parameters(), x]


def gradients_that_are_added_up(nn):
    """Several gradients are added at one tensor: in place, and y * y as the second product."""
    norm = nn.BatchNorm1d(3)
    w = nn.Parameter(torch.randn(5, 3))
    y = w * 2
    rows = w.index_select(0, torch.tensor([1, 1])) - w[torch.tensor([0, 2])]
    loss = (y * y).sum() + norm(w).pow(2).sum() + rows.exp().sum()
    return loss + norm.eval()(w).sum(), norm, [*norm.parameters(), w]


def two_leaves_of_one_gradient(nn):
    v, w = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    y = (v + w) * 1
    return (y.exp() + y).sum(), (), [v, w]


NETS = [
    hand_wired,
    sequential,
    shared_module,
    branches_and_scalars,
    loss_written_out,
    layer_norm,
    batch_norm,
    dropout,
    embedding,
    cross_entropy,
    attention,
    fifty_layers,
    double_precision_and_inputs,
    gradients_that_are_added_up,
    two_leaves_of_one_gradient,
]


def made(net, nn):
    torch.manual_seed(3)
    return net(nn)


@pytest.mark.parametrize("net", NETS)
@nnmirror.exact()
def test_the_saved_file_gives_pytorchs_gradients(net, tmp_path):
    expected, _, theirs = made(net, torch.nn)
    expected.backward()
    loss, _module, mine = made(net, nnmirror)
    explanation = nnmirror.explain(loss)
    explanation.save(tmp_path / "backward.py")
    text = (tmp_path / "backward.py").read_text()
    assert not [line for line in text.splitlines() if line.startswith("import nnmirror")]
    ran = runpy.run_path(str(tmp_path / "backward.py"))
    found = ran["backward"](**ran["values"]())
    loss.backward()
    assert len(found) == len(theirs) == len(explanation.leaves)
    for p, q in zip(theirs, mine, strict=True):
        (name,) = [n for n, leaf in explanation.leaves.items() if torch.equal(leaf.value, q)]
        assert torch.equal(found[name], p.grad), name
        assert torch.equal(q.grad, p.grad), name


def test_a_function_in_the_readers_names():
    """Parameters have their modules' names, variables the script's, and calls their source line."""
    torch.manual_seed(0)

    class Net(nnmirror.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nnmirror.Linear(2, 4), nnmirror.Linear(4, 1)

        def forward(self, x):
            h = torch.tanh(self.fc1(x))
            return self.fc2(h)

    net, criterion = Net(), nnmirror.MSELoss()
    x, y = torch.randn(3, 2), torch.randn(3, 1)
    loss = criterion(net(x), y)
    explanation = nnmirror.explain(loss)
    text = str(explanation)
    assert "d_fc1_weight = d_fc1.t().mm(x)" in text
    assert "d_fc1 = torch.addcmul(one, tanh, tanh, value=-1) * d_tanh" in text
    assert "# dx = g (1 - y^2)" in text
    assert "h = torch.tanh(self.fc1(x))" in text
    known = [(o.module, o.module_class, o.node) for o in explanation.operations]
    assert known == [
        ("criterion", "MSELoss", "MseLossBackward0"),
        ("fc2", "Linear", "AddmmBackward0"),
        ("", "Net", "TanhBackward0"),
        ("fc1", "Linear", "AddmmBackward0"),
    ]
    assert all(o.place is not None and o.place.filename == __file__ for o in explanation.operations)
    assert [i.operation for i in explanation.operations[1].inputs] == [None, 2, None]
    assert [i.leaf for i in explanation.operations[1].inputs] == ["fc2.bias", None, "fc2.weight"]
    assert torch.equal(explanation.operations[3].results[0].value, net.fc1(x).detach())
    assert list(explanation.gradients) == ["fc2.bias", "fc2.weight", "fc1.bias", "fc1.weight"]
    assert "Explanation" in repr(explanation)


def test_the_line_of_a_call_is_shown_only_if_it_is_known():
    """A repeated call may come from another line. In plain mode every line is known."""
    net = nnmirror.Linear(2, 2)
    x = torch.randn(3, 2)
    for _ in range(2):
        loss = net(x).sum()
    assert [o.place for o in nnmirror.explain(loss).operations] == [None, None]
    with nnmirror.plain():
        loss = net(x).sum()
    places = [o.place for o in nnmirror.explain(loss).operations]
    assert [p and p.text for p in places] == ["loss = net(x).sum()"] * 2


def test_each_call_of_a_layer_without_weights_is_named():
    """In training too; operations outside of a layer get no name."""
    fc, act, apart = nnmirror.Linear(4, 4), nnmirror.Tanh(), nnmirror.PairwiseDistance()
    block = nnmirror.Sequential(nnmirror.Softmax(-1), nnmirror.Tanh())
    x = torch.randn(3, 4)
    for _ in range(5):
        h = block(act(block(act(fc(act(x.clone().requires_grad_()))))))
        loss = apart(h, h.exp()).sum() + apart(x2=h * 2, x1=x).sum()
        explanation = nnmirror.explain(loss)
        kinds = [(o.node, o.module) for o in explanation.operations]
        assert [m for n, m in kinds if n == "NormBackward1"] == ["apart"] * 2
        assert [m for n, m in kinds if n in ("ExpBackward0", "MulBackward0")] == ["", ""]
        once = ["block.1", "block.0", "act"]
        assert [m for _, m in kinds[-8:]] == [*once, *once, "fc", "act"]


def test_names_that_python_or_a_comment_would_not_take(tmp_path):
    class Net(nnmirror.Module):
        def __init__(self):
            super().__init__()
            self.given = ["two\nlines", "\ufb01", "x\u00b2", "class", "\u2028", "\U0001f600", "\ud800", "d_x",
                          "x", "t1", "torch", "values", "a\tb\r", '"q"', "\\n", "1"]  # fmt: skip
            for name in self.given:
                self.add_module(name, nnmirror.Linear(2, 2))
            self.register_parameter("p\nq", nnmirror.Parameter(torch.ones(2)))

        def forward(self, x):
            for name in self.given:
                x = torch.tanh(self._modules[name](x))
            return x * self._parameters["p\nq"]

    class Doubled(nnmirror.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    Net.__qualname__ = Net.__name__ = "N\net"
    Doubled.__name__ = "dou\nbled"
    net = Net()
    loss = Doubled.apply(net(torch.randn(3, 2))).sum()
    explanation = nnmirror.explain(loss)
    explanation.html(tmp_path / "net.html")
    explanation.save(tmp_path / "backward.py")
    ran = runpy.run_path(str(tmp_path / "backward.py"))
    found = ran["backward"](**ran["values"]())
    loss.backward()
    for name, p in net.named_parameters():
        assert torch.equal(found[name], p.grad), name
    assert "# two\\nlines (Linear): AddmmBackward0\n" in explanation.source


def test_repeated_calls_give_the_same_source():
    """Also in exact mode, which computes the formula differently, the same formula is shown."""
    net = nnmirror.Sequential(nnmirror.Linear(2, 3), nnmirror.LeakyReLU(0.37), nnmirror.GELU())
    loss = (net(torch.randn(4, 2)) * 0.137 + 0.1).sum()
    first = nnmirror.explain(loss).source
    for _ in range(4):
        assert nnmirror.explain(loss).source == first
    assert "* 0.137\n" in first
    with nnmirror.exact():
        exactly = nnmirror.explain(net(torch.randn(4, 2)).sum())
    assert exactly.operations[1].formula.startswith("none:  P(x) = ")
    assert "dx = g (P(x) + x p(x))" in first


@parity
def test_explain_does_not_change_training(nn, optim):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        loss = nn.MSELoss()(net(torch.randn(5, 3)), torch.randn(5, 1))
        optimizer.zero_grad()
        if nn is nnmirror and step in (1, 4):
            explanation = nnmirror.explain(loss)
            assert all(p.grad is None for p in net.parameters())
        loss.backward()
        if nn is nnmirror and step in (1, 4):
            for name, p in net.named_parameters():
                assert torch.equal(explanation.gradients[name], p.grad)
        optimizer.step()
    return list(net.parameters())


@parity
@pytest.mark.parametrize("way", ["steps", "plain"])
def test_steps_and_plain_mode_give_the_same_bits(nn, optim, way):
    """With hooks, retained gradients, a user's Function and torch's own graph before it."""
    torch.manual_seed(0)
    seen = []
    base = nnmirror if nn is nnmirror else torch.autograd

    class Cube(base.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 3 * x * x

    net, out = nn.Linear(3, 4), nn.Linear(4, 2)
    net.weight.register_hook(lambda g: seen.append(("weight", g)))
    net.bias.register_post_accumulate_grad_hook(lambda p: seen.append(("bias", p.grad.clone())))
    x = torch.randn(5, 3, requires_grad=True)

    def run():
        h = net(x * 2)
        h.retain_grad()
        h.register_hook(lambda g: g * 0.5)
        t = Cube.apply(torch.tanh(h))
        t.grad_fn.register_hook(lambda gi, go: seen.append(("node", *go, out.weight.grad)))
        a, b = t.unbind(1)[:2]
        top, _ = t.sort(1)
        loss = out(t + t.detach()).pow(2).mean() + (a * b).sum() + top[:, -1].sum()
        if nn is not nnmirror:
            loss.backward()
        elif way == "steps":
            for step in nnmirror.steps(loss):
                assert step.gradients
                if step.node == "TanhBackward0":
                    assert list(step.take()) == ["input"]
        else:
            loss.backward()
        return h.grad

    results = []
    for _ in range(2):
        if way == "plain":
            with nnmirror.plain():
                results.append(run())
        else:
            results.append(run())
    return results, seen, x.grad, [p.grad for p in (*net.parameters(), *out.parameters())]


def test_a_step_knows_what_it_does():
    net = nnmirror.Sequential(nnmirror.Linear(3, 4), nnmirror.Tanh(), nnmirror.Linear(4, 1))
    loss = net(torch.randn(5, 3)).sum()
    steps = []
    for step in nnmirror.steps(loss, net):
        assert step.input_gradients is None
        steps.append(step)
    assert [s.module for s in steps] == ["", "2", "1", "0"]
    assert [s.formula for s in steps][2] == "dx = g (1 - y^2)"
    assert [s.computes for s in steps][2] == "y = tanh(x)"
    assert torch.equal(steps[1].input_gradients["weight"], net[2].weight.grad)
    assert steps[2].gradient is steps[1].input_gradients["input"]


def test_a_loop_over_steps_may_be_left():
    """Gradients that are complete are kept, others not started; torch's modes are restored."""
    first, second = nnmirror.Linear(3, 4), nnmirror.Linear(4, 1)
    loss = second(first(torch.randn(5, 3))).sum()
    for step in nnmirror.steps(loss):
        if step.module == "first":
            break
    assert second.weight.grad is not None is first.weight.grad
    assert torch.is_grad_enabled()
    assert (first(torch.randn(5, 3)) * 2).requires_grad
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_refused_as_by_pytorch():
    net, x = nnmirror.Linear(3, 2), torch.randn(4, 3)
    for ask in (nnmirror.explain, nnmirror.steps):
        with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
            ask(x.sum())
        with pytest.raises(RuntimeError, match="only for scalar outputs"):
            ask(net(x))
    loss = net(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        nnmirror.explain(loss)
    explanation = nnmirror.explain(net(x), gradient=torch.ones(4, 2))
    assert torch.equal(explanation.gradients["net.bias"], net.bias.grad)


def test_a_hook_that_may_change_a_gradient_is_refused_by_name():
    net = nnmirror.Linear(3, 2)

    def doubled(g):
        return g * 2

    h = net(torch.randn(4, 3))
    h.retain_grad()
    nnmirror.explain(h.sum())
    h.register_hook(doubled)
    with pytest.raises(NotImplementedError, match=r"hook doubled .*nnmirror\.steps"):
        nnmirror.explain(h.sum())
    with nnmirror.watch(net):
        nnmirror.explain(net(torch.randn(4, 3)).sum())


def test_a_step_shows_the_gradient_that_it_uses():
    """After the hooks of its result, before and after it is taken."""
    x, net, seen = torch.randn(4, 3), nnmirror.Linear(3, 2), {}
    h = net(x)
    h.register_hook(lambda g: g * 2)
    h.grad_fn.register_prehook(lambda gs: (gs[0] + 1,))
    for step in nnmirror.steps(h.sum()):
        seen[step.node] = before, *_ = step.gradients
        step.take()
        assert step.gradients[0] is before
    assert torch.equal(seen["AddmmBackward0"][0], torch.full((4, 2), 3.0))
    assert torch.equal(net.bias.grad, torch.full((2,), 12.0))


@pytest.mark.parametrize("tool", ["explain", "steps"])
def test_what_the_tools_cannot_show_is_refused_at_once(tool):
    call = getattr(nnmirror, tool)
    net = nnmirror.Linear(3, 2)
    with pytest.raises(TypeError, match="by PyTorch's autograd, not by the mirror"):
        call(torch.nn.Linear(3, 2)(torch.ones(3)).sum())
    with pytest.raises(TypeError, match="takes a tensor, such as a loss, not a Linear"):
        call(net)
    with pytest.raises(TypeError, match="a module is expected after the tensor, not a str"):
        call(net(torch.ones(3)).sum(), "net")
    with pytest.raises(RuntimeError, match="does not require grad"):
        call(torch.ones(()))


class Wired(nnmirror.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nnmirror.Linear(3, 4), nnmirror.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.l1(x))
        return self.l2(h)


# Since Python 3.13 pdb stops at the line that starts it, not at the next one.
BEFORE = ["n"] if sys.version_info >= (3, 13) else []


def pdbs_set_trace():
    raise AssertionError("pdb was started otherwise")


pdbs_set_trace.__module__ = "pdb"


@pytest.fixture
def at_the_prompt(monkeypatch, capsys):
    """Run a script with breakpoints as outside pytest; feed pdb the commands, then `c`.

    Returns where pdb stopped, and the output.
    """
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
    monkeypatch.setattr(pdb, "set_trace", pdbs_set_trace)
    tracer, interrupt = sys.gettrace(), signal.getsignal(signal.SIGINT)

    def run(script, *commands):
        lines = [*BEFORE, *commands, "c", "c", "c"]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        try:
            script()
        finally:
            sys.settrace(tracer)
            signal.signal(signal.SIGINT, interrupt)
            bdb.Breakpoint.clearBreakpoints()
        said = capsys.readouterr().out
        stops = re.findall(r"^(?:\(Pdb\) )*> .*?\)(\S+?)\(\)", said, re.M)
        return stops[len(BEFORE) :], said

    return run


def test_a_debugger_steps_from_the_script_into_the_formulas(at_the_prompt):
    """`s` goes to the call of a formula, then to its line, past everything in between."""
    net, criterion = Wired(), nnmirror.MSELoss()
    row = nnmirror.Sequential(nnmirror.Linear(3, 4), nnmirror.Tanh(), nnmirror.Linear(4, 1))
    x, target = torch.randn(5, 3), torch.randn(5, 1)
    loss, sgd = criterion(net(x), target), nnmirror.optim.SGD(net.parameters(), lr=0.1)

    @nnmirror.plain()
    def script(call, *args):
        breakpoint()
        call(*args)

    def stops(call, commands):
        commands = commands.split()
        return at_the_prompt(lambda: script(*call), *commands)[0][1 : len(commands) + 1]

    forward = ["forward", "forward", "Linear.forward", "Linear.forward"]  # the net's, the rule's
    assert stops((net, x), "s s s s") == forward
    assert stops((row, x), "s s r s") == ["Linear.forward"] * 3 + ["Tanh.forward"]
    assert stops((criterion, x, x + 1), "s") == ["MseLoss.forward"]
    assert stops((sgd.step,), "s") == ["_step_plainly"]
    assert stops((loss.backward,), "s r s r s r s r s s s s") == [
        *["MseLoss.d_input"] * 2,
        *[f"Linear.d_{name}" for name in ("bias", "input", "weight") for _ in range(2)],
        *["Tanh.d_input"] * 2,
        *["_tanh_grad"] * 2,
    ]
    # From the end of a formula, or of a function that it calls, back to the caller.
    assert stops((net, x), "s s s s s r r") == [*forward, "_linear", "_linear", "Linear.forward"]
    assert stops((net, x), "s s s s n r") == [*forward, "Linear.forward", "forward"]


def test_a_debugger_says_whose_formula_it_is_and_finds_it_by_its_name(at_the_prompt):
    net, x = Wired(), torch.randn(5, 3)

    @nnmirror.plain()
    def script():
        breakpoint()
        net(x).sum().backward()

    commands = "b Tanh.d_input", "c", "b nnmirror.rules.linear.Linear.d_weight, g.numel() > 4", "c"
    stops, said = at_the_prompt(script, *commands)
    assert stops == ["script", "Tanh.d_input", "Linear.d_weight"]
    assert ")Tanh.d_input()  dx = g (1 - y^2)\n-> return " in said
    for name, function in {  # as they were written, not their wrappers
        "nnmirror.rules.linear.Linear.forward": linear.Linear.formulas.raw_forward,
        "Wired.forward": inspect.unwrap(Wired.forward),
        "nnmirror.exact.activation.Gelu.d_input": vars(activation.Gelu)["d_input"],
    }.items():
        code = getattr(function, "__func__", function).__code__
        said = at_the_prompt(script, f"b {name}")[1]
        assert f"Breakpoint 1 at {code.co_filename}:{code.co_firstlineno}\n" in said
    said = at_the_prompt(script, "b Tanh.d_output")[1]
    assert "*** The specified object 'Tanh.d_output' is not a function" in said


def test_a_debugger_skips_what_lies_between_however_it_was_started(at_the_prompt):
    loss = nnmirror.MSELoss()(Wired()(torch.randn(5, 3)), torch.randn(5, 1))

    @nnmirror.plain()
    def by_pdb():
        pdb.set_trace()
        loss.backward(retain_graph=True)

    def by_name():
        nnmirror.set_trace(header="here")
        loss.backward(retain_graph=True)

    def before():  # as `python -m pdb` does
        pdb.Pdb(nosigint=True).set_trace()
        with nnmirror.plain():
            loss.backward(retain_graph=True)

    for script, commands in ((by_pdb, "s"), (by_name, "s"), (before, "n s")):
        stops, said = at_the_prompt(script, *commands.split())
        assert stops[len(commands.split())] == "MseLoss.d_input"
        assert said.startswith("here\n") is (script is by_name)
        assert not here.is_plain
        assert pdb.set_trace is pdbs_set_trace


def test_in_plain_mode_the_rules_themselves_are_called():
    """A breakpoint in a rule stops: in forward and backward, in a Sequential, at every call."""
    written = linear.Linear.formulas.raw_forward, vars(rules.Tanh)["d_input"]
    called = [function.__func__.__code__ for function in written]
    net = nnmirror.Sequential(nnmirror.Linear(3, 4), nnmirror.Tanh(), nnmirror.Linear(4, 1))
    x = torch.randn(5, 3)
    counts = collections.Counter()

    def tracer(frame, event, arg):
        counts[frame.f_code] += 1

    before = sys.gettrace()
    for plain in (True, False):
        counts.clear()
        for step in range(12):
            with nnmirror.plain() if plain else contextlib.nullcontext():
                sys.settrace(tracer if step == 11 else before)
                net(x).sum().backward()
                with torch.no_grad():
                    net(x)
                sys.settrace(before)
        assert [counts[code] for code in called] == ([4, 1] if plain else [0, 0])


def test_plain_mode_gives_grad_the_same_strides():
    """Along a dimension of length one, too; they choose the kernel of what is computed with it."""
    for plain in (False, True):
        with nnmirror.plain() if plain else contextlib.nullcontext():
            w = nnmirror.Parameter(torch.randn(1, 4, 1).transpose(0, 2))
            (w * 2).exp().sum().backward()
            assert w.grad.stride() == (4, 1, 1)


def test_plain_mode_belongs_to_the_thread():
    seen = []

    def other():
        seen.append(here.is_plain)

    with nnmirror.plain():
        assert here.is_plain
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [False]
    assert not here.is_plain


def test_the_environment_turns_plain_mode_on(monkeypatch):
    monkeypatch.setenv("NNMIRROR_PLAIN", "1")
    spec = importlib.util.find_spec("nnmirror._state")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.here.is_plain
    assert again.plain == 1


def test_torchs_own_graph_in_front_is_left_to_torch():
    net, w = nnmirror.Linear(2, 1), torch.rand(3, 2, requires_grad=True)
    inner = w * 2
    loss = net(inner).sum()
    explanation = nnmirror.explain(loss)
    assert "# PyTorch's own graph goes on from here" in explanation.source
    loss.backward()
    assert torch.equal(explanation.gradients["inner"] * 2, w.grad)


def test_a_users_function_and_what_it_reads_are_written_for_these_numbers():
    class Largest(nnmirror.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.place = int(x.argmax())
            return x.max()

        @staticmethod
        def backward(ctx, g):
            dx = torch.zeros(4)
            dx[ctx.place] = g * float(g)
            return dx

    p = nnmirror.Parameter(torch.tensor([1.0, 3.0, 2.0, 0.0]))
    explanation = nnmirror.explain(Largest.apply(p) * 3)
    assert "# What follows depends on numbers in these tensors." in explanation.source
    assert torch.equal(explanation.gradients["p"], torch.tensor([0.0, 9.0, 0.0, 0.0]))


@parity
def test_training_in_and_out_of_plain_mode(nn, optim):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 1))
    optimizer = optim.Adam(net.parameters(), lr=0.1)
    for step in range(8):
        with nnmirror.plain() if step % 3 else contextlib.nullcontext():
            loss = nn.MSELoss()(net(torch.randn(5, 3)), torch.randn(5, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return list(net.parameters())


def test_a_saved_file_keeps_every_number(tmp_path):
    """Tensors of each kind, layout and size are read back with the same values and strides."""
    values = {
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 0.1]),
        "by_columns": torch.randn(3, 4).t(),
        "repeated": torch.randn(4, 1).expand(4, 5),
        "large": torch.randn(30, 30, dtype=torch.float64)[::2],
        "half": torch.randn(3, dtype=torch.bfloat16),
        "mask": torch.tensor([[True, False]]),
        "many": torch.randn(10, 10) > 0,
        "index": torch.tensor([1, -2]),
        "none": torch.empty(0, 3),
    }
    names = ", ".join(values)
    standalone.save(
        f"import torch\n\n\ndef backward({names}):\n    pass\n", values, tmp_path / "f.py"
    )
    found = runpy.run_path(str(tmp_path / "f.py"))["values"]()
    for name, value in values.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        assert found[name].stride() == value.stride(), name
        same = torch.equal(found[name].nan_to_num(nan=7), value.nan_to_num(nan=7))
        assert same, name
        assert torch.equal(found[name].signbit(), value.signbit()), name


def test_an_in_place_negation_is_written_as_one():
    """`-x` alone on a line would have no effect."""

    class Negated(nnmirror.Function):
        @staticmethod
        def forward(ctx, x):
            return -x

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g.neg_()
            return g

    p = nnmirror.Parameter(torch.rand(3))
    explanation = nnmirror.explain(Negated.apply(p).sum())
    assert ".neg_()" in explanation.source
    assert torch.equal(explanation.gradients["p"], -torch.ones(3))


def test_a_net_that_is_made_again_is_explained_alike():
    """As by a cell of a notebook that is run again: with the lines of its calls."""
    texts = set()
    for _ in range(5):
        torch.manual_seed(0)
        first, last, x = nnmirror.Linear(3, 4), nnmirror.Linear(4, 1), torch.ones(2, 3)
        texts.add(str(nnmirror.explain(last(torch.tanh(first(x))).sum(), first, last)))
    (text,) = texts
    assert "last(torch.tanh(first(x)))" in text
