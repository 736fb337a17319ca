"""DistributedDataParallel: one copy of a module in each process, trained as one."""

import contextlib
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .. import _torch, running, tape
from .._torch import DisableTorchFunctionSubclass, tree_flatten, tree_unflatten
from ..grad_mode import is_grad_enabled
from ..modules.module import Module
from ..node import Node
from ..operation import Operation
from .reducer import Reducer

_MIB = 1024 * 1024
_NOT_MIRRORED = (
    "nnmirror: {} of DistributedDataParallel is not mirrored. What to do: {}; or open an issue that"
    " asks for it."
)


class DistributedDataParallel(Module):
    """Train a module in several processes, as `torch.nn.parallel.DistributedDataParallel`.

    Each process has a copy of `module` and its own part of the data. The copies start from
    rank 0's weights; in each backward the gradients are averaged,
    `p.grad = sum over ranks of (p.grad / n)`, by the all-reduces of `torch.distributed`, so that
    all take the same step. Buckets and their order are PyTorch's: see
    `nnmirror/parallel/reducer.py`.

    Needs `torch.distributed.init_process_group` before. Construction, forward and backward
    are done by all processes in the same order. An error in one process ends the others: their next
    collective fails.

    A parameter that gets no gradient is an error at the next forward, unless
    `find_unused_parameters` or `static_graph` is set; then its gradient counts as zero if other
    ranks use it, and its `.grad` stays unchanged if none does.

    Saved: only the buckets, which hold a copy of all gradients (with `gradient_as_bucket_view` they
    are the gradients).
    """

    def __init__(
        self,
        module: Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        delay_all_reduce_named_params: object = None,
        param_to_hook_all_reduce: object = None,
        mixed_precision: object = None,
        device_mesh: object = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: list[int] | None = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
    ) -> None:
        super().__init__()
        for name, given, instead in (
            ("delay_all_reduce_named_params", delay_all_reduce_named_params, "leave it out"),
            ("param_to_hook_all_reduce", param_to_hook_all_reduce, "leave it out"),
            ("mixed_precision", mixed_precision, "convert the module with .to(dtype)"),
            ("device_mesh", device_mesh, "give process_group=device_mesh.get_group()"),
            (
                "skip_all_reduce_unused_params",
                skip_all_reduce_unused_params or None,
                "set find_unused_parameters=True",
            ),
            ("batched_grad_copy", batched_grad_copy or None, "leave it out"),
        ):
            if given is not None:
                raise NotImplementedError(_NOT_MIRRORED.format(name, instead))
        if process_group is None:
            process_group = _torch.default_group()
        self.process_group = process_group
        self.parameters_to_ignore = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        parameters = self._check(module, device_ids, output_device)
        gpus = device_ids if device_ids and not self.is_multi_device_module else None
        self.device_ids = None if gpus is None else [_device_index(d) for d in gpus]
        if output_device is None and gpus is not None:
            output_device = gpus[0]
        self.output_device = None if output_device is None else _device_index(output_device)
        self.dim = dim
        self.module = module
        self.device = parameters[0].device
        sync_buffers_at_first = self._buffer_flags(broadcast_buffers, forward_sync_buffers)
        self.find_unused_parameters = find_unused_parameters
        self.require_backward_grad_sync = True
        self.require_forward_param_sync = True
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.static_graph = static_graph
        if check_reduction:
            warnings.warn(
                "The `check_reduction` argument in `DistributedDataParallel` module is deprecated."
                " Please avoid using it.",
                FutureWarning,
                stacklevel=2,
            )
        self.broadcast_bucket_size = 250 * _MIB
        self._set_bucket_sizes(bucket_cap_mb, bucket_cap_mb_list)
        if init_sync:
            trained = self._trained()[0]
            _torch.verify_params_across_processes(self.process_group, trained, None)
            state = [p.detach() for p in parameters]
            if sync_buffers_at_first:
                state += [b.detach() for b in self._synced_buffers()]
            self._broadcast(state)
        self._make_reducer()
        if static_graph and find_unused_parameters:
            warnings.warn(_NEEDLESS, stacklevel=2)

    def _check(
        self,
        module: Module,
        device_ids: Sequence[int | torch.device] | None,
        output_device: int | torch.device | None,
    ) -> list[torch.Tensor]:
        """The parameters that are not ignored, after checks of them and of the devices."""
        parameters: list[torch.Tensor] = [
            p for name, p in module.named_parameters() if name not in self.parameters_to_ignore
        ]
        if not any(p.requires_grad for p in parameters):
            raise RuntimeError(
                "DistributedDataParallel is not needed when a module doesn't have any parameter"
                " that requires a gradient."
            )
        if device_ids is not None and len(device_ids) > 1:
            raise ValueError("device_ids can only be None or contain a single element.")
        devices = {p.device for p in parameters}
        self.is_multi_device_module = len(devices) > 1
        types = {d.type for d in devices}
        if len(types) != 1:
            raise ValueError(
                "DistributedDataParallel's input module must be on the same type of devices, but"
                f" input module parameters locate in {types}."
            )
        self.device_type = next(iter(types))
        on_one_gpu = self.device_type != "cpu" and not self.is_multi_device_module
        if not (device_ids and on_one_gpu) and (device_ids or output_device):
            raise ValueError(
                "DistributedDataParallel device_ids and output_device arguments only work with"
                " single-device/multiple-device GPU modules or CPU modules, but got device_ids"
                f" {device_ids}, output_device {output_device}, and module parameters {devices}."
            )
        return parameters

    def _buffer_flags(self, broadcast_buffers: bool | None, forward_sync: bool | None) -> bool:
        """Set whether each forward copies rank 0's buffers; return whether construction does."""
        if broadcast_buffers is not None:
            both = forward_sync is not None
            warnings.warn(_BOTH_FLAGS if both else _OLD_FLAG, FutureWarning, stacklevel=3)
        if forward_sync is not None:
            self.forward_sync_buffers = forward_sync
            return True
        self.forward_sync_buffers = True if broadcast_buffers is None else broadcast_buffers
        return self.forward_sync_buffers

    @property
    def broadcast_buffers(self) -> bool:
        """The older name of `forward_sync_buffers`."""
        return self.forward_sync_buffers

    @broadcast_buffers.setter
    def broadcast_buffers(self, value: bool) -> None:
        self.forward_sync_buffers = value

    # -- gradients -----------------------------------------------------------------------------

    def _set_bucket_sizes(self, one: float | None, several: list[int] | None) -> None:
        default = one is None and not several
        cap = max(several) if several else 25 if one is None else one
        self.bucket_bytes_cap = int(cap * _MIB)
        self.bucket_bytes_cap_list = [int(mb * _MIB) for mb in several or ()]
        self.bucket_bytes_cap_default = default
        # A small first bucket can be sent earlier.
        first = _torch.first_bucket_bytes() if default else self.bucket_bytes_cap
        self._bucket_limits = self.bucket_bytes_cap_list or [first, self.bucket_bytes_cap]

    def _trained(self) -> tuple[list[torch.Tensor], list[str]]:
        """The parameters to reduce and their names; a shared one once, with its last name."""
        found: dict[int, tuple[torch.Tensor, str]] = {}
        for path, module in self.module.named_modules():
            for name, p in module.named_parameters(recurse=False):
                name = f"{path}.{name}"
                if p.requires_grad and name not in self.parameters_to_ignore:
                    found[id(p)] = (p, name)
        return [p for p, _ in found.values()], [name for _, name in found.values()]

    def _make_reducer(self) -> None:
        limits = self._bucket_limits
        one_for_all = self.static_graph or not self.find_unused_parameters
        params, names = self._trained()
        self.reducer = Reducer(
            params,
            names,
            self.process_group,
            [sys.maxsize] if one_for_all and not self.bucket_bytes_cap_list else limits,
            limits,
            self.find_unused_parameters,
            self.gradient_as_bucket_view,
            self.static_graph,
        )
        self._first_walk_is_watched = False  # of a static graph

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, gradients accumulate in each process; the first backward after it reduces.

        The forward has to be inside as well.
        """
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        recorded = is_grad_enabled()
        if recorded:
            self.reducer.rebuild_buckets()
        if self.will_sync_module_buffers():
            # Like .data: the version does not change, so a graph that saved a buffer stays valid.
            self._broadcast([b.data for b in self._synced_buffers()])
        if self.device_ids:
            device = torch.device(self.device_type, self.device_ids[0])
            inputs, kwargs = _moved(inputs, device), _moved(kwargs, device)
        output = self.module(*inputs, **kwargs)
        self.require_forward_param_sync = recorded and self.require_backward_grad_sync
        if self.require_forward_param_sync:
            self.reducer.prepare_for_backward(list(_tensors(output)))
        if self.static_graph:
            watched = not self._first_walk_is_watched
        else:
            watched = self.find_unused_parameters
        return self._behind_sink(output) if watched else output

    def _behind_sink(self, output: object) -> Any:
        """The output with a node in front at which every walk from it starts."""
        leaves, spec = tree_flatten(output)
        if not any(map(_is_tracked, leaves)):
            return output
        passed = tape.record(_DDPSink, tuple(leaves))[0]
        leaves = [new if _is_tracked(old) else old for old, new in zip(leaves, passed, strict=True)]
        if self.static_graph:
            node = next(t.grad_fn for t in leaves if _is_tracked(t))
            node.register_prehook(self._watch_first_walk)
        return tree_unflatten(leaves, spec)

    def _watch_first_walk(self, _: object) -> None:
        if not self._first_walk_is_watched:
            self._first_walk_is_watched = True
            running.queue_callback(self.reducer.reduce_all)

    # -- buffers and weights -------------------------------------------------------------------

    def will_sync_module_buffers(self) -> bool:
        """Does the next forward start by copying rank 0's buffers?"""
        return bool(
            self.require_forward_param_sync and self.forward_sync_buffers and self._synced_buffers()
        )

    def _synced_buffers(self) -> list[torch.Tensor]:
        return [
            b for name, b in self.module.named_buffers() if name not in self.parameters_to_ignore
        ]

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        if tensors:
            with torch.no_grad(), DisableTorchFunctionSubclass():
                _torch.broadcast_coalesced(
                    self.process_group, tensors, self.broadcast_bucket_size, 0
                )

    # -- copying -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if not dist.is_initialized() or self.process_group != _torch.default_group():
            raise RuntimeError(
                "DDP Pickling/Unpickling are only supported when using DDP with the default process"
                " group. That is, when you have called init_process_group and have not passed"
                " process_group argument to DDP constructor"
            )
        state = super().__getstate__()
        for name in ("process_group", "reducer"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["process_group"] = _torch.default_group()
        super().__setstate__(state)
        self._make_reducer()

    # -- not mirrored ----------------------------------------------------------------------------

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> NoReturn:
        """Not mirrored: give every rank as many batches."""
        raise NotImplementedError(
            _NOT_MIRRORED.format("join()", "give every rank as many batches as the others")
        )

    def register_comm_hook(self, state: object, hook: object) -> None:
        """Not mirrored: gradients are reduced by all_reduce."""
        raise NotImplementedError(
            _NOT_MIRRORED.format(
                "register_comm_hook()",
                "reduce within no_sync() by calls of torch.distributed on the .grad",
            )
        )


class _DDPSink(Operation):
    """The identity, with copies; outputs that the loss does not use pass None on."""

    @staticmethod
    def forward(ctx: Node, *inputs: object) -> tuple[object, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in inputs)

    @staticmethod
    def backward(ctx: Node, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads


def _is_tracked(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _device_index(device: int | str | torch.device) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def _tensors(value: object) -> Iterable[torch.Tensor]:
    """The tensors in what a forward returned."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif not isinstance(value, tuple | list):
        return []
    return itertools.chain.from_iterable(map(_tensors, value))


def _moved(value: object, device: torch.device) -> Any:
    """The arguments of a forward, with tensors moved to the device."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, dict) and value:
        return type(value)((k, _moved(v, device)) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(v, device) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(v, device) for v in value)
    return value


_BOTH_FLAGS = (
    "Both `broadcast_buffers` and `forward_sync_buffers` were specified. `broadcast_buffers` is"
    " deprecated and its value is ignored when `forward_sync_buffers` is provided."
)
_OLD_FLAG = (
    "`broadcast_buffers` is deprecated. Use `forward_sync_buffers` instead. IMPORTANT: unlike"
    " `broadcast_buffers=False`, `forward_sync_buffers=False` still syncs buffers at init. If you"
    " rely on buffers NOT being synced at init (e.g. rank-local buffers), keep using"
    " `broadcast_buffers=False` until `init_sync_buffers` is available."
)
_NEEDLESS = (
    "You passed find_unused_parameters=true to DistributedDataParallel, `_set_static_graph` will"
    " detect unused parameters automatically, so you do not need to set"
    " find_unused_parameters=true, just be sure these unused parameters will not change during"
    " training loop while calling `_set_static_graph`."
)
