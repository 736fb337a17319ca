"""Transforms of functions, as in `torch.func`, on the mirror's own tape.

    def loss(params, x, t):
        return F.mse_loss(nnmirror.func.functional_call(model, params, x), t)

    params = dict(model.named_parameters())
    per_sample = nnmirror.func.vmap(nnmirror.func.grad(loss), in_dims=(None, 0, 0))(params, x, t)

Names, arguments and errors are those of `torch.func`, whose own transforms do not see the tape; the
results are the same. What is computed differently:

- `grad`, `vjp`, `jacrev` run a backward over what the function recorded. The backward is recorded
  too if the result depends on a tensor outside that requires grad. Transforms can be nested: each
  passes aliases of the arguments to the function, and computes the gradients of these.
- `jvp` runs two backwards: with g(u) = J^T u, linear in u, it is (dg/du)^T v. `jacfwd` is `jacrev`.
- `vmap` calls the function once for each item of the batch and stacks the results: a loop where
  PyTorch runs one operation on the whole batch. Side effects of the function happen once per item.
  An argument that all items share cannot be changed in place.

As in PyTorch, a result requires grad if it depends on a tensor outside that does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar, overload

import torch

from . import _torch, tape, tensor
from ._missing import missing
from ._torch import DisableTorchFunctionSubclass, TreeSpec, tree_flatten, tree_unflatten
from .grad_mode import is_grad_enabled, users_code
from .gradients import grad as _grad
from .node import Node
from .rules.shape import view_as

if TYPE_CHECKING:
    from .modules.container import ModuleList
    from .modules.module import Module
__all__ = [
    "functional_call",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "stack_module_state",
    "vjp",
    "vmap",
]

T = torch.Tensor
P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
Places: TypeAlias = int | tuple[int, ...]


class _Inside:
    """The aliases of the arguments to differentiate that a transform passes to a function."""

    def __init__(self) -> None:
        self.records = is_grad_enabled()  # outside
        self.is_over = False

    def call(
        self,
        func: Callable[..., Any],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        has_aux: bool,
        name: str,
    ) -> tuple[Any, Any]:
        """The output of `func`, and its auxiliary output."""
        try:
            output = func(*args, **kwargs)
        finally:
            self.is_over = True
        if not has_aux:
            return output, None
        if not (isinstance(output, tuple) and len(output) == 2):
            raise RuntimeError(
                f"{name}: output of function f should be a tuple: (output, aux) if has_aux is True"
            )
        return output

    def differentiable(self, value: object) -> T:
        if not isinstance(value, T):
            raise ValueError(f"Thing passed to transform API must be Tensor, got {type(value)}")
        if value.requires_grad and self.records:
            with users_code(True):
                return view_as(value, value)
        with DisableTorchFunctionSubclass():
            alias: Any = value.detach()
        if not (alias.is_floating_point() or alias.is_complex()):
            raise RuntimeError("only Tensors of floating point dtype can require gradients")
        alias.__class__ = tensor.Tensor
        alias._requires_grad, alias._given_by = True, self
        return alias

    def leads_out(self, results: Iterable[T]) -> bool:
        """Does one of `results` depend on an outside tensor that requires grad?"""
        if not self.records:
            return False
        stack = [tape.edge_of(t)[0] for t in results if t.requires_grad]
        seen: set[int] = set()
        while stack:
            target = stack.pop()
            if id(target) in seen:
                continue
            seen.add(id(target))
            if isinstance(target, Node):
                stack += [edge[0] for edge in target.edges if edge is not None]
                continue
            # A tensor of an enclosing transform counts as outside.
            given_by = getattr(target, "_given_by", None)
            if given_by is None or not (given_by is self or given_by.is_over):
                return True
        return False

    def brought_out(self, results: object) -> Any:
        """Results as seen from outside: detached, unless they depend on outside tensors."""
        flat, spec = tree_flatten(results)
        for i, result in enumerate(flat):
            if not isinstance(result, T):
                raise RuntimeError(f"Expected tensors, got unsupported type {type(result)}")
            if result.requires_grad and not self.leads_out([result]):
                flat[i] = result.detach()
        return tree_unflatten(flat, spec)


def _gradients(
    outputs: Sequence[T], inputs: Sequence[T], starts: Sequence[T] | None, create_graph: bool
) -> list[T]:
    """The gradients of `outputs` for `inputs`; zeros for an input that nothing depends on."""
    asked = [i for i, out in enumerate(outputs) if out.requires_grad]
    found: Sequence[T | None] = [None] * len(inputs)
    if asked:
        found = _grad(
            [outputs[i] for i in asked],
            inputs,
            None if starts is None else [starts[i] for i in asked],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    return [
        torch.zeros_like(t.detach()) if g is None else g for g, t in zip(found, inputs, strict=True)
    ]


# -- gradients -----------------------------------------------------------------------------


def grad(func: Callable[P, Any], argnums: Places = 0, has_aux: bool = False) -> Callable[P, Any]:
    """A function that computes the gradient of `func`, as `torch.func.grad`.

    dy/dx for x the argument (or arguments) `argnums`, a tensor or dicts, lists, tuples of them,
    and y = func(...), a tensor without dimensions. With `has_aux`, func returns (y, aux), and the
    gradient comes with aux.
    """

    @functools.wraps(func, updated=())
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        found, value = _grad_and_value(func, argnums, has_aux, args, kwargs)
        return (found, value[1]) if has_aux else found

    return call


def grad_and_value(
    func: Callable[P, Any], argnums: Places = 0, has_aux: bool = False
) -> Callable[P, tuple[Any, Any]]:
    """A function that computes the gradient of `func` and its value; see `grad`."""

    @functools.wraps(func, updated=())
    def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Any, Any]:
        return _grad_and_value(func, argnums, has_aux, args, kwargs)

    return call


def _grad_and_value(
    func: Callable[..., Any],
    argnums: Places,
    has_aux: bool,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[Any, Any]:
    inside = _Inside()
    args, inputs, spec = _taken_in(inside, args, argnums)
    with users_code(True):
        output, aux = inside.call(func, args, kwargs, has_aux, "grad_and_value(f)(*args)")
        if not isinstance(output, T):
            raise RuntimeError(
                "grad_and_value(f)(*args): Expected f(*args) to return a Tensor, got"
                f" {type(output)}"
            )
        if output.dim() != 0:
            raise RuntimeError(
                "grad_and_value(f)(*args): Expected f(*args) to return a scalar Tensor, got tensor"
                f" with {output.dim()} dims. Maybe you wanted to use the vjp or jacrev APIs"
                " instead?"
            )
        found = _gradients([output], inputs, None, inside.leads_out([output]))
    grads = tree_unflatten(inside.brought_out(found), spec)
    value = inside.brought_out(output)
    return grads, (value, inside.brought_out(aux)) if has_aux else value


def _taken_in(
    inside: _Inside, args: tuple[object, ...], argnums: Places | None
) -> tuple[tuple[object, ...], list[T], TreeSpec]:
    """The arguments with aliases at `argnums`; the aliases, flat, and their structure."""
    which = range(len(args)) if argnums is None else _places(argnums, len(args))
    as_one = isinstance(argnums, int)
    given = args[which[0]] if as_one else tuple([args[i] for i in which])
    flat, spec = tree_flatten(given)
    aliases = [inside.differentiable(value) for value in flat]
    made = tree_unflatten(aliases, spec)
    changed = list(args)
    for i, value in zip(which, (made,) if as_one else made, strict=True):
        changed[i] = value
    return tuple(changed), aliases, spec


def _places(argnums: object, count: int) -> Sequence[int]:
    if not isinstance(argnums, int | tuple):
        raise RuntimeError(f"argnums must be int or Tuple[int, ...], got: {type(argnums)}")
    found = []
    for place in (argnums,) if isinstance(argnums, int) else argnums:
        if not isinstance(place, int):
            raise RuntimeError(f"argnum must be int, got: {type(place)}")
        if not -count <= place < count:
            raise RuntimeError(f"Got argnum={place}, but only {count} positional inputs")
        found.append(place % count)
    if not found:
        raise RuntimeError("argnums must be non-empty")
    if len(set(found)) != len(found):
        raise RuntimeError(f"argnums elements must be unique, got {tuple(found)}")
    return found


def _only_tensors(flat: Sequence[object], name: str) -> None:
    if not flat or (len(flat) == 1 and flat[0] is None):
        raise RuntimeError(
            f"{name}: Expected f to be a function that has non-empty output (got output = {flat})"
        )
    for value in flat:
        if not isinstance(value, T):
            raise RuntimeError(
                f"{name}: expected f(*primals) to return only tensors, got unsupported type"
                f" {type(value)}"
            )


# -- products with the Jacobian ------------------------------------------------------------


@overload
def vjp(
    func: Callable[..., R], *primals: object, has_aux: Literal[False] = False
) -> tuple[R, Callable[..., Any]]: ...


@overload
def vjp(
    func: Callable[..., tuple[R, A]], *primals: object, has_aux: Literal[True]
) -> tuple[R, Callable[..., Any], A]: ...


def vjp(func: Callable[..., Any], *primals: object, has_aux: bool = False) -> Any:
    """`func(*primals)` and a function that computes J^T u, as `torch.func.vjp`.

    J is the Jacobian of func for all primals, u has the structure of func's output. With `has_aux`,
    func returns (output, aux), and aux is the third result.
    """
    output, pull_back, aux = _vjp(func, primals, None, has_aux)
    return (output, pull_back, aux) if has_aux else (output, pull_back)


def _vjp(
    func: Callable[..., Any], primals: tuple[object, ...], argnums: Places | None, has_aux: bool
) -> tuple[Any, Callable[..., Any], Any]:
    name = "vjp(f, *primals)"
    inside = _Inside()
    args, inputs, spec = _taken_in(inside, primals, argnums)
    with users_code(True):
        outputs, aux = inside.call(func, args, {}, has_aux, name)
    flat, out_spec = tree_flatten(outputs)
    _only_tensors(flat, name)
    for output in flat:
        if not (output.is_floating_point() or output.is_complex()):
            raise RuntimeError(
                "vjp(f, ...): All outputs of f must be floating-point or complex Tensors, got"
                f" Tensor with dtype {output.dtype}"
            )
    leads_out = inside.leads_out(flat)

    def pull_back(
        cotangents: object, retain_graph: bool = True, create_graph: bool | None = None
    ) -> Any:
        starts, given = tree_flatten(cotangents)
        if given != out_spec:
            raise RuntimeError(
                "Expected pytree structure of cotangents to be the same as pytree structure of"
                f" outputs to the function. cotangents: {_printed(given)}, primal output:"
                f" {_printed(out_spec)}"
            )
        recorded = is_grad_enabled() if create_graph is None else create_graph
        recorded = recorded and (leads_out or any(t.requires_grad for t in starts))
        found = _gradients(flat, inputs, starts, recorded)
        return tree_unflatten(inside.brought_out(found), spec)

    return inside.brought_out(outputs), pull_back, inside.brought_out(aux) if has_aux else None


def _printed(spec: TreeSpec) -> str:
    return repr(tree_unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")


@overload
def jvp(
    func: Callable[..., R],
    primals: tuple[object, ...],
    tangents: tuple[object, ...],
    *,
    strict: bool = False,
    has_aux: Literal[False] = False,
) -> tuple[R, R]: ...


@overload
def jvp(
    func: Callable[..., tuple[R, A]],
    primals: tuple[object, ...],
    tangents: tuple[object, ...],
    *,
    strict: bool = False,
    has_aux: Literal[True],
) -> tuple[R, R, A]: ...


def jvp(
    func: Callable[..., Any],
    primals: object,
    tangents: object,
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """`func(*primals)` and J v, as `torch.func.jvp`; v are the `tangents`, one for each primal.

    J^T u is linear in u, and J v is its derivative for u along v: two backwards, where PyTorch uses
    forward mode. The last bits may differ.
    """
    name = "jvp(f, primals, tangents)"
    if not isinstance(primals, tuple):
        raise RuntimeError(
            f"{name}: Expected primals to be a tuple. E.g. it should be valid to call f(*primals)."
        )
    given, primals_spec = tree_flatten(primals)
    along, tangents_spec = tree_flatten(tangents)
    if primals_spec != tangents_spec:
        raise RuntimeError(
            f"{name}: Expected primals and tangents to have the same python structure. For example,"
            " if primals is a tuple of 3 tensors, tangents also must be. Got primals with structure"
            f" {primals_spec} and tangents with structure {tangents_spec}"
        )
    for values, kind in ((given, "primals"), (along, "tangents")):
        if not values:
            raise RuntimeError(f"{name}: Expected {kind} to contain at least one Tensor.")
        for value in values:
            if not isinstance(value, T):
                raise RuntimeError(
                    f"{name}: Expected {kind} to only contain Tensors, got {type(value)}"
                )
    for primal, tangent in zip(given, along, strict=True):
        if primal.shape != tangent.shape:
            raise RuntimeError(
                f"Expected tangent to have the same shape as its primal: {list(primal.shape)}, got"
                f" {list(tangent.shape)}"
            )
    inside = _Inside()
    args, inputs, _ = _taken_in(inside, primals, None)
    with users_code(True):
        outputs, aux = inside.call(func, args, {}, has_aux, name)
        flat, spec = tree_flatten(outputs)
        _only_tensors(flat, name)
        if strict and not all(out.requires_grad for out in flat):
            raise RuntimeError(
                "jvp(f, primals, tangents, strict=True): The output of f is independent of the"
                " inputs. This is not allowed with strict=True."
            )
        made = [torch.zeros_like(out.detach()) for out in flat]
        asked = [i for i, out in enumerate(flat) if out.requires_grad]
        starts = [inside.differentiable(made[i]) for i in asked]
        pulled = _gradients([flat[i] for i in asked], inputs, starts, True)
        recorded = inside.leads_out([*pulled, *along])
        for i, found in zip(asked, _gradients(pulled, starts, along, recorded), strict=True):
            made[i] = found
    results = inside.brought_out(outputs), tree_unflatten(inside.brought_out(made), spec)
    return (*results, inside.brought_out(aux)) if has_aux else results


# -- Jacobians -----------------------------------------------------------------------------


def jacrev(
    func: Callable[..., Any],
    argnums: Places = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    """A function that computes the Jacobian of `func`, as `torch.func.jacrev`.

    dy_i/dx_j, of shape (*y.shape, *x.shape), for each tensor y that func returns and each x among
    the arguments `argnums`. One backward for each number in y; `chunk_size` changes nothing.
    """
    if not (chunk_size is None or chunk_size > 0):
        raise ValueError("jacrev: `chunk_size` should be greater than 0.")

    @functools.wraps(func, updated=())
    def call(*args: Any) -> Any:
        _refuse_complex("jacrev", args, "inputs")
        output, pull_back, aux = _vjp(func, args, argnums, has_aux)
        flat, out_spec = tree_flatten(output)
        _refuse_complex("jacrev", flat, "outputs")
        made = []  # of each output, for each argument
        for i, out in enumerate(flat):
            rows = []
            for j in range(out.numel()):
                basis = [torch.zeros_like(t.detach()) for t in flat]
                basis[i].view(-1)[j] = 1
                row, spec = tree_flatten(pull_back(tree_unflatten(basis, out_spec)))
                rows.append(row)
            if not rows:
                which = _places(argnums, len(args))
                given = args[which[0]] if isinstance(argnums, int) else [args[k] for k in which]
                row, spec = tree_flatten(given if isinstance(argnums, int) else tuple(given))
                stacked = [t.detach().new_zeros((*out.shape, *t.shape)) for t in row]
            else:
                stacked = [
                    torch.stack(of).reshape(*out.shape, *of[0].shape)
                    for of in zip(*rows, strict=True)
                ]
            made.append(tree_unflatten(stacked, spec))
        found = tree_unflatten(made, out_spec)
        return (found, aux) if has_aux else found

    return call


def jacfwd(
    func: Callable[..., Any],
    argnums: Places = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The Jacobian like `torch.func.jacfwd`; here it is computed by `jacrev`, row by row. `func` is
    called once, so `randomness` changes nothing.
    """
    _check_randomness(randomness)
    return jacrev(func, argnums, has_aux=has_aux)


