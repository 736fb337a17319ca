"""The plain layers of a Sequential, run at one go.

Layer by layer, every layer pays for being a module, a recorded call and a tracked tensor,
which on a small net is most of the time. Here the same operations run in the same order on
plain tensors, and leave one node: the formulas are those of `nnmirror.functional`, arranged
in two loops over `plain.Op`s, and for small nets bound to their memory (`program.py`).
Nothing else may be told apart from the layers called one by one:

- only Linear, ReLU, LeakyReLU, Tanh, Sigmoid and Sequentials of them are taken, as they come,
  with no hook on any of them; anything odd about the input or the parameters goes the long way;
- where other layers stand between them, or hooked ones, each run of plain layers goes at one go
  and the others are called (`Layout`);
- what nobody sees is computed in place: an activation in the memory of the Linear before it,
  a gradient in the memory of the one before it;
- whoever asks for a `grad_fn` gets the nodes that the layers would have left: `unfold` makes
  them of what was saved.

`enabled = False` has every Sequential call its layers one by one.
"""

import weakref
from operator import attrgetter, is_
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass, _is_any_autocast_enabled

from .. import formula, tape, tensor, walk
from .. import functional as F
from ..changes import HookRegistry, Registry, count
from ..fast.signature import Signature
from ..parameter import Parameter
from . import linear, module, plain
from .activation import Hardtanh
from .explicit import Chain, Recorded
from .module import Module
from .plain import Op
from .program import Pool, alias_of_output, fits, nobody, small

enabled = True

_Below: Any = torch._C._AutoDispatchBelowAutograd  # torch's autograd need not be asked
_mm, _plain = torch.mm, attrgetter("_plain")
_version: Any = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_CALL = Module.__call__
_FORWARDS = {kind: kind.forward for kind in plain.PLAIN}  # type: ignore[attr-defined]
_FLOATS = (torch.float32, torch.float64)
_PLAIN = (torch.Tensor, tensor.Tensor)


def _trains(parameter: Any) -> bool:
    return parameter is not None and parameter._requires_grad


