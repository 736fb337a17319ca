"""`backward` and `grad`: they check what they are given, and start the walk."""

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias, TypeGuard, overload

import torch

from . import _state, _torch, fast
from . import node as _node
from . import tensor as _tensor
from ._state import here as _here
from ._torch import DisableTorchFunctionSubclass
from ._upcalls import implements, upcall
from .accumulate import accumulate, grad_of, put_grad, retained
from .beyond import check_input, taken_over
from .double_backward import run_recorded, tracked_alias
from .fast.signature import Meta
from .grad_mode import is_grad_enabled
from .gradient_hooks import run_post_accumulate_hooks
from .node import AccumulateGrad, Edge, Node, Target
from .tape import edge_of, meta_of
from .walk import unrecorded, walk


def make_grads(
    outputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    create_graph: bool = False,
) -> list[torch.Tensor]:
    """The initial gradients: those given, checked, or 1 for each scalar output."""
    for given in grads:
        if given is not None and not isinstance(given, torch.Tensor):
            raise TypeError(
                f"gradients can be either Tensors or None, but got {type(given).__name__}"
            )
    if len(grads) != len(outputs):
        raise RuntimeError(f"got {len(outputs)} tensors and {len(grads)} gradients")
    started = []
    with DisableTorchFunctionSubclass():
        for i, (out, grad) in enumerate(zip(outputs, grads, strict=True)):
            if grad is None and not out.requires_grad:
                raise RuntimeError(_NO_GRAD_FN.format(i))
            started.append(start_grad(meta_of(out), grad, i, create_graph))
    return started


def expect_tracked(name: str, tensor: object, modules: Sequence[object]) -> None:
    """Raise if `nnmirror.<name>`, which shows the graph behind `tensor`, cannot."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"nnmirror.{name} takes a tensor, such as a loss, not {_kind(tensor)}")
    if _tensor.is_torchs(tensor) and tensor.requires_grad:
        raise TypeError(
            f"nnmirror.{name}: this tensor was computed by PyTorch's autograd, not by the mirror:"
            " which nn does the model come from?"
        )
    for module in modules:
        if not hasattr(module, "named_modules"):
            raise TypeError(
                f"nnmirror.{name}: a module is expected after the tensor, not {_kind(module)}"
            )


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def start_grad(
    meta: Meta,
    grad: Any,  # a tensor or None; of `Module.backward` what the user gives
    index: int,
    create_graph: bool = False,
) -> torch.Tensor:
    """The initial gradient for an output of this shape, dtype and device."""
    shape, dtype, device = meta
    if grad is None:
        if shape.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if not dtype.is_floating_point:
            raise RuntimeError(
                f"grad can be implicitly created only for real scalar outputs but got {dtype}"
            )
        return torch.ones(shape, dtype=dtype, device=device)
    if grad.shape != shape:
        raise RuntimeError(
            f"Mismatch in shape: grad_output[{index}] has a shape of {grad.shape} and"
            f" output[{index}] has a shape of {shape}."
        )
    if grad.is_complex() and not dtype.is_complex:
        raise RuntimeError(
            "For complex Tensors, both grad_output and output are required to have the same dtype."
            f" Mismatch in dtype: grad_output[{index}] has a dtype of {grad.dtype} and"
            f" output[{index}] has a dtype of {dtype}."
        )
    if grad.device != device:
        raise RuntimeError(
            f"invalid gradient at index {index} - expected device {device} but got {grad.device}"
        )
    grad = grad.detach() if not create_graph else _tracked(grad)
    return grad if grad.dtype is dtype else grad.to(dtype)


def _tracked(grad: torch.Tensor) -> torch.Tensor:
    """An initial gradient, which may have a history itself."""
    if isinstance(grad, _tensor.Tensor) or not grad.requires_grad:
        return grad
    return tracked_alias(grad, edge_of(grad))


def _roots(outputs: Sequence[torch.Tensor]) -> list[Edge]:
    for i, out in enumerate(outputs):
        if not out.requires_grad:
            raise RuntimeError(_NO_GRAD_FN.format(i))
    if len(outputs) == 1:
        return [edge_of(outputs[0])]
    return [edge_of(_over(out)) for out in outputs]


def _over(output: torch.Tensor) -> torch.Tensor:
    """What stands for a result of torch's own beside others, if the mirror has recorded it."""
    if isinstance(output, _tensor.Tensor) or output.is_leaf:
        return output
    with DisableTorchFunctionSubclass():
        over = taken_over(output)
    return output if over is None else over


_NO_GRAD_FN = "element {} of tensors does not require grad and does not have a grad_fn"


