"""A small net with every call bound to its memory: the fast path of `fused.py`.

In a small net the arithmetic takes less time than saying what to compute. So for a number of
rows a net gets a `Program`: memory for all that nobody sees, and each call on it made ready
(`functools.partial`), so that a step goes through a list. The formulas are those of
`fused.back`, and give the same bits:

- what the backward of the activations needs of the outputs (where they are zero, 1 - y^2) is
  computed for all layers at once, where all have the same activation and one thread has them;
- the rows of G are added up for all layers of one width at once: each column is added in the
  order in which it would be on its own;
- the parameters' gradients are written into an `Arena`, and lent to the parameters. Who reads
  a `.grad` gets a copy that is the parameter's own from then on (`Tensor.grad`), so that an
  arena, which is used again and again, is never seen.

What a user sees, the output and the gradient of the input too, is new each time.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .. import walk
from ..changes import count
from ..rules.kernel import GRAIN
from .plain import Op

if TYPE_CHECKING:
    from .fused import Needs

T = torch.Tensor
Shapes = Sequence[tuple[int, ...]]
Calls = list[Callable[[], Any]]


# Of a net whose outputs and weights take more bytes than this, torch's allocator has the memory.
_MOST_BYTES = 1 << 23
_MOST_BYTES_IDLE = 1 << 22  # beyond this there is but one program for a number of rows
_MOST_PROGRAMS = 4  # for one number of rows: as many outputs may wait for their backward
_MOST_ARENAS = 2


def fits(ops: list[Op]) -> bool:
    """Is it two or more Linears, each with at most one activation after it, on the CPU?

    An activation inside is computed in the memory of the Linear before it.
    """
    linears = [i for i, op in enumerate(ops) if op.is_linear]
    if len(linears) < 2 or linears[0] != 0 or not ops[0].w.is_cpu:
        return False
    ends = [*linears[1:], len(ops)]
    return all(end - start <= 2 for start, end in zip(linears, ends, strict=True)) and not any(
        op.saves_node or (op.saves_input and not op.is_linear and op is not ops[-1]) for op in ops
    )


def _bytes(ops: list[Op], rows: int) -> int:
    """About what a program for such a net holds between calls."""
    linears = [op for op in ops if op.is_linear]
    size = sum(rows * len(op.w) + op.w.numel() for op in linears)
    return size * linears[0].w.element_size()


def small(ops: list[Op], rows: int) -> bool:
    """Is that little enough?"""
    return _bytes(ops, rows) <= _MOST_BYTES


def _padded(size: int) -> int:
    """Each tensor begins where a cache line does, as one of its own would."""
    return -(-size // 16) * 16


def _views(flat: T, shapes: Shapes) -> list[T]:
    """Tensors of these shapes in `flat`, not to be told from others: no views of anything."""
    found, at = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        found.append(flat[at : at + size].view(shape).detach())
        at += _padded(size)
    return found


def _room(shapes: Shapes) -> int:
    return sum(_padded(torch.Size(shape).numel()) for shape in shapes)


class Program:
    """One forward, and the backward over it, for so many rows."""

    def __init__(self, ops: list[Op], needs: "Needs", rows: int) -> None:
        self.lock = threading.Lock()
        self.user: Callable[[], Any] = nobody  # the node that has it, weakly
        self.needs = needs
        self.linears: list[Any] = [op for op in ops if op.is_linear]
        self.acts: list[Any] = []
        for i, op in enumerate(ops):
            if op.is_linear:
                after = ops[i + 1] if i + 1 < len(ops) else None
                self.acts.append(None if after is None or after.is_linear else after)
        self.last_act = self.acts[-1]
        places = [i for i, op in enumerate(ops) if op.is_linear]
        # Of each Linear: whether its input, its bias, its weight get a gradient.
        self.wants = [(needs.passes_on[i], *needs.trained[i]) for i in places]
        self.rows = rows
        self.leaves = needs.leaves
        with torch.inference_mode(False), torch.no_grad():
            self._bind_forward()
            self.grads = self._gradients()
            self.inbox = self.grads[-1]
        self.arenas: list[Arena] = []
        last = self.linears[-1].w
        self.outputs = ((torch.Size((rows, len(last))), last.dtype, last.device),)

    def _bind_forward(self) -> None:
        w = self.linears[0].w
        shapes = [(self.rows, len(op.w)) for op in self.linears[:-1]]
        self.outs = w.new_zeros(_room(shapes))
        self.hidden = _views(self.outs, shapes)
        self.calls: Calls = []
        for i, (op, act) in enumerate(zip(self.linears, self.acts, strict=True)):
            if op is self.linears[-1]:
                h = self.hidden[-1]
                self.last = (
                    partial(torch.mm, h, op.wt)
                    if op.b is None
                    else partial(torch.addmm, op.b, h, op.wt)
                )
                break
            out = self.hidden[i]
            if i == 0:
                self.first = torch.mm if op.b is None else partial(torch.addmm, op.b)
                self.first_wt, self.first_out = op.wt, out
            elif op.b is None:
                self.calls.append(partial(torch.mm, self.hidden[i - 1], op.wt, out=out))
            else:
                self.calls.append(partial(torch.addmm, op.b, self.hidden[i - 1], op.wt, out=out))
            if act is not None:
                self.calls.append(partial(act.run, out))

    def _gradients(self) -> list[T]:
        """G of each Linear: of its output. Those of one width lie in one block."""
        grads: list[T] = []
        self.blocks: list[tuple[int, int, T]] = []  # from which to which layer, and all of them
        widths = [len(op.w) for op in self.linears]
        while len(grads) < len(widths):
            start, width = len(grads), widths[len(grads)]
            end = start + 1
            while end < len(widths) and widths[end] == width:
                end += 1
            shapes = [(self.rows, width)] * (end - start)
            flat = self.outs.new_zeros(_room(shapes))
            apart = _padded(self.rows * width)
            block = flat.as_strided((end - start, self.rows, width), (apart, width, 1))
            self.blocks.append((start, end, block))
            grads += _views(flat, shapes)
        return grads

    # -- forward -----------------------------------------------------------------------------

    def run(self, x: T) -> T:
        """The output for `x`."""
        self.first(x, self.first_wt, out=self.first_out)
        for call in self.calls:
            call()
        y = self.last()
        return y if self.last_act is None else self.last_act.run(y)  # type: ignore[no-any-return]

    def record(self, x: T) -> tuple[list[T], T]:
        """What a node keeps for the backward, and the output."""
        self.first(x, self.first_wt, out=self.first_out)
        for call in self.calls:
            call()
        y = self.last()
        act = self.last_act
        if act is None:
            return [x], y
        if act.saves_input:
            return [x, y], act.run(y)
        y = act.run(y)
        return [x, alias_of_output(y)], y

    def saved(self, kept: list[T]) -> list[T]:
        """What each layer saved, of which a node keeps the input and maybe the output."""
        found = kept[:1]
        for h, act in zip(self.hidden, self.acts, strict=False):
            found += [h] if act is None else [h, h]
        return found + kept[1:]

    # -- backward ----------------------------------------------------------------------------

    def arena(self) -> "Arena | None":
        """Memory for the parameters' gradients that nobody else holds."""
        for arena in self.arenas:
            if arena.is_free():
                return arena
        if len(self.arenas) == _MOST_ARENAS:
            return None
        with torch.inference_mode(False), torch.no_grad():
            self.arenas.append(Arena(self))
        return self.arenas[-1]

    def takes(self, g: T) -> bool:
        """Is `g` laid out as the gradient of a Linear's output is here?"""
        inbox = self.inbox
        return g is inbox or (
            g.stride() == inbox.stride() and g.dtype is inbox.dtype and g.shape == inbox.shape
        )

    def back(self, x: T, kept: T, g: T, arena: "Arena") -> T | None:
        """Compute the gradients for the output's `g` into `arena`; return that of the input."""
        if self.last_act is not None:
            g = self.last_act.back(kept, g, False)
        if g is not self.inbox:
            self.inbox.copy_(g)
        for call in arena.calls:
            call()
        if arena.first is not None:
            arena.first(x)
        return torch.mm(self.grads[0], self.linears[0].w) if self.wants[0][0] else None

    def give(self, arena: "Arena") -> None:
        """Accumulate what is in `arena` into the parameters' `.grad`.

        They are as they were at the forward: else the gradients are those of `fused.back`.
        """
        with walk._accumulating:
            for leaf, grad in arena.pairs:
                if leaf._gradient is None:
                    leaf._gradient = grad
                else:
                    walk._accumulate(leaf, grad, True)
            arena.epoch = count[0]
            walk.latest[0] = arena.itself


