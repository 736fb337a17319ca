"""README.md and the other texts: their tables agree with the package, and their code runs."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

import nnmirror

from .lists import LISTS, MIRRORED
from .parity import parity

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLE = [
    (name, mirrored)
    for names, mirrored in re.findall(
        r"^\| (`(?:nn|optim)\..*?) \| (yes|no|only here|PyTorch's) \|", MIRRORED.read_text(), re.M
    )
    for name in re.findall(r"`([\w.]+)`", names)
]


def look_up(root, path):
    for part in path.split("."):
        root = getattr(root, part)
    return root


@pytest.mark.parametrize(("name", "mirrored"), TABLE)
def test_table_of_what_is_mirrored(name, mirrored):
    if mirrored == "only here":
        with pytest.raises(AttributeError):
            look_up(torch, name)
    else:
        assert look_up(torch, name), "a name of PyTorch's"
    if mirrored == "PyTorch's":
        assert look_up(nnmirror, name) is look_up(torch, name)
    elif mirrored != "no":
        assert look_up(nnmirror, name)
    elif isinstance(look_up(torch, name), type):
        with pytest.raises(NotImplementedError, match="not mirrored"):
            look_up(nnmirror, name)()
    else:
        with pytest.raises(AttributeError, match="not mirrored"):
            look_up(nnmirror, name)


def test_the_table_names_every_optimiser_and_helper():
    named = {name for name, mirrored in TABLE if mirrored != "no"}
    schedulers = {f"optim.lr_scheduler.{n}" for n in nnmirror.optim.lr_scheduler.__all__}
    optimisers = {f"optim.{n}" for n in nnmirror.optim.__all__}
    helpers = {f"nn.utils.{n}" for n in nnmirror.utils.__all__}
    assert optimisers | schedulers | helpers <= named


@pytest.mark.parametrize("path", LISTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_lists_are_those_of_the_code(path):
    """The names of the modules, functions and operations, and the bounds of exact mode."""
    assert LISTS[path](path.read_text()) == path.read_text(), "run: python -m compat_tests.lists"


def test_the_rule_in_the_readme_is_the_one_that_runs():
    shown = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "class Tanh" in c)
    assert shown in (ROOT / "nnmirror" / "rules" / "activation.py").read_text()


def test_every_file_that_a_text_names_is_there():
    """Each file that a text links or names exists."""
    texts = [ROOT / "README.md", *ROOT.glob("*/*.md"), *ROOT.glob("nnmirror/*/*.md")]
    for path in texts:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
            assert (path.parent / link).exists(), f"{path.relative_to(ROOT)}: {link}"
        for name in re.findall(r"`((?:nnmirror|compat_tests|examples)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


@parity
def test_tanh(nn, optim):
    x = nn.Parameter(torch.randn(4, 25))
    y = nn.Tanh()(x)
    y.backward(torch.randn(4, 25))
    return y, x.grad


def test_the_test_in_the_readme_is_the_one_above():
    shown = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "@parity" in c)
    assert shown in Path(__file__).read_text()


def test_function_in_the_docstring_of_testing():
    text = nnmirror.testing.__doc__
    code = text[text.index("    import torch") : text.index("The package's own tests")]
    scope = {}
    exec(textwrap.dedent(code), scope)
    p = nnmirror.Parameter(torch.tensor([3.0]))
    scope["Square"].apply(p).backward()
    assert p.grad.item() == 6.0