class Needs:
    """Which gradients are asked for, given whether one for the input is."""

    __slots__ = (
        "edges",
        "input_at",
        "leaves",
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
        first, end = ops[0], ops[-1]
        self.watch_input = _trains(first.weight) if first.is_linear else input_edge
        self.watch_input = self.watch_input and not first.saves_node  # which watches it
        self.watch_output = self.passes_on[-1] and not (end.is_linear or end.saves_node)
        self.weights = tuple(
            op.w for op, on in zip(ops, self.passes_on, strict=True) if on and op.is_linear
        )
        # In the order in which the layers' own nodes would be walked.
        self.edges: list[Any] = [
            (p, 0)
            for op in reversed(ops)
            if op.is_linear
            for p in (op.bias, op.weight)
            if _trains(p)
        ]
        self.leaves = [p for p, _ in self.edges]
        last = len(self.edges)  # the input's, before that of the first layer's weight
        self.input_at = last - 1 if _trains(ops[0].weight) else last

    def versions(self, saved: Any) -> list[int]:
        found = [*map(_version, self.weights)]
        if self.watch_input:
            found.append(_version(saved[0]))
        if self.watch_output:
            found.append(_version(saved[-1]))
        return found


class Plan:
    """How to run plain layers in a row. Whether it still fits them, `Layout` knows."""

    def __init__(self, run: "Run") -> None:
        ops = self.ops = run.ops
        if isinstance(ops[-1], plain.ActivationOp) and not ops[-1].function.is_inplace:
            ops[-1].write_over(False)  # the output is seen, and how often it was written to
        weights = [op.weight for op in ops if op.is_linear]
        self.dtypes = (weights[0].dtype,) if weights else _FLOATS
        self.needs = {flag: Needs(ops, flag) for flag in (False, True)}
        # With a single feature, one row is also one column, and PyTorch takes it for that.
        self.narrow = any(1 in w.shape for w in weights)
        spans = [(m, i, i + 1) for i, m in enumerate(run.members)] + run.nested
        self.last: list[Any] = [_nothing]  # the latest node, weakly
        self.calls = [(m.__dict__, PartCall(self.last, start, end)) for m, start, end in spans]
        self.bindable = fits(ops)
        # Programs by the number of rows, and whether the input's gradient is asked for; a
        # number that came but once is not worth one.
        self.pools: dict[tuple[int, bool], Pool] = {}
        self.signatures: dict[int, Signature] = {}  # by the number of rows, without an edge
        self.met: list[tuple[int, bool]] = []

    def new_pool(self, rows: int, edge: bool) -> Pool | None:
        """Programs for so many rows, if it is to have any."""
        key = rows, edge
        if not self.bindable:
            return None
        if key not in self.met:
            self.met = [*self.met[-_MET_MOST:], key]
            return None
        if rows == 0 or not small(self.ops, rows):
            return None
        if len(self.pools) >= _POOLS_MOST:
            self.pools = {}
        pool = self.pools[key] = Pool(self.ops, self.needs[edge], rows)
        return pool

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, Any] | None:
        """The output for `x`, and how to go back; None where the layers must be called."""
        shape = x.shape
        if (
            x.dtype not in self.dtypes
            or len(shape) != 2
            or x.layout is not torch.strided
            or not x.is_contiguous()
            or (shape[0] == 1 and (self.narrow or x.stride() != (shape[1], 1)))
            or _is_any_autocast_enabled()
            or tape.in_transform() is not None
            or tape.forward_mode["_current_level"] >= 0
        ):
            return None
        try:
            if tape.is_grad_enabled():
                edge = None
                if x.requires_grad:
                    edge = tape.edge_of(x)
                    x = x.detach() if type(x) is torch.Tensor else x
                out, node = self.record(x, shape[0], edge)
                for own, call in self.calls:
                    own["_call"] = call
                return out, FusedCall(node)
            if x.requires_grad and torch.is_grad_enabled():
                x = x.detach()
            out = self.infer(x, shape[0])
        except (RuntimeError, TypeError):
            return None  # the layers say what is wrong, one by one
        for own, _ in self.calls:
            own["_call"] = None
        return out, NOT_RECORDED

    def infer(self, h: torch.Tensor, rows: int) -> torch.Tensor:
        """The output alone."""
        pool = self.pools.get((rows, False)) or self.new_pool(rows, False)
        program = None if pool is None else pool.take()
        if program is None:
            for op in self.ops:
                h = op.run(h)
            return h
        try:
            return program.run(h)
        finally:
            program.user = nobody

    def record(self, h: torch.Tensor, rows: int, edge: Any) -> tuple[Any, tape.Node]:
        """The output for `h`, tracked, and its node; `edge` is where the gradient of h goes."""
        needs = self.needs[edge is not None]
        node: Any = tape.Node(Fused)
        inner = edge is not None
        pool = self.pools.get((rows, inner)) or self.new_pool(rows, inner)
        program = pool.take() if pool is not None and (needs.edges or edge) else None
        if program is None:
            saved = []
            for op in self.ops:
                kept, h = op.record(h)
                saved.append(kept)
            if saved[-1] is h:
                saved[-1] = alias_of_output(h)
            node.outputs = ((h.shape, h.dtype, h.device),)
        else:
            try:
                saved, h = program.record(h)
            except BaseException:
                program.user = nobody
                raise
            node.outputs, node.program, node.pool = program.outputs, program, pool
            program.user = weakref.ref(node)
        # Not the plan, which leads to the modules, and they to the node.
        node.ops, node.needs, node.needs_all = self.ops, needs, self.needs[True]
        node.folded, node.epoch = unfold, count[0]
        node.deliver, node.deliver_from_loss = deliver, deliver_from_loss
        node._saved, node._versions = saved, needs.versions(saved)
        if edge is None:
            node.edges, node.leads_on = needs.edges, False
        else:
            at = needs.input_at
            node.edges = [*needs.edges[:at], edge, *needs.edges[at:]]
        self.last[0] = weakref.ref(node)
        if node.edges:
            if edge is None:
                sign = self.signatures.get(rows)
                if sign is None:
                    sign = self.signatures[rows] = Signature()
                node.signature = sign
            node.sequence = next(tape._sequence)
            h.__class__ = tensor.Tensor
            h._node = node  # type: ignore[attr-defined]
        return h, node


# Of how many numbers of rows programs are kept, and how many that came once are remembered.
_POOLS_MOST = 4
_MET_MOST = 16


class Fused(tape.Function):
    """The layers of a plan: dx and the parameters' gradients, from the last to the first."""

    is_rule = True
    is_fresh = True

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        check(ctx)
        return back(ctx.ops, all_saved(ctx), ctx.needs, g)


def check(node: Any) -> None:
    """Raise if what was saved is gone, or was changed."""
    saved = node._saved
    if saved is None:
        raise RuntimeError(tape._FREED)
    if node._versions != node.needs.versions(saved):
        _complain(node)