class Arena:
    """Memory for the gradients of a program's parameters, and the calls that fill it."""

    def __init__(self, program: Program) -> None:
        linears, wants, gs = program.linears, program.wants, program.grads
        last = len(linears) - 1
        # How far back a gradient goes: to the first Linear with something to train before it.
        lowest = next(i for i, want in enumerate(wants) if any(want))
        blocks = [
            (max(start, lowest), end, block[max(start, lowest) - start :])
            for start, end, block in program.blocks
            if end > lowest
        ]
        # Biases of one width, all of them trained, get their gradients by one call.
        together = [
            (start, end, block)
            for start, end, block in blocks
            if end - start > 1
            and all(wants[i][1] for i in range(start, end))
            and block.numel() < GRAIN  # above this threads share the sum, in another order
        ]
        new = program.outs.new_zeros
        sums = [new(block.shape[::2]) for _, _, block in together]
        dws = [new(op.w.shape if want[2] else 0) for op, want in zip(linears, wants, strict=True)]
        dbs = [new(op.w.shape[:1]) for op in linears]
        alone = set(range(lowest, last + 1))
        self.calls: Calls = []
        for (start, end, _), out in zip(together, sums, strict=True):
            alone -= set(range(start, end))
            for i in range(start, end):
                dbs[i] = out[i - start].detach()
        prepared = _prepared(program, lowest, self.calls)
        self.first: Any = None
        for i in range(last, lowest - 1, -1):
            _, to_bias, to_weight = wants[i]
            if to_bias and i in alone:
                self.calls.append(partial(torch.sum, gs[i], 0, out=dbs[i]))
            if to_weight and i:
                self.calls.append(partial(torch.mm, gs[i].t(), program.hidden[i - 1], out=dws[i]))
            elif to_weight:
                self.first = partial(_weight_grad, gs[0].t(), dws[0])
            if i > lowest:
                self.calls.append(partial(torch.mm, gs[i], linears[i].w, out=gs[i - 1]))
                if program.acts[i - 1] is not None:
                    self.calls += program.acts[i - 1].calls_back(
                        program.hidden[i - 1], gs[i - 1], prepared[i - 1]
                    )
        for (_, _, block), out in zip(together, sums, strict=True):
            self.calls.append(partial(torch.sum, block, 1, out=out))
        # In the order of `Needs.edges`.
        self.grads = [
            grad
            for (_, to_bias, to_weight), db, dw in reversed(list(zip(wants, dbs, dws, strict=True)))
            for grad, wanted in ((db, to_bias), (dw, to_weight))
            if wanted
        ]
        del dws, dbs, sums
        for i in range(len(self.grads)):
            self.grads[i]._lent = True  # type: ignore[attr-defined]  # see Tensor.grad
        self.pairs = [*zip(program.leaves, self.grads, strict=True)]
        self.ids = {*map(id, self.grads)}
        self.itself = weakref.ref(self)
        self.epoch = -1  # where the count of changes stood when all of it was last lent
        self.counts = [*map(sys.getrefcount, self.grads)]

    def lent(self, grads: list[Any]) -> bool:
        """Are all these gradients from here, and as the parameters that they were lent to?"""
        return self.epoch == count[0] and self.ids.issuperset(map(id, grads))

    def is_free(self) -> bool:
        """Does no parameter have one of the gradients?"""
        return [*map(sys.getrefcount, self.grads)] == self.counts