@implements(_tensor)
def backward(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    grad_tensors: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    inputs: torch.Tensor | Sequence[torch.Tensor] | dict[str, torch.Tensor] | None = None,
) -> None:
    """Add the gradients of `tensors` to the leaves' `.grad`, as `torch.autograd.backward`.

    One backward from all of them: dx = sum_i g_i dy_i/dx, with g_i from `grad_tensors` (None means
    1, if y_i is a single number). With `inputs`, only these get a gradient. With `create_graph` the
    backward is recorded itself: each `.grad` has a `grad_fn`, and can be differentiated, to any
    order (see `double_backward`). RuntimeError if a tensor does not require grad.
    `torch.autograd.backward` calls this if it is given a tensor that the mirror tracks; tensors of
    torch's own graph may be given with those.
    """
    if grad_variables is not None:
        warnings.warn(
            "`grad_variables` is deprecated. Use `grad_tensors` instead.",
            FutureWarning,
            stacklevel=2,
        )
        if grad_tensors is not None:
            raise RuntimeError(
                "`grad_tensors` and `grad_variables` (deprecated) arguments both passed to"
                " `backward()`. Please only use `grad_tensors`."
            )
        grad_tensors = grad_variables
    outputs = _as_many(tensors)
    grads = (None,) * len(outputs) if grad_tensors is None else _as_many(grad_tensors)
    if inputs is not None:
        inputs = _inputs_of(inputs, "backward")
        if not all(t.requires_grad for t in inputs):
            raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
    if retain_graph is None:
        retain_graph = create_graph
    if create_graph:
        _warn_of_cycle()
    elif inputs is None and grad_tensors is None and len(outputs) == 1:
        retain = _flag(retain_graph)
        if fast.enabled and not _here.is_plain:
            if _state.taps and walk_tapped(outputs[0], retain):
                return
            if walk_bound(outputs[0], retain):
                return
    if _here.is_plain and inputs is None and not create_graph:
        _tensor.backward_plainly(outputs, grads, _flag(retain_graph))
        return
    started = make_grads(outputs, grads, create_graph)
    roots = _roots(outputs)
    if inputs is None:
        retain = _flag(retain_graph)
        may_be_bound = len(roots) == 1 and not create_graph and fast.enabled and not _state.taps
        if grads[0] is None or not may_be_bound or not walk_from(roots[0][0], started[0], retain):
            walk(roots, started, retain, create_graph=create_graph)
        return
    for tensor in inputs:
        tensor.retain_grad()
    theirs = {id(t): t for t in inputs if not isinstance(t, _tensor.Tensor)}
    before = {key: grad_of(tensor) for key, tensor in theirs.items()}
    edges = _input_edges(inputs)
    found = walk(
        roots, started, _flag(retain_graph), only=edges, into=True, create_graph=create_graph
    )
    arrived = {id(tensor): grad for tensor, grad in zip(inputs, found, strict=True)}
    with DisableTorchFunctionSubclass():
        for key, tensor in theirs.items():
            grad = arrived[key]
            if grad is None:
                continue
            if tensor.is_leaf:
                accumulate(tensor, grad, False, create_graph)
            elif create_graph:  # torch's engine has added one that is not recorded
                put_grad(tensor, retained(before[key], grad, create_graph))


def _warn_of_cycle() -> None:
    """PyTorch's warning, once."""
    if not _state.warned_of_cycle or torch.is_warn_always_enabled():
        _state.warned_of_cycle = True
        warnings.warn(
            "Using backward() with create_graph=True will create a reference cycle between the"
            " parameter and its gradient which can cause a memory leak. We recommend using"
            " autograd.grad when creating the graph to avoid this. If you have to use this"
            " function, make sure to reset the .grad fields of your parameters to None after use"
            " to break the cycle and avoid the leak.",
            stacklevel=4,
        )


def _as_many(value: Any) -> tuple[Any, ...]:
    if type(value) is _tensor.Tensor or isinstance(value, torch.Tensor):
        return (value,)
    if _is_gradient_edge(value):
        return (_at(value),)
    return tuple(_at(v) if _is_gradient_edge(v) else v for v in value)


class _GradientEdge(Protocol):
    """torch.autograd.graph.GradientEdge, which is not imported."""

    @property
    def node(self) -> object: ...
    @property
    def output_nr(self) -> int: ...


def _is_gradient_edge(value: object) -> TypeGuard[_GradientEdge]:
    kind = type(value)  # recognized by name, as torch.autograd is not imported
    return (kind.__module__, kind.__name__) == ("torch.autograd.graph", "GradientEdge")


