"""A module imports from its own floor or below; torch stays out of what must start at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cmkit
from cmkit import discover

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: {"errors", "kinds", "plugins", "source", "recipe", "stop"},
    1: {"noise", "denoiser", "checkpoint", "foreign", "pictures", "weights"},
    2: {
        "compose",
        "convert",
        "train",
        "sample",
        "search",
        "edit",
        "measure",
        "figures",
    },
    3: {"run", "draw", "report", "compare", "testing", "new"},
    4: {"ui", "cli", "__init__"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
FREE_OF_TORCH = [f"cmkit.{name}" for name in sorted(FLOORS[0])] + ["cmkit", "cmkit.cli"]


def imports(path: Path):
    """Absolute names of the modules that a file imports at run time, wherever it does so."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(name: str) -> list[Path]:
    """Those of a module of the kernel, or of a package."""
    return [*(ROOT / "cmkit").glob(f"{name}.py"), *(ROOT / "cmkit" / name).glob("*.py")]


def test_every_module_of_the_kernel_has_a_floor():
    modules = {path.stem for path in (ROOT / "cmkit").glob("*.py")}
    packages = {path.parent.name for path in (ROOT / "cmkit").glob("*/__init__.py")}
    assert modules | packages == set(FLOOR_OF)


@pytest.mark.parametrize("name", sorted(FLOOR_OF))
def test_kernel_imports_nothing_above_its_floor_and_no_plugin(name):
    assert files(name)
    for target in (target for path in files(name) for target in imports(path)):
        package, _, rest = target.partition(".")
        assert package != "cmkit_std", f"{name} imports a plugin"
        inner = rest.split(".")[0]
        if package == "cmkit" and inner in FLOOR_OF:
            assert FLOOR_OF[inner] <= FLOOR_OF[name], f"{name} imports {inner} from above"


def test_built_in_parts_import_only_the_two_lowest_floors():
    for path in (ROOT / "plugins" / "cmkit_std").rglob("*.py"):
        for target in imports(path):
            package, _, rest = target.partition(".")
            inner = rest.split(".")[0]
            if package == "cmkit" and inner in FLOOR_OF:
                assert FLOOR_OF[inner] <= 1, f"{path.name} imports cmkit.{inner}"


def fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", FREE_OF_TORCH)
def test_importing_it_imports_no_torch(module):
    assert fresh_python(f"import {module}, sys; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "command", [["--help"], ["plugins"], ["plugins", "--json"], ["schema"], ["run", "none.toml"]]
)
def test_command_imports_no_torch(command):
    code = (
        "import sys, contextlib, io; from cmkit.cli import main\n"
        f"sys.argv = ['cmkit', *{command!r}]\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        "print('torch' in sys.modules)"
    )
    assert fresh_python(code) == "False"


def test_built_in_parts_are_described_without_torch():
    code = (
        "import sys, cmkit; r = cmkit.discover()\n"
        "for row in r.rows: r.load(row.kind, row.name).model_json_schema()\n"
        "print('torch' in sys.modules)"
    )
    assert fresh_python(code) == "False"


def test_public_names_resolve():
    for name in cmkit.__all__:
        assert getattr(cmkit, name) is not None


def test_nothing_unpickles():
    """Pickle runs code: torch.load and the pickle modules appear in one child process only."""
    sources = {*(ROOT / "cmkit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")}
    for path in sources - {ROOT / "cmkit" / "weights" / "pickles.py"}:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert getattr(node.value, "id", "") not in {"torch", "pickle", "joblib"}, path
        assert not {"pickle", "dill", "joblib", "shelve"} & set(imports(path)), path


def test_every_built_in_enters_by_its_entry_point():
    assert {
        row.dist for row in discover().rows if row.plugin and "cmkit_std" in row.plugin.target
    } == {"cmkit"}
