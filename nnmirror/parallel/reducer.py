"""Reducer: gradients are averaged over processes while the backward is still running.

The parameters are put into buckets. When the last gradient of a bucket has been computed, the
bucket's all-reduce is started while the backward of the next layers runs. At the end the reducer
waits for all, and the averages become the parameters' `.grad`.

The rounding of a sum over more than two processes depends on the order of summation, so the bits
depend on the position of each gradient in its bucket. Everything here follows the order of
PyTorch's reducer (Li et al., "PyTorch Distributed", 2020): one bucket for all in the first
iteration (by size if unused parameters are looked for), then buckets by size in the order in which
the gradients arrived on rank 0; 1/n multiplied in while a gradient is copied into its bucket.
"""

import warnings
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .. import _state, _torch, running, tape
from .._teardown import not_at_exit
from .._torch import DisableTorchFunctionSubclass
from ..accumulate import accumulate, is_dense, put_grad
from ..tensor import Tensor


class Bucket:
    """Gradients of some parameters, side by side in one flat tensor."""

    def __init__(self, indices: list[int], params: Sequence[torch.Tensor]) -> None:
        self.indices = indices
        self.pending = len(indices)
        self.work: dist.Work | None = None  # the running all-reduce
        self.flat = torch.empty(
            sum(params[i].numel() for i in indices),
            dtype=params[indices[0]].dtype,
            device=params[indices[0]].device,
        )
        self.views: list[torch.Tensor] = []  # each with its parameter's layout
        start = 0
        for param in (params[i] for i in indices):
            part = self.flat[start : start + param.numel()]
            dense = is_dense(param)
            view = part.as_strided(param.shape, param.stride()) if dense else part.view(param.shape)
            self.views.append(view)
            start += param.numel()


