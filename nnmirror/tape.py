"""The tape: what was called, and the walk back over it.

A differentiable operation is a `Function` with a `forward` and a `backward`. Each call
on a tensor that requires grad leaves a `Node`: the function, what it saved, and an edge
for every input, leading to the node that made the input or to the input itself where it
is a leaf. `walk` goes back over these edges, latest call first, adding up what arrives.

Everything here runs with `DisableTorchFunctionSubclass` entered once per call, so that
tracked tensors behave as plain ones inside a forward, a backward and the walk.
"""

import heapq
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch._C import DisableTorchFunctionSubclass, _EnableTorchFunction

from . import tensor as _tensor
from .grad_mode import is_grad_enabled, no_grad

# Where a gradient goes: (node, n) for its n-th output, (leaf, 0) for a leaf tensor.
Edge: TypeAlias = tuple[Any, int]

_sequence = itertools.count()

# The tensor's own accessors. Tensor overrides `grad` with a property for its users; the
# tape, already behind DisableTorchFunctionSubclass, reads and writes underneath it.
_C_grad = torch._C.TensorBase.grad

_FREED = (
    "Trying to backward through the graph a second time (or directly access saved tensors"
    " after they have already been freed). Saved intermediate values of the graph are freed"
    " when you call .backward() or autograd.grad(). Specify retain_graph=True if you need to"
    " backward through the graph a second time or if you need to access saved tensors after"
    " calling backward."
)
_ANOMALY = (
    " Hint: enable anomaly detection to find the operation that failed to compute its"
    " gradient, with torch.autograd.set_detect_anomaly(True)."
)


