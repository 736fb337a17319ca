"""Build the reference pages: `python .ci/pages.py DIRECTORY`.

pdoc makes them from the docstrings, and from the texts beside the code that these include. Every
public module has a page, so that what a docstring refers to can be read. Names spelt as a script
spells them (`nn.Linear`) are linked too. A name of the package that leads nowhere is an error.
"""

import importlib
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render
from pdoc.extract import walk_specs

sys.path.insert(0, str(Path(__file__).parent.parent))  # the pages are of the source here

import nnmirror
from nnmirror.rules import Rule

FOOTER = f"nnmirror {nnmirror.__version__}"
TEMPLATES = Path(__file__).parent / "pages"


def modules() -> list[str]:
    """The public modules but `nnmirror.modules`, whose classes are on the first page."""
    found = [info.name for info in pkgutil.walk_packages(nnmirror.__path__, "nnmirror.")]
    return [name for name in found if not re.match(r"nnmirror\.(nn|modules)\b|.*\._", name)]


def is_of_a_rule(doc: pdoc.doc.Doc) -> bool:
    """Whether it is a member of a rule."""
    owner, _, member = doc.qualname.partition(".")
    found = getattr(sys.modules[doc.modulename], owner, None)
    return bool(member) and isinstance(found, type) and issubclass(found, Rule)


def show_rules(module: ModuleType) -> None:
    """Also the rules of a file that exports only its functions."""
    if not hasattr(module, "__all__"):
        return
    rules = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Rule)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    module.__all__ = [*rules, *module.__all__]


def link_names(pages: Path) -> None:
    """Link `nn.Linear`, `nn.functional.tanh`, `optim.SGD`, as the texts spell them."""
    there = {
        page: set(re.findall(r'<section id="(\w+)"', page.read_text()))
        for page in pages.rglob("*.html")
    }
    for page in there:
        up = "../" * (len(page.relative_to(pages).parts) - 1)

        def link(match: re.Match[str], up: str = up) -> str:
            space, _, name = match[1].rpartition(".")
            target = ("nnmirror" + space.removeprefix("nn") if space.startswith("nn")
                      else f"nnmirror.{space}").replace(".", "/") + ".html"  # fmt: skip
            if name not in there.get(pages / target, ()):
                return match[0]
            return f'<code><a href="{up}{target}#{name}">{match[1]}</a></code>'

        text = re.sub(r"<code>((?:nn|optim)(?:\.\w+)+)</code>", link, page.read_text())
        page.write_text(text)


def unresolved(pages: Path) -> list[str]:
    """The names of the package in its texts that no link leads from."""
    lost = []
    for page in sorted(pages.rglob("*.html")):
        text = re.sub(r"<pre>.*?</pre>|<a [^>]*>.*?</a>", "", page.read_text(), flags=re.S)
        for name in re.findall(r"<code>((?:nnmirror|rules|exact)(?:\.\w+)+)(?:\(\))?</code>", text):
            lost.append(f"{page.relative_to(pages)}: {name}")
    return lost


def main(directory: Path) -> int:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Cannot determine where")  # declared by torch.Tensor
    warnings.filterwarnings("ignore", "Error parsing source code")  # of rules that a function makes
    names = modules()
    for name in names:
        importlib.import_module(name)
    for name in names:
        module = sys.modules[name]
        if name.startswith(("nnmirror.functional", "nnmirror.rules.")) and hasattr(
            module, "__all__"
        ):
            show_rules(module)
    pdoc.render.env.globals["is_of_a_rule"] = is_of_a_rule
    pdoc.render.configure(footer_text=FOOTER, template_directory=TEMPLATES)
    specs = ["nnmirror", "!nnmirror.modules"]
    for name in names:  # what a package's `__all__` leaves out has to be named
        if name not in walk_specs(specs):
            specs.append(name)
    pdoc.pdoc(*specs, output_directory=directory)
    link_names(directory)
    lost = unresolved(directory)
    for line in lost:
        print(f"leads nowhere: {line}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
