"""The lists of names in the texts, made from the code.

    python -m compat_tests.lists

writes them: the modules, functions and operations in nnmirror/mirrored.md, and the bounds in
nnmirror/exact/README.md. In the tables the last cell of a row is written by hand, and is kept.
`test_readme.py` fails if a list is not as it is written here.
"""

import pkgutil
import re
import textwrap
from pathlib import Path

import nnmirror
from nnmirror.exact.table import table
from nnmirror.rules import recorded

PACKAGE = Path(__file__).parent.parent / "nnmirror"
MIRRORED, EXACT = PACKAGE / "mirrored.md", PACKAGE / "exact" / "README.md"


def modules() -> dict[str, list[str]]:
    """The exported modules, by the file that has them in PyTorch too."""
    names: dict[str, list[str]] = {}
    for info in pkgutil.iter_modules(nnmirror.modules.__path__):
        file = vars(nnmirror.modules)[info.name]
        exported = [n for n in getattr(file, "__all__", ()) if n in nnmirror.modules.__all__]
        if exported:
            names[info.name] = [f"nn.{name}" for name in exported]
    return names


def paragraph(names: list[str]) -> str:
    return textwrap.fill(" ".join(f"`{name}`" for name in names), 100)


def replaced(text: str, after: str, made: str) -> str:
    """The text with `made` in place of the lines that follow `after`, up to an empty one."""
    start = text.index(after) + len(after)
    return text[:start] + made + text[text.index("\n\n", start) :]


def mirrored(text: str) -> str:
    """nnmirror/mirrored.md with its lists made anew."""
    notes = dict(re.findall(r"^\| (\w+) \| `nn.*? \|(.*)\|$", text, re.M))
    rows = [
        f"| {file} | {', '.join(f'`{name}`' for name in names)} |{notes.get(file, ' ')}|"
        for file, names in modules().items()
    ]
    text = replaced(text, "| file | modules | |\n| --- | --- | --- |\n", "\n".join(rows))
    functions = [f"nn.functional.{name}" for name in sorted(nnmirror.functional.__all__)]
    text = replaced(text, "## Functions\n\n", paragraph(functions))
    operations = [name.replace(" = ", "=") for name in recorded()]
    return replaced(text, "on views as well:\n", paragraph(operations) + ".")


def bounds(text: str) -> str:
    """nnmirror/exact/README.md with its table made anew."""
    rows = [f"| `{name}` | {units:g} |" for name, units in table().items()]
    return replaced(text, "| layer or function | units |\n| --- | --- |\n", "\n".join(rows))


LISTS = {MIRRORED: mirrored, EXACT: bounds}

if __name__ == "__main__":
    for path, made in LISTS.items():
        path.write_text(made(path.read_text()))