def all_saved(node: Any) -> Any:
    """What each layer saved. Inside a program's memory it need not be kept again."""
    saved = node._saved
    return saved if node.program is None or saved is None else node.program.saved(saved)


def back(ops: list[Op], saved: Any, needs: Needs, g: Any) -> tuple[Any, ...]:
    """The gradients for `Needs.edges`, that of the input among them if passes_on[0]."""
    grads = []
    passes_on, trained = needs.passes_on, needs.trained
    ours = False  # g is nobody else's: it may be written over
    for i in range(len(ops) - 1, -1, -1):
        op: Any = ops[i]
        kept = saved[i]
        if op.is_linear:
            to_bias, to_weight = trained[i]
            if to_bias:
                grads.append(g.sum(0))
            dx = None
            if passes_on[i]:
                dx = _mm(g, op.w)
                if i == 0:
                    grads.append(dx)
            if to_weight:
                grads.append(_mm(g.t(), kept))
            if dx is None:
                break
            g = dx
        else:
            g = op.back(kept, g, ours)
        ours = True
    if passes_on[0] and not ops[0].is_linear:
        grads.append(g)
    return tuple(grads)


def deliver(node: Any, g: torch.Tensor) -> tuple[list[Any], list[Any]] | None:
    """Go back by the node's program and accumulate.

    Returns what is left to hand on, the gradient for the input if any, and its edge. None
    where there is no program, or none that can.
    """
    program = node.program
    if program is None or node._saved is None or node.epoch != count[0]:
        return None
    with program.lock:
        arena = program.arena() if program.takes(g) else None
        if arena is None:
            return None
        check(node)
        saved = node._saved
        with _Below():
            dx = program.back(saved[0], saved[-1], g, arena)
        program.give(arena)
    if dx is None:
        return [], []
    return [dx], [node.edges[node.needs.input_at]]


def deliver_from_loss(loss: Any) -> bool:
    """Go back from a loss right behind a net, both as usual; False if anything is not."""
    net = loss.edges[0][0]
    program = net.program
    if (
        program is None
        or net.folded is None
        or net.leads_on
        or net.epoch != count[0]
        or net._saved is None
        or loss._saved is None
        or tensor.leaf_hooks_exist[0]
        or loss.is_watched
        or torch.is_anomaly_enabled()
    ):
        return False
    shape, dtype, device = loss.outputs[0]
    if len(shape):
        return False  # not a number
    with DisableTorchFunctionSubclass(), program.lock:
        arena = program.arena()
        if arena is None:
            return False
        with _Below():
            found = loss.function.backward(loss, tape.constant(1.0, dtype, device))
            g = found[0]
            loss.free()
            check(net)
            saved = net._saved
            fits = program.takes(g)
            if fits:
                program.back(saved[0], saved[-1], g, arena)
            else:
                g = walk.validated(loss, loss.completed(found))[0]
                grads = back(net.ops, all_saved(net), net.needs, g)
        if fits:
            program.give(arena)
        else:
            walk._give(net.edges, grads)
        net.free()
    return True


def _complain(node: Any) -> None:
    """Something saved was changed: have the layer's own node say which, and of which version."""
    for made in reversed(nodes(node)):
        if not issubclass(made.function, F.Linear):
            made.saved(0)
            continue
        names = made.plan.names
        if made.needs_input_grad[1]:
            made.saved(names.index("weight"), via="AsStrided")
        if made.needs_input_grad[2]:
            made.saved(names.index("input"))


