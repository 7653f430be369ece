import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import embax

REPOSITORY = Path(__file__).parents[1]
PACKAGE = Path(embax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = ("flax", "optax", "orbax", "jaxtyping", "beartype", "pandas", "google.protobuf")


def run(code: str) -> str:
    """What `code` prints in an interpreter of its own, where every warning is an error."""
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_tests_run_against_the_installed_package():
    assert REPOSITORY / "src" not in PACKAGE.parents
    assert (PACKAGE / "py.typed").is_file()


def test_import_needs_jax_and_numpy_alone():
    run(f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import embax, embax._types")


def test_import_brings_in_no_extra():
    loaded = run("import sys, embax; print(*(name.partition('.')[0] for name in sys.modules))").split()
    assert not {"flax", "optax", "orbax", "pandas"} & set(loaded)


def test_import_starts_no_backend():
    """So that a user's JAX configuration still counts after it."""
    run("import jax, embax; jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count('cpu') == 3")


def test_shapes_mean_nothing_without_jaxtyping():
    run(
        "import sys; sys.modules['jaxtyping'] = None\n"
        "from embax._types import Array, Float, PyTree\n"
        "assert Float[Array, 'vocab dim'] is Array and PyTree[Array] is object"
    )


def test_version():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert embax.__version__ == importlib.metadata.version("embax") == declared


def module_id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_no_private_jax(path):
    assert not re.search(r"\bjax\._src\b|from jax import _src", path.read_text())


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=module_id)
def test_init_modules_only_export(path):
    """`from embax._x import Y as Y`, the form that type checkers take for an export, and nothing else."""
    docstring, *statements = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr), "a docstring comes first"
    for statement in statements:
        assert isinstance(statement, ast.ImportFrom), ast.unparse(statement)
        assert statement.level == 0, ast.unparse(statement)
        assert statement.module.partition(".")[0] == "embax", ast.unparse(statement)
        assert all(alias.asname == alias.name for alias in statement.names), ast.unparse(statement)


def test_public_names_are_those_of_the_init_module():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    exported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = {name for name in run("import embax; print(*vars(embax))").split() if not name.startswith("_")}
    submodules = {name for name in public if importlib.util.find_spec(f"embax.{name}")}
    assert public - submodules == exported - submodules - {"__version__"}


def test_no_cpp_sources_are_installed():
    assert not [file for file in importlib.metadata.files("embax") if file.suffix in {".cc", ".h", ".txt"}]
