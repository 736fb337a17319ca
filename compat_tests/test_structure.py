"""How the package hangs together: what it takes of torch's private names, and who imports whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import nnmirror

PACKAGE = Path(nnmirror.__file__).parent
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}


def full_name(node: ast.AST) -> str:
    """`torch._C._nn.linear` of the expression that reads so; empty for any other expression."""
    if isinstance(node, ast.Attribute):
        before = full_name(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_private(name: str) -> bool:
    if not name.startswith("torch."):
        return False
    parts = name.split(".")
    if ".".join(parts[:3]) == "torch._C._nn":
        parts = parts[3:]
    elif parts[1] == "Tensor":
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if full_name(node):
            names = [full_name(node)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            yield from private_names(node)
            continue
        yield from filter(is_private, names)


def test_private_names_of_torch_are_in_one_file():
    found = {
        str(path.relative_to(PACKAGE)): names
        for path, tree in SOURCES.items()
        if path.name != "_torch.py" and (names := sorted(set(private_names(tree))))
    }
    assert not found, "give them a line in nnmirror/_torch.py"


def test_each_of_them_is_used():
    home = PACKAGE / "_torch.py"
    listed = {
        target.id
        for node in ast.walk(SOURCES[home])
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    used = set()
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if path == home:
                continue
            if isinstance(node, ast.Attribute) and full_name(node).startswith("_torch."):
                used.add(full_name(node).split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "_torch":
                used.update(alias.name for alias in node.names)
    assert used == listed