class Node:
    """One recorded call: the `ctx` of its Function, and the `grad_fn` of its outputs.

    What PyTorch offers on both is here under the same names: `save_for_backward`,
    `saved_tensors`, `needs_input_grad`, `mark_dirty`, `mark_non_differentiable`,
    `set_materialize_grads` for the Function; `name`, `next_functions`, `register_hook`,
    `register_prehook`, `metadata` for whoever looks at a `grad_fn`.
    """

    edges: tuple[Edge | None, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()
    label: str = ""  # set by a forward whose name depends on its inputs, as in PyTorch
    sequence: int = -1
    outputs: tuple[tuple[torch.Size, torch.dtype, torch.device], ...] = ()
    dirty: tuple[torch.Tensor, ...] = ()
    non_differentiable: tuple[torch.Tensor, ...] = ()
    materialize_grads: bool = True
    _saved: tuple[torch.Tensor | None, ...] | None = ()
    _versions: tuple[int, ...] = ()
    # Hooks, absent until one is registered.
    tensor_hooks: dict[int, dict[int, Callable[..., Any]]] | None = None
    retained: dict[int, Any] | None = None
    prehooks: dict[int, Callable[..., Any]] | None = None
    posthooks: dict[int, Callable[..., Any]] | None = None

    def __init__(self, function: "type[Function]") -> None:
        self.function = function

    # -- for the Function ------------------------------------------------------------

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep `tensors` for backward, which fails if one is changed in place until then."""
        self._saved = tensors
        try:
            self._versions = tuple([0 if t is None else t._version for t in tensors])
        except RuntimeError:
            if any(t is not None and t.is_inference() for t in tensors) and is_grad_enabled():
                raise RuntimeError(
                    "Inference tensors cannot be saved for backward. Please do not use Tensors"
                    " created in inference mode in computation tracked by autograd. To work"
                    " around this, you can make a clone to get a normal tensor and use it in"
                    " autograd, or use `torch.no_grad()` instead of `torch.inference_mode()`."
                ) from None
            self._saved = None  # in inference mode: there will be no backward

    def saved(self, index: int, via: str | None = None) -> torch.Tensor:
        """The saved tensor at `index`, checked. A rule reads only those it needs.

        `via` names the operation PyTorch would have saved a transpose through, for the
        error message.
        """
        if self._saved is None:
            raise RuntimeError(_FREED)
        tensor = self._saved[index]
        if tensor is not None and tensor._version != self._versions[index]:
            raise RuntimeError(self._modified(tensor, self._versions[index], via))
        return tensor  # type: ignore[return-value]

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]:
        if self._saved is None:
            raise RuntimeError(_FREED)
        return tuple(self.saved(i) for i in range(len(self._saved)))

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        self.dirty = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        self.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    # -- for whoever looks at a grad_fn ------------------------------------------------

    def name(self) -> str:
        return self.label or self.function.node_name()

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        return tuple(
            (None, 0)
            if edge is None
            else (edge[0] if type(edge[0]) is Node else AccumulateGrad(edge[0]), edge[1])
            for edge in self.edges
        )

    def register_hook(self, fn: Callable[..., Any]) -> torch.utils.hooks.RemovableHandle:
        """`fn(grad_inputs, grad_outputs)` runs after this node; may return new grad_inputs."""
        if self.posthooks is None:
            self.posthooks = {}
        return _add_hook(self.posthooks, fn)

    def register_prehook(self, fn: Callable[..., Any]) -> torch.utils.hooks.RemovableHandle:
        """`fn(grad_outputs)` runs before this node; may return new grad_outputs."""
        if self.prehooks is None:
            self.prehooks = {}
        return _add_hook(self.prehooks, fn)

    @property
    def metadata(self) -> dict[Any, Any]:
        return self.__dict__.setdefault("_metadata", {})

    def __repr__(self) -> str:
        return f"<{self.name()} object at {id(self):#x}>"

    # -- for the walk ------------------------------------------------------------------

    def run(self, grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Call the Function's backward; one gradient per edge, each of its input's shape."""
        function = self.function
        if self.materialize_grads and len(grads) > 1:
            grads = [
                torch.zeros(m[0], dtype=m[1], device=m[2]) if g is None else g
                for g, m in zip(grads, self.outputs, strict=True)
            ]
        results = function.backward(self, *grads)
        if not isinstance(results, tuple):
            results = (results,)
        if len(results) != len(self.edges):
            # PyTorch forgives trailing Nones
            if len(results) < len(self.edges) or any(
                r is not None for r in results[len(self.edges) :]
            ):
                raise RuntimeError(
                    f"function {self.name()} returned an incorrect number of gradients"
                    f" (expected {len(self.edges)}, got {len(results)})"
                )
        return results

    def free(self) -> None:
        if self._saved:
            self._saved = None

    def _modified(self, tensor: torch.Tensor, expected: int, via: str | None) -> str:
        shape = list(tensor.shape)
        maker, index = via, 0
        if via is not None:
            shape = shape[::-1]
        elif isinstance(tensor, _tensor.Tensor) and tensor._node is not None:
            maker, index = tensor._node.name(), tensor._output_nr
        elif hasattr(tensor, "_alias_of_output"):
            maker = self.name()
        made = f", which is output {index} of {maker}," if maker else ""
        return (
            "one of the variables needed for gradient computation has been modified by an"
            f" inplace operation: [{torch.Tensor.type(tensor)} {shape}]{made} is at version"
            f" {tensor._version}; expected version {expected} instead." + _ANOMALY
        )


class AccumulateGrad:
    """What `next_functions` shows for a leaf."""

    def __init__(self, variable: torch.Tensor) -> None:
        self.variable = variable

    next_functions: tuple[()] = ()

    def name(self) -> str:
        return "torch::autograd::AccumulateGrad"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccumulateGrad) and other.variable is self.variable

    def __hash__(self) -> int:
        return id(self.variable)

    def __repr__(self) -> str:
        return f"<AccumulateGrad object at {id(self.variable):#x}>"


