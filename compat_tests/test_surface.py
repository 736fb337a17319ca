"""The public names and their signatures: a script can call each as it calls PyTorch's."""

import abc
import inspect
import pickle
import pkgutil
import re

import pytest
import torch

import nnmirror

# These have other annotations than PyTorch's, such as object for Any.
ANNOTATED = {"Identity", "ModuleDict", "ParameterDict", "ParameterList"}
CLASSES = {
    **{
        f"nn.{name}": (getattr(torch.nn, name), getattr(nnmirror, name))
        for name in ["Parameter", *nnmirror.modules.__all__]
        if name not in ANNOTATED
    },
    **{
        f"optim.lr_scheduler.{name}": (
            getattr(torch.optim.lr_scheduler, name),
            getattr(nnmirror.optim.lr_scheduler, name),
        )
        for name in nnmirror.optim.lr_scheduler.__all__
    },
    **{
        f"optim.swa_utils.{name}": (
            getattr(torch.optim.swa_utils, name),
            getattr(nnmirror.optim.swa_utils, name),
        )
        for name in ("SWALR", "AveragedModel")
    },
    **{
        f"optim.{name}": (getattr(torch.optim, name), getattr(nnmirror.optim, name))
        for name in ("Optimizer", "SGD", "Adam", "AdamW", "RMSprop", "Adagrad")
    },
}


def shape_of(function):
    """The signature without annotations' package names, or None where PyTorch has none."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    text = str(signature)
    text = re.sub(r"\(self: [\w.]+", "(self", text)  # a mixin annotates self
    # The same types, spelled from different modules.
    text = re.sub(r"torch\.nn\.parameter\.|nnmirror\.parameter\.", "", text)
    text = re.sub(r"ForwardRef\('(\w+)'\)", r"\1", text)
    return text.replace("'", "").replace("Optional[Module]", "Module | None")


def public(cls):
    # Parameter's other methods are torch.Tensor's own.
    names = cls.__dict__ if issubclass(cls, torch.Tensor) else dir(cls)
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(name):
    theirs, mine = CLASSES[name]
    assert shape_of(mine) == shape_of(theirs)
    different = {}
    for method in public(theirs):
        expected, actual = getattr(theirs, method), getattr(mine, method, None)
        assert actual is not None, f"{name}.{method} is missing"
        if callable(expected) and shape_of(expected) != shape_of(actual):
            different[method] = (shape_of(expected), shape_of(actual))
    assert not different


@pytest.mark.parametrize("name", nnmirror.functional.__all__)
def test_functional_parameters(name):
    theirs = getattr(torch.nn.functional, name)
    if shape_of(theirs) is None:
        pytest.skip("PyTorch's is a builtin without a signature")
    # PyTorch chooses one of two functions by a boolean argument.
    theirs = torch._jit_internal.boolean_dispatched.get(theirs, {"if_false": theirs})["if_false"]
    names = [
        list(inspect.signature(function).parameters.items())
        for function in (theirs, getattr(nnmirror.functional, name))
    ]
    assert [(n, p.default, p.kind) for n, p in names[0]] == [
        (n, p.default, p.kind) for n, p in names[1]
    ]


@pytest.mark.parametrize("name", nnmirror.functional.__all__)
def test_a_function_is_pickled_by_its_public_name(name):
    """A net that keeps its activation, `self.act = F.relu`, is saved whole."""
    saved = pickle.dumps(getattr(nnmirror.functional, name))
    assert b"nnmirror.functional" in saved
    assert pickle.loads(saved) is getattr(nnmirror.functional, name)


def test_init_signatures():
    for name in torch.nn.init.__all__:
        theirs, mine = getattr(torch.nn.init, name), getattr(nnmirror.init, name)
        assert shape_of(mine) == shape_of(theirs), name


def test_utils_signatures():
    for name in nnmirror.utils.__all__:
        theirs, mine = getattr(torch.nn.utils, name), getattr(nnmirror.utils, name)
        assert shape_of(mine) == shape_of(theirs), name


def test_both_spellings_of_the_import():
    from nnmirror import nn, optim

    assert nn.Linear is nnmirror.Linear
    assert optim.SGD is nnmirror.optim.SGD
    import nnmirror.nn as same_nn
    import nnmirror.nn.functional as F

    assert same_nn is nn
    assert F is nn.functional is nnmirror.functional
    assert nn.functional.relu is F.relu
    from nnmirror.nn.modules.linear import Linear

    from nnmirror.nn.parameter import Parameter
    from nnmirror.nn.utils import clip_grad_norm_

    assert Linear is nn.Linear
    assert Parameter is nn.Parameter
    assert clip_grad_norm_ is nn.utils.clip_grad_norm_


def test_a_misspelt_name_gets_pythons_error():
    """A misspelt name raises Python's usual error, with the data for its "Did you mean"."""
    with pytest.raises(AttributeError, match=r"^module 'nnmirror' has no attribute 'Lineer'$") as e:
        getattr(nnmirror.nn, "Lineer")  # noqa: B009
    assert (e.value.name, e.value.obj) == ("Lineer", nnmirror)
    with pytest.raises(ImportError, match=r"^cannot import name 'SWALR' from 'nnmirror"):
        exec("from nnmirror.optim.lr_scheduler import SWALR")


