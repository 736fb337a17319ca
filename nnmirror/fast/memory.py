"""The memory of the intermediate results of a bound walk, which the next one uses again."""

from collections.abc import Callable, Sequence

import torch

from .._types import TorchFunction
from ..grad_mode import outside_inference_mode
from .shorter import LARGE, TorchCall, memory_of, size_of


class Memory:
    """The buffers of a bound walk; a second set is made only if it runs in several threads at the
    same time.

    `take` returns the tensors for `names`, in order. Views of them are made once.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.views: set[str] = set()  # views made with the memory, which need not be computed
        self.writers: set[str] = set()  # computed into `out=`
        # Computed into the memory of the first argument, by this method.
        self.in_place: dict[str, TorchFunction] = {}
        self.makers: list[Callable[[list[torch.Tensor]], torch.Tensor]] = []
        self.places: dict[int, int] = {}  # of the tensors that were recorded
        self.shared: dict[int, int] = {}  # for each place: the first one with the same memory
        self.kinds: dict[int, object] = {}  # of memory of its own: what it may be used for
        self.sizes: dict[int, int] = {}  # and its bytes
        self.until: dict[int, int] = {}  # the last call that reads it
        self.spare: list[list[torch.Tensor]] = []
        # The first buffers are allocated among the results that the walk is compared with. After
        # the next walk they are replaced by new ones, which then lie above the activations and the
        # gradients: the C library returns only memory above all that is in use to the system, and
        # a net whose activations or gradients are returned after each step has up to a thousand
        # page faults in the next.
        self.uses = 0

    def add(self, call: TorchCall, is_last: bool, now: int, until: int) -> None:
        """Put the result of `call` into this memory, if possible.

        If its first argument is used there for the last time, and nothing shares its memory, the
        result may take that memory. Otherwise it takes, if possible, memory that was last read
        shortly before this call, the `now`-th, as that is still in the cache.
        """
        out = call.out
        changing = getattr(torch.Tensor, f"{call.func.__name__}_", None)
        is_view = any(
            isinstance(a, torch.Tensor) and memory_of(a) == memory_of(out) for a in call.args
        )
        writer = None if is_view else _writer(call)
        if writer is None and is_last and changing is not None and not is_view:
            first = call.args[0]
            place = self.places.get(id(first))
            if place is not None and is_alike(first, out):
                self.in_place[call.name] = changing
                self.places[id(out)] = place
                at = self.shared[place]
                self.until[at] = max(self.until[at], until)
            return
        if is_view:
            places = self.places
            parts = [places.get(id(a)) for a in call.args if isinstance(a, torch.Tensor)]
            if None in parts or call.kwargs:
                return
            given = [(a, places.get(id(a))) for a in call.args]
            func = call.func

            def view(made: list[torch.Tensor]) -> torch.Tensor:
                return func(*[a if at is None else made[at] for a, at in given])  # type: ignore[no-any-return]

            # The recorded tensors are released; their places stay.
            given = [(None if isinstance(a, torch.Tensor) else a, at) for a, at in given]
            self.views.add(call.name)
            self.makers.append(view)
        else:
            name = getattr(call.func, "__name__", "")
            if name in _EMPTY and out.is_contiguous():
                self.views.add(call.name)  # nothing to compute
            elif name in _ZEROS and out.is_contiguous():
                self.in_place[call.name] = torch.Tensor.zero_
            elif name in _COPIES and out.is_contiguous():
                self.in_place[call.name] = torch.Tensor.copy_
            elif writer is None:
                return
            else:
                self.writers.add(call.name)
            free = self.reused(out, now)
            place = self.own(out) if free is None else free
            self.until.pop(place, None)  # the latest is the last
            self.until[place] = until
            self.shared[len(self.names)] = place
        self.places[id(out)] = len(self.names)
        self.names.append(call.name)

    def reused(self, out: torch.Tensor, now: int) -> int | None:
        """The place of memory that is free at the `now`-th call, and now `out`'s too; None if there
        is none.

        Small tensors share it with those of the same layout, large ones with all, so that little is
        kept.
        """
        size, layout, kind = size_of(out), _layout(out), _kind(out)
        free = [at for at, end in self.until.items() if end < now and self.kinds[at] == kind]
        if not free:
            return None
        if size < LARGE:
            at = free[-1]
            self.makers.append(lambda made: made[at])
        else:
            at = ([at for at in free if self.sizes[at] >= size] or free)[-1]
            self.sizes[at] = max(self.sizes[at], size)
            self.makers.append(lambda made: _laid_out(made[at].untyped_storage(), *layout))
        return at

    def own(self, out: torch.Tensor) -> int:
        """The place of new memory for `out`."""
        at, device = len(self.names), out.device
        shape, stride, dtype = layout = _layout(out)
        self.kinds[at], self.sizes[at] = _kind(out), size_of(out)
        if size_of(out) < LARGE:
            self.makers.append(
                lambda made: torch.empty_strided(shape, stride, dtype=dtype, device=device)
            )
            return at

        def make(made: list[torch.Tensor]) -> torch.Tensor:
            memory = torch.empty(self.sizes[at], dtype=torch.uint8, device=device)
            return _laid_out(memory.untyped_storage(), *layout)

        self.makers.append(make)
        return at

    def take(self) -> list[torch.Tensor]:
        try:
            return self.spare.pop()
        except IndexError:
            return self.new()

    def keep(self, made: list[torch.Tensor]) -> None:
        """For the next walk."""
        self.uses += 1
        self.spare.append(self.new() if self.uses == 2 else made)

    def new(self) -> list[torch.Tensor]:
        made: list[torch.Tensor] = []
        with outside_inference_mode():
            for make in self.makers:
                made.append(make(made))
        return made


def _layout(out: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """With the strides, which may differ along a dimension of length 1 although both are
    contiguous: a product of matrices then takes another kernel."""
    return out.shape, out.stride(), out.dtype


def _kind(out: torch.Tensor) -> object:
    """Tensors of the same kind can have the same memory one after another."""
    return out.device if size_of(out) >= LARGE else (*_layout(out), out.device)


def _laid_out(
    storage: torch.UntypedStorage, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor in existing memory."""
    made = torch.empty(0, dtype=dtype, device=storage.device)
    return made.set_(storage, 0, shape, stride)  # type: ignore[call-overload, no-any-return]


def is_alike(first: object, out: torch.Tensor) -> bool:
    """Can `out` be computed into the memory of `first`?"""
    return (
        isinstance(first, torch.Tensor) and _layout(first) == _layout(out) and out.is_contiguous()
    )


_EMPTY = {"empty", "empty_like", "new_empty"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_COPIES = {"clone", "contiguous"}


def _writer(call: TorchCall) -> TorchFunction | None:
    """The function that computes the call with `out=`; None if there is none."""
    name = getattr(call.func, "__name__", "")
    writer = getattr(torch, name, None)
    out = call.out
    if writer is None or writer not in (call.func, twin(call.func)) or not out.is_contiguous():
        return None
    try:
        made = writer(*call.args, **call.kwargs, out=torch.empty_like(out))
    except (TypeError, RuntimeError):
        return None
    return writer if made.shape == out.shape and made.dtype is out.dtype else None


def twin(func: TorchFunction) -> TorchFunction | None:
    """The function of the same name as a method of Tensor."""
    name = getattr(func, "__name__", "")
    return getattr(torch, name, None) if getattr(torch.Tensor, name, None) is func else None