def _at(edge: _GradientEdge) -> torch.Tensor:
    """A tensor for `edge`: the leaf, or one without values that has the node."""
    node = edge.node
    if isinstance(node, AccumulateGrad):
        return node.variable
    if not isinstance(node, Node):
        raise NotImplementedError(
            "nnmirror: a GradientEdge of torch's own graph, beside what the mirror tracks, is not"
            " mirrored; give the tensor in place of its edge"
        )
    shape, dtype, device = node.outputs[edge.output_nr]
    with DisableTorchFunctionSubclass():
        made: Any = torch.empty((), dtype=dtype, device=device).expand(shape)
    made.__class__ = _tensor.Tensor
    made._node, made._output_nr = node, edge.output_nr
    made.retain_grad = _nothing  # if backward was given the edge
    return made  # type: ignore[no-any-return]


def _nothing() -> None:
    pass


def _inputs_of(inputs: object, caller: str) -> tuple[torch.Tensor, ...]:
    """The requested tensors: one, several, or the values of a dict."""
    if type(inputs) is dict:
        inputs = tuple(inputs.values())
    elif isinstance(inputs, Mapping):
        raise TypeError(
            f"`inputs` argument to `{caller}()` must be a dict, not {type(inputs).__name__}."
            " Other Mapping types are not supported."
        )
    found = _as_many(inputs)
    if not found:
        raise RuntimeError(f"`inputs` argument to `{caller}()` cannot be empty.")
    return found