class Function:
    """An operation with a hand-written backward, as `torch.autograd.Function`.

        class Square(nnmirror.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return g * 2 * x

        y = Square.apply(x)

    `backward` receives one gradient per output and returns one per input of `forward`
    (None for what is no tensor). Inside both, operations are not recorded.
    """

    is_view: bool = False  # the output shares the first input's memory
    is_inplace: bool = False  # the first input is changed, and is the output
    input_place: int = 0  # which argument is the input of the module that is this function

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "You must implement the forward function for custom autograd.Function."
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise NotImplementedError("setup_context is not implemented.")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "You must implement either the backward or vjp method for your custom"
            " autograd.Function to use it with backward mode AD."
        )

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call `forward`, recording it if grad mode is on and an input requires grad."""
        return record(cls, args)[0]

    @classmethod
    def node_name(cls) -> str:
        return cls.__name__ + "Backward"


def record(
    function: type[Function],
    args: tuple[Any, ...],
    inplace: Callable[[], Any] | None = None,
) -> tuple[Any, Node | None]:
    """Run `function.forward` on `args`; return its output and its node.

    The node is None with grad mode off. Where no input requires grad the output stays an
    untracked tensor; the node then still holds what was saved, for `Module.backward`.

    `inplace`, if given, performs the operation on the first argument, which becomes the
    output, after `forward` has computed (and saved) what its backward needs.
    """
    if not is_grad_enabled():
        with DisableTorchFunctionSubclass():
            if inplace is not None:
                return inplace(), None
            node = Node(function)
            node.needs_input_grad = (False,) * len(args)
            if not torch.is_grad_enabled():
                return _forward(node, function, args), None
            with torch.no_grad():  # an input may belong to torch's own autograd
                return _forward(node, function, args), None
    with DisableTorchFunctionSubclass():
        if torch.is_autocast_enabled():
            raise RuntimeError(
                "nnmirror: torch.autocast is not mirrored; convert the model and its input"
                " with .to(dtype) instead"
            )
        edges: list[Edge | None] = []
        tracked = False
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                edges.append(_edge(arg))
                tracked = True
                if not isinstance(arg, _tensor.Tensor):
                    # The tape computes on a detached alias: no torch graph is built.
                    args = (*args[:i], arg.detach(), *args[i + 1 :])
            else:
                edges.append(None)
        node = Node(function)
        node.needs_input_grad = tuple([edge is not None for edge in edges])
        if tracked and (function.is_inplace or inplace is not None):
            _check_inplace(args[0], edges[0])
        out = _forward(node, function, args)
        if inplace is not None:
            out = inplace()
            node.dirty = (out,)
        node.edges = tuple(edges)
        if not tracked:
            if isinstance(out, torch.Tensor):
                node.outputs = (_meta(out),)
            return out, node
        node.sequence = next(_sequence)
        if isinstance(out, tuple | list):
            made = [_track(node, i, o, args) for i, o in enumerate(out)]
            node.outputs = tuple(_meta(o) for o in made)
            return type(out)(made) if type(out) in (tuple, list) else out, node
        out = _track(node, 0, out, args)
        node.outputs = (_meta(out),)
        return out, node


def _forward(node: Node, function: type[Function], args: tuple[Any, ...]) -> Any:
    if function.setup_context is Function.setup_context:
        return function.forward(node, *args)
    out = function.forward(*args)
    function.setup_context(node, args, out)
    return out


def _meta(out: Any) -> Any:
    return (out.shape, out.dtype, out.device) if isinstance(out, torch.Tensor) else None


def _edge(tensor: torch.Tensor) -> Edge:
    if isinstance(tensor, _tensor.Tensor):
        view = tensor._view_of
        if view is not None and view[0]._node is not view[1]:
            raise RuntimeError(
                "nnmirror: this tensor is a view of one that was changed in place after the"
                " view was made; make the view again from the changed tensor (PyTorch redoes"
                " the view by itself)"
            )
        if tensor._node is not None:
            return tensor._node, tensor._output_nr
    return tensor, 0


def _track(node: Node, index: int, out: Any, args: tuple[Any, ...]) -> Any:
    """Make `out` a tracked tensor: output `index` of `node`."""
    if not isinstance(out, torch.Tensor):
        return out
    if not (out.is_floating_point() or out.is_complex()):
        return out
    if any(out is t for t in node.non_differentiable):
        return out
    dirty = any(out is t for t in node.dirty)
    if dirty:
        if isinstance(out, _tensor.Tensor):
            if out._node is None and out._requires_grad:
                _check_inplace(out, (out, 0))
        elif out._is_view():
            raise RuntimeError(_INPLACE_VIEW)
    elif isinstance(out, _tensor.Tensor) or any(out is a for a in args):
        out = out.view_as(out)  # the forward handed an input on: a tensor of its own
    if node._saved and any(out is t for t in node._saved):
        # An output that is saved would keep itself alive: save an alias of it.
        alias = out.detach()
        alias._alias_of_output = True
        node._saved = tuple(alias if t is out else t for t in node._saved)
        node._versions = tuple(
            out._version if t is alias else v
            for t, v in zip(node._saved, node._versions, strict=True)
        )
    if not isinstance(out, _tensor.Tensor):
        out.__class__ = _tensor.Tensor
    out._node = node
    out._output_nr = index
    if node.function.is_view:
        base = args[0]
        if isinstance(base, _tensor.Tensor):
            out._view_of = base._view_of or (base, base._node)
    return out


_INPLACE_VIEW = (
    "nnmirror: an in-place operation on a view is not mirrored when gradients are recorded;"
    " use the out-of-place operation, or work on the tensor itself"
)


def _check_inplace(tensor: torch.Tensor, edge: Edge | None) -> None:
    """Refuse what PyTorch refuses, and what the tape cannot follow."""
    if isinstance(tensor, _tensor.Tensor) and tensor._view_of is not None:
        base, node = tensor._view_of
        if node is None and base._requires_grad:
            raise RuntimeError(
                "a view of a leaf Variable that requires grad is being used in an in-place"
                " operation."
            )
        raise RuntimeError(_INPLACE_VIEW)
    if edge is not None:
        if type(edge[0]) is not Node:
            if edge[0].is_leaf:
                raise RuntimeError(
                    "a leaf Variable that requires grad is being used in an in-place operation."
                )
            raise RuntimeError(
                "nnmirror: an in-place operation on a tensor that torch's own autograd made is not"
                " mirrored; use the out-of-place operation"
            )
    elif tensor._is_view() or torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2:
        # An untracked tensor is about to carry a gradient: views of it would not know.
        raise RuntimeError(_INPLACE_VIEW)


# -- the walk backwards ----------------------------------------------------------------


def walk(
    edges: Sequence[Edge],
    grads: Sequence[torch.Tensor],
    retain_graph: bool = False,
    only: Sequence[Edge] | None = None,
    stop: Sequence[Edge] | None = None,
) -> list[torch.Tensor | None]:
    """Send `grads` back from `edges`.

    Every leaf on the way adds what arrives to its `.grad`. With `only`, nothing is
    accumulated: the gradients arriving at those edges are returned. With `stop`, they are
    returned and go no further, while the other leaves accumulate.

    The order is PyTorch's: of the nodes whose gradients are complete the one recorded
    last runs first, and gradients are added up in the order in which they arrive. So
    sums of three or more terms have the same bits.
    """
    counts, order = _dependencies(edges)
    captured = only or stop or ()
    wanted = {(id(t), n): i for i, (t, n) in enumerate(captured)}
    found: list[torch.Tensor | None] = [None] * len(captured)
    reaches: set[int] | None = None  # with `only`: what lies on the way to it
    if only is not None:
        reaches = {id(t) for t, _ in only}
        for node in sorted(order, key=lambda n: n.sequence):
            if any(e is not None and id(e[0]) in reaches for e in node.edges):
                reaches.add(id(node))
    buffers: dict[int, list[torch.Tensor | None]] = {}
    ready: list[tuple[int, Node]] = []
    to_torch: list[tuple[torch.Tensor, torch.Tensor]] = []

    def arrive(target: Any, index: int, grad: torch.Tensor | None) -> None:
        """One gradient (or None) reaches `target`; act when it was the last expected."""
        key = id(target)
        if reaches is not None and key not in reaches:
            return
        is_node = type(target) is Node
        slots = buffers.get(key)
        if slots is None:
            slots = buffers[key] = [None] * (len(target.outputs) if is_node else 1)
        if grad is not None:
            held = slots[index]
            slots[index] = grad if held is None else held + grad
            grad = None  # from here on the slot alone holds it
        counts[key] -= 1
        if counts[key]:
            return
        if is_node:
            heapq.heappush(ready, (-target.sequence, target))
            return
        del buffers[key]
        if slots[0] is None:
            return
        if (key, 0) in wanted:
            found[wanted[key, 0]] = _run_tensor_hooks(_leaf_hooks(target), slots[0])
        elif reaches is None:
            # 2: the slot and the call's own argument
            _finish_leaf(target, slots[0], sys.getrefcount(slots[0]) <= 2, to_torch)

    with DisableTorchFunctionSubclass():
        for (target, index), grad in zip(edges, grads, strict=True):
            arrive(target, index, grad)
        while ready:
            node = heapq.heappop(ready)[1]
            slots = buffers.pop(id(node))
            if node.tensor_hooks is not None or node.retained is not None:
                _run_output_hooks(node, slots)
            for i in range(len(slots)) if wanted else ():
                if (id(node), i) in wanted:
                    found[wanted[id(node), i]] = slots[i]
                    if stop is not None:
                        slots[i] = None
            if reaches is not None and not any(
                e is not None and id(e[0]) in reaches for e in node.edges
            ):
                continue
            if node.prehooks:
                slots = _run_prehooks(node, slots)
            if all(g is None for g in slots):
                results: Any = [None] * len(node.edges)
            else:
                results = _validated(node, node.run(slots))
            if node.posthooks:
                results = _run_posthooks(node, results, slots)
            slots = None
            if not retain_graph:
                node.free()
            results.reverse()
            for edge in node.edges:
                if edge is None:
                    results.pop()
                else:
                    arrive(edge[0], edge[1], results.pop())
        for tensor, grad in to_torch[:-1]:
            tensor.backward(grad, retain_graph=True)
        for tensor, grad in to_torch[-1:]:
            tensor.backward(grad, retain_graph=retain_graph)
    return found


def _dependencies(edges: Iterable[Edge]) -> tuple[dict[int, int], list[Node]]:
    """How many gradients each target will receive, and the nodes that will run."""
    counts: dict[int, int] = {}
    order: list[Node] = []
    seen: set[int] = set()
    stack = []
    for target, _ in edges:
        counts[id(target)] = counts.get(id(target), 0) + 1
        stack.append(target)
    while stack:
        target = stack.pop()
        if type(target) is not Node or id(target) in seen:
            continue
        seen.add(id(target))
        order.append(target)
        for edge in target.edges:
            if edge is not None:
                counts[id(edge[0])] = counts.get(id(edge[0]), 0) + 1
                stack.append(edge[0])
    return counts, order


def _validated(node: Node, results: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Bring each gradient to its input's shape and dtype, as PyTorch's engine does.

    So a rule for a broadcasting operation returns the gradient of the broadcast shape,
    and the sum over the broadcast dimensions is taken here, once for all.
    """
    checked: list[torch.Tensor | None] = []
    for i, edge in enumerate(node.edges):
        grad = results[i]
        if edge is None or grad is None:
            checked.append(None)
            continue
        target, index = edge
        if not isinstance(grad, torch.Tensor):
            raise TypeError(
                f"function {node.name()} returned a gradient at index {i} that is no tensor:"
                f" {torch.typename(grad)}"
            )
        shape, dtype, device = (
            target.outputs[index]
            if type(target) is Node
            else (target.shape, target.dtype, target.device)
        )
        if grad.shape != shape:
            if not _expandable(shape, grad.shape):
                raise RuntimeError(
                    f"Function {node.name()} returned an invalid gradient at index {i} - got"
                    f" {list(grad.shape)} but expected shape compatible with {list(shape)}"
                )
            grad = grad.sum_to_size(shape)
        if grad.dtype is not dtype:
            grad = grad.to(dtype)
        if grad.device != device:
            if grad.dim() == 0:
                grad = grad.to(device)
            else:
                raise RuntimeError(
                    f"Function {node.name()} returned an invalid gradient at index {i} -"
                    f" expected device {device} but got {grad.device}"
                )
        if grad.requires_grad:
            grad = grad.detach()
        checked.append(grad)
    return checked


