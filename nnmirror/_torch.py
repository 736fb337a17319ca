"""The private names of torch that the package uses, and what each is for.

No other file of the package uses private names of torch, with two exceptions:

- `torch._C._nn.linear`, `.elu`, `.mse_loss` and so on are the functions that `torch.nn.functional`
  calls, or names itself. Rules are registered for them, and name them.
- Of a tensor: `_version`, which counts in-place changes; `_base` and `_is_view()`;
  `_make_subclass`, which makes a Parameter; `_backward_hooks` of torch's own tensors; `_cdata` of
  the storage. The tape cannot work without them.

All are looked up when the package is imported; if one is missing, the import fails with its name.
The comments say what could replace each. Where they say nothing, the operation would need another
kernel or the plain formula.
"""

import sys
from typing import Any

import torch
import torch.distributed

try:
    # -- whether a tensor subclass is dispatched to --------------------------------------

    # Inside a forward, a backward and the walk, tracked tensors are used as plain ones. Without it,
    # each would need a plain alias, which is slower. (PyTorch's notes on extending name it.)
    DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
    # The same, for modes as well: comparisons of bits must not be seen by a mode.
    DisableTorchFunction = torch._C.DisableTorchFunction
    # The opposite, for a user's code inside: without it, hooks could not compute with tracked
    # tensors.
    EnableTorchFunction = torch._C._EnableTorchFunction
    # Would torch dispatch to a subclass? Without these, the two usual shortcuts past
    # `__torch_function__` are lost.
    is_torch_function_enabled = torch._C._is_torch_function_enabled
    is_torch_function_mode_enabled = torch._C._is_torch_function_mode_enabled
    # The `__torch_function__` of a subclass that does not take part in dispatch.
    disabled_torch_function_impl = torch._C._disabled_torch_function_impl
    # The order in which subclasses are tried; it could be written here.
    get_overloaded_args = torch.overrides._get_overloaded_args  # type: ignore[attr-defined]
    # Is a TorchDispatchMode active? Then it must see the operations of the layers and of the
    # generic walk. Without this question, no walk could be bound.
    len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
    # The same for a TorchFunctionMode. Without these, tensors that such a mode keeps could be
    # overwritten.
    function_mode_stack = torch.overrides._get_current_function_mode_stack  # type: ignore[attr-defined]

    # The operation that torch.jit.script takes a function for. Without these, a scripted function
    # could not call those that are replaced in torch.
    find_builtin = torch.jit._builtins._find_builtin  # type: ignore[attr-defined]
    register_builtin = torch.jit._builtins._register_builtin  # type: ignore[attr-defined]

    # -- PyTorch's modes -----------------------------------------------------------------

    # Torch's grad mode; its public form is a class, which costs more at each hook and walk.
    set_grad_enabled = torch._C._set_grad_enabled
    # Torch's inference mode. The public form is a Python class: an exception from a signal handler
    # in its `__enter__` leaves the mode changed.
    InferenceMode = torch._C._InferenceMode
    # A context manager that turns off torch's autograd. Without it, a bound walk and SGD's step are
    # slower, but still right.
    AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd  # type: ignore[attr-defined]
    # Autocast, which the tape refuses. The public function asks about one device only.
    is_any_autocast_enabled = torch._C._is_any_autocast_enabled
    # It is off only inside the forward of a torch.autograd.Function. Without it, a gradient would
    # be silently lost there, so another way to detect that would be needed.
    is_fwd_grad_enabled = torch._C._is_fwd_grad_enabled
    # What `no_grad` and `set_grad_enabled` are made of, for a mode of the mirror's own.
    DecoratorContextManager = torch.utils._contextlib._DecoratorContextManager
    NoParamDecoratorContextManager = torch.utils._contextlib._NoParamDecoratorContextManager

    # -- transforms of torch.func, forward mode ------------------------------------------

    # None outside the transforms of torch.func; inside them, PyTorch's own function is called.
    peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
    # Is it one of their tensors?
    is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
    # The tensor that it wraps, which may be tracked. Without it, its gradient would be silently
    # lost.
    get_unwrapped = torch._C._functorch.get_unwrapped
    # The older vmap, which torch.autograd.gradcheck uses for a batch of gradients; the gradients
    # are unwrapped from it. Without these four, that check is refused.
    is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
    vmapmode_increment_nesting = torch._C._vmapmode_increment_nesting
    vmapmode_decrement_nesting = torch._C._vmapmode_decrement_nesting
    add_batch_dim = torch._add_batch_dim
    remove_batch_dim = torch._remove_batch_dim
    # The tangent of a tensor in forward mode, in which a user's Function is refused.
    unpack_dual = torch._unpack_dual
    # Their names in the messages that refuse them.
    of_forward_mode = (torch._make_dual, torch._unpack_dual)

    # -- tensors -------------------------------------------------------------------------

    # Where torch itself keeps `.grad` and `.data`: the properties of a tracked tensor's base.
    TensorBase: Any = torch._C.TensorBase
    # The metaclass of Buffer and Parameter.
    TensorMeta = torch._C._TensorMeta
    # How many tensors share a storage, and how a view was made: for an in-place operation that
    # brings a gradient into shared memory. Without them it is refused.
    storage_Use_Count = torch._C._storage_Use_Count
    get_creation_meta = torch._C._autograd._get_creation_meta  # type: ignore[attr-defined]
    # Marks a tensor as changed when it was changed through an alias.
    increment_version = torch._C._increment_version
    # May `p.data = moved` be, for `Module.to`?
    has_compatible_shallow_copy_type = torch._has_compatible_shallow_copy_type
    # The line width of a printed tensor, for the `grad_fn=` after it.
    PRINT_OPTS = torch._tensor_str.PRINT_OPTS

    # -- functions of torch --------------------------------------------------------------

    # The number of the next call that torch records. Without it, the gradients of a tensor that the
    # mirror and torch have both used could not be added in PyTorch's order.
    next_sequence_nr = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]
    # Torch's engine, which runs the backward of what torch itself recorded in front of mirrored
    # layers. Without it, gradients for tensors there are refused.
    engine = torch._C._ImperativeEngine()  # type: ignore[attr-defined]
    # Stands in for `torch._C` in torch.autograd.graph, with two functions replaced.
    C = torch._C
    # The arguments of `Module.to`, with PyTorch's errors.
    parse_to = torch._C._nn._parse_to  # type: ignore[attr-defined]
    # The padded values, with PyTorch's errors.
    pad_sequence = torch._C._nn.pad_sequence  # type: ignore[attr-defined]
    # Which arguments of an operation are numbers.
    jit_get_schemas_for_operator = torch._C._jit_get_schemas_for_operator
    # The name of a device type that was added to PyTorch.
    get_privateuse1_backend_name = torch._C._get_privateuse1_backend_name
    # How optimisers and clip_grad_norm_ group tensors for one kernel.
    group_tensors_by_device_and_dtype = torch._C._group_tensors_by_device_and_dtype
    # For attention: the kernel that PyTorch would choose, and whether it may round in half
    # precision.
    fused_sdp_choice = torch._fused_sdp_choice
    get_math_sdp_allow_fp16_bf16_reduction = torch._C._get_math_sdp_allow_fp16_bf16_reduction
    # For a convolution: the kernel that PyTorch chooses, and the memory format of its result.
    # Without them, the plain formula.
    ConvBackend = torch._C._ConvBackend  # type: ignore[attr-defined]
    select_conv_backend = torch._C._select_conv_backend
    conv_determine_backend_memory_format = torch._C._conv_determine_backend_memory_format
    # Where `UndefinedGrad` is, which torch.utils.data and others call.
    functions: Any = torch._C._functions
    # Functions that torch passes to `__torch_function__` besides those of the same name in `torch`.
    VariableFunctions = torch._C._VariableFunctions
    broadcast_tensors = torch._VF.broadcast_tensors  # type: ignore[attr-defined]
    meshgrid = torch._VF.meshgrid  # type: ignore[attr-defined]
    # The tensors in what DistributedDataParallel, and the functions in func.py, are given and
    # return.
    tree_flatten = torch.utils._pytree.tree_flatten
    tree_unflatten = torch.utils._pytree.tree_unflatten
    TreeSpec = torch.utils._pytree.TreeSpec
    # `in_dims` and `out_dims` of vmap, one for each tensor.
    broadcast_to_and_flatten = torch.utils._pytree._broadcast_to_and_flatten

    # -- kernels that a public operation is composed of ----------------------------------

    batch_norm_impl_index = torch._batch_norm_impl_index
    euclidean_dist = torch._euclidean_dist
    linalg_check_errors = torch._linalg_check_errors
    linalg_det = torch._linalg_det
    linalg_slogdet = torch._linalg_slogdet
    linalg_solve_ex = torch._linalg_solve_ex
    prelu_kernel = torch._prelu_kernel
    safe_softmax = torch._safe_softmax
    scaled_dot_product_flash_attention_for_cpu = torch._scaled_dot_product_flash_attention_for_cpu
    standard_gamma = torch._standard_gamma
    upsample_bicubic2d_aa = torch._C._nn._upsample_bicubic2d_aa  # type: ignore[attr-defined]
    upsample_bilinear2d_aa = torch._C._nn._upsample_bilinear2d_aa  # type: ignore[attr-defined]
    upsample_lanczos2d_aa = torch._C._nn._upsample_lanczos2d_aa  # type: ignore[attr-defined]
    upsample_nearest_exact1d = torch._C._nn._upsample_nearest_exact1d  # type: ignore[attr-defined]
    upsample_nearest_exact2d = torch._C._nn._upsample_nearest_exact2d  # type: ignore[attr-defined]
    upsample_nearest_exact3d = torch._C._nn._upsample_nearest_exact3d  # type: ignore[attr-defined]
    standard_gamma_grad = torch._standard_gamma_grad

    # -- operations on lists of tensors, as torch.optim has them -------------------------
    # Without them, optimisers loop over the parameters.

    foreach_add = torch._foreach_add
    foreach_add_ = torch._foreach_add_
    foreach_addcdiv_ = torch._foreach_addcdiv_
    foreach_addcmul = torch._foreach_addcmul
    foreach_addcmul_ = torch._foreach_addcmul_
    foreach_clamp_max_ = torch._foreach_clamp_max_
    foreach_clamp_min_ = torch._foreach_clamp_min_
    foreach_copy_ = torch._foreach_copy_
    foreach_div_ = torch._foreach_div_
    foreach_lerp_ = torch._foreach_lerp_
    foreach_maximum_ = torch._foreach_maximum_
    foreach_mul = torch._foreach_mul
    foreach_mul_ = torch._foreach_mul_
    foreach_neg = torch._foreach_neg
    foreach_neg_ = torch._foreach_neg_
    foreach_norm = torch._foreach_norm
    foreach_pow = torch._foreach_pow
    foreach_reciprocal_ = torch._foreach_reciprocal_
    foreach_sign = torch._foreach_sign
    foreach_sqrt = torch._foreach_sqrt
    foreach_sqrt_ = torch._foreach_sqrt_
    foreach_sub_ = torch._foreach_sub_
    # With `fused=True`; without one of them that would be refused.
    fused_adagrad_ = torch._fused_adagrad_
    fused_adam_ = torch._fused_adam_
    fused_adamw_ = torch._fused_adamw_
    fused_sgd_ = torch._fused_sgd_
