import contextlib
import json
import re
import time

import pytest

from cmkit import PluginError, RecipeError, discover
from cmkit.recipe import load, run_name, schema

TEXT = """\
name = "small"
seed = 1

[dataset]
use = "digits"

[backbone]
use = "adm"
channels = 32

[objective]
use = "ict"
end_scales = 80

[train]
steps = 10
batch = 8

[sampler]
use = "multistep"
sigmas = []

[[metric]]
use = "fidelity"
fid = true
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "ct.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path, *overrides):
    with pytest.raises((RecipeError, PluginError)) as caught:
        load(path, overrides, discover())
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path.parent) + "/", "")


def test_every_default_is_written_out_and_the_resolved_recipe_is_the_same_recipe(write):
    recipe = load(write(TEXT), [], discover())
    assert recipe.train.lr == 1e-4
    assert recipe.resolved["train"]["save_every"] == 1000
    again = load(write(recipe.toml()), [], discover())
    assert again.resolved == recipe.resolved
    assert run_name(again) == run_name(recipe)
    assert re.fullmatch(r"small-[0-9a-f]{8}", run_name(recipe))


def test_a_changed_value_changes_the_hash_and_a_written_default_does_not(write):
    def name(*overrides):
        return run_name(load(write(TEXT), overrides, discover()))

    assert name("train.lr=1e-4", "train.log_every=7", "train.keep=3") == name()
    assert name("train.lr=2e-4") != name()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "end_scales",
            "end_scale",
            "ct.toml:13: objective.end_scale: unknown key; did you mean 'end_scales'?",
        ),
        ("[train]", "[trian]", "ct.toml:15: trian: unknown key; did you mean 'train'?"),
        (
            "steps = 10",
            "steps = -1",
            "ct.toml:16: train.steps = -1: should be greater than or equal to 1",
        ),
        ("steps = 10", "steps = true", "ct.toml:16: train.steps = true: should be a valid integer"),
        ("steps = 10", 'steps = "10"', 'ct.toml:16: train.steps = "10": should be a valid integer'),
        ("steps = 10", "steps = 10.5", "ct.toml:16: train.steps = 10.5"),
        ("batch = 8", "lr = nan\nbatch = 8", "ct.toml:17: train.lr = NaN"),
        ("batch = 8", "lr = inf\nbatch = 8", "ct.toml:17: train.lr = Infinity"),
        ("batch = 8", "lr = 1e400\nbatch = 8", "ct.toml:17: train.lr = Infinity"),
        ("batch = 8", "lr = 0\nbatch = 8", "ct.toml:17: train.lr = 0: should be greater than 0"),
        ("batch = 8", "batch = 10000000000000000000000000000000", "ct.toml:17: train.batch"),
        ("batch = 8", "", "ct.toml:15: train.batch: missing key"),
        ("fid = true", "fdi = true", "ct.toml:25: metric.0.fdi: unknown key; did you mean 'fid'?"),
        ('name = "small"', 'name = "../evil"', 'ct.toml:1: name = "../evil"'),
        ("seed = 1", "seed = -1", "ct.toml:2: seed = -1"),
        ("seed = 1", "seed = 1979-05-27", "ct.toml:2: seed"),
        (
            'use = "ict"',
            'use = "itc"',
            "ct.toml:12: objective.use: no objective is called 'itc'; did you mean 'ict'?",
        ),
        ('use = "ict"', "", "ct.toml:11: objective.use: name the objective to use: "),
        ("seed = 1", "seed = ", "ct.toml:2: not TOML"),
        ("[[metric]]", "[metric]", "ct.toml:23: metric: expected a list of tables"),
        ("batch = 8", "batch = 8\naccumulate = 3", "batch 8 is not divisible by accumulate 3"),
        ("sigmas = []", "sigmas = [1.0, 2.0]", "sigmas [1.0, 2.0] must fall"),
        ("[train]", "denoiser = 3\n[train]", "objective.denoiser: unknown key"),
    ],
)
def test_a_fault_is_one_line_with_its_place_and_cure(write, old, new, said):
    assert said in refusal(write(TEXT.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stesp=5", "--set train.stesp: unknown key; did you mean 'steps'?"),
        ("train.steps=zero point", "--set train.steps"),
        ("train.steps", "expected table.key=value"),
        ("=5", "expected table.key=value"),
        ("metric.7.fid=true", "'7' is not an index from 0 to 0"),
        ("name.first=1", "'name' is a value, not a table"),
        ("train.steps=[1", "is not a TOML value"),
        ("train.steps=1\nseed=7", "is not a TOML value"),
    ],
)
def test_a_bad_override_names_itself(write, override, said):
    assert said in refusal(write(TEXT), override)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ('use = "cd"\nnum_sigmas = 1', "objective.num_sigmas = 1: should be greater than or equal"),
        ('use = "ct"\nnum_sigmas = 1', "objective.num_sigmas = 1: should be greater than or equal"),
        ('use = "ct"\nstart_scales = 9\nend_scales = 5', "end_scales 5 must not be below start"),
        ('use = "ict"\nstart_scales = 9\nend_scales = 5', "end_scales 5 must not be below start"),
        ('use = "cd"\nend_scales = 5', "end_scales 5 must not be below num_sigmas 40"),
        ('use = "ict"\np_std = 0.0', "objective.p_std = 0.0: should be greater than 0"),
        ('use = "edm"\np_std = -1.0', "objective.p_std = -1.0: should be greater than 0"),
        ('use = "cd"\ntarget_ema = 1.5', "objective.target_ema = 1.5: should be less than 1"),
        ('use = "ct"\ntarget_ema = -0.1', "objective.target_ema = -0.1: should be greater than"),
        ('use = "ct"\nstart_ema = 1.5', "objective.start_ema = 1.5: should be less than 1"),
        ('use = "ccd"\ndistance = "l3"', "objective.distance"),
        ('use = "cct"\ngap = "karras"', "objective.gap"),
        ('use = "ccd"\ndistance = "lpips"\nstop_gradient = false', "needs stop_gradient = true"),
        (
            'use = "ict"\n[denoiser]\nsigma_min = 1.0\nsigma_max = 0.5',
            "sigma_min 1.0 must be below",
        ),
    ],
)
def test_impossible_objectives_are_refused_in_one_line(write, objective, said):
    assert said in refusal(write(TEXT.replace('use = "ict"\nend_scales = 80', objective)))


def test_overrides_are_toml_values_and_reach_lists(write):
    recipe = load(
        write(TEXT),
        ["train.steps=7", "sampler.sigmas=[0.8, 0.1]", "metric.0.kid=true", "name=other"],
        discover(),
    )
    assert recipe.train.steps == 7
    assert recipe.sampler.sigmas == (0.8, 0.1)
    assert recipe.metric[0].kid is True
    assert recipe.name == "other"


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe name = 1",
        b"\xef\xbb\xbfname = 'x'",
        b"name = " + b"[" * 5000,
        b"a." * 50_000 + b"b = 1",
        b"seed = " + b"9" * 5000,
        b"x = '" + b"y" * 300_000 + b"'",
        b"a = {b = " * 40,
        b"x = " + b"[" * 3000 + b"]" * 3000,
        b"x = " + b"{a = " * 3000 + b"1" + b"}" * 3000,
        b".".join([b"a"] * 3000) + b" = 1",
        b"[" + b".".join([b"a"] * 3000) + b"]",
        b"seed = 0x" + b"f" * 10_000,
        b"name = 0x" + b"f" * 10_000,
        b"seed = " + b"9" * 10_000 + b".5",
        b"",
        b"name = 'x'\nname = 'y'",
    ],
)
def test_a_hostile_file_is_refused_at_once(write, text):
    started = time.process_time()
    assert refusal(write(text)).startswith("ct.toml")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "{a = " * 3000 + "1" + "}" * 3000])
@pytest.mark.parametrize("key", ["x", "train.steps", "metric.0.fid"])
def test_what_is_nested_too_deep_is_refused_in_an_override_too(write, key, value):
    assert "is not a TOML value" in refusal(write(TEXT), f"{key}={value}")


@pytest.mark.parametrize("depth", [30, 100, 300, 400, 470, 480, 490, 600])
def test_no_depth_that_toml_allows_is_more_than_one_line(write, depth):
    """Where the parser still succeeds, whoever looks at the value must succeed too."""
    for value in ("[" * depth + "]" * depth, "{a = " * depth + "1" + "}" * depth):
        refusal(write(TEXT.replace("batch = 8", f"batch = {value}")))
        refusal(write(TEXT), f"train.batch={value}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (".".join(["a"] * 3000) + "=1", "expected table.key=value"),
        ("x={" + ".".join(["a"] * 3000) + "=1}", "a key has at most 64 parts"),
        ("seed=0x" + "f" * 10_000, "is not a TOML value"),
        ("seed=" + "9" * 10_000, "is not a TOML value"),
        ("a..b=1", "expected table.key=value"),
    ],
    ids=["parts", "inline", "hexadecimal", "digits", "empty"],
)
def test_an_override_of_any_length_is_refused_in_a_short_line(write, override, said):
    message = refusal(write(TEXT), override)
    assert said in message
    assert len(message) < 700


UNITS = [*" \t\"'.[]{}a=,\\#-0\u00e9", "a=", "a.", "{a=", '"a".', '"\\', ',"', ",'", "a ", "[]"]
OPENINGS = ["", "x = ", "[", "x = [", "x = {a=1,", 'x = "', "x = '", "#"]


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_a_line_as_long_as_a_recipe_may_be_takes_no_time(write, unit):
    """Timed, since that is the law: an expression that goes back takes minutes for these, and the
    processor's time does not see how busy the machine is. A machine ten times slower passes."""
    for opening in OPENINGS:
        closing = opening[-1:] if opening[-1:] in ("'", '"') else ""
        line = opening + unit * ((2**18 - 400) // len(unit.encode())) + closing
        for text, overrides in ((f"{TEXT}\n{line}", []), (TEXT, [line]), (TEXT, [f"{line}=1"])):
            path = write(text)
            started = time.process_time()
            with contextlib.suppress(RecipeError):  # some of them are TOML
                load(path, overrides, discover())
            assert time.process_time() - started < 3, (opening, unit)


def test_a_comment_may_hold_any_number_of_dots(write):
    load(write(f"# {'.' * 90}\n{TEXT}"), [], discover())


def test_lines_are_those_of_toml_whatever_else_ends_a_line_elsewhere(write):
    text = TEXT.replace('name = "small"', 'name = "small"  # \x85 \u2028 \u2029')
    assert "ct.toml:16: train.steps" in refusal(write(text.replace("steps = 10", "steps = -1")))


def test_a_quoted_key_with_a_dot_has_its_line(write):
    text = TEXT.replace("[train]", "[train]\n'a.b' = 1")
    assert "ct.toml:16: train.a.b: unknown key" in refusal(write(text))


def test_a_folder_and_a_missing_file_are_refused(tmp_path, write):
    write(TEXT)
    assert "not a file" in refusal(tmp_path)
    assert "did you mean" in refusal(tmp_path / "cd.toml")


def test_inline_tables_have_lines_too(write):
    text = 'name = "x"\ndataset = { use = "digits" }\nbackbone = { use = "adm", chanels = 32 }\n'
    assert "ct.toml:3: backbone.chanels: unknown key" in refusal(write(text))
    text = text.replace("chanels", "channels") + (
        'metric = [\n  { use = "fidelity" },\n  { use = "fidelity", fdi = true },\n]\n'
    )
    assert "ct.toml:6: metric.1.fdi" in refusal(write(text))


def test_schema_accepts_the_recipe_and_knows_every_part():
    document = schema(discover())
    json.dumps(document, allow_nan=False)
    uses = {
        document["$defs"][option["$ref"].split("/")[-1]]["properties"]["use"]["const"]
        for option in document["properties"]["objective"]["oneOf"]
    }
    assert uses == set(discover().names("objective"))
    assert document["additionalProperties"] is False
    assert "description" in document["$defs"]["train"]["properties"]["steps"]


def test_every_letter_dropped_from_a_key_is_refused_with_the_right_hint(write):
    """The nearest right key is named for at least 95 % of single deletions."""
    hits = total = 0
    for key in ("steps", "batch", "end_scales", "channels", "sigmas"):
        for i in range(len(key)):
            wrong = key[:i] + key[i + 1 :]
            message = refusal(write(re.sub(rf"^{key} =", f"{wrong} =", TEXT, flags=re.M)))
            total += 1
            hits += f"did you mean '{key}'" in message
    assert hits / total >= 0.95