def _expandable(shape: Sequence[int], desired: Sequence[int]) -> bool:
    if len(shape) > len(desired):
        return False
    tail = desired[len(desired) - len(shape) :]
    return all(s == d or s == 1 for s, d in zip(shape, tail, strict=True))


def accumulate(leaf: torch.Tensor, grad: torch.Tensor, may_keep: bool) -> None:
    """Add `grad` to `leaf.grad`, as PyTorch's AccumulateGrad.

    The first gradient becomes `.grad` itself if nobody else holds it (`may_keep`) and its
    layout is the leaf's; otherwise it is copied. Later ones are added in place.
    """
    held = _C_grad.__get__(leaf)
    if held is not None:
        if held.requires_grad:
            raise RuntimeError(
                "nnmirror: .grad requires grad itself; gradients of gradients are not mirrored"
            )
        held.add_(grad)
        return
    if leaf.is_contiguous():
        fits = grad.is_contiguous()
    else:
        fits = grad.stride() == leaf.stride()
    if not (may_keep and fits) or grad._is_view():
        layout = torch.preserve_format if _dense(leaf) else torch.contiguous_format
        grad = torch.empty_like(leaf, memory_format=layout).copy_(grad)
    if type(grad) is not torch.Tensor:
        grad = grad.detach()
    _C_grad.__set__(leaf, grad)


