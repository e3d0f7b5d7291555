"""A module imports from its own room or from rooms below; torch stays out of what must start at
once."""

import ast
import subprocess
import sys
from pathlib import Path

import cmkit
from cmkit import discover

ROOT = Path(__file__).parent.parent
ROOMS = """
errors values stop
noise rng denoiser traits models kinds batches plugins functional
files hub device pictures tensors checkpoint runs.places runs.folder rescaling latents
recipe weights plan
sample measure train search edit
report runs convert export mixing smoke
suite
testing new api cli __main__
""".split()  # noqa: SIM905 - rows are storeys
"""Modules and packages of the kernel, bottom to top: each imports from itself and what is before
it, types and imports inside functions included."""
FOR_PLUGINS = ROOMS[: ROOMS.index("recipe")]
FREE_OF_TORCH = """
errors values stop kinds plugins files hub runs.places runs.folder rescaling recipe report export
smoke suite api cli
""".split()  # noqa: SIM905


def imports(path: Path):
    """Absolute names of the modules that a file imports, wherever and for whatever it does so."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    """The module that a file is, as others import it."""
    home = ROOT / "plugins" if "plugins" in path.parts else ROOT
    return ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The longest entry of ROOMS that holds a module of the kernel."""
    inner = module.removeprefix("cmkit.")
    held = [room for room in ROOMS if inner == room or inner.startswith(f"{room}.")]
    return max(held, key=len, default=None) if module.startswith("cmkit.") else None


KERNEL = [p for p in sorted((ROOT / "cmkit").rglob("*.py")) if "templates" not in p.parts]
BUILT_IN = sorted((ROOT / "plugins" / "cmkit_std").rglob("*.py"))


def test_every_module_of_the_kernel_has_a_room_and_every_room_a_module():
    found = {room_of(name_of(path)) for path in KERNEL if name_of(path) != "cmkit"}
    assert found == set(ROOMS)


def test_kernel_imports_nothing_above_its_room_and_no_plugin():
    for path in KERNEL:
        room = room_of(name_of(path))
        for target in imports(path):
            assert target.partition(".")[0] != "cmkit_std", f"{path} imports a plugin"
            other = room_of(target)
            if room and other:
                assert ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {target}"


def test_built_in_parts_import_only_what_is_made_for_plugins():
    for path in BUILT_IN:
        for target in imports(path):
            assert room_of(target) in {None, *FOR_PLUGINS}, f"{path} imports {target}"


def test_no_modules_import_each_other_in_a_circle():
    """Types and imports inside functions included; a package may import from its own modules."""
    files = {name_of(path): path for path in KERNEL + BUILT_IN}
    needs = {
        name: {t for t in imports(path) if t in files and not f"{name}.".startswith(f"{t}.")}
        for name, path in files.items()
    }
    while free := {name for name, targets in needs.items() if not targets & needs.keys()}:
        needs = {name: targets for name, targets in needs.items() if name not in free}
    assert not needs


def fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_what_must_start_at_once_imports_no_torch():
    """Modules, commands that list or check, and the description of every built-in part."""
    code = f"""
import contextlib, importlib, io, sys
for name in {FREE_OF_TORCH!r}:
    importlib.import_module(f"cmkit.{{name}}")
    assert "torch" not in sys.modules, name
from cmkit.cli import main
for command in (["--help"], ["plugins"], ["plugins", "--json"], ["schema"], ["run", "none.toml"]):
    sys.argv = ["cmkit", *command]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    assert "torch" not in sys.modules, command
import cmkit
registry = cmkit.discover()
for row in registry.rows:
    registry.load(row.kind, row.name).model_json_schema()
    assert "torch" not in sys.modules, row
print("done")
"""
    assert fresh_python(code) == "done"


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
    assert "import_module" not in (ROOT / "cmkit" / "checkpoint.py").read_text("utf-8")


def test_every_built_in_enters_by_its_entry_point():
    assert {
        row.dist for row in discover().rows if row.plugin and "cmkit_std" in row.plugin.target
    } == {"cmkit"}


def test_no_package_gives_a_name_of_its_own_modules_to_something_else():
    """`from cmkit.room import name` would then mean one or the other by the order of imports."""
    for init in (path for path in KERNEL if path.name == "__init__.py"):
        names = {
            a.asname or a.name
            for n in ast.walk(ast.parse(init.read_text("utf-8")))
            if isinstance(n, ast.ImportFrom)
            for a in n.names
        }
        assert not names & {path.stem for path in init.parent.glob("*.py")}, init