@not_at_exit
class Reducer:
    """Averages the gradients of `params`, which are in the order of registration."""

    def __init__(
        self,
        params: list[torch.Tensor],
        names: list[str],
        process_group: "dist.ProcessGroup",
        first_limits: list[int],
        later_limits: list[int],
        find_unused: bool,
        as_views: bool,
        static_graph: bool,
    ) -> None:
        self.params, self.names = params, names
        self.group = process_group
        self.world = process_group.size()
        self.later_limits = later_limits
        self.static_graph = static_graph
        self.find_unused = find_unused and not static_graph  # otherwise, found in the first walk
        self.as_views = as_views
        self.expecting = False  # the next walk reduces
        self.unfinished = False  # some gradients have arrived, but not all
        self.rebuilt = self.find_unused  # the buckets are final
        self.unused: list[int] = []  # on this rank, as far as known
        self.unused_marked = False
        self.ready: set[int] = set()
        self.arrived: list[int] = []  # in the order of the first walk
        self.used = torch.zeros(len(self.params), dtype=torch.int32)  # since the last reduction
        self.used_work: dist.Work | None = None
        self.next = 0  # the bucket to reduce next: all ranks must use the same order
        self.in_walk = False
        self.walks = 0
        # How often a walk reaches each parameter, counted in the first one of a static graph.
        self.times = [0] * len(self.params)
        self.left = list(self.times)
        buckets, _ = _torch.bucket_assignment(self.params, first_limits)
        self._make_buckets(list(reversed(buckets)))
        this = weakref.ref(self)  # the hooks hold it weakly
        self.handles = [_on_arrival(this, i, param) for i, param in enumerate(self.params)]

    def __del__(self) -> None:
        for handle in getattr(self, "handles", ()):
            handle.remove()

    # -- buckets -----------------------------------------------------------------------------

    def _make_buckets(self, assignment: list[list[int]]) -> None:
        with DisableTorchFunctionSubclass():
            self.buckets = [Bucket(indices, self.params) for indices in assignment]
            self.place = {
                index: (bucket, view)
                for bucket in self.buckets
                for index, view in zip(bucket.indices, bucket.views, strict=True)
            }
            for index, (_, view) in self.place.items() if self.as_views else ():
                grad = self._grad(index)
                if grad is not None:
                    view.copy_(grad)
                    self._set_grad(index, view)

    def rebuild_buckets(self) -> None:
        """Before a forward: raise if the last reduction is incomplete; the first time, order the
        buckets."""
        if self.unfinished:
            raise RuntimeError(self._unfinished_message())
        if self.rebuilt or not self.arrived:
            return
        params = [self.params[i] for i in self.arrived]
        buckets, _ = _torch.bucket_assignment(params, self.later_limits, [], self.arrived)
        self.rebuilt, self.arrived = True, []
        self._make_buckets(self._from_rank_0(buckets))

    def _from_rank_0(self, buckets: list[list[int]]) -> list[list[int]]:
        """Use rank 0's buckets: on other ranks the gradients may have arrived in another order."""
        device, n = self.params[0].device, len(self.params)
        sent = torch.zeros(2 * n + 1, dtype=torch.int32)
        sizes = [len(b) for b in buckets]
        sent[:n] = torch.tensor([i for b in buckets for i in b])
        sent[n] = len(sizes)
        sent[n + 1 : n + 1 + len(sizes)] = torch.tensor(sizes)
        sent = sent.to(device)
        dist.broadcast(sent, group=self.group, group_src=0)
        values = sent.tolist()
        count = values[n]
        indices = iter(values[:n])
        return [[next(indices) for _ in range(size)] for size in values[n + 1 : n + 1 + count]]

    # -- one iteration -------------------------------------------------------------------------

    def prepare_for_backward(self, outputs: list[torch.Tensor]) -> None:
        """After a forward: the next walk reduces. `outputs` show which parameters it will reach."""
        self.expecting = True
        self.next = 0
        for bucket in self.buckets:
            bucket.pending = len(bucket.indices)
        self.left = list(self.times)
        self.unused_marked = False
        self.ready.clear()
        if self.find_unused:
            with DisableTorchFunctionSubclass():
                edges = [tape.edge_of(t) for t in outputs if isinstance(t, Tensor) and t.grad_fn]
            reached = running.dependencies(edges).counts
            self.unused = [i for i, p in enumerate(self.params) if id(p) not in reached]

    def arrive(self, index: int) -> None:
        """Called when a walk has reached a parameter and accumulated its `.grad`."""
        if not self.in_walk:
            self.in_walk = True
            self.walks += 1
        learning = self.static_graph and self.walks == 1
        if (self.find_unused or learning) and self._grad(index) is not None:
            self.used[index] = 1
        if learning:
            self.times[index] += 1
            return
        if not self.expecting:
            return
        if not self.unused_marked:
            self.unused_marked = True
            for i in self.unused:
                self._mark_ready(i)
        if self.static_graph:
            self.left[index] -= 1
            if self.left[index]:
                return
        if not self.rebuilt:
            self.arrived.append(index)
        self._mark_ready(index)

    def _mark_ready(self, index: int) -> None:
        if index in self.ready:
            raise RuntimeError(_TWICE.format(index, self.names[index]))
        self.ready.add(index)
        self.unfinished = True
        self._copy_in(index)
        bucket, _ = self.place[index]
        bucket.pending -= 1
        if bucket.pending:
            return
        before = self.next
        while self.next < len(self.buckets) and self.buckets[self.next].pending == 0:
            self._start(self.buckets[self.next])
            self.next += 1
        if before < self.next == len(self.buckets):
            if self.find_unused:
                self._start_used()
            running.queue_callback(self._finish)

    def _copy_in(self, index: int) -> None:
        """This process's share of the average: its gradient, divided by their number."""
        grad, view = self._grad(index), self.place[index][1]
        if grad is None:
            view.zero_()
            return
        if grad.dtype is not view.dtype or grad.device != view.device:
            raise RuntimeError(
                f"nnmirror: the gradient of {self.names[index]} is {grad.dtype} on {grad.device},"
                f" but was {view.dtype} on {view.device} when DistributedDataParallel was made;"
                " convert and move the module before"
            )
        if grad.stride() != view.stride() and not _state.warned_of_strides:
            _state.warned_of_strides = True
            warnings.warn(_STRIDES.format(*map(_layout, (grad, view))), stacklevel=2)
        if _same_memory(grad, view):
            view.div_(self.world)
            return
        torch.mul(grad, 1 / self.world, out=view)
        if self.as_views:
            self._set_grad(index, view)

    def _start(self, bucket: Bucket) -> None:
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)

    def _start_used(self) -> None:
        self.used_anywhere = self.used.to(self.params[0].device, copy=True)
        self.used_work = dist.all_reduce(self.used_anywhere, group=self.group, async_op=True)

    def reduce_all(self) -> None:
        """The first walk of a static graph has ended: reduce all, now that the uses are known."""
        self._start_used()
        self.unused = [i for i, times in enumerate(self.times) if times == 0]
        self.unfinished = True
        for index in range(len(self.params)):
            self._copy_in(index)
        for bucket in self.buckets:
            self._start(bucket)
        self._finish()

    def _finish(self) -> None:
        """Wait for the all-reduces, and set the averages."""
        self.expecting = self.unfinished = self.in_walk = False
        if self.static_graph and self.walks > 1 and not self.rebuilt:
            self.arrived += self.unused
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None
        used = self.used
        if self.used_work is not None:
            self.used_work.wait()
            self.used_work = None
            used = self.used_anywhere.cpu()
            if self.find_unused:
                self.used.zero_()
            else:
                self.used = used
        # A parameter that no rank uses keeps its gradient, or None.
        keeps = (used == 0).tolist() if self.find_unused or self.static_graph else None
        for index, (_, view) in self.place.items():
            if keeps is None or not keeps[index]:
                self._hand_out(index, view)

    def _hand_out(self, index: int, view: torch.Tensor) -> None:
        grad = self._grad(index)
        if self.as_views:
            if grad is None:
                self._set_grad(index, view)
            elif not _same_memory(grad, view):
                raise RuntimeError(_NOT_A_VIEW)
        elif grad is None:
            accumulate(self.params[index], view, may_keep=False)
        else:
            grad.copy_(view)

    # -- help ----------------------------------------------------------------------------------

    def _grad(self, index: int) -> torch.Tensor | None:
        with DisableTorchFunctionSubclass():
            return self.params[index].grad

    def _set_grad(self, index: int, grad: torch.Tensor) -> None:
        with DisableTorchFunctionSubclass():
            put_grad(self.params[index], grad)

    def _unfinished_message(self) -> str:
        left = [i for i in range(len(self.params)) if i not in self.ready]
        rank = self.group.rank()
        if self.static_graph:
            message = _UNFINISHED_STATIC
        else:
            message = _UNFINISHED.format(_MAYBE_OUTPUTS if self.find_unused else _MAYBE_UNUSED)
        if dist.get_debug_level() != dist.DebugLevel.OFF:
            names = ", ".join(self.names[i] for i in left)
            message += f"\nParameters which did not receive grad for rank {rank}: {names}"
        message += f"\nParameter indices which did not receive grad for rank {rank}: "
        message += " ".join(map(str, left))
        return message + (_DEBUG_HINT if dist.get_debug_level() == dist.DebugLevel.OFF else "")