def alias_of_output(y: T) -> T:
    """To be saved in place of an output, which would keep itself alive."""
    alias = y.detach()
    alias._alias_of_output = True  # type: ignore[attr-defined]
    return alias


def _weight_grad(gt: T, out: T, x: T) -> None:
    torch.mm(gt, x, out=out)


def _prepared(program: Program, lowest: int, calls: Calls) -> dict[int, T]:
    """What the backward of the hidden activations needs of their outputs, by layer."""
    inner = range(lowest, len(program.hidden))
    acts = [program.acts[i] for i in inner]
    if not acts:
        return {}
    alike = acts[0] is not None and len({type(act) for act in acts}) == 1
    if alike and program.outs.numel() < GRAIN:  # more would take several threads
        into = acts[0].room(program.outs)
        calls += acts[0].prepares(program.outs, into)
        found = _views(into, [tuple(h.shape) for h in program.hidden])
        return {i: found[i] for i in inner}
    prepared = {}
    for i, act in zip(inner, acts, strict=True):
        if act is not None:
            h = program.hidden[i]
            prepared[i] = act.room(h)
            calls += act.prepares(h, prepared[i])
    return prepared


def nobody() -> None:
    """Nobody has it."""


class _Taken:
    _saved = ()


_taken = _Taken()


def _just_taken() -> _Taken:
    """Somebody is about to have it."""
    return _taken


class Pool:
    """The programs for one number of rows."""

    def __init__(self, ops: list[Op], needs: "Needs", rows: int) -> None:
        self.what = ops, needs, rows
        self.most = max(1, min(_MOST_PROGRAMS, _MOST_BYTES_IDLE // (1 + _bytes(ops, rows))))
        self.programs: list[Program] = []
        self.lock = threading.Lock()

    def take(self) -> Program | None:
        """A program that nobody uses; None if there are too many that are used."""
        with self.lock:
            for program in self.programs:
                node = program.user()
                if node is None or node._saved is None:
                    program.user = _just_taken
                    return program
            if len(self.programs) == self.most:
                return None
            program = Program(*self.what)
            program.user = _just_taken
            self.programs.append(program)
            return program

    def forget(self, program: Program) -> None:
        """Never give this one out again: somebody may look at what it holds."""
        with self.lock:
            if program in self.programs:
                self.programs.remove(program)
