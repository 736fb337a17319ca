"""The package's structure: which private names of torch it uses, and imports without cycles."""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import nnmirror

PACKAGE = Path(nnmirror.__file__).parent
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}


def full_name(node: ast.AST, known_as: Mapping[str, str] = MappingProxyType({})) -> str:
    """The dotted name that an expression spells, as `torch._C._nn.linear`; else an empty string.

    `known_as`: what was imported under another name.
    """
    if isinstance(node, ast.Attribute):
        before = full_name(node.value, known_as)
        return before and f"{before}.{node.attr}"
    return known_as.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def is_private(name: str) -> bool:
    if not name.startswith("torch."):
        return False
    parts = name.split(".")
    if ".".join(parts[:3]) == "torch._C._nn":
        parts = parts[3:]
    elif parts[1] == "Tensor":
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def renamed(tree: ast.AST) -> dict[str, str]:
    """By the new name, what `import ... as` gives one."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    aliases = [alias for node in imports for alias in node.names]
    return {alias.asname: alias.name for alias in aliases if alias.asname}


def private_names(tree: ast.AST, known_as: Mapping[str, str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if full_name(node):
            names = [full_name(node, known_as)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            yield from private_names(node, known_as)
            continue
        yield from filter(is_private, names)


def test_private_names_of_torch_are_in_one_file():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path, tree in SOURCES.items()
        if path.name != "_torch.py" and (names := sorted(set(private_names(tree, renamed(tree)))))
    }
    assert not found, "give them a line in nnmirror/_torch.py"


def test_each_private_name_is_used():
    home = PACKAGE / "_torch.py"
    functions = [n for n in SOURCES[home].body if isinstance(n, ast.FunctionDef)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    listed = {function.name for function in functions} | {
        target.id
        for node in ast.walk(SOURCES[home])
        if isinstance(node, ast.Assign | ast.AnnAssign) and id(node) not in inside
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    # Used by the functions of that file, or by other files.
    loaded = {n.id for f in functions for n in ast.walk(f) if isinstance(n, ast.Name)}
    used = loaded & listed
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if path == home:
                continue
            if isinstance(node, ast.Attribute) and full_name(node).startswith("_torch."):
                used.add(full_name(node).split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "_torch":
                used.update(alias.name for alias in node.names)
    assert used == listed


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports of a file, also inside functions, except those under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and full_name(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from imports(other)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from imports(child)


def import_graph() -> dict[str, set[str]]:
    """For each module of the package, the other modules that it imports."""
    modules = {name_of(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = graph[module] = set()
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for statement in imports(SOURCES[path]):
            if isinstance(statement, ast.Import):
                found.update(alias.name for alias in statement.names if alias.name in modules)
                continue
            home = statement.module or ""
            if statement.level:
                above = package.split(".")[: len(package.split(".")) - statement.level + 1]
                home = ".".join([*above, home] if home else above)
            for alias in statement.names:
                names = [f"{home}.{alias.name}", home]
                found.update([name for name in names if name in modules][:1])
    return graph


def test_no_import_cycles():
    left = import_graph()
    while free := [module for module, below in left.items() if not below & left.keys()]:
        for module in free:
            del left[module]
    assert not left, "these import one another, or what does"


def test_upcalls_are_implemented():
    """Each function declared with `upcall` is the one of the module that it names (_upcalls.py)."""
    declared = 0
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and full_name(decorator.func) == "upcall":
                    declared += 1
                    lower, home = name_of(path), ast.literal_eval(decorator.args[0])
                    found, expected = (
                        getattr(sys.modules[module], node.name) for module in (lower, home)
                    )
                    assert found is expected, f"{lower} calls {node.name} of {home}"
    assert declared
