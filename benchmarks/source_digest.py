"""Is a figure that was kept still that of the code as it is?"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

_ROOT = Path(__file__).parent.parent


def source_digest(modules: Sequence[str], *, within: Sequence[str]) -> str:
    """What modules compute, in sixteen hex digits: theirs, of the modules that they import, and of torch's version.

    Comments, docstrings and layout do not count.

    Args:
        modules: by full name, to begin with.
        within: imports are followed into modules whose name starts with one of these.
    """
    found = {name: _meaning(path) for name, path in _reached(list(modules), tuple(within))}
    text = "\n".join([torch.__version__, *(f"{name} {found[name]}" for name in sorted(found))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reached(waiting: list[str], within: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = _ROOT / (name.replace(".", "/") + ".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        yield name, path
        waiting += [one for one in _imports(path) if one.startswith(within)]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _meaning(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body.pop(0)
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


__all__ = ["source_digest"]