def _dense(tensor: torch.Tensor) -> bool:
    """Non-overlapping and dense: its strides say all about its layout."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _finish_leaf(
    leaf: torch.Tensor, grad: torch.Tensor, unshared: bool, to_torch: list[Any]
) -> None:
    if not isinstance(leaf, _tensor.Tensor):
        # A tensor of torch's own: torch's engine takes the gradient on where there is a
        # graph or a hook; a bare leaf is filled as our own are.
        if not leaf.is_leaf or leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
            to_torch.append((leaf, grad))
            return
    hooks = _leaf_hooks(leaf)
    if hooks:
        grad = _run_tensor_hooks(hooks, grad)
        unshared = False
    accumulate(leaf, grad, may_keep=unshared)
    if isinstance(leaf, _tensor.Tensor) and leaf._post_accumulate_hooks:
        with _EnableTorchFunction(), torch.no_grad(), no_grad():
            for hook in tuple(leaf._post_accumulate_hooks.values()):
                hook(leaf)


# -- hooks -------------------------------------------------------------------------------


def _add_hook(
    hooks: dict[int, Callable[..., Any]], fn: Callable[..., Any]
) -> torch.utils.hooks.RemovableHandle:
    handle = torch.utils.hooks.RemovableHandle(hooks)
    hooks[handle.id] = fn
    return handle


def _leaf_hooks(leaf: torch.Tensor) -> dict[int, Callable[..., Any]] | None:
    return leaf._leaf_hooks if isinstance(leaf, _tensor.Tensor) else None


def _run_tensor_hooks(
    hooks: dict[int, Callable[..., Any]] | None, grad: torch.Tensor
) -> torch.Tensor:
    """Call each hook with the gradient; what it returns replaces it."""
    for hook in tuple(hooks.values()) if hooks else ():
        with _EnableTorchFunction(), torch.no_grad(), no_grad():
            result = hook(grad)
        if result is None:
            continue
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"expected Tensor, but hook returned '{torch.typename(result)}'")
        if result.dtype is not grad.dtype:
            raise RuntimeError(
                f"hook '{getattr(hook, '__name__', 'unknown')}' has changed the type of value"
                f" (was {torch.Tensor.type(grad)} got {torch.Tensor.type(result)})"
            )
        if result.shape != grad.shape:
            raise RuntimeError(
                f"hook '{getattr(hook, '__name__', 'unknown')}' has changed the size of value"
            )
        grad = result.detach() if result.requires_grad else result
    return grad


def _run_output_hooks(node: Node, slots: list[torch.Tensor | None]) -> None:
    for index, grad in enumerate(slots):
        if grad is None:
            continue
        if node.tensor_hooks is not None:
            grad = slots[index] = _run_tensor_hooks(node.tensor_hooks.get(index), grad)
        if node.retained is not None and index in node.retained:
            tensor = node.retained[index]()
            if tensor is not None:
                held = _C_grad.__get__(tensor)
                _C_grad.__set__(tensor, grad.clone() if held is None else held + grad)


def _run_prehooks(node: Node, slots: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    with _EnableTorchFunction(), torch.no_grad(), no_grad():
        for hook in tuple(node.prehooks.values()):  # type: ignore[union-attr]
            result = hook(tuple(slots))
            if result is not None:
                slots = list(result) if isinstance(result, tuple) else [result]
    return slots


def _run_posthooks(
    node: Node, results: list[torch.Tensor | None], slots: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    with _EnableTorchFunction(), torch.no_grad(), no_grad():
        for hook in tuple(node.posthooks.values()):  # type: ignore[union-attr]
            result = hook(tuple(results), tuple(slots))
            if result is not None:
                results = list(result) if isinstance(result, tuple) else [result]
    return results


# -- what Tensor.backward and grad are made of -----------------------------------------


def make_grads(
    outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """The gradients to start from: those given, checked, or one for each scalar output."""
    if len(grads) != len(outputs):
        raise RuntimeError(
            f"got {len(outputs)} tensors and {len(grads)} gradients"
        )
    with DisableTorchFunctionSubclass():
        return [
            start_grad(_meta(out), grad, i)
            for i, (out, grad) in enumerate(zip(outputs, grads, strict=True))
        ]


def start_grad(meta: Any, grad: Any, index: int) -> torch.Tensor:
    """The gradient to start from at an output of this shape, dtype and device."""
    shape, dtype, device = meta
    if grad is None:
        if shape.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if not dtype.is_floating_point:
            raise RuntimeError(
                f"grad can be implicitly created only for real scalar outputs but got {dtype}"
            )
        return torch.ones(shape, dtype=dtype, device=device)
    if not isinstance(grad, torch.Tensor):
        raise TypeError(
            f"gradients can be either Tensors or None, but got {type(grad).__name__}"
        )
    if grad.shape != shape:
        raise RuntimeError(
            f"Mismatch in shape: grad_output[{index}] has a shape of {grad.shape} and"
            f" output[{index}] has a shape of {shape}."
        )
    grad = grad.detach()
    return grad if grad.dtype is dtype else grad.to(dtype)


def _roots(outputs: Sequence[torch.Tensor]) -> list[Edge]:
    roots = []
    for i, out in enumerate(outputs):
        if not (isinstance(out, _tensor.Tensor) and out.requires_grad):
            raise RuntimeError(
                f"element {i} of tensors does not require grad and does not have a grad_fn"
            )
        roots.append(_edge(out))
    return roots


_NO_CREATE_GRAPH = (
    "nnmirror: create_graph=True (a gradient of a gradient) is not mirrored; the backward"
    " formulas are computed, not recorded"
)


def backward(
    outputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> None:
    """Accumulate into the leaves' `.grad` (or only into that of `inputs`)."""
    if create_graph:
        raise NotImplementedError(_NO_CREATE_GRAPH)
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if inputs is not None and len(inputs) == 0:
        raise RuntimeError("`inputs` argument to `backward()` cannot be empty.")
    started = make_grads(outputs, grads)
    roots = _roots(outputs)
    if inputs is None:
        walk(roots, started, bool(retain_graph))
        return
    edges = _input_edges(inputs)
    for tensor, grad in zip(
        inputs, walk(roots, started, bool(retain_graph), only=edges), strict=True
    ):
        if grad is not None:
            with DisableTorchFunctionSubclass():
                accumulate(tensor, grad, may_keep=False)