def unfold(node: Any) -> None:
    """Turn `node` into the node of the last layer, with those of the others behind it."""
    ops, needs, saved, versions = node.ops, node.needs, all_saved(node), list(node._versions)
    node.folded = node.signature = None
    if node.program is not None:
        node.pool.forget(node.program)  # a user may look at what it holds
        node.program = node.pool = None
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
            shape = torch.Size(()) if saved is None else _shape(saved[i + 1])
            new.outputs = ((shape, *node.outputs[0][1:]),)
        new._saved = None
        kept = None if saved is None else saved[i]
        at = 0  # the version of what was kept, then
        if kept is not None and not op.saves_node:
            at_end = i == last and not op.is_linear
            at = at_input if i == 0 else at_output if at_end else kept._version
        if op.is_linear:
            both = zip((op.bias, op.weight), needs.trained[i], strict=True)
            bias, weight = ((p, 0) if trained else None for p, trained in both)
            new.edges, new.places = [bias, edge, weight], (1, 2) if op.bias is None else (0, 1, 2)
            new.label = "MmBackward0" if op.bias is None else "AddmmBackward0"
            if kept is not None:
                at_w = at_weight.get(id(op.w), op.weight._version)
                saved_of = {"input": (kept, at), "weight": (op.weight, at_w)}
                args: tuple[Any, ...] = (op.bias, kept, op.weight)
        elif op.saves_node:
            if kept is not None:
                vars(new).update(vars(kept))
            new.edges, new.places = [edge, *[None] * len(op.args)], (0,)
        else:
            has_slope = "slope" in vars(op)
            new.edges, new.places = [edge, None] if has_slope else [edge], (0,)
            new.label = ""
            if kept is not None:
                saved_of = {"input": (kept, at), "result": (kept, at)}
                args = (kept, op.slope) if has_slope else (kept,)
        new.needs_input_grad = tuple([e is not None for e in new.edges])
        if not op.saves_node:
            if kept is None:
                new.plan = formula.Plan()
            else:
                new.plan = op.function.formulas.plan(args, new.needs_input_grad)
                pairs = [saved_of[name] for name in new.plan.names]
                new._saved = [t for t, _ in pairs]
                new._versions = [v for _, v in pairs]
        made.append(new)
        edge = (new, 0) if any(new.needs_input_grad) else None
    # Not as nodes: the last would lead to itself.
    node.before = made[:-1]


