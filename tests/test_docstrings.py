"""Every public name has a docstring with an example, and every example of a docstring runs."""

import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
import types

import pytest
import torch

import tsm_jit

torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install 'tsm-jit[test]'")


def modules() -> list[types.ModuleType]:
    """The modules of the package, without those that need an extra which is not installed."""
    names = [name for _, name, _ in pkgutil.walk_packages(tsm_jit.__path__, "tsm_jit.")]
    imported = [tsm_jit]
    for name in names:
        if not name.endswith(("__main__", ".worker")):
            try:
                imported.append(importlib.import_module(name))
            except ModuleNotFoundError as error:
                if str(error.name).startswith("tsm_jit"):
                    raise
    return imported


def docstrings() -> dict[str, str]:
    """The docstrings of modules, their classes and functions, and the methods of these classes, by qualified name."""
    texts = {}
    for module in modules():
        here = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        methods = [member for value in here if inspect.isclass(value) for member in vars(value).values()]
        for value in (module, *here, *methods):
            if (inspect.isclass(value) or inspect.isroutine(value) or value is module) and value.__doc__:
                texts[f"{module.__name__}: {getattr(value, '__qualname__', 'module')}"] = inspect.cleandoc(
                    value.__doc__
                )
    return texts


def public(module: types.ModuleType, prefix: str = "tsm_jit") -> dict[str, object]:
    """The classes and functions that a user may name, by the name to type."""
    values = {}
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            values |= public(value, f"{prefix}.{name}")
        elif inspect.isclass(value) or inspect.isroutine(value):  # not aliases of types
            values[f"{prefix}.{name}"] = value
    return values


DOCSTRINGS, PUBLIC = docstrings(), public(tsm_jit)


@pytest.mark.parametrize("name", [name for name, text in DOCSTRINGS.items() if "Example::" in text])
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"Example::\n((?:\n|[ ]+.*\n?)+)", DOCSTRINGS[name])
    exec(
        textwrap.dedent(example),
        {"functools": functools, "torch": torch, "torchvision": torchvision, "tsm_jit": tsm_jit},
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_and_describes_its_parameters(name):
    text = inspect.getdoc(PUBLIC[name])
    assert "Example::" in text
    if inspect.isfunction(PUBLIC[name]):
        for parameter in inspect.signature(PUBLIC[name]).parameters:
            assert re.search(rf"^ +(\w+, )*{parameter}(, \w+)*: ", text, re.MULTILINE), parameter
