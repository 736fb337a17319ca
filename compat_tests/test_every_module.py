"""Every module in PyTorch's own table of modules: the same results, gradients and errors.

A layer is compared here as soon as it is exported: forward and backward, in training and in
evaluation, in place if it can be. PyTorch's table has arguments and inputs for about 100 of the
mirrored modules.
"""

import inspect

import pytest
import torch
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map_only

import nnmirror
from nnmirror.tape import tensors_in

from . import test_every_op
from .parity import DEVICES, compare, off_by
from .test_activations import NEARLY

MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls.__name__ in nnmirror.modules.__all__
}
MOST = 50  # of over a hundred samples for CrossEntropyLoss, some
# Gradients that differ in exact mode too, by so many units in the last place of the largest.
CLOSE = {
    name.removeprefix("nn.functional.").replace("_", ""): units
    for name, (units, _) in test_every_op.CLOSE.items()
    if units > 1
}
for name, (_, _, units) in NEARLY.items():
    kind = name.partition(" ")[0]
    CLOSE[kind] = max(units, CLOSE.get(kind, 0))


def driven(nn, optim, name, made_with, given, dtype, training, inplace):
    """The results, the gradients of the inputs and the module's parameters and buffers."""
    args, kwargs = made_with
    module = getattr(nn, name)(*args, **kwargs).to(dtype).train(training)
    args, kwargs = given
    leaves = list(tensors_in(given))
    if inplace:
        module.inplace = True
        args = nn.functional.leaky_relu(args[0], 1.0), *args[1:]  # not a leaf
    results = list(tensors_in(module(*args, **kwargs)))
    for y in results:
        if y.requires_grad:
            y.backward(torch.randn_like(y), retain_graph=True)
    grads = [t.grad for t in leaves]
    return results, grads, dict(module.named_parameters()), dict(module.named_buffers())


def samples(info, dtype, training):
    """Arguments for the constructor and for the call, those that raise errors too."""
    how = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    every = list(info.module_inputs_func(info, **how))
    if info.module_error_inputs_func is not None:
        bad = info.module_error_inputs_func(info, **how)
        every += [sample.module_error_input for sample in bad]
    for sample in every[:: 1 + len(every) // MOST]:
        made, given = sample.constructor_input, sample.forward_input
        given = ((), {}) if given is None else (given.args, given.kwargs)
        yield tree_map_only(torch.Tensor, as_leaf, ((made.args, made.kwargs), given))


def as_leaf(t):
    return t.detach().requires_grad_(t.requires_grad)


@pytest.mark.parametrize("on_device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_every_module_of_pytorchs_table(name, on_device):
    info = MODULES[name]
    in_place_too = "inplace" in inspect.signature(info.module_cls).parameters
    function = off_by(CLOSE.get(name.removeprefix("Lazy").lower(), 0))(
        lambda nn, optim, **how: driven(nn, optim, name, **how)
    )
    for dtype in (torch.float32, torch.float64):
        for training in {True, not info.train_and_eval_differ}:
            torch.manual_seed(0)
            for made_with, given in samples(info, dtype, training):
                for inplace in {False, in_place_too}:
                    how = {"dtype": dtype, "training": training, "inplace": inplace}
                    compare(function, on_device, made_with=made_with, given=given, **how)
