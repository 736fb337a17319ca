"""Which names of torch.nn, torch.optim and torch.autograd a script uses, without running it.

Read from the source of the script and of the modules under its directory that it imports:
imports under any name, and attributes of what was imported or assigned from it. What a
script looks up by a string (`getattr(nn, name)`) is not seen.
"""

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import runner

_PACKAGES = ("torch.nn.", "torch.optim.", "torch.autograd.")


@dataclass(frozen=True)
class Use:
    """A name of PyTorch's, and where it is used."""

    file: str
    line: int
    name: str
    mirrored: bool


@dataclass
class Source:
    """One file: the dotted names that its own names stand for, and what it uses."""

    file: str
    package: str
    names: dict[str, str] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    used: set[tuple[int, str]] = field(default_factory=set)
    imported: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)  # the lines that seed torch

    def read(self) -> None:
        with open(self.file, "rb") as file:
            tree = ast.parse(file.read(), self.file)
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.ImportFrom):
                self._import_from(node)
        for node in nodes:  # nn = torch.nn
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], self._dotted(node.value)
                if isinstance(target, ast.Name) and value:
                    self.names.setdefault(target.id, value)
        bound = {n.id for n in nodes if isinstance(n, ast.Name) and type(n.ctx) is not ast.Load}
        bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for node in nodes:
            if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
                self._read_name(node, bound)

    def _read_name(self, node: ast.Attribute | ast.Name, bound: set[str]) -> None:
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name in ("manual_seed", "seed_everything"):
            self.seeds.append(node.lineno)
        dotted = self._dotted(node)
        if dotted:
            self.used.add((node.lineno, dotted))
        elif isinstance(node, ast.Name) and name not in bound:
            for star in self.stars:
                if hasattr(sys.modules.get(star), name):
                    self.used.add((node.lineno, f"{star}.{name}"))

    def _import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imported.append(alias.name)
            top = alias.name.partition(".")[0]
            self.names[alias.asname or top] = alias.name if alias.asname else top

    def _import_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            up = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            module = ".".join([*up, module] if module else up)
        self.imported.append(module)
        for alias in node.names:
            dotted = f"{module}.{alias.name}"
            if alias.name == "*":
                if module.startswith("torch."):
                    self.stars.append(module)
                continue
            self.imported.append(dotted)
            self.names[alias.asname or alias.name] = dotted
            self.used.add((node.lineno, dotted))

    def _dotted(self, node: ast.AST) -> str | None:
        """What an expression like `nn.functional.relu` stands for, if it is torch's."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        start = self.names.get(node.id)
        if start is None or start.partition(".")[0] != "torch":
            return None
        return ".".join([start, *reversed(parts)])


def read(what: str, as_module: bool = False) -> list[Source]:
    """The script (or with `as_module`, what `python -m` runs) and its own modules."""
    if as_module:
        root = Path(os.getcwd())
        to_read = [*_files(f"{what}.__main__", root), *_files(what, root)]
    else:
        root = Path(os.path.dirname(os.path.realpath(what)))
        to_read = [(what, "")]
    sources: dict[str, Source] = {}
    while to_read:
        file, package = to_read.pop(0)
        real = os.path.realpath(file)
        if real not in sources:
            source = sources[real] = Source(_short(file), package)
            source.read()
            to_read += [found for name in source.imported for found in _files(name, root)]
    return list(sources.values())


def uses(sources: list[Source]) -> list[Use]:
    found = {
        Use(source.file, line, name, mirrored): None
        for source in sources
        for line, dotted in sorted(source.used)
        for name, mirrored in _resolved(dotted)
    }
    return list(found)


def _short(file: str) -> str:
    path = os.path.realpath(file)
    here = os.path.realpath(os.getcwd())
    return os.path.relpath(path, here) if Path(path).is_relative_to(here) else path


def _files(name: str, root: Path) -> Iterator[tuple[str, str]]:
    """The files under `root` that `import name` runs, and the package of each."""
    path, parts = root, name.split(".")
    for i, part in enumerate(parts):
        package = ".".join(parts[: i + 1])
        path = path / part
        if (path / "__init__.py").is_file():
            init = path / "__init__.py"
            if runner.is_users(str(init), root):
                yield str(init), package
        elif path.with_suffix(".py").is_file():
            if runner.is_users(str(path.with_suffix(".py")), root):
                yield str(path.with_suffix(".py")), package.rpartition(".")[0]
            return
        elif not path.is_dir():
            return


def _resolved(dotted: str) -> Iterator[tuple[str, bool]]:
    """The name in one of the packages that `dotted` leads to, and whether it is mirrored.

    `torch.nn.Module.forward` leads to `torch.nn.Module`; a module alone to nothing.
    """
    if not dotted.startswith(_PACKAGES):
        return
    module: Any = sys.modules["torch"]
    name = "torch"
    for part in dotted.split(".")[1:]:
        name += f".{part}"
        value = getattr(module, part, None)
        if not isinstance(value, ModuleType):
            # Where torch has not loaded the module, neither has the mirror.
            yield name, hasattr(module, part) and runner.is_mirrored(module, part)
            return
        module = value


def render(found: list[Use]) -> str:
    """The names, the lines they are used in, and how many are mirrored."""
    lines: dict[tuple[str, str, bool], list[int]] = {}
    for use in found:
        lines.setdefault((use.file, use.name, use.mirrored), []).append(use.line)
    width = max((len(name) for _, name, _ in lines), default=0)
    text, last = [], ""
    for (file, name, mirrored), numbers in lines.items():
        if file != last:
            text.append(file)
            last = file
        answer = "mirrored" if mirrored else "NOT MIRRORED"
        text.append(f"  {name:{width}}  {answer:12}  line {', '.join(map(str, numbers))}")
    names = {use.name: use.mirrored for use in found}
    return "\n".join([*text, f"{sum(names.values())} of {len(names)} names are mirrored"])


def warn(what: str, as_module: bool = False) -> None:
    """Say on stderr, before it runs, at which names a script will stop."""
    try:
        found = uses(read(what, as_module))
    except (OSError, SyntaxError):
        return  # Python's own error follows
    said = set()
    for use in found:
        if not use.mirrored and use.name not in said:
            said.add(use.name)
            print(
                f"nnmirror: {use.file}:{use.line} uses {use.name}, which is not mirrored;"
                " the script will stop if it gets there",
                file=sys.stderr,
            )
