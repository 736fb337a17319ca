"""Which names of torch.nn, torch.optim and torch.autograd a script uses, without running it.

It reads the source of the script, and of the modules in its directory that it imports, and finds
imports under any name, attributes of imported names and of variables assigned from them, and calls
that the mirror refuses, as far as the source shows them. Names that a script looks up by string
(`getattr(nn, name)`) are not found.
"""

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from . import func, runner

_PACKAGES = ("torch.nn.", "torch.optim.", "torch.autograd.")


NO, REFUSED = "NOT MIRRORED", "REFUSED"  # else "mirrored", or runner.NAMED_ONLY
AT_RUN_TIME = "at run time"  # whether it is refused depends on the call


@dataclass(frozen=True)
class Use:
    """A name of PyTorch's, or a call, and where it is used."""

    file: str
    line: int
    name: str
    answer: str
    why: str = ""  # it is refused
    stops: str = "if it gets there"  # if it is not mirrored: where the script stops

    @property
    def mirrored(self) -> bool:
        return self.answer not in (NO, REFUSED)


@dataclass
class Source:
    """One file: the dotted names that its own names refer to, and what it uses."""

    file: str
    package: str
    names: dict[str, str] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    used: set[tuple[int, str, bool]] = field(default_factory=set)  # line, name, only mentioned?
    refused: list[tuple[int, str, str]] = field(default_factory=list)  # line, call, why
    built: list[tuple[int, str, str]] = field(default_factory=list)  # line, library's name, why
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
        asked = {id(n) for node in nodes for n in _asked_about(node)}
        for node in nodes:
            if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
                self._read_name(node, bound, id(node) in asked)
            elif isinstance(node, ast.Call):
                self._read_call(node)
        self._read_libraries(nodes)

    def _read_name(self, node: ast.Attribute | ast.Name, bound: set[str], asked: bool) -> None:
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name in ("manual_seed", "seed_everything"):
            self.seeds.append(node.lineno)
        dotted = self._dotted(node)
        if dotted:
            self.used.add((node.lineno, dotted, asked))
            if dotted in _REFUSED_NAMES:
                self.refused.append((node.lineno, dotted, _REFUSED_NAMES[dotted]))
        elif isinstance(node, ast.Name) and name not in bound:
            for star in self.stars:
                if hasattr(sys.modules.get(star), name):
                    self.used.add((node.lineno, f"{star}.{name}", asked))

    def _read_call(self, node: ast.Call) -> None:
        """Arguments that are refused."""
        called = self._dotted(node.func) or ""
        given = {k.arg: k.value for k in node.keywords if k.arg}
        for name, value in given.items():
            if not (isinstance(value, ast.Constant) and value.value is True):
                continue
            for where, argument, why in _REFUSED_ARGUMENTS:
                if name == argument and called.startswith(where):
                    self.refused.append((value.lineno, f"{argument}=True", why))

    def _read_libraries(self, nodes: list[ast.AST]) -> None:
        """Where a mirrored layer may become part of a library's model."""
        models: dict[str, str] = {}  # variables assigned from a call of a library, and that call
        layers = {
            node.name
            for node in nodes
            if isinstance(node, ast.ClassDef)
            and any((self._dotted(base) or "").startswith("torch.nn.") for base in node.bases)
        }
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    library = self._dotted(base, torchs=False)
                    if library and self._makes_a_layer(node, layers):
                        self.built.append((node.lineno, library, _DERIVED))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                library = self._dotted(node.value.func, torchs=False)
                if library:
                    models.update((ast.unparse(target), library) for target in node.targets)
        for node in nodes:
            if not isinstance(node, ast.Assign) or not self._makes_a_layer(node.value, layers):
                continue
            for target in map(ast.unparse, node.targets):
                for model, library in models.items():
                    if target.startswith((f"{model}.", f"{model}[")):
                        self.built.append((node.lineno, library, _ASSIGNED))

    def _makes_a_layer(self, tree: ast.AST, layers: set[str]) -> bool:
        """Is a layer of torch.nn made there, or one of the classes `layers`?"""
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = self._dotted(node.func) or ""
                if called.startswith("torch.nn.") and called.rpartition(".")[2][0].isupper():
                    return True
                if isinstance(node.func, ast.Name) and node.func.id in layers:
                    return True
        return False

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
            self.used.add((node.lineno, dotted, True))

    def _dotted(self, node: ast.AST, torchs: bool = True) -> str | None:
        """The dotted name that an expression like `nn.functional.relu` refers to, of torch or
        not."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        start = self.names.get(node.id)
        if start is None or (start.partition(".")[0] == "torch") != torchs:
            return None
        return ".".join([start, *reversed(parts)])


def read(what: str, as_module: bool = False) -> list[Source]:
    """The script (with `as_module`, the module that `python -m` runs) and its own modules."""
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


def uses(sources: list[Source], load: bool = False) -> list[Use]:
    """The names and calls found. With `load`, libraries are imported to inspect their classes."""
    found = {}
    for source in sources:
        here = [
            Use(source.file, line, name, answer, stops=stops)
            for line, dotted, named in sorted(source.used)
            for name, answer, stops in _resolved(dotted, named)
        ]
        here += [Use(source.file, line, name, REFUSED, why) for line, name, why in source.refused]
        here += [
            Use(source.file, line, name, REFUSED if why is _DERIVED else AT_RUN_TIME, why)
            for line, name, why in source.built
            if _may_be_a_model(name, load, derived=why is _DERIVED)
        ]
        found.update(dict.fromkeys(here))
    return list(found)


_TO_TORCH = "nnmirror.to_torch(model) has the same weights"
_OF_SOME = "of a function that"
_TRANSFORMS = (
    _OF_SOME + " refers to a model which is trained (lambda x: model(x)); nnmirror.func.{} gives"
    " the same"
)
# Calls that are refused, and what to do instead.
_REFUSED_NAMES = {
    "torch.autocast": "convert model and input with .to(dtype)",
    "torch.amp.autocast": "convert model and input with .to(dtype)",
    "torch.cpu.amp.autocast": "convert model and input with .to(dtype)",
    "torch.cuda.amp.autocast": "convert model and input with .to(dtype)",
    "torch.compile": f"of a mirrored model; run it as it is; {_TO_TORCH}",
    "torch.export.export": f"of a mirrored model; {_TO_TORCH}",
    "torch.onnx.export": f"of a mirrored model; {_TO_TORCH}",
    "torch.jit.script": f"of a mirrored model; {_TO_TORCH}",
    "torch.jit.trace": f"of a mirrored model; {_TO_TORCH}",
    "torch.fx.symbolic_trace": f"of a mirrored model; {_TO_TORCH}",
    "torch.vmap": _TRANSFORMS.format("vmap"),
    **{
        f"torch.func.{name}": _TRANSFORMS.format(name)
        for name in func.__all__
        if name not in ("functional_call", "stack_module_state")
    },
    "torch.func.linearize": f"if parameters used in it require grad; {_TO_TORCH}",
}
# Calls that are refused if an argument is True: the start of the name, and the argument.
_REFUSED_ARGUMENTS = (
    ("torch.nn.Embedding", "sparse", "leave it out: the gradient is dense, and the same numbers"),
    ("torch.utils.checkpoint", "use_reentrant", "use_reentrant=False"),
)
_DERIVED = f"a torch.nn.Module, which cannot have mirrored layers; {_TO_TORCH}"
_ASSIGNED = (
    "a torch.nn.Module that it returns becomes mirrored with this layer, or an error names its"
    " layers that are not mirrored"
)


def _asked_about(node: ast.AST) -> list[ast.AST]:
    """The classes that `isinstance` or `issubclass` is called with."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and len(node.args) == 2
    ):
        return list(ast.walk(node.args[1]))
    return []


