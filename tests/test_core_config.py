"""Settings: recipe, flags, defaults, conversion, and what a mistake says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from transformers import TrainingArguments

from llava.core.config import build, leaves, load_yaml, merge, parse, setting, to_dict


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How the weights move."""

    lr: float = setting(1e-3, "peak learning rate, 100% of it")
    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training."""

    name: str
    lr: float | None = None
    freeze: list[str] = setting([])
    optim: Optim = setting(Optim(lr=0.5))


@dataclass(frozen=True, kw_only=True)
class Training:
    """A whole training."""

    data: Path = setting(help="the folder of images")
    steps: int = 10
    is_balanced: bool = setting(True, "weigh classes")
    use_cpu: bool = False
    save_model_path: str | None = None
    sizes: list[int] = setting([32, 64])
    optim: Optim = setting(Optim(lr=5e-4))
    fallback: Optim | None = None
    model: dict[str, Any] = setting({"fusion": "none", "dim": 8})
    phases: list[Phase] = setting([])
    named: Mapping[str, Phase] = setting({})


@dataclass(frozen=True, kw_only=True)
class Switched:
    """A group that may be switched off."""

    optim: Optim | None = setting(Optim(lr=5.0))


def run(*argv: str) -> Training:
    return parse(Training, ["--data", "x", *argv])


def message(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(Training, argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: from_recipe\nsteps: 7\noptim: {lr: 1e-2}\nphases: [{name: a}, {name: b, lr: 3}]\n")
    return path


def test_defaults_are_copied_for_each_instance() -> None:
    first, second = run(), run()
    assert first == Training(data=Path("x")) == second
    assert first.sizes is not second.sizes and first.model is not second.model


def test_flags_reach_nested_settings_and_are_converted() -> None:
    config = run("--optim.lr", "1e-2", "--optim.name=sgd", "--optim.betas", "0.5", "0.6", "--steps", "3")
    assert config.optim == Optim(lr=0.01, name="sgd", betas=(0.5, 0.6))
    assert config.steps == 3 and isinstance(config.steps, int)


def test_a_recipe_comes_first_and_flags_override_it(recipe: Path) -> None:
    config = parse(Training, ["--config", str(recipe), "--steps", "9", "--phases.1.lr", "1e-3"])
    assert (config.data, config.steps, config.optim.lr) == (Path("from_recipe"), 9, 0.01)
    assert [(p.name, p.lr) for p in config.phases] == [("a", None), ("b", 0.001)]
    assert parse(Training, [], recipe=recipe).steps == 7


def test_a_further_recipe_lies_over_the_first(recipe: Path, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("steps: 8\noptim: {name: sgd}\n")
    words = ["--config", str(recipe), f"--config={over}"]
    config = parse(Training, words)
    assert (config.data, config.steps, config.optim) == (Path("from_recipe"), 8, Optim(lr=0.01, name="sgd"))
    assert parse(Training, [*words, "--steps", "9"]).steps == 9
    assert parse(Training, ["--data", "x", "--config", str(over)], recipe=recipe).optim.lr == 5e-4  # not the default


def test_a_group_given_in_part_keeps_the_rest_of_its_own_default(recipe: Path) -> None:
    assert run("--optim.name", "sgd").optim == Optim(lr=5e-4, name="sgd")
    assert build(Training, {"data": "x", "optim": {"name": "sgd"}}).optim.lr == 5e-4
    assert run("--fallback.name", "sgd").fallback == Optim(name="sgd")
    phases = build(Training, {"data": "x", "phases": [{"name": "a", "optim": {"name": "sgd"}}]}).phases
    assert phases[0].optim == Optim(lr=0.5, name="sgd")


def test_a_flag_switches_an_optional_group_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert build(Switched, {}).optim == Optim(lr=5.0)
    assert parse(Switched, ["--optim", "none"]).optim is None
    assert parse(Switched, ["--optim.name", "sgd"]).optim == Optim(lr=5.0, name="sgd")
    for words in (["--optim", "sgd"], ["--optim", "none", "--optim.lr", "1"]):
        with pytest.raises(SystemExit):
            parse(Switched, words)
        assert "group of settings" in capsys.readouterr().err


def test_flags_step_into_free_mappings_and_keep_what_they_do_not_name() -> None:
    assert run("--model.fusion", "bridge").model == {"fusion": "bridge", "dim": 8}
    assert run("--model.blocks", "1", "2", "--steps", "2").model["blocks"] == ["1", "2"]
    assert run("--model.use-text", "--steps", "2").model["use_text"] == "true"
    assert run("--model.a.b=c").model["a"] == {"b": "c"}


def test_dashes_mean_underscores_in_names_only() -> None:
    assert run("--save-model-path", "my-model").save_model_path == "my-model"
    assert run("--save-model-path=a-b=c").save_model_path == "a-b=c"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use_cpu"], True),
        (["--use_cpu", "True"], True),
        (["--use-cpu=false"], False),
        (["--use_cpu", "no"], False),
        (["--use_cpu", "--steps", "3"], True),
    ],
)
def test_boolean_flags_with_and_without_a_value(words: list[str], expected: bool) -> None:
    assert run(*words).use_cpu is expected


def test_lists_and_none() -> None:
    assert run("--sizes", "1", "2").sizes == [1, 2]
    assert run("--sizes").sizes == []
    assert build(Training, {"data": "x", "save_model_path": "none"}).save_model_path is None
    assert build(Phase, {"name": "a", "freeze": "backbone"}).freeze == ["backbone"]
    assert build(Phase, {"name": "none"}).name == "none"


def test_what_is_built_gives_itself_back_through_json() -> None:
    config = run("--phases", "--fallback.lr", "2", "--model.x", "1")
    config = build(Training, {**to_dict(config), "phases": [{"name": "a"}], "named": {"p": {"name": "b"}}})
    assert config.named["p"] == Phase(name="b")
    assert build(Training, json.loads(json.dumps(to_dict(config)))) == config
    assert build(Training, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What to ask of which files."""

    paths: list[Path] = setting(help="files or folders", positional=True)
    json: bool = False
    question: str = "Real?"