def _shape(kept: Any) -> torch.Size:
    """The shape of a layer's input, or of its output, of what it kept."""
    return kept.shape if isinstance(kept, torch.Tensor) else kept._saved[0].shape  # type: ignore[no-any-return]


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
        both = node.needs_all
        with DisableTorchFunctionSubclass():
            started = walk.start_grad(node.outputs[0], gradient, 0)
            check(node)
            grads = list(back(node.ops, all_saved(node), both, started))
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

    It holds for one state of them. A Sequential keeps a few, for those it goes between.
    """

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
        place = 0
        for run in kept if self.whole is None else ():
            between = children[place : run.start]
            self.parts[run.start] = Plan(run), run.size, not all(map(_is_known, between))
            place = run.start + run.size
        # What was taken for given. Of every Sequential: its modules, and which they were.
        self.nested = [(s._modules, [*s._modules.values()]) for s in (root, *inner)]
        ops = [op for run in kept for op in run.ops if op.is_linear]
        members = [m for run in kept for m in run.members if type(m) is linear.Linear]
        self.owned = [
            (m.__dict__, op.own, op.weight, op.bias) for m, op in zip(members, ops, strict=True)
        ]
        self.params = [p for op in ops for p in (op.weight, op.bias) if p is not None]
        self.plains = [p._plain for p in self.params]
        self.watched = {id(m): m for m in (*children, *inner)}
        self.watched |= {id(m): m for run in kept for m in run.members}
        # Classes whose `forward` somebody may replace, and with them how a module is called.
        kinds = {type(m) for run in kept for m in run.members}
        self.kinds: list[Any] = [(kind, _FORWARDS[kind]) for kind in kinds]
        self.state = self._state()
        # Where the count of changes stood when it was last seen to hold, if all are counted.
        self.epoch = -1
        self.counted = all(map(_counts, (root, *self.watched.values())))

    def _state(self) -> list[Any]:
        """What a layout may be made anew for, and found again when it is back."""
        state: list[Any] = [p._requires_grad or p._node for p in self.params]
        for m in self.watched.values():
            own = getattr(m, "__dict__", {})
            state += [
                type(m),
                *(bool(own.get(name)) for name in module.CALL_HOOKS),
                own.get("forward"),
                *map(own.get, plain.SETTINGS),
            ]
        return [*state, *map(bool, module.GLOBAL_HOOKS)]

    def stands(self) -> bool:
        """Are the modules and their parameters those that there were, in the same memory?"""
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
        return all(map(is_, map(_plain, self.params), self.plains))

    def holds(self) -> bool:
        """Is everything as it was when this was made?"""
        for kind, forward in self.kinds:
            if kind.forward is not forward:
                return False
        if Module.__call__ is not _CALL and self.kinds:
            return False
        now = count[0]
        if self.epoch != now:
            if not (self.stands() and self.state == self._state()):
                return False
            if self.counted:
                self.epoch = now
            return True
        # What torch.utils.swap_tensors exchanged is not counted.
        return all(map(is_, map(_plain, self.params), self.plains))

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
            if after_stranger and not self.holds():
                return None
            done = plan(x)
        return None if done is None else (*done, size)


def _counts(m: Any) -> bool:
    """Do the registries of this module count their changes, as those that it begins with?"""
    own = getattr(m, "__dict__", {})
    return all(type(own.get(name, r)) is type(r) for name, r in _COUNTING.items())


_COUNTING: dict[str, Any] = {
    **{name: HookRegistry() for name in module.CALL_HOOKS},
    "_modules": Registry(),
    "_parameters": Registry(),
}


def _is_known(child: Any) -> bool:
    """Is it a layer of the package, which without hooks changes no other?"""
    cls = type(child)
    return (
        cls.__module__.startswith(f"{__package__}.")
        and issubclass(cls, Module)
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

    def takes(self, child: Any) -> bool:
        """Take one more module, if it is plain."""
        ops, members, nested, met = len(self.ops), len(self.members), len(self.nested), self.met
        self.met = set(met)
        if self._gather(child):
            self.size += 1
            return True
        del self.ops[ops:], self.members[members:], self.nested[nested:]
        self.met = met
        return False

    def _gather(self, child: Any) -> bool:
        if any(getattr(child, name, None) for name in module.CALL_HOOKS):
            return False
        if _is_sequential(child):
            start = len(self.ops)
            if not child._modules or not self._is_new(child):
                return False
            if not all(self._gather(member) for member in child._modules.values()):
                return False
            self.nested.append((child, start, len(self.ops)))
            return True
        kind = type(child)
        if kind not in plain.PLAIN or "forward" in child.__dict__:
            return False
        if kind.forward is not _FORWARDS[kind]:
            return False
        if kind is linear.Linear and not _is_plain_linear(child):
            return False
        slope = getattr(child, "negative_slope", 0.0)
        if not isinstance(slope, int | float):
            return False
        if any(isinstance(getattr(child, name, None), torch.Tensor) for name in plain.SETTINGS):
            return False  # a number that is a tensor: PyTorch may have an error for it
        if getattr(child, "inplace", False) and kind not in plain.IN_PLACE:
            return False
        if isinstance(child, Hardtanh) and not child.min_val <= child.max_val:
            return False  # it says so
        after_linear = bool(self.ops) and self.ops[-1].is_linear
        if (not after_linear or slope < 0) and getattr(child, "inplace", False):
            # It writes over what somebody may see, or with such a slope cannot go back.
            return False
        if not self._is_new(child, *child._parameters.values()):
            return False
        self.members.append(child)
        self.ops.append(plain.op_of(child, after_linear))
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
        and cls.__call__ is Module.__call__
        and _calls_its_modules(candidate)
    )


def _calls_its_modules(sequential: Any) -> bool:
    """Does the forward of this Sequential call its modules, all in their order?"""
    return type(sequential).__iter__ is _SEQUENTIAL[1] and "forward" not in sequential.__dict__


def _laid_out(root: Any) -> Layout:
    runs: list[Run] = []
    run = Run(0)
    plain_root = _calls_its_modules(root) and not any(module.GLOBAL_HOOKS)
    plain_root = plain_root and Module.__call__ is _CALL
    for place, child in enumerate(root._modules.values() if plain_root else ()):
        if not run.takes(child):
            runs.append(run)
            run = Run(place)
            if not run.takes(child):
                run = Run(place + 1)
    return Layout(root, [*runs, run])


_LAYOUTS_MOST = 4


def layout_of(sequential: Any) -> Layout:
    """How the Sequential is laid out now."""
    own = sequential.__dict__
    layouts: list[Layout] = own.get("_plan", [])
    if layouts and layouts[0].holds():
        return layouts[0]
    now = count[0]
    layouts = [layout for layout in layouts if layout.stands()]
    found = next((layout for layout in layouts if layout.holds()), None)
    if found is None:
        found = _laid_out(sequential)
        if found.counted:
            found.epoch = now
    others = [layout for layout in layouts if layout is not found]
    own["_plan"] = [found, *others[: _LAYOUTS_MOST - 1]]
    return found


def _is_plain_linear(member: Any) -> bool:
    own = member._parameters
    if set(own) != {"weight", "bias"} or own["weight"] is None:
        return False
    weight, bias = own["weight"], own["bias"]
    if any(
        p is not None
        and (type(p) is not Parameter or p.dtype not in _FLOATS or p._node is not None)
        for p in own.values()
    ):
        return False
    if weight.dim() != 2 or not weight.is_contiguous() or weight.is_inference():
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
