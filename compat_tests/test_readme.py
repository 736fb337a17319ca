"""The README: what it says is mirrored is, and what it says is not is refused."""

import re
from pathlib import Path

import pytest
import torch

import nnmirror

README = (Path(__file__).parent.parent / "README.md").read_text()
TABLE = [
    (name, mirrored == "yes")
    for names, mirrored in re.findall(r"^\| (`(?:nn|optim)\..*?) \| (yes|no) \|", README, re.M)
    for name in re.findall(r"`([\w.]+)`", names)
]


def look_up(root, path):
    for part in path.split("."):
        root = getattr(root, part)
    return root


@pytest.mark.parametrize(("name", "mirrored"), TABLE)
def test_table_of_what_is_mirrored(name, mirrored):
    assert look_up(torch, name), "a name of PyTorch's"
    if mirrored:
        assert look_up(nnmirror, name)
    else:
        with pytest.raises(AttributeError, match="not mirrored"):
            look_up(nnmirror, name)


def test_the_table_names_every_module_and_function():
    named = {name for name, mirrored in TABLE if mirrored}
    modules = {f"nn.{n}" for n in nnmirror.modules.__all__}
    functions = {f"nn.functional.{n}" for n in nnmirror.functional.__all__}
    optimisers = {f"optim.{n}" for n in nnmirror.optim.__all__}
    helpers = {f"nn.utils.{n}" for n in nnmirror.utils.__all__}
    assert modules | functions | optimisers | helpers <= named


def test_operations_listed_as_recorded_are():
    text = README[README.index("Between modules, these") : README.index("Results that carry no")]
    names = re.findall(r"`(\w+)`", text)
    assert len(names) > 40
    p = nnmirror.Parameter(torch.ones(2, 2))
    samples = {
        "pow": (2,), "clamp": (0,), "clamp_min": (0,), "clamp_max": (0,), "matmul": (p,),
        "mm": (p,), "add": (1,), "sub": (1,), "mul": (2,), "div": (2,), "view": (4,),
        "reshape": (4,), "unflatten": (0, (1, 2)), "unsqueeze": (0,), "transpose": (0, 1),
        "maximum": (p,), "minimum": (p,), "where": (p > 0, p), "permute": (1, 0), "expand": (2, 2), "to": (torch.float64,),
    }  # fmt: skip
    for name in names:
        if name in ("cat", "stack"):
            assert getattr(torch, name)([p, p]).requires_grad
        elif name == "unbind":
            assert p.unbind()[0].requires_grad
        elif name in ("bmm", "mv", "dot"):
            a = p.unsqueeze(0) if name == "bmm" else p if name == "mv" else p[0]
            b = p.unsqueeze(0) if name == "bmm" else p[0]
            assert getattr(a, name)(b).requires_grad
        elif name == "detach":
            assert not p.detach().requires_grad
        else:
            member = getattr(p, name)
            result = member(*samples.get(name, ())) if callable(member) else member
            assert result.requires_grad, name


def test_function_in_the_readme():
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "class Square" in c)
    scope = {"nnmirror": nnmirror}
    exec(code, scope)
    p = nnmirror.Parameter(torch.tensor([3.0]))
    scope["Square"].apply(p).backward()
    assert p.grad.item() == 6.0
