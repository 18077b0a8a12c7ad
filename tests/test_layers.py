"""Modules import only from lower layers, and the core does not need the packages for data and logs."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "larp_jax"

# Modules and subpackages of larp_jax from the top layer down. A module may import from lower layers and from its own
# subpackage, not from others of its layer. "larp_jax" is the __init__ of the package.
LAYERS = (
    {"cli"},
    {"tools"},
    {"training", "larp_jax"},
    {"evaluation"},
    {"inference"},
    {"api"},
    {"budgets"},
    {"weights", "data"},
    {"runtime", "npz"},
    {"models", "files"},
    {"config", "metrics", "storage", "hub"},
    {"state", "errors", "version", "torch_reader"},
)
HEIGHT = {name: -i for i, layer in enumerate(LAYERS) for name in layer}

# Modules, and subpackages with all their modules, that can be imported without the packages in NOT_CORE.
CORE = {"api", "config", "errors", "files", "hub", "metrics", "models", "npz", "state", "storage", "tools.flops"}
CORE |= {"training.losses", "training.optim", "evaluation.frechet", "weights.export", "weights.fingerprint"}
CORE |= {"weights.importing", "weights.i3d", "weights.lpips", "weights.networks", "weights.released"}
CORE |= {"weights.released_config", "weights.teachers", "weights.tensors", "runtime.rng"}
NOT_CORE = ["tensorflow", "tensorflow_datasets", "clu", "av", "grain"]


def dotted(path: pathlib.Path) -> str:
    """`larp_jax.models.prior` for its file; a package for its __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def group(module: str) -> str:
    """The name of LAYERS that a module belongs to."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "larp_jax"
    return "cli" if name == "__main__" else name


def imports(name: str, source: str) -> set[str]:
    """Modules of larp_jax that the source of a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write imports from larp_jax in full"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return {module for module in found if module.split(".")[0] == "larp_jax"}


def points_up(importer: str, imported: str) -> bool:
    importer, imported = group(importer), group(imported)
    return importer != imported and HEIGHT[imported] >= HEIGHT[importer]


def test_every_module_has_its_layer():
    unplaced = sorted({group(module) for module in MODULES} - HEIGHT.keys())
    assert not unplaced, f"place {unplaced} in LAYERS of {__file__}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    wrong = [name for name in imports(module, MODULES[module].read_text("utf-8")) if points_up(module, name)]
    assert not wrong, f"{module} imports {wrong}, which are not below it"


def test_the_rule_sees_every_way_to_import():
    source = """
import larp_jax.cli
def f():
    from larp_jax import errors, metrics
    from larp_jax.models import prior
"""
    found = imports("larp_jax.training.losses", source)
    assert found == {"larp_jax.cli", "larp_jax.metrics", "larp_jax.errors", "larp_jax.models.prior"}
    assert {name for name in found if points_up("larp_jax.training.losses", name)} == {"larp_jax.cli"}


def test_functions_and_modules_are_short():
    for path in MODULES.values():
        source = path.read_text("utf-8")
        assert source.count("\n") <= 600, path
        functions = [x for x in ast.walk(ast.parse(source)) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef))]
        assert not [f.name for f in functions if f.end_lineno - f.lineno >= 80], path


def defined_twice(source: str) -> list[str]:
    """Names of functions and classes that are defined twice in one module, class or function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        # decorated definitions may share a name: setters of properties, overloads
        names = [x.name for x in getattr(node, "body", ()) if isinstance(x, kinds) and not x.decorator_list] \
            if isinstance(node, (ast.Module, *kinds)) else []  # fmt: skip
        found += sorted({name for name in names if names.count(name) > 1})
    return found


def test_nothing_is_defined_twice():
    for path in [*MODULES.values(), *sorted(pathlib.Path(__file__).parent.rglob("*.py"))]:
        assert not defined_twice(path.read_text("utf-8")), path


def test_the_rule_sees_double_definitions():
    assert defined_twice("def f(): pass\ndef g(): f()\ndef f(): pass\n") == ["f"]
    assert defined_twice("class A:\n  def f(self): pass\n  def f(self): pass\n") == ["f"]
    setter = "  @x.setter\n  def x(self, y): pass\n"
    assert not defined_twice(f"class A:\n  @property\n  def x(self): pass\n{setter}\ndef x(): pass\n")


def import_without(blocked: list[str], modules: list[str]) -> subprocess.CompletedProcess:
    """Imports modules in a fresh interpreter in which the blocked packages seem not to be installed."""
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker)
for name in {modules!r}:
    importlib.import_module(name)
"""
    return subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)


def test_the_core_imports_without_the_packages_for_data_and_logs():
    in_core = lambda module: any(f"{module}.".startswith(f"larp_jax.{name}.") for name in CORE)  # noqa: E731
    modules = ["larp_jax", *filter(in_core, MODULES)]
    assert len(modules) > len(CORE) and {"larp_jax.training.losses", "larp_jax.models.tokenizer"} <= set(modules)
    result = import_without(NOT_CORE, modules)
    assert result.returncode == 0, result.stderr


def test_the_doctor_can_be_imported_if_jax_and_flax_are_broken():
    result = import_without([*NOT_CORE, "jax", "flax"], ["larp_jax.tools.doctor"])
    assert result.returncode == 0, result.stderr