def test_every_layer_is_exported():
    """A class that is left out of its file's `__all__` is reported as not mirrored."""
    files = [
        vars(nnmirror.modules)[info.name]
        for info in pkgutil.iter_modules(nnmirror.modules.__path__)
    ]
    for file in files:
        made = {
            name
            for name, value in vars(file).items()
            if inspect.isclass(value)
            and value.__module__ == file.__name__
            and hasattr(torch.nn, name)
        }
        assert made <= set(nnmirror.modules.__all__), file.__name__


EVERY_OPTIMISER = sorted(n for n, v in vars(torch.optim).items() if isinstance(v, type))
EVERY_LAYER = sorted(
    name
    for name, value in vars(torch.nn).items()
    if isinstance(value, type) and issubclass(value, torch.nn.Module)
)


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_a_layer_that_is_not_mirrored_is_for_isinstance_only(name):
    """`isinstance(m, (nn.Linear, nn.LSTM))` works, as init functions use it; nn.LSTM() raises."""
    theirs, mine = getattr(torch.nn, name), getattr(nnmirror, name)
    assert getattr(nnmirror, name) is mine
    assert (mine.__name__, issubclass(mine, nnmirror.Module)) == (name, True)
    # PyTorch's answer, for each pair of layers.
    for other in EVERY_LAYER:
        expected = issubclass(theirs, getattr(torch.nn, other))
        assert issubclass(mine, getattr(nnmirror, other)) == expected, other
    if name in nnmirror.__all__:
        return

    class Own(mine, abc.ABC):
        def __init__(self):
            super().__init__(1, 2)

    for made in (mine, lambda: mine(1, 2, bias=True), Own):
        with pytest.raises(
            NotImplementedError, match=rf"nnmirror\.{name} is not mirrored.*What to"
        ):
            made()


def test_a_name_that_is_not_mirrored_says_so():
    with pytest.raises(AttributeError, match=r"grid_sample.*not mirrored.*What to do"):
        nnmirror.functional.grid_sample  # noqa: B018
    with pytest.raises(
        AttributeError, match=r"Transformer\.generate_square_subsequent_mask is not"
    ):
        nnmirror.Transformer.generate_square_subsequent_mask(3)
    for name in ("Linaer", "grid_sample", "Tensor_", "__wrapped__"):
        with pytest.raises(AttributeError):
            getattr(nnmirror, name)
    assert not hasattr(nnmirror.functional, "Optional")  # in torch.nn.functional only as an import


@pytest.mark.parametrize("name", EVERY_OPTIMISER)
def test_every_optimiser_is_there(name):
    """Optimisers that are not mirrored are PyTorch's own, which work too (test_ecosystem)."""
    mine = getattr(nnmirror.optim, name)
    assert (mine is getattr(torch.optim, name)) == (name not in nnmirror.optim.__all__)
    assert issubclass(mine, nnmirror.optim.Optimizer)
    assert not issubclass(mine, nnmirror.optim.SGD) or name == "SGD"


@pytest.mark.parametrize(
    "line",
    [
        "from nnmirror.nn.functional import grid_sample",
        "from nnmirror.nn.functional import linear, grid_sample as sample",
        "from nnmirror.optim.lr_scheduler import LinearLR, EPOCH_DEPRECATION_WARNING",
        "from nnmirror.nn.utils import weight_norm",
    ],
)
def test_an_import_of_a_name_that_is_not_mirrored_says_so(line):
    """The ImportError says what to do instead; other import errors are Python's own."""
    with pytest.raises(ImportError, match=r"is not mirrored\. What to do"):
        exec(line)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'nnmirror\.nn\.quantized'"):
        exec("import nnmirror.nn.quantized")
    assert not hasattr(nnmirror.functional, "grid_sample")
    assert getattr(nnmirror.functional, "grid_sample", None) is None
    exec("from nnmirror.nn import Linear, LSTM; from nnmirror.optim import Adamax as Best")
    exec("from nnmirror.nn import *; from nnmirror.nn.functional import *")
    inspect.getmembers(nnmirror)


def test_torch_compile_is_refused():
    model = nnmirror.Sequential(nnmirror.Linear(2, 3), nnmirror.ReLU())
    ways = (
        lambda: torch.compile(model),
        lambda: torch.compile(backend="eager")(model),
        model.compile,
    )
    for way in ways:
        with pytest.raises(NotImplementedError, match=r"nnmirror: .*torch\.compile cannot trace"):
            way()


PUBLIC = (
    nnmirror,
    nnmirror.functional,
    nnmirror.init,
    nnmirror.modules,
    nnmirror.optim,
    nnmirror.optim.lr_scheduler,
    nnmirror.optim.swa_utils,
    nnmirror.parallel,
    nnmirror.testing,
    nnmirror.utils,
)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    """A name without a docstring would be an empty entry in the API pages."""
    bare = [] if module.__doc__ else [module.__name__]
    for name in module.__all__:
        value = getattr(module, name)
        if not (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__):
            bare.append(name)
        if inspect.isclass(value):
            bare += [f"{name}.{member}" for member in undocumented_members(value)]
    assert not bare


def undocumented_members(cls):
    mine = [base for base in cls.__mro__ if base.__module__.startswith("nnmirror")]
    for name, member in ((n, m) for base in mine for n, m in vars(base).items()):
        kinds = (property, classmethod, staticmethod)
        if not (inspect.isroutine(member) or isinstance(member, kinds)):
            continue
        # The class says what forward computes.
        if not (name.startswith("_") or name in ("forward", "extra_repr") or member.__doc__):
            yield name
