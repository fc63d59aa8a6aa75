"""The README's facts: its two commands, what `.ci/run` makes of them, and every name that it mentions."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from velora_pretrain import cli
from velora_pretrain.config import MODES
from velora_pretrain.dimensions import SIZES
from velora_pretrain.recipe import resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"^velora-pretrain (.+?)(?:  .*)?$", README, flags=re.MULTILINE)


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_there_are_two_commands_that_install_and_then_run():
    assert [command.count("\n") for command in COMMANDS] == [1, 1]
    first, second = (command.strip().split(" && ") for command in COMMANDS)
    assert first == ["python -m pip install -e .", "velora-pretrain train --recipe quickstart"]
    assert second == ['python -m pip install -e ".[test]"', "python tools/check.py"]


def test_the_first_command_names_a_recipe_that_exists():
    arguments = shlex.split(COMMANDS[0].split(" && ")[1])
    assert resolve(arguments[arguments.index("--recipe") + 1], {}, []).data == "sample"


def test_the_checks_exist_and_end_with_the_tests():
    source = (ROOT / "tools/check.py").read_text()
    tools = re.findall(r'"-m", "(\w+)"', source)
    assert tools == ["ruff", "ruff", "pyright", "pytest"]
    assert "lint-imports" in source


def test_ci_runs_the_second_command_word_for_word(tmp_path: Path):
    """In a copy whose virtual environment and command only say what they were asked."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_bytes((ROOT / ".ci/run").read_bytes())
    fence = "`" * 3
    blocks = ["bash\necho first\n", "text\nnothing\n", "bash\necho 'the  second' && cat\n"]
    (tmp_path / "README.md").write_text("".join(f"{fence}{block}{fence}\n" for block in blocks))
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nmkdir -p "$3/bin" && echo "echo $1 $2" > "$3/bin/activate"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci/run")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        input="standard input must not reach the command",
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout == "-m venv\nthe  second\n"
    (tmp_path / "README.md").write_text("nothing\n")
    assert subprocess.run(["bash", str(tmp_path / ".ci/run")], capture_output=True, check=False).returncode == 1


def test_ci_is_executable():
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_sizes_modes_and_recipes_are_those_that_exist():
    sizes, modes = re.findall(r"^Sizes: (.*)\. Modes: (.*)\.$", README, flags=re.MULTILINE)[0]
    assert sizes.split(", ") == list(SIZES)
    assert modes.split(", ") == list(MODES)
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    assert set(re.findall(r"`(quickstart|small_\w+|llama_\w+|velora_\w+)`", README)) == recipes


def test_the_end_of_the_first_command_is_shown():
    (shown,) = re.findall(
        r"^The first one ends like this:\n\n```text\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL
    )
    assert not [name for name in ("validation perplexity", "peak memory") if name not in shown], shown


def test_there_are_examples():
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_name_commands_and_options_that_exist(
    example: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    words = shlex.split(example)
    options = [word for word in words if word.startswith("--")]
    command = words[: words.index(options[0])] if options else words
    shown = help_of(command, capsys)
    assert not [option for option in options if f"{option} " not in shown]
    values = dict(itertools.pairwise(words))
    size = values.get("--size") or (None if "--recipe" in values else "9m")
    resolve(values.get("--recipe"), {"size": size, "mode": values.get("--mode")}, [])


def test_every_option_in_the_text_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    commands = (["train"], ["eval", "checkpoint"], ["eval", "harness"])
    commands += (["data", "fetch"], ["data", "tokenise"], ["compare", "memory"], ["compare", "perplexity"], ["doctor"])
    known = "".join(help_of(command, capsys) for command in commands)
    mentioned = set(re.findall(r"`(--[a-z-]+)", README))
    assert mentioned
    assert not [option for option in mentioned if f"{option} " not in known]


def test_every_assignment_and_key_in_the_text_exists():
    assignments = [each for each in re.findall(r"`--set (\S+)`", README) if not each.startswith("dotted.")]
    assert len(assignments) >= 2
    resolve(None, {"size": "60m"}, assignments)
    assert "max_position_embeddings" in type(resolve(None, {"size": "60m"}, []).model).model_fields
    assert all(dimensions.max_position_embeddings == 1024 for dimensions in SIZES.values())


def test_every_path_in_the_text_exists():
    paths = {word for command in COMMANDS for word in shlex.split(command) if word.endswith(".py")} | {"recipes/"}
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_library_example_trains_a_model_of_the_users_own(tmp_path: Path):
    import torch
    import transformers

    (example,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 5
    torch.manual_seed(0)
    row = {"input_ids": torch.randint(0, 50, (12,))}
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=20, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True
    )
    names = {"config": config, "args": args, "dataset": [row | {"labels": row["input_ids"]}] * 160}
    exec(example, names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.1
