"""The imports of the package: no circles, and no layer of those in CONTRIBUTING.md imports a higher one."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
LINE = re.search(r"^cli, .* -> _checks$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[0]
LAYERS = {name: k for k, layer in enumerate(reversed(LINE.split(" -> "))) for name in layer.split(", ")}


def modules() -> dict[str, Path]:
    """The files of the package by the names of their modules."""
    files = {}
    for path in (ROOT / "tsm_jit").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return files


def graph() -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports, also those that functions import."""
    files = modules()
    imported: dict[str, set[str]] = {name: set() for name in files}
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported[module] |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported[module] |= {name if name in files else node.module for name in names}
        imported[module] &= files.keys()
    return imported


def layer(module: str, imported: dict[str, set[str]]) -> int:
    """The layer of a module. One that is not listed, such as a public path, belongs to the highest that it imports."""
    top = module.split(".")[1:2]
    if top and top[0] in LAYERS:
        return LAYERS[top[0]]
    return max((layer(each, imported) for each in imported[module]), default=0)


def test_no_circle():
    list(TopologicalSorter(graph()).static_order())  # raises CycleError, which names the modules


def test_no_layer_imports_a_higher_one():
    imported = graph()
    assert set(LAYERS) <= {module.split(".")[1] for module in imported if "." in module}
    for module, names in imported.items():
        for name in names:
            assert layer(name, imported) <= layer(module, imported), f"{module} imports {name}"
