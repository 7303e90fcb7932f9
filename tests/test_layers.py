"""The layers of docs/decisions/0002-layers.md, held against the imports of every file."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import graftory
from graftory.hub import Hub
from tests.hub_samples import lora

PACKAGE = Path(graftory.__file__).parent
CORE = ("lazy", "errors", "printable", "schema", "config", "settings", "progress", "versions", "adapter")
"""In the order in which they may import each other."""
BELOW_COMPOSE = ("core", "hub", "adapters", "kernels", "data", "training")
BELOW_COMMANDS = (*BELOW_COMPOSE, "compose", "continual", "demo")
LAYERS: dict[str, tuple[str, ...]] = {
    "core": (),
    "kernels": (),
    "hub": ("core",),
    "serving": ("core", "hub"),
    "data": ("core",),
    "adapters": ("core", "kernels"),
    "training": ("core", "adapters", "data"),
    "compose": BELOW_COMPOSE,
    "continual": (*BELOW_COMPOSE, "compose"),
    "demo": BELOW_COMMANDS,
    "commands": (*BELOW_COMMANDS, "serving"),
    "cli": (*BELOW_COMMANDS, "commands"),
    "__main__": ("cli",),
    "package": BELOW_COMMANDS,
}
KERNELS_MAY_USE = {"torch", "triton"}
TORCH_FREE = (
    "graftory",
    *(f"graftory.{name}" for name in CORE),
    "graftory.data",
    "graftory.cli",
    "graftory.hub.*",
    "graftory.commands.*",
    "graftory.serving",
    "graftory.serving.cache",
)
HEAVY = (
    *("torch", "transformers", "peft", "datasets", "matplotlib", "rich", "scipy", "sklearn"),
    *("huggingface_hub", "fsspec", "cryptography", "networkx"),
)


def layer_of(module: str) -> str:
    """The row of the table that a dotted name of ours belongs to."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    return "core" if parts[1] in CORE else parts[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as absolute dotted names."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (imported_from(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def imported_from(module: str, name: str) -> str:
    """Where `from module import name` leads: the names that graftory re-exports count as their own modules."""
    if module != "graftory":
        return module
    if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file():
        return f"graftory.{name}"
    return graftory._LAZY.get(name, "graftory.errors")


def violations(path: Path, source: str) -> list[str]:
    """What a file imports against the table."""
    layer = layer_of(module_name(path))
    found = []
    for module in imports_of(path, source):
        if module.split(".")[0] == "graftory":
            target = layer_of(module)
            allowed = target == layer or target in LAYERS[layer]
        else:
            top = module.split(".")[0]
            allowed = layer != "kernels" or top in KERNELS_MAY_USE or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"{module_name(path)} ({layer}) imports {module}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_belongs_to_a_layer() -> None:
    unknown = {layer_of(module_name(path)) for path in FILES} - set(LAYERS)
    assert not unknown, f"add {unknown} to the table of tests/test_layers.py and docs/decisions/0002-layers.md"


def test_imports_follow_the_layers() -> None:
    assert [line for path in FILES for line in violations(path, path.read_text())] == []


def test_core_imports_only_what_comes_before_it() -> None:
    for position, name in enumerate(CORE):
        folder = PACKAGE / name
        for path in folder.glob("*.py") if folder.is_dir() else [PACKAGE / f"{name}.py"]:
            ours = {module for module in imports_of(path, path.read_text()) if module.startswith("graftory")}
            # files of a folder may import each other
            others = {module for module in ours if module.split(".")[1] != name}
            assert others <= {f"graftory.{before}" for before in CORE[:position]}, path


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("hub/x.py", "from graftory.training import train"),
        ("hub/x.py", "def f():\n    import graftory.adapters.lora"),
        ("hub/x.py", "from graftory import merge"),
        ("hub/x.py", "from .. import compose"),
        ("hub/x.py", "from ..compose import merge"),
        ("hub/x.py", "import importlib\nimportlib.import_module('graftory.compose')"),
        ("commands/x.py", "from graftory.cli import main"),
        ("continual/x.py", "from graftory import cli"),
        ("errors.py", "from graftory.hub import Hub"),
        ("kernels/x.py", "from graftory.errors import ShapeError"),
        ("kernels/x.py", "import numpy"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert len(violations(PACKAGE / file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("hub/x.py", "from graftory.errors import ConfigError"),
        ("hub/x.py", "from graftory import __version__"),
        ("hub/x.py", "from .store import Store"),
        ("kernels/x.py", "import torch.nn.functional, triton, math"),
        ("commands/x.py", "def f():\n    from graftory.training import train"),
    ],
)
def test_a_right_import_is_allowed(file: str, source: str) -> None:
    assert violations(PACKAGE / file, source) == []


def test_what_must_be_light_imports_nothing_heavy() -> None:
    """Each module is imported in turn in one fresh interpreter; the first that brings something heavy is named."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [module for module in sys.argv[1].split(',') if module in sys.modules]\n"
        "    if heavy: sys.exit(f'importing {name} brings {heavy}')\n"
    )
    names = [name for pattern in TORCH_FREE for name in expand(pattern)]
    done = subprocess.run([sys.executable, "-c", code, ",".join(HEAVY), *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_needs_no_model_waits_for_none(tmp_path: Path) -> None:
    """transformers takes three times as long to import as torch, its Trainer, peft and scikit-learn as long again."""
    hub = Hub.create(tmp_path)
    for seed, name in enumerate(("one", "two")):
        hub.put(name, lora(seed))
    code = (
        "import sys\n"
        "from graftory.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'transformers', 'peft', 'sklearn', 'ot', 'torch._dynamo'} & sys.modules.keys()\n"
        "sys.exit(f'{sys.argv[1]} brings {heavy}' if heavy else 0)\n"
    )
    for command in (
        ["merge", "one", "two", "--name", "both"],
        ["compress", "one", "--drop-layers", "1", "--name", "small"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_names_of_a_package_lead_where_they_are_defined() -> None:
    """And none of them is hidden by a submodule, once that is imported."""
    for name in (
        "graftory",
        "graftory.adapters",
        "graftory.compose",
        "graftory.compose.merge.tuning",
        "graftory.training",
    ):
        package = importlib.import_module(name)
        submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        for public in package.__all__:
            value = getattr(package, public)
            assert not isinstance(value, ModuleType), public
            assert public not in submodules or public in vars(package), public
        with pytest.raises(AttributeError, match=f"'{name}' has no attribute 'nothing'"):
            package.nothing  # noqa: B018


def expand(pattern: str) -> list[str]:
    """`graftory.hub.*` is the package and all that lies in it."""
    if not pattern.endswith(".*"):
        return [pattern]
    folder = PACKAGE.joinpath(*pattern.split(".")[1:-1])
    return sorted(module_name(path) for path in folder.rglob("*.py"))
