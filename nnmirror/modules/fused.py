"""The plain layers of a Sequential, run at one go.

Layer by layer, every layer pays for being a module, a recorded call and a tracked tensor,
which on a small net is most of the time. Here the same operations run in the same order on
plain tensors, and leave one node: the formulas are those of `nnmirror.functional`, arranged
in two loops. Nothing else may be told apart from the layers called one by one:

- only Linear, ReLU, LeakyReLU, Tanh, Sigmoid and Sequentials of them are taken, as they come,
  with no hook on any of them; anything odd about the input or the parameters goes the long way;
- where other layers stand between them, or hooked ones, each run of plain layers goes at one go
  and the others are called (`Mixed`);
- what nobody sees is computed in place: an activation in the memory of the Linear before it,
  a gradient in the memory of the one before it; in a small net, in memory that an earlier call
  has done with (`Scratch`);
- whoever asks for a `grad_fn` gets the nodes that the layers would have left: `unfold` makes
  them of what was saved.

`enabled = False` has every Sequential call its layers one by one.
"""

import functools
import weakref
from operator import is_
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass, _is_any_autocast_enabled

from .. import functional as F
from .. import tape, tensor, walk
from ..parameter import Parameter
from . import activation, linear, module
from .explicit import Chain, Recorded

enabled = True

_addmm, _mm, _le, _data_ptr = torch.addmm, torch.mm, torch.le, torch.Tensor.data_ptr

LINEAR, RELU, TANH, LEAKY, SIGMOID = range(5)
_FUNCTIONS: tuple[type[tape.Function], ...] = (F.Linear, F.Relu, F.Tanh, F.LeakyRelu, F.Sigmoid)
_IN_PLACE: Any = (None, torch.relu_, torch.tanh_, torch._C._nn.leaky_relu_, torch.sigmoid_)
_INPLACE_FUNCTIONS = {RELU: F.ReluInplace, LEAKY: F.LeakyReluInplace}
_KINDS: dict[type, int] = {
    linear.Linear: LINEAR,
    activation.ReLU: RELU,
    activation.Tanh: TANH,
    activation.LeakyReLU: LEAKY,
    activation.Sigmoid: SIGMOID,
}
_FORWARDS = {kind: kind.forward for kind in _KINDS}  # type: ignore[attr-defined]
_FLOATS = (torch.float32, torch.float64)
_PLAIN = (torch.Tensor, tensor.Tensor)


class Op:
    """One layer: what it does, to what. It must not hold the module, which leads here."""

    __slots__ = (
        "activate",
        "b",
        "bias",
        "function",
        "kind",
        "own",
        "saves_input",
        "slope",
        "w",
        "weight",
        "wt",
    )
    weight: Any
    bias: Any
    w: Any
    wt: Any
    b: Any

    def __init__(self, layer: Any, kind: int, after_linear: bool) -> None:
        self.kind, self.own = kind, layer._parameters
        self.function: type[tape.Function] = _FUNCTIONS[kind]
        if getattr(layer, "inplace", False):
            self.function = _INPLACE_FUNCTIONS[kind]
        self.weight = self.bias = self.w = self.wt = self.b = None
        self.slope = 0.0
        if kind == LINEAR:
            self.weight, self.bias = self.own["weight"], self.own["bias"]
            # The same memory, as plain tensors: torch is slower with a subclass.
            self.w = self.weight.detach()
            self.wt = self.w.t()
            self.b = None if self.bias is None else self.bias.detach()
        elif kind == LEAKY:
            self.slope = layer.negative_slope
        # Its input is the output of a Linear, which nobody else sees: it may be written over.
        # (The gradient of leaky_relu looks at signs, which a slope below zero turns round.)
        self.write_over(after_linear and not self.slope < 0)

    def write_over(self, hidden: bool) -> None:
        """Compute an activation in the memory of its input, if that is `hidden`."""
        self.saves_input = self.kind == LINEAR or (self.kind == LEAKY and not hidden)
        self.activate: Any = None
        if self.kind != LINEAR:
            self.activate = _IN_PLACE[self.kind] if hidden else _FUNCTIONS[self.kind].infer
        if self.kind == LEAKY:
            self.activate = functools.partial(self.activate, negative_slope=self.slope)