@upcall("nnmirror.fast.tapped")
def walk_tapped(loss: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a loss by a bound walk with taps; False if there is none."""
    raise NotImplementedError


@upcall("nnmirror.fast.binding")
def walk_bound(loss: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a loss by a bound walk; False if there is none for this graph."""
    raise NotImplementedError


@upcall("nnmirror.fast.binding")
def walk_from(target: Target, grad: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a result with the gradient `grad` by a bound walk; False if there is
    none for this graph."""
    raise NotImplementedError


def _flag(value: SupportsIndex) -> bool:
    """retain_graph as PyTorch's engine converts it: an unsigned byte."""
    number = operator.index(value)
    if not 0 <= number < 256:
        bound = "less than minimum" if number < 0 else "greater than maximum"
        raise OverflowError(f"unsigned byte integer is {bound}")
    return bool(number)


@implements(_node)
def run_by_itself(
    node: Node, grads: Sequence[torch.Tensor | None]
) -> Sequence[torch.Tensor | None]:
    return _run(node, grads, create_graph=is_grad_enabled())


@unrecorded
def _run(
    node: Node, grads: Sequence[torch.Tensor | None], create_graph: bool = False
) -> Sequence[torch.Tensor | None]:
    with DisableTorchFunctionSubclass():
        if create_graph:
            return run_recorded(node, grads, node.needs_input_grad)
        return node.run([None if grad is None else grad.detach() for grad in grads])


@implements(_node)
def accumulate_by_itself(leaf: torch.Tensor, grad: torch.Tensor | None) -> None:
    _accumulate(leaf, grad, create_graph=is_grad_enabled())


@unrecorded
def _accumulate(leaf: torch.Tensor, grad: torch.Tensor | None, create_graph: bool = False) -> None:
    with DisableTorchFunctionSubclass():
        if grad is not None:
            accumulate(leaf, grad, may_keep=False, create_graph=create_graph)
        run_post_accumulate_hooks(leaf, create_graph)


def between(
    starts: Sequence[tuple[Edge, torch.Tensor | None]], ends: Sequence[Edge]
) -> list[torch.Tensor | None]:
    """Run the backward from `starts`, edges with their gradients, up to `ends`.

    It accumulates into the leaves in between, and returns the gradients for `ends`.
    """
    if not starts:
        raise RuntimeError(_NO_GRAD_FN.format(0))
    grads = []
    with DisableTorchFunctionSubclass():
        for i, ((target, index), grad) in enumerate(starts):
            if isinstance(target, Node):
                meta = target.outputs[index]
            else:
                meta = meta_of(target)
            grads.append(start_grad(meta, grad, i))
    return walk([edge for edge, _ in starts], grads, stop=ends)


def _input_edges(inputs: Sequence[torch.Tensor]) -> list[Edge]:
    edges = []
    for tensor in inputs:
        if not tensor.requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
        if not isinstance(tensor, _tensor.Tensor):
            check_input(tensor)
        edges.append(edge_of(tensor))
    return edges


@overload
def grad(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    inputs: torch.Tensor | Sequence[torch.Tensor],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[torch.Tensor, ...]: ...


@overload
def grad(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    inputs: dict[str, torch.Tensor],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> dict[str, torch.Tensor]: ...


def grad(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    inputs: torch.Tensor | Sequence[torch.Tensor] | dict[str, torch.Tensor],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """The gradients of `outputs` for `inputs`, as `torch.autograd.grad`: nothing accumulates.

    A tuple, or a dict where `inputs` is one. With `create_graph` they can be differentiated, to any
    order, with respect to the saved tensors and `grad_outputs`. NotImplementedError if a rule on
    the way has no second derivative. With `is_grads_batched` the first dimension of each of
    `grad_outputs` is a batch, and the backward is run for each item.
    """
    if retain_graph is None:
        retain_graph = create_graph
    if not only_inputs:
        warnings.warn(
            "only_inputs argument is deprecated and is ignored now (defaults to True). To"
            " accumulate gradient for other parts of the graph, please use"
            " torch.autograd.backward.",
            FutureWarning,
            stacklevel=2,
        )
    if materialize_grads and allow_unused is False:
        raise ValueError(
            "Expected allow_unused to be True or not passed when materialize_grads=True, but"
            " got: allow_unused=False."
        )
    outs, ins = _as_many(outputs), _inputs_of(inputs, "grad")
    starts = (None,) * len(outs) if grad_outputs is None else _as_many(grad_outputs)
    vmapped = any(isinstance(g, torch.Tensor) and _is_vmapped(g) for g in starts)

    def one(given: Sequence[torch.Tensor | None], retain: bool) -> Sequence[torch.Tensor | None]:
        started = make_grads(outs, given, create_graph)
        results = walk(
            _roots(outs), started, retain, only=_input_edges(ins), create_graph=create_graph
        )
        for i, found in enumerate(() if allow_unused or materialize_grads else results):
            if found is None:
                raise RuntimeError(
                    f"The differentiated Tensor at index {i} appears to not have been used in the"
                    " graph. Set allow_unused=True if this is the desired behavior."
                )
        return results

    if is_grads_batched:
        for i, (out, given) in enumerate(zip(outs, starts, strict=False)):
            if isinstance(given, torch.Tensor) and given.shape[1:] != out.shape:
                # The shape of grad_output lacks two dimensions in PyTorch's message too.
                raise RuntimeError(_BATCHED.format(i, given.shape[2:], i, out.shape))
        results = _one_by_one(one, starts, bool(retain_graph))
    elif vmapped:
        results = _under_vmap(one, starts, bool(retain_graph))
    else:
        results = one(starts, bool(retain_graph))
    if materialize_grads:
        results = [
            _zeros_for(t, create_graph) if g is None else g
            for g, t in zip(results, ins, strict=True)
        ]
    if type(inputs) is dict:
        return dict(zip(inputs, results, strict=True))
    return tuple(results)


def _zeros_for(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """The gradient of an unused input; a leaf, if the others can be differentiated."""
    with DisableTorchFunctionSubclass():
        made: Any = torch.zeros_like(tensor.detach())
    if requires_grad:
        made.__class__ = _tensor.Tensor
        made._requires_grad = True
    return made  # type: ignore[no-any-return]


_BATCHED = (
    "If `is_grads_batched=True`, we interpret the first dimension of each grad_output as the batch"
    " dimension. The sizes of the remaining dimensions are expected to match the shape of"
    " corresponding output, but a mismatch was detected: grad_output[{}] has a shape of {} and"
    " output[{}] has a shape of {}. If you only want some tensors in `grad_output` to be considered"
    " batched, consider using vmap."
)
_Grads: TypeAlias = Sequence[torch.Tensor | None]
_One: TypeAlias = Callable[[_Grads, bool], _Grads]
_is_vmapped = _torch.is_legacy_batchedtensor


def _one_by_one(one: _One, batches: _Grads, retain_graph: bool) -> _Grads:
    """The gradients for each item of a batch of initial gradients, stacked."""
    sizes = {len(g) for g in batches if g is not None}
    if len(sizes) != 1:
        raise ValueError(
            "vmap: Expected all tensors to have the same size in the mapped dimension, got sizes"
            f" {[len(g) for g in batches if g is not None]} for the mapped dimension"
        )
    (size,) = sizes
    rows = [
        one([None if g is None else g[i] for g in batches], retain_graph or i < size - 1)
        for i in range(size)
    ]
    return [None if of[0] is None else torch.stack(of) for of in zip(*rows, strict=True)]


def _under_vmap(one: _One, starts: _Grads, retain_graph: bool) -> _Grads:
    """The same if the batch is hidden by the vmap of `torch.autograd.gradcheck`."""
    level = _torch.vmapmode_increment_nesting() - 1
    _torch.vmapmode_decrement_nesting()
    if level != 1:
        raise NotImplementedError("nnmirror: a gradient inside of nested vmaps is not mirrored")
    size = next(len(_unwrapped(g, 1)) for g in starts if g is not None and _is_vmapped(g))
    batches = [None if g is None else _unwrapped(g, size) for g in starts]
    results = _one_by_one(one, batches, retain_graph)
    return [None if g is None else _torch.add_batch_dim(g, 0, 1) for g in results]


def _unwrapped(grad: torch.Tensor, size: int) -> torch.Tensor:
    return _torch.remove_batch_dim(grad, 1, size, 0)