def backward_to(
    outputs: Sequence[Any], grads: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Accumulate into the leaves between, and return the gradients for `inputs`."""
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if isinstance(out, _tensor.Tensor) and out.requires_grad
    ]
    if not pairs:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    outs = [out for out, _ in pairs]
    started = make_grads(outs, [grad for _, grad in pairs])
    return walk(_roots(outs), started, stop=[_edge(t) for t in inputs])


def _input_edges(inputs: Sequence[torch.Tensor]) -> list[Edge]:
    edges = []
    for tensor in inputs:
        if not tensor.requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
        edges.append(_edge(tensor))
    return edges


def grad(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    inputs: torch.Tensor | Sequence[torch.Tensor],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    materialize_grads: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `outputs` for `inputs`, as `torch.autograd.grad`: nothing accumulates."""
    if create_graph:
        raise NotImplementedError(_NO_CREATE_GRAPH)
    if materialize_grads and allow_unused is False:
        raise ValueError(
            "Expected allow_unused to be True or not passed when materialize_grads=True, but"
            " got: allow_unused=False."
        )
    outs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    ins = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    if grad_outputs is None:
        starts: Sequence[torch.Tensor | None] = [None] * len(outs)
    else:
        starts = (grad_outputs,) if isinstance(grad_outputs, torch.Tensor) else grad_outputs
    started = make_grads(outs, starts)
    results = walk(_roots(outs), started, bool(retain_graph), only=_input_edges(ins))
    if materialize_grads:
        results = [
            torch.zeros_like(t.detach()) if g is None else g
            for g, t in zip(results, ins, strict=True)
        ]
    elif not allow_unused and any(g is None for g in results):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set"
            " allow_unused=True if this is the desired behavior."
        )
    return tuple(results)