def _trains(parameter: Any) -> bool:
    return parameter is not None and parameter._requires_grad


class Needs:
    """Which gradients are asked for, given whether one for the input is."""

    __slots__ = (
        "edges",
        "input_at",
        "passes_on",
        "trained",
        "watch_input",
        "watch_output",
        "weights",
    )

    def __init__(self, ops: list[Op], input_edge: bool) -> None:
        # passes_on[i]: layer i must give a gradient for its input.
        self.passes_on = []
        # As it was at the forward: whether the bias, and the weight, of a layer get one.
        self.trained = [(_trains(op.bias), _trains(op.weight)) for op in ops]
        wanted = input_edge
        for op in ops:
            self.passes_on.append(wanted)
            wanted = wanted or _trains(op.weight) or _trains(op.bias)
        # What a backward looks at, and which therefore may not be changed until then.
        self.watch_input = _trains(ops[0].weight) if ops[0].kind == LINEAR else input_edge
        self.watch_output = ops[-1].kind != LINEAR and self.passes_on[-1]
        self.weights = tuple(
            op.w for op, on in zip(ops, self.passes_on, strict=True) if on and op.kind == LINEAR
        )
        # In the order in which the layers' own nodes would be walked.
        self.edges: list[Any] = [
            (p, 0)
            for op in reversed(ops)
            if op.kind == LINEAR
            for p in (op.bias, op.weight)
            if _trains(p)
        ]
        last = len(self.edges)  # the input's, before that of the first layer's weight
        self.input_at = last - 1 if _trains(ops[0].weight) else last

    def versions(self, saved: Any) -> list[int]:
        found = [weight._version for weight in self.weights]
        if self.watch_input:
            found.append(saved[0]._version)
        if self.watch_output:
            found.append(saved[-1]._version)
        return found


# A net whose hidden layers take more bytes than this leaves them to torch's allocator.
_SCRATCH_MOST = 1 << 20
_SPARE_MOST = 4  # of how many sizes a net keeps some, and how many of each