except (AttributeError, ImportError) as error:
    raise ImportError(
        f"nnmirror: PyTorch {torch.__version__} lacks what nnmirror takes from it ({error}); see"
        " setup.cfg of nnmirror for the versions that they go together in"
    ) from error

# Its "_current_level" is -1 outside of `dual_level()`, where no tensor has a tangent. Torch has no
# other way to ask; it is only read, and without that module or name there is no forward mode.
forward_mode: dict[str, Any] = {"_current_level": -1}
if "_current_level" in getattr(sys.modules.get("torch.autograd.forward_ad"), "__dict__", {}):
    forward_mode = vars(sys.modules["torch.autograd.forward_ad"])

# Its "_is_in_torch_dispatch_mode" is True within a TorchDispatchMode, which may set attributes of
# results. Asked faster than `len_torch_dispatch_stack`; without it, such attributes are lost.
dispatch_mode: dict[str, Any] = {"_is_in_torch_dispatch_mode": False}
if "_is_in_torch_dispatch_mode" in vars(torch.utils._python_dispatch):
    dispatch_mode = vars(torch.utils._python_dispatch)


def is_shown() -> bool:
    """Does a mode see each operation? One that only sets the device of new tensors does not
    count."""
    if len_torch_dispatch_stack():
        return True
    if not is_torch_function_mode_enabled():
        return False
    kinds = {type(mode).__module__ for mode in function_mode_stack()}
    return kinds != {"torch.utils._device"}  # imported by torch when a device is first set


# -- of torch.distributed, for DistributedDataParallel ---------------------------------------
# Looked up when they are used, as a build of torch may lack them. They arrange buckets and send
# them as PyTorch's DistributedDataParallel does, so that ranks of either library work together.


def default_group() -> "torch.distributed.ProcessGroup":
    return torch.distributed.distributed_c10d._get_default_group()


def first_bucket_bytes() -> int:
    return torch.distributed._DEFAULT_FIRST_BUCKET_BYTES


def bucket_assignment(*args: Any) -> tuple[list[list[int]], list[int]]:
    return torch.distributed._compute_bucket_assignment_by_size(*args)


def broadcast_coalesced(*args: Any) -> None:
    torch.distributed._broadcast_coalesced(*args)


def verify_params_across_processes(*args: Any) -> None:
    torch.distributed._verify_params_across_processes(*args)