def hessian(func: Callable[..., Any], argnums: Places = 0) -> Callable[..., Any]:
    """A function that computes the second derivatives of `func`, as `torch.func.hessian`: the
    Jacobian of its Jacobian.
    """
    return jacrev(jacrev(func, argnums), argnums)


def _refuse_complex(name: str, values: object, kind: str) -> None:
    for i, value in enumerate(tree_flatten(values)[0]):
        if isinstance(value, T) and value.is_complex():
            raise RuntimeError(
                f"{name}: Expected all {kind} to be real but received complex tensor at flattened"
                f" input idx: {i}"
            )


# -- vmap ----------------------------------------------------------------------------------


def vmap(
    func: Callable[P, R],
    in_dims: int | tuple[Any, ...] = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[P, R]:
    """A function that calls `func` for each item of a batch, as `torch.vmap`.

    `in_dims` is the batch dimension of each argument, None for an argument that all items share;
    `out_dims` is the batch dimension of the results. With `randomness="same"` each item gets the
    same random numbers, with "different" the next ones (PyTorch draws those of all items together,
    which gives other numbers); "error" raises. There is one call per item, so `chunk_size` changes
    nothing.
    """
    _check_randomness(randomness)
    if not (chunk_size is None or chunk_size > 0):
        raise ValueError(f"vmap: chunk_size should be None or greater than 0. (got {chunk_size})")
    name = getattr(func, "__name__", None) or repr(func)

    @functools.wraps(func, updated=())
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not isinstance(out_dims, int):
            for dim in tree_flatten(out_dims)[0]:
                if not (isinstance(dim, int) or dim is None):
                    raise ValueError(
                        f"vmap({name}, ..., out_dims={out_dims}): `out_dims` must be an int, None"
                        " or a python collection of ints representing where in the outputs the"
                        " vmapped dimension should appear."
                    )
        size, dims, flat, spec = _batched(name, in_dims, args)
        if size == 0:
            raise NotImplementedError(
                "nnmirror: func.vmap over an empty batch is not mirrored: it calls the function"
                " once per item, so the shapes of the results are unknown without one. Call the"
                " module with the empty batch itself"
            )
        items = [
            [value] * size if dim is None else _unbound(value, dim)
            for value, dim in zip(flat, dims, strict=True)
        ]
        shared = [t for t, dim in zip(flat, dims, strict=True) if dim is None]
        shared = [t for t in shared if isinstance(t, T)]
        versions = [t._version for t in shared]
        before = _random_states()
        results = []
        for i, given in enumerate(zip(*items, strict=True)):
            if i and randomness == "same":
                _set_random_states(before)
            with _mapped([t for t, dim in zip(given, dims, strict=True) if dim is not None]):
                results.append(func(*tree_unflatten(list(given), spec), **kwargs))
            if [t._version for t in shared] != versions:
                raise NotImplementedError(
                    "nnmirror: func.vmap calls the function once for each item, and the function"
                    " changed an argument that all of them share in place: that would happen once"
                    " for each. Change a copy of it, or return what it becomes"
                )
            if randomness == "error" and not _same_states(before, _random_states()):
                _set_random_states(before)
                raise RuntimeError(
                    "vmap: called random operation while in randomness error mode. Please either"
                    " use the 'same' or 'different' randomness flags on vmap or perform the"
                    " randomness operation out of vmap"
                )
        return _stacked(name, results, out_dims)

    return call


@contextlib.contextmanager
def _mapped(items: Sequence[object]) -> Iterator[None]:
    before = tape.mapping.items
    tape.mapping.depth, tape.mapping.items = tape.mapping.depth + 1, items
    try:
        yield
    finally:
        tape.mapping.depth, tape.mapping.items = tape.mapping.depth - 1, before


def _unbound(value: T, dim: int) -> Sequence[T]:
    with users_code(is_grad_enabled()):
        if value.requires_grad and is_grad_enabled():
            value = view_as(value, value)  # tensors that torch tracks are recorded here
        return value.unbind(dim)


def _check_randomness(randomness: str) -> None:
    if randomness not in ("error", "different", "same"):
        raise RuntimeError(
            "Only allowed values for randomness are 'error', 'different', or 'same'. Got"
            f" {randomness}"
        )


def _random_states() -> list[T]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_states(states: Sequence[T]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _same_states(before: Sequence[T], after: Sequence[T]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _batched(
    name: str, in_dims: object, args: tuple[object, ...]
) -> tuple[int, list[int | None], list[Any], TreeSpec]:
    """The size of the batch, and of each argument, flat, which dimension is the batch."""
    said = f"vmap({name}, in_dims={in_dims}, ...)(<inputs>): "
    if not isinstance(in_dims, int | tuple):
        raise ValueError(
            f"{said}expected `in_dims` to be int or a (potentially nested) tuple matching the"
            f" structure of inputs, got: {type(in_dims)}."
        )
    if not args:
        raise ValueError(
            f"vmap({name})(<inputs>): got no inputs. Maybe you forgot to add inputs, or you are"
            " trying to vmap over a function with no inputs. The latter is unsupported."
        )
    flat, spec = tree_flatten(args)
    dims = _torch.broadcast_to_and_flatten(in_dims, spec)
    if dims is None:
        raise ValueError(
            f"{said}in_dims is not compatible with the structure of `inputs`. in_dims has structure"
            f" {tree_flatten(in_dims)[1]} but inputs has structure {spec}."
        )
    sizes = []
    for i, (value, dim) in enumerate(zip(flat, dims, strict=True)):
        if dim is None:
            continue
        if not isinstance(dim, int):
            raise ValueError(
                f"{said}Got in_dim={dim} for an input but in_dim must be either an integer"
                " dimension or None."
            )
        if not isinstance(value, T):
            raise ValueError(
                f"{said}Got in_dim={dim} for an input but the input is of type {type(value)}. We"
                " cannot vmap over non-Tensor arguments, please use None as the respective in_dim"
            )
        if not -value.dim() <= dim < value.dim():
            raise ValueError(
                f"{said}Got in_dim={dim} for some input, but that input is a Tensor of"
                f" dimensionality {value.dim()} so expected in_dim to satisfy -{value.dim()} <="
                f" in_dim < {value.dim()}."
            )
        dims[i] = dim % value.dim()
        sizes.append(value.shape[dim])
    if not sizes:
        raise ValueError("vmap: Expected at least one Tensor to vmap over")
    if len(set(sizes)) > 1:
        raise ValueError(
            "vmap: Expected all tensors to have the same size in the mapped dimension, got sizes"
            f" {sizes} for the mapped dimension"
        )
    return sizes[0], dims, flat, spec


def _stacked(name: str, results: Sequence[object], out_dims: Any) -> Any:
    first, spec = tree_flatten(results[0])
    dims: list[int | None] | None
    if isinstance(results[0], T):
        dims = [out_dims] if out_dims is None or isinstance(out_dims, int) else list(out_dims)
        if len(dims) != 1:
            dims = None
    else:
        dims = _torch.broadcast_to_and_flatten(out_dims, spec)
    if dims is None:
        raise ValueError(
            f"vmap({name}, ..., out_dims={out_dims})(<inputs>): out_dims is not compatible with the"
            f" structure of `outputs`. out_dims has structure {tree_flatten(out_dims)[1]} but"
            f" outputs has structure {spec}."
        )
    rows = [tree_flatten(result)[0] for result in results]
    made = []
    for i, (value, dim) in enumerate(zip(first, dims, strict=True)):
        if dim is None:
            if isinstance(value, T) and not all(row[i] is value for row in rows):
                raise ValueError(
                    f"vmap({name}, ...): `{name}` can not return a BatchedTensor when out_dim is"
                    " None"
                )
            made.append(value)
            continue
        if not isinstance(value, T):
            raise ValueError(
                f"vmap({name}, ...): `{name}` must only return Tensors, got type {type(value)}. Did"
                " you mean to set out_dims= to None for output?"
            )
        made.append(torch.stack([row[i] for row in rows], dim))
    return tree_unflatten(made, spec)


# -- modules -------------------------------------------------------------------------------


def functional_call(
    module: Any,
    parameter_and_buffer_dicts: dict[str, torch.Tensor] | Sequence[dict[str, torch.Tensor]],
    args: Any = None,
    kwargs: dict[str, object] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call `module` with other parameters and buffers, by name: `torch.func.functional_call` for
    the mirror's modules.
    """
    return torch.func.functional_call(
        module,
        parameter_and_buffer_dicts,
        args,
        kwargs,
        tie_weights=tie_weights,
        strict=strict,
    )


def stack_module_state(
    models: "Sequence[Module] | ModuleList",
) -> tuple[dict[str, T], dict[str, T]]:
    """The parameters and the buffers of modules of one class, stacked by name, as
    `torch.func.stack_module_state`: new leaves, for `vmap` of `functional_call`.
    """
    if len(models) == 0:
        raise RuntimeError("stack_module_state: Expected at least one model, got 0.")
    if not (all(m.training for m in models) or all(not m.training for m in models)):
        raise RuntimeError(
            "stack_module_state: Expected all models to have the same training/eval mode."
        )
    if not all(type(m) is type(models[0]) for m in models):
        raise RuntimeError("stack_module_state: Expected all models to be of the same class.")
    found: list[dict[str, T]] = []
    for named in ("named_parameters", "named_buffers"):
        states = [dict(getattr(model, named)()) for model in models]
        found.append({name: _leaf_of([s[name] for s in states], name) for name in states[0]})
    return found[0], found[1]


def _leaf_of(tensors: Sequence[T], name: str) -> T:
    asks = [t.requires_grad for t in tensors]
    if any(asks) and not all(asks):
        raise RuntimeError(f"Expected {name} from each model to have the same .requires_grad")
    made = torch.stack([t.detach() for t in tensors])
    if asks[0]:
        made.__class__ = tensor.Tensor
        made.requires_grad_()
    return made  # type: ignore[no-any-return]


__getattr__ = missing(
    __name__, __all__, "compute it with those; or transform nnmirror.to_torch(model) by torch.func"
)