@pytest.mark.parametrize(
    "words", [["a.png", "b.png", "--json"], ["--json", "a.png", "b.png"], ["a.png", "--json", "b.png"]]
)
def test_positional_settings_stand_anywhere(words: list[str]) -> None:
    assert parse(Asking, words) == Asking(paths=[Path("a.png"), Path("b.png")], json=True)


def test_a_missing_positional_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Asking, ["--question", "x"])
    assert "Missing setting 'paths'; give it in the recipe or on the command line." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Asking, ["a.png", "--paths", "b.png"])
    assert "Unknown argument '--paths'. Give its value without a name." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 1}, ["Unknown setting 'stepz'", "Did you mean 'steps'?", "Allowed: data"]),
        ({"optim": {"lrr": 1}}, ["'optim.lrr'", "Did you mean 'lr'?"]),
        ({"phases": [{"name": "a"}, {"name": "b", "lrr": 1}]}, ["'phases.1.lrr'", "Did you mean 'lr'?"]),
        ({"named": {"p": {"nam": "b"}}}, ["'named.p.nam'", "Did you mean 'name'?"]),
        ({"phases": [{}]}, ["Missing setting 'phases.0.name'"]),
        ({"phases": ["a"]}, ["phases.0", "'a' is no group of settings", "name"]),
        ({"optim": 3}, ["optim: 3 is no group of settings", "lr"]),
        ({"steps": "many"}, ["steps: 'many' is not usable", "integer"]),
        ({"sizes": [1, "b"]}, ["sizes.1: 'b' is not usable", "integer"]),
        ({"optim": {"name": "adam"}}, ["optim.name: 'adam'", "'adamw' or 'sgd'"]),
        ({"use_cpu": "perhaps"}, ["use_cpu: 'perhaps'", "boolean"]),
        ({1: 2}, ["Unknown setting '1'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        build(Training, {"data": "x", **values})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["Missing setting 'data'; give it in the recipe or as --data."]),
        (["--stepz", "3"], ["Unknown argument '--stepz'. Did you mean --steps?"]),
        (["--optim.lrr=3"], ["Unknown argument '--optim.lrr=3'. Did you mean --optim.lr?"]),
        (["--data", "x", "stray"], ["Unknown argument 'stray'. See --help."]),
        (["--data", "x", "--use_cpu", "perhaps"], ["Unknown argument 'perhaps'"]),
        (["--data", "x", "--phases.2.lr", "1"], ["--phases.2.lr: '2' is no index of a list of 0"]),
        (["--data", "x", "--steps", "1.5"], ["steps: '1.5' is not usable"]),
        (["--data", "x", "--model.fusion.a", "1"], ["--model.fusion.a: model.fusion is 'none', not a group"]),
        (["--config", "nowhere.yaml"], ["Recipe 'nowhere.yaml' does not exist."]),
    ],
)
def test_a_wrong_command_line_ends_with_one_message(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    err = message(capsys, *argv)
    for word in words:
        assert word in err
    assert err.count("\n") == 2  # usage, error


@pytest.mark.parametrize(
    ("text", "word"),
    [("- a\n- b\n", "must be a mapping of settings, got list"), ("a: [1\n", "is not YAML"), ("optim: 3\n", "no group")],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert word in message(capsys, "--config", str(tmp_path / "bad.yaml"))


def test_a_misspelt_recipe_names_its_neighbour(recipe: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'recipe.yaml'\?"):
        load_yaml(recipe.with_name("recepe.yaml"))


def test_an_empty_recipe_is_no_settings(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def test_help_shows_sections_short_types_and_true_defaults(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        parse(Training, ["--help"], description="Train it.", prog="m2f2 train")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.startswith("usage: m2f2 train [--config RECIPE] [--setting value ...]\n\nTrain it.\n")
    assert "\nA whole training:\n" in text and "\noptim: How the weights move:\n" in text
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  --")}
    assert lines["--data"] == "path the folder of images (required)"
    assert lines["--optim.lr"] == "float peak learning rate, 100% of it (default: 0.0005)"
    assert lines["--optim.name"] == "adamw|sgd (default: adamw)"
    assert lines["--fallback.lr"].endswith("(default: 0.001)")
    assert lines["--sizes"] == "[int ...] (default: 32 64)"
    assert lines["--save_model_path"] == "str (default: none)"
    assert lines["--is_balanced"] == "bool weigh classes (default: true)"
    assert "NoneType" not in text and "typing" not in text


def test_help_shows_what_the_recipe_sets(recipe: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for words, default in (["--help"], recipe), (["--config", str(recipe), "--help"], None):
        with pytest.raises(SystemExit):
            parse(Training, words, recipe=default)
        text = capsys.readouterr().out
        assert "(recipe: 7)" in text and "peak learning rate, 100% of it (recipe: 1e-2)" in text
        assert "(recipe: {name: a} {name: b, lr: 3})" in text and "(default: 32 64)" in text
        assert str(recipe.parent) not in text


def test_merge_descends_into_mappings_only() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert merge(base, {"a": {"b": 3}, "d": [2], "e": 4}) == {"a": {"b": 3, "c": 2}, "d": [2], "e": 4}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """Ours beside those of transformers."""

    lora_r: int = setting(8, "rank")
    tune_deepfake_mlp_adapter: bool = False
    optimiser: Optim = setting(Optim())


def test_a_subclass_of_training_arguments_takes_the_flags_its_users_know(tmp_path: Path) -> None:
    argv = "--lora_r 128 --tune_deepfake_mlp_adapter True --bf16 False --use_cpu --learning_rate 2e-4 --report_to none"
    argv += " --save_strategy steps --optimiser.name sgd --lr-scheduler-type cosine --deepspeed none --output_dir"
    arguments = parse(Arguments, [*argv.split(), str(tmp_path)])
    assert (arguments.lora_r, arguments.tune_deepfake_mlp_adapter, arguments.bf16) == (128, True, False)
    assert arguments.optimiser.name == "sgd" and arguments.learning_rate == 2e-4 and arguments.use_cpu
    assert arguments.lr_scheduler_type == "cosine" and arguments.save_strategy == "steps"
    assert arguments.report_to == [] and arguments.deepspeed is None
    assert next(iter(leaves(Arguments))).path == "lora_r"  # our own settings come first in --help
    assert json.dumps(to_dict(arguments))


def test_a_mistake_beside_training_arguments_stays_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Arguments, ["--learning_rat", "1"])
    assert "Did you mean --learning_rate?" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Did you mean 'learning_rate'\?") as raised:
        build(Arguments, {"learning_rat": 1})
    assert len(str(raised.value)) < 400