class Scratch:
    """Memory for what nobody sees, of one forward and the backward over it."""

    def __init__(self, ops: list[Op], rows: int) -> None:
        # For every layer: the output of a Linear; the gradient of its input, also transposed;
        # where that of a ReLU is zero. The outputs lie in one piece, and so do the masks, if
        # each is of a ReLU: one call makes them all.
        self.outs: Any = None
        self.zeros: Any = None
        self.hidden: list[Any] = [None] * len(ops)
        self.grads: list[Any] = [(None, None)] * len(ops)
        self.masks: list[Any] = [None] * len(ops)
        self.outputs: Any = None  # Node.outputs, the same at every call
        linears = [i for i, op in enumerate(ops) if op.kind == LINEAR]
        inner = linears[1:]  # the first one's input, the last one's output are seen
        shapes = [(rows, len(ops[i].w)) for i in linears[:-1]]
        # Each begins where a cache line does, as one of its own would.
        places = [0]
        for _, width in shapes:
            places.append(places[-1] + -(-rows * width // 16) * 16)
        if not places[-1] or places[-1] * ops[linears[0]].w.element_size() > _SCRATCH_MOST:
            return
        with torch.inference_mode(False):
            outs = ops[linears[0]].w.new_zeros(places[-1])
            zeros = torch.zeros_like(outs, dtype=torch.bool)
            for before, i, shape, start in zip(linears, inner, shapes, places, strict=False):
                end = start + rows * shape[1]
                self.hidden[before] = outs[start:end].view(shape)
                grad = torch.empty_like(self.hidden[before])
                self.grads[i] = grad, grad.t()
                if ops[before + 1].kind == RELU:
                    self.masks[before + 1] = zeros[start:end].view(shape)
            if all(ops[i + 1].kind == RELU for i in linears[:-1]):
                self.outs, self.zeros = outs, zeros
            else:
                self.masks = [None] * len(ops)


class Lease:
    """A node's right to a scratch, to itself. It ends when the node is freed or forgotten.

    A node that is unfolded keeps the scratch for good: a user may look at what it saved.
    """

    __slots__ = ("scratch", "spare")

    def __init__(self, spare: list[Scratch], scratch: Scratch) -> None:
        self.spare, self.scratch = spare, scratch

    def __del__(self) -> None:
        if len(self.spare) < _SPARE_MOST:
            self.spare.append(self.scratch)


class Plan:
    """How to run plain layers in a row. Whether it still fits them, `Layout` knows."""

    def __init__(self, run: "Run") -> None:
        ops = self.ops = run.ops
        if not ops[-1].function.is_inplace:
            ops[-1].write_over(False)  # the output is seen, and how often it was written to
        weights = [op.weight for op in ops if op.kind == LINEAR]
        self.dtypes = (weights[0].dtype,) if weights else _FLOATS
        self.steps = [(op.kind == LINEAR, op.b, op.wt, op.activate, op.saves_input) for op in ops]
        self.needs = {flag: Needs(ops, flag) for flag in (False, True)}
        # With a single feature, one row is also one column, and PyTorch takes it for that.
        self.narrow = any(1 in w.shape for w in weights)
        spans = [(m, i, i + 1) for i, m in enumerate(run.members)] + run.nested
        self.last: list[Any] = [_nothing]  # the latest node, weakly
        self.calls = [(m.__dict__, PartCall(self.last, start, end)) for m, start, end in spans]
        self.spare: dict[int, list[Scratch]] = {}  # by the number of rows

    def scratch(self, rows: int) -> tuple[Scratch, list[Scratch]]:
        """Memory for so many rows, and where to put it when it is done with."""
        spare = self.spare.get(rows)
        if spare is None:
            if len(self.spare) >= _SPARE_MOST:
                self.spare.clear()
            spare = self.spare[rows] = []
        try:
            return spare.pop(), spare
        except IndexError:
            return Scratch(self.ops, rows), spare

    def infer(self, h: torch.Tensor, rows: int) -> torch.Tensor:
        """The output alone."""
        scratch, spare = self.scratch(rows)
        for (is_linear, b, wt, activate, _), out in zip(self.steps, scratch.hidden, strict=True):
            if not is_linear:
                h = activate(h)
            elif b is None:
                h = _mm(h, wt, out=out)
            else:
                h = _addmm(b, h, wt, out=out)
        spare.append(scratch)
        return h

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, Any] | None:
        """The output for `x`, and how to go back; None where the layers must be called."""
        shape = x.shape
        if (
            x.dtype not in self.dtypes
            or len(shape) != 2
            or not x.is_contiguous()
            or (shape[0] == 1 and (self.narrow or x.stride() != (shape[1], 1)))
            or _is_any_autocast_enabled()
            or tape.in_transform() is not None
            or any(module.GLOBAL_HOOKS)
        ):
            return None
        try:
            if tape.is_grad_enabled():
                edge = None
                if x.requires_grad:
                    edge = tape.edge_of(x)
                    x = x.detach() if type(x) is torch.Tensor else x
                out, node = self.record(x, shape[0], edge)
                for d, call in self.calls:
                    d["_call"] = call
                return out, FusedCall(node)
            if x.requires_grad and torch.is_grad_enabled():
                x = x.detach()
            out = self.infer(x, shape[0])
        except (RuntimeError, TypeError):
            return None  # the layers say what is wrong, one by one
        for d, _ in self.calls:
            d["_call"] = None
        return out, NOT_RECORDED

    def record(self, h: torch.Tensor, rows: int, edge: Any) -> tuple[Any, tape.Node]:
        """The output for `h`, tracked, and its node; `edge` is where the gradient of h goes."""
        scratch, spare = self.scratch(rows)
        saved: list[Any] = []
        keep = saved.append
        for (is_linear, b, wt, activate, saves_input), out in zip(
            self.steps, scratch.hidden, strict=True
        ):
            if saves_input:
                keep(h)
            if not is_linear:
                h = activate(h)
            elif b is None:
                h = _mm(h, wt, out=out)
            else:
                h = _addmm(b, h, wt, out=out)
            if not saves_input:
                keep(h)
        needs = self.needs[edge is not None]
        if saved[-1] is h:
            saved[-1] = h.detach()  # an output that is saved would keep itself alive
            saved[-1]._alias_of_output = True  # type: ignore[attr-defined]
        node: Any = tape.Node(Fused)
        # Not the plan, which leads to the modules, and they to the node.
        node.ops, node.needs, node.needs_all, node.folded = (
            self.ops,
            needs,
            self.needs[True],
            unfold,
        )
        node.scratch = Lease(spare, scratch)
        node._saved, node._versions = saved, needs.versions(saved)
        if edge is None:
            node.edges, node.leads_on = needs.edges, False
        else:
            at = needs.input_at
            node.edges = [*needs.edges[:at], edge, *needs.edges[at:]]
        if scratch.outputs is None:
            scratch.outputs = ((h.shape, h.dtype, h.device),)
        node.outputs = scratch.outputs
        self.last[0] = weakref.ref(node)
        if node.edges:
            node.sequence = next(tape._sequence)
            h.__class__ = tensor.Tensor
            h._node = node  # type: ignore[attr-defined]
        return h, node


class Fused(tape.Function):
    """The layers of a plan: dx and the parameters' gradients, from the last to the first."""

    is_rule = True
    is_fresh = True

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        saved, needs = ctx._saved, ctx.needs
        if saved is None:
            raise RuntimeError(tape._FREED)
        if ctx._versions != needs.versions(saved):
            _complain(ctx)
        return back(ctx.ops, saved, needs, ctx.scratch.scratch, g)


def back(ops: list[Op], saved: Any, needs: Needs, scratch: Scratch, g: Any) -> tuple[Any, ...]:
    """The gradients for `Needs.edges`, that of the input among them if passes_on[0]."""
    grads = []
    passes_on, trained = needs.passes_on, needs.trained
    ours = False  # g is nobody else's: it may be written over
    gt = None
    zero = tape.constant(0.0, g.dtype, g.device)
    if scratch.outs is not None:
        _le(scratch.outs, zero, out=scratch.zeros)
    for i in range(len(ops) - 1, -1, -1):
        op, kept = ops[i], saved[i]
        kind = op.kind
        if kind == LINEAR:
            to_bias, to_weight = trained[i]
            if to_bias:
                grads.append(g.sum(0))
            dx = dxt = None
            if passes_on[i]:
                into, dxt = scratch.grads[i]
                dx = _mm(g, op.w, out=into)
                if i == 0:
                    grads.append(dx)
            if to_weight:
                grads.append(_mm(g.t() if gt is None else gt, kept))
            if dx is None:
                break
            g, gt = dx, dxt
        elif kind == RELU:
            mask = scratch.masks[i]
            if mask is None:
                mask = _le(kept, zero)
            g = g.masked_fill_(mask, zero) if ours else g.masked_fill(mask, zero)
        elif kind == TANH:
            one = tape.constant(1.0, kept.dtype, kept.device)
            g, gt = torch.addcmul(one, kept, kept, value=-1).mul_(g), None
        elif kind == SIGMOID:
            one = tape.constant(1.0, kept.dtype, kept.device)
            g, gt = torch.sub(one, kept).mul_(g).mul_(kept), None
        else:
            slope = tape.constant(op.slope, g.dtype, g.device)
            g, gt = torch.where(torch.gt(kept, zero), g, g * slope), None
        ours = True
    if passes_on[0] and ops[0].kind != LINEAR:
        grads.append(g)
    return tuple(grads)


def _complain(node: Any) -> None:
    """Something saved was changed: have the layer's own node say which, and of which version."""
    for made in reversed(nodes(node)):
        if made.function is not F.Linear:
            made.saved(0)
            continue
        if made.needs_input_grad[1]:
            made.saved(1, via="AsStrided")
        if made.needs_input_grad[2]:
            made.saved(0)


def unfold(node: Any) -> None:
    """Turn `node` into the node of the last layer, with those of the others behind it."""
    ops, needs, saved, versions = node.ops, node.needs, node._saved, list(node._versions)
    node.folded = None
    if node.scratch is not None:
        node.scratch.spare = []
    edge = node.edges[needs.input_at] if needs.passes_on[0] else None
    at_output = versions.pop() if needs.watch_output else 0
    at_input = versions.pop() if needs.watch_input else 0
    at_weight = dict(zip(map(id, needs.weights), versions, strict=True))
    sequence, last = node.sequence, len(ops) - 1
    node.leads_on = True
    made: list[Any] = []
    for i, op in enumerate(ops):
        new: Any = node if i == last else tape.Node(F.Linear)
        new.function = op.function
        new.sequence = sequence - (last - i) / (last + 1)
        if i < last:
            shape = torch.Size(()) if saved is None else saved[i + 1].shape
            new.outputs = ((shape, *node.outputs[0][1:]),)
        new._saved = None
        kept = None if saved is None else saved[i]
        at = 0  # the version of what was kept, then
        if kept is not None:
            at_end = i == last and op.kind != LINEAR
            at = at_input if i == 0 else at_output if at_end else kept._version
        if op.kind == LINEAR:
            both = zip((op.bias, op.weight), needs.trained[i], strict=True)
            bias, weight = ((p, 0) if trained else None for p, trained in both)
            new.edges, new.places = [bias, edge, weight], (1, 2) if op.bias is None else (0, 1, 2)
            new.label = "MmBackward0" if op.bias is None else "AddmmBackward0"
            new.bias_shape = None if op.bias is None else op.bias.shape
            new.batched = new.by_columns = False
            if kept is not None:
                new.input_shape = kept.shape
                new._saved = (kept if weight is not None else None, op.weight)
                new._versions = (at, at_weight.get(id(op.w), op.weight._version))
        else:
            new.edges, new.places = [edge] if op.kind != LEAKY else [edge, None], (0,)
            new.label, new.slope = "", op.slope
            if kept is not None:
                new._saved, new._versions = (kept,), (at,)
        new.needs_input_grad = tuple([e is not None for e in new.edges])
        made.append(new)
        edge = (new, 0) if any(new.needs_input_grad) else None
    # Not as nodes: the last would lead to itself.
    node.before = made[:-1]


def nodes(node: Any) -> list[Any]:
    """The layers' own nodes, in the order of the layers."""
    if node.folded is not None:
        unfold(node)
    return [*node.before, node]


NOT_RECORDED = Chain([None])


class FusedCall:
    """What `Module.backward` of the Sequential goes back over."""

    def __init__(self, node: tape.Node) -> None:
        self.node = node

    def __call__(self, gradient: Any = None) -> Any:
        node: Any = self.node
        if node.folded is None:
            return Chain([Recorded(made) for made in nodes(node)])(gradient)
        needs, both = node.needs, node.needs_all
        with DisableTorchFunctionSubclass():
            started = walk.start_grad(node.outputs[0], gradient, 0)
            if node._saved is None:
                raise RuntimeError(tape._FREED)
            if node._versions != needs.versions(node._saved):
                _complain(node)
            grads = list(back(node.ops, node._saved, both, node.scratch.scratch, started))
            node.free()
        dx = grads.pop(both.input_at)
        if grads:
            walk.walk(both.edges, grads)
        return dx


def _nothing() -> None:
    """There is no node yet."""


class PartCall:
    """The call of one layer of a plan, or of a Sequential in it, should it be asked for."""

    def __init__(self, last: list[Any], start: int, end: int) -> None:
        self.last, self.start, self.end = last, start, end

    def __call__(self, gradient: Any = None) -> Any:
        node = self.last[0]()
        if node is None:
            raise RuntimeError(
                "nnmirror: the Sequential that called this module is gone, with what it saved"
            )
        return Chain([Recorded(made) for made in nodes(node)[self.start : self.end]])(gradient)


# A run of fewer layers is sooner called, unless there are no others.
_FEWEST = 2


class Layout:
    """Which layers of a Sequential are run at one go: all, some runs of them, or none.

    Made at its first call, looked over at every other.
    """

    cut: Any = None  # what takes its place while there are hooks (`layout_of`)
    hooked: Any = None  # which of the hooks there were, for that

    def __init__(self, root: Any, runs: "list[Run]") -> None:
        children = [*root._modules.values()]
        self.whole: Plan | None = None
        # Where a run begins: its plan, its size, and whether a stranger was called before it.
        self.parts: dict[int, tuple[Plan, int, bool]] = {}
        kept = [run for run in runs if len(run.ops) >= _FEWEST]
        if len(runs) == 1 and runs[0].ops and runs[0].size == len(children):
            kept = runs
            self.whole = Plan(runs[0])
        inner = [s for run in kept for s, _, _ in run.nested]
        watched = [m for run in kept for m in run.members] + inner
        place = 0
        for run in kept if self.whole is None else ():
            between = children[place : run.start]
            watched += filter(_is_known, between)
            self.parts[run.start] = Plan(run), run.size, not all(map(_is_known, between))
            place = run.start + run.size
        self.hooks = [getattr(m, name) for m in watched for name in module.CALL_HOOKS]
        # What was taken for given. Of every Sequential: its modules, and which they were.
        self.nested = [(s._modules, [*s._modules.values()]) for s in (root, *inner)]
        ops = [op for run in kept for op in run.ops if op.kind == LINEAR]
        members = [m for run in kept for m in run.members if type(m) is linear.Linear]
        self.owned = [
            (m.__dict__, op.own, op.weight, op.bias) for m, op in zip(members, ops, strict=True)
        ]
        self.weights = [op.weight for op in ops]
        self.params = [p for op in ops for p in (op.weight, op.bias) if p is not None]
        self.flags = [p._requires_grad for p in self.params]
        self.memory = [p.data_ptr() for p in self.params]
        self.shapes = [p.shape for p in self.params]
        self.epoch = module.epoch[0]

    def holds(self) -> bool:
        """Is everything but the hooks as it was when this was made?"""
        if self.epoch != module.epoch[0]:
            return False
        for modules, known in self.nested:
            if len(modules) != len(known) or not all(map(is_, modules.values(), known)):
                return False
        for members, own, weight, bias in self.owned:
            if (
                members["_parameters"] is not own
                or own.get("weight") is not weight
                or own.get("bias", own) is not bias
            ):
                return False
        for weight in self.weights:
            if not weight.is_contiguous():
                return False
        params = self.params
        return (
            [p._requires_grad for p in params] == self.flags
            and [*map(_data_ptr, params)] == self.memory
            and [p.shape for p in params] == self.shapes
        )

    def run(self, place: int, x: Any) -> tuple[torch.Tensor, Any, int] | None:
        """The output of the layers from `place` on, how to go back, and how many there were.

        None if the module there must be called. A stranger, or a hook, that was called before
        may have changed anything: then all is looked over again.
        """
        part = self.parts.get(place)
        if part is None or type(x) not in _PLAIN:
            return None
        plan, size, after_stranger = part
        with DisableTorchFunctionSubclass():
            if after_stranger and (any(self.hooks) or not self.holds()):
                return None
            done = plan(x)
        return None if done is None else (*done, size)


def _is_known(child: Any) -> bool:
    """Is it a layer of the package, which without hooks changes no other?"""
    cls = type(child)
    return (
        cls.__module__.startswith(f"{__package__}.")
        and issubclass(cls, module.Module)
        and not child._modules
        and "forward" not in child.__dict__
        and not any(getattr(child, name) for name in module.CALL_HOOKS)
    )


class Run:
    """Plain layers in a row, being gathered: modules of a Sequential from `start` on."""

    def __init__(self, start: int) -> None:
        self.start, self.size = start, 0
        self.ops: list[Op] = []
        self.members: list[Any] = []
        self.nested: list[tuple[Any, int, int]] = []  # a Sequential, and where its layers are
        self.met: set[int] = set()  # what may not be there twice

    def takes(self, child: Any, hooked: bool) -> bool:
        """Take one more module, if it is plain; `hooked` says whether one with hooks is."""
        ops, members, nested, met = len(self.ops), len(self.members), len(self.nested), self.met
        self.met = set(met)
        if self._gather(child, hooked):
            self.size += 1
            return True
        del self.ops[ops:], self.members[members:], self.nested[nested:]
        self.met = met
        return False

    def _gather(self, child: Any, hooked: bool) -> bool:
        if not hooked and any(getattr(child, name, None) for name in module.CALL_HOOKS):
            return False
        if _is_sequential(child):
            start = len(self.ops)
            if not child._modules or not self._is_new(child):
                return False
            if not all(self._gather(member, hooked) for member in child._modules.values()):
                return False
            self.nested.append((child, start, len(self.ops)))
            return True
        kind = _KINDS.get(type(child))
        if kind is None or "forward" in child.__dict__:
            return False
        if type(child).forward is not _FORWARDS[type(child)]:
            return False
        if kind == LINEAR and not _is_plain_linear(child):
            return False
        if kind == LEAKY and not isinstance(child.negative_slope, int | float):
            return False
        after_linear = bool(self.ops) and self.ops[-1].kind == LINEAR
        odd = not after_linear or (kind == LEAKY and child.negative_slope < 0)
        if odd and getattr(child, "inplace", False):
            # It writes over what somebody may see, or with such a slope cannot go back.
            return False
        if not self._is_new(child, *child._parameters.values()):
            return False
        self.members.append(child)
        self.ops.append(Op(child, kind, after_linear))
        return True

    def _is_new(self, *things: Any) -> bool:
        """Is none of these shared with what was gathered before?"""
        ids = {id(thing) for thing in things if thing is not None}
        new = not ids & self.met
        self.met |= ids
        return new


_SEQUENTIAL: list[Any] = []


def is_run_by(sequential: Any) -> None:
    """container.py, which imports this file, tells what its Sequential is."""
    _SEQUENTIAL.extend((sequential.forward, sequential.__iter__))


def _is_sequential(candidate: Any) -> bool:
    """Is it called as a Sequential is?"""
    cls: Any = type(candidate)
    return (
        getattr(cls, "forward", None) is _SEQUENTIAL[0]
        and cls.__call__ is module.Module.__call__
        and _calls_its_modules(candidate)
    )


def _calls_its_modules(sequential: Any) -> bool:
    """Does the forward of this Sequential call its modules, all in their order?"""
    return type(sequential).__iter__ is _SEQUENTIAL[1] and "forward" not in sequential.__dict__


def _laid_out(root: Any, hooked: bool) -> Layout:
    """`hooked` says whether layers with hooks are taken for plain."""
    runs: list[Run] = []
    run = Run(0)
    for place, child in enumerate(root._modules.values() if _calls_its_modules(root) else ()):
        if not run.takes(child, hooked):
            runs.append(run)
            run = Run(place)
            if not run.takes(child, hooked):
                run = Run(place + 1)
    return Layout(root, [*runs, run])


def layout_of(sequential: Any) -> Layout:
    """How the Sequential is laid out now."""
    own = sequential.__dict__
    layout: Layout | None = own.get("_plan")
    if layout is not None and any(layout.hooks):
        cut = layout.cut
        if cut is not None and cut.hooked == [*map(bool, layout.hooks)] and cut.holds():
            return cut  # type: ignore[no-any-return]
    elif layout is not None and layout.holds():
        return layout
    # With hooks, that for the time when they are gone is made too, and kept.
    layout = own["_plan"] = _laid_out(sequential, True)
    if not any(layout.hooks):
        return layout
    cut = layout.cut = _laid_out(sequential, False)
    cut.hooked = [*map(bool, layout.hooks)]
    return cut


def _is_plain_linear(member: Any) -> bool:
    own = member._parameters
    if set(own) != {"weight", "bias"} or own["weight"] is None:
        return False
    weight, bias = own["weight"], own["bias"]
    if any(
        p is not None and (type(p) is not Parameter or p.dtype not in _FLOATS) for p in own.values()
    ):
        return False
    if weight.dim() != 2 or not weight.is_contiguous():
        return False
    return bias is None or (bias.dim() == 1 and len(bias) == len(weight) and bias.is_contiguous())


def run(sequential: Any, x: Any) -> tuple[Any, Layout | None]:
    """The output, or `NotImplemented` and which of the layers can be run at one go."""
    if not enabled:
        return NotImplemented, None
    with DisableTorchFunctionSubclass():
        layout = layout_of(sequential)
        if layout.whole is None:
            return NotImplemented, layout if layout.parts else None
        done = layout.whole(x) if type(x) in _PLAIN else None
    if done is None:
        return NotImplemented, None
    out, sequential.__dict__["_call"] = done
    return out, None