def _may_be_a_model(library: str, load: bool, derived: bool) -> bool:
    """Is the library's class a torch.nn.Module? Unknown for the result of a function."""
    parts = library.split(".")
    top = parts[0]
    if top in sys.stdlib_module_names or top in ("torch", "nnmirror"):
        return False
    if top not in sys.modules and not load:
        return False
    value = _NOT_THERE
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except Exception:  # for example a class, or a library that is not installed
            continue
        for part in parts[n:]:
            value = getattr(value, part, None)
        break
    if isinstance(value, type):
        return issubclass(value, sys.modules["torch.nn"].Module)  # type: ignore[attr-defined]
    return not derived and (value is _NOT_THERE or callable(value))


_NOT_THERE = object()


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


def _resolved(dotted: str, named: bool) -> Iterator[tuple[str, str, str]]:
    """The name in one of the packages that `dotted` refers to, whether it is mirrored, and where a
    script that uses it stops.

    `torch.nn.Module.forward` refers to `torch.nn.Module`; a module by itself to nothing. A class
    that is only `named` does not stop the script.
    """
    if not dotted.startswith(_PACKAGES):
        return
    module = sys.modules["torch"]
    name = "torch"
    for part in dotted.split(".")[1:]:
        name += f".{part}"
        value = getattr(module, part, sys.modules.get(name))  # torch.optim deletes such names
        if not isinstance(value, ModuleType):
            # If torch has not loaded the module, neither has the mirror.
            found = runner.support(module, part) if hasattr(module, part) else None
            stops = "if it makes one" if found == runner.NAMED_ONLY else "if it gets there"
            if found == runner.NAMED_ONLY and not named:
                found = None
            yield name, found or NO, stops
            return
        module = value


def render(found: list[Use]) -> str:
    """The names, the lines they are used in, and how many are mirrored."""
    lines: dict[tuple[str, str, str, str], list[int]] = {}
    for use in found:
        numbers = lines.setdefault((use.file, use.name, use.answer, use.why), [])
        if use.line not in numbers:
            numbers.append(use.line)
    width = max((len(name) for _, name, _, _ in lines), default=0)
    text, last = [], ""
    for (file, name, answer, why), numbers in lines.items():
        if file != last:
            text.append(file)
            last = file
        at = f"line {', '.join(map(str, numbers))}"
        text.append(f"  {name:{width}}  {answer:12}  {at}{why and ': '}{why}")
    names: dict[str, bool] = {}
    for use in found:
        if use.answer not in (REFUSED, AT_RUN_TIME):
            names[use.name] = names.get(use.name, True) and use.mirrored
    refused = sum(use.answer == REFUSED for use in found)
    more = f"; {refused} {'calls are' if refused > 1 else 'call is'} refused" if refused else ""
    return "\n".join([*text, f"{sum(names.values())} of {len(names)} names are mirrored{more}"])


def warn(what: str, as_module: bool = False) -> None:
    """Report on stderr, before the script runs, the names and calls at which it will stop."""
    try:
        found = uses(read(what, as_module))
    except (OSError, SyntaxError):
        return  # Python's own error follows
    said = set()
    for use in found:
        if not use.mirrored and use.name not in said:
            said.add(use.name)
            answer = "is not mirrored" if use.answer == NO else f"is refused ({use.why})"
            stops = f"will stop {use.stops}"
            if use.why.startswith(_OF_SOME):
                answer, stops = f"is refused {use.why}", "will stop if there is one"
            print(
                f"nnmirror: {use.file}:{use.line} uses {use.name}, which {answer};"
                f" the script {stops}",
                file=sys.stderr,
            )
