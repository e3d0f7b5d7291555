"""The registry: many small packages, some of them hostile, made as importable modules."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from cmkit import PluginError, discover
from cmkit.plugins import register

GOOD = """
import cmkit
@cmkit.hookimpl
def cmkit_register():
    return [cmkit.Plugin("objective", "{name}", "{target}", "a test")]
"""


class Dist:
    def __init__(self, name, version="1.0"):
        self.name, self.version = name, version


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a module and returns its entry point, as if a wheel had brought both."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(dist, source, **fields):
        module = dist.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(source.format(**fields) if fields else source)
        entry = EntryPoint(dist, module, "cmkit")
        vars(entry)["dist"] = Dist(dist)
        return entry

    return make


def test_a_strangers_part_is_listed_and_loaded(package):
    entry = package("my-pkg", GOOD, name="mine", target="cmkit_std.objectives.ict:ICT")
    registry = register([entry])
    assert [row.qualified for row in registry.rows] == ["my-pkg:mine"]
    assert registry.load("objective", "mine").__name__ == "ICT"
    assert registry.load("objective", "my-pkg:mine").__name__ == "ICT"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        (
            "import cmkit\n@cmkit.hookimpl\ndef cmkit_regster(): return []",
            "did you mean 'cmkit_register'",
        ),
        (
            "import cmkit\n@cmkit.hookimpl\ndef cmkit_register(x): return []",
            "PluginValidationError",
        ),
        (
            "import cmkit\n@cmkit.hookimpl\ndef cmkit_register(): return ['adm']",
            "must return cmkit.Plugin",
        ),
        ("import cmkit\n@cmkit.hookimpl\ndef cmkit_register(): 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_broken_package_is_a_row_and_the_others_work(package, source, reason):
    good = package("good-pkg", GOOD, name="fine", target="cmkit_std.objectives.ict:ICT")
    registry = register([package("bad-pkg", source), good])
    broken = [row for row in registry.rows if row.broken]
    assert [row.dist for row in broken] == ["bad-pkg"]
    assert reason in broken[0].broken
    assert registry.load("objective", "fine")
    with pytest.raises(PluginError, match="broken packages: bad-pkg"):
        registry.load("metric", "unknown")


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        ('cmkit.Plugin("widget", "x", "a:b", "")', "unknown kind 'widget'"),
        ('cmkit.Plugin("metric", "x", "a:b", "", api=99)', "written for cmkit API 99, this is 1"),
        ('cmkit.Plugin("metric", "x", "a.b", "")', "is not 'module:Class'"),
    ],
)
def test_a_part_that_cannot_work_is_marked_before_it_is_imported(package, plugin, reason):
    source = f"import cmkit\n@cmkit.hookimpl\ndef cmkit_register(): return [{plugin}]"
    (row,) = register([package("odd-pkg", source)]).rows
    assert reason in row.broken


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:X", "cannot be imported: ModuleNotFoundError"),
        ("cmkit_std.objectives.ict:Nothing", "AttributeError"),
        ("cmkit_std.samplers.multistep:Multistep", "is not a cmkit.Objective"),
        ("cmkit.kinds:Objective", "lacks loss, phase"),
    ],
)
def test_a_target_is_judged_when_it_is_named(package, target, reason):
    registry = register([package("late-pkg", GOOD, name="late", target=target)])
    assert registry.rows[0].broken is None
    with pytest.raises(PluginError, match=reason) as caught:
        registry.load("objective", "late")
    assert "late-pkg 1.0" in str(caught.value)


def test_a_clash_makes_the_bare_name_an_error_that_lists_the_qualified_ones(package):
    target = "cmkit_std.objectives.ict:ICT"
    entries = [package(name, GOOD, name="same", target=target) for name in ("one-pkg", "two-pkg")]
    for order in (entries, entries[::-1]):
        registry = register(order)
        assert registry.names("objective") == ["one-pkg:same", "two-pkg:same"]
        assert registry.load("objective", "two-pkg:same")
        with pytest.raises(PluginError, match="say 'one-pkg:same' or 'two-pkg:same'"):
            registry.load("objective", "same")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(PluginError, match="no objective is called 'itc'; did you mean 'ict'"):
        discover().load("objective", "itc")


@pytest.mark.slow
def test_a_manifest_that_imports_torch_is_told_so(package):
    code = f"""
import sys; sys.path.insert(0, {str(package("slow-pkg", "import torch").name)!r})
from importlib.metadata import EntryPoint
sys.path.insert(0, {sys.path[0]!r})
from cmkit.plugins import register
class D: name, version = "slow-pkg", "1.0"
e = EntryPoint("slow-pkg", "slow_pkg", "cmkit"); vars(e)["dist"] = D
print(register([e]).rows[0].broken)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "imports torch" in done.stdout