def _on_arrival(
    this: "weakref.ref[Reducer]", index: int, param: torch.Tensor
) -> torch.utils.hooks.RemovableHandle:
    def arrive(*_: object) -> None:
        reducer = this()
        if reducer is not None:
            reducer.arrive(index)

    if isinstance(param, Tensor):
        return param._register_reached_hook(arrive)
    return param.register_post_accumulate_grad_hook(arrive)  # a Parameter of torch's own


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _layout(t: torch.Tensor) -> str:
    return f"sizes() = {list(t.shape)}, strides() = {list(t.stride())}"


_STRIDES = (
    "Grad strides do not match bucket view strides. This may indicate grad was not created"
    " according to the gradient layout contract, or that the param's strides changed since DDP"
    " was constructed.  This is not an error, but may impair performance.\ngrad.{}\nbucket_view.{}"
)
_UNFINISHED = (
    "Expected to have finished reduction in the prior iteration before starting a new one. This"
    " error indicates that your module has parameters that were not used in producing loss. {}"
    "making sure all `forward` function outputs participate in calculating loss. \nIf you already"
    " have done the above, then the distributed data parallel module wasn't able to locate the"
    " output tensors in the return value of your module's `forward` function. Please include the"
    " loss function and the structure of the return value of `forward` of your module when"
    " reporting this issue (e.g. list, dict, iterable)."
)
_MAYBE_UNUSED = (
    "You can enable unused parameter detection by passing the keyword argument"
    " `find_unused_parameters=True` to `torch.nn.parallel.DistributedDataParallel`, and by \n"
)
_MAYBE_OUTPUTS = (
    "Since `find_unused_parameters=True` is enabled, this likely  means that not all `forward`"
    " outputs participate in computing loss. You can fix this by "
)
_UNFINISHED_STATIC = (
    "Expected to have finished reduction in the prior iteration before starting a new one. This"
    " error indicates that your training graph has changed in this iteration, e.g., one parameter"
    " is used in first iteration, but then got unused in the second iteration. this is not"
    " compatible with static_graph set to True."
)
_DEBUG_HINT = (
    "\n In addition, you can set the environment variable TORCH_DISTRIBUTED_DEBUG to either INFO or"
    " DETAIL to print out information about which particular parameters did not receive gradient on"
    " this rank as part of this error"
)
_TWICE = (
    "Expected to mark a variable ready only once. This error is caused by one of the following"
    " reasons: 1) Use of a module parameter outside the `forward` function. Please make sure model"
    " parameters are not shared across multiple concurrent forward-backward passes. or try to use"
    " _set_static_graph() as a workaround if this module graph does not change during training"
    " loop.2) Reused parameters in multiple reentrant backward passes. For example, if you use"
    " multiple `checkpoint` functions to wrap the same part of your model, it would result in the"
    " same set of parameters been used by different reentrant backward passes multiple times, and"
    " hence marking a variable ready multiple times. DDP does not support such use cases in"
    " default. You can try to use _set_static_graph() as a workaround if your module graph does not"
    " change over iterations.\nParameter at index {} with name {} has been marked as ready twice."
    " This means that multiple autograd engine  hooks have fired for this particular parameter"
    " during this iteration."
)
_NOT_A_VIEW = (
    "Detected at least one parameter gradient is not the expected DDP bucket view with"
    " gradient_as_bucket_view=True. This may happen (for example) if multiple allreduce hooks were"
    " registered onto the same parameter. If you hit this error, please file an issue with a"
    " minimal repro."
)
