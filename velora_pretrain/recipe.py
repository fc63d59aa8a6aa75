"""From a recipe file and command-line options to a resolved run, with one clear line for each mistake."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from velora_pretrain.config import Run
from velora_pretrain.dimensions import Section
from velora_pretrain.errors import UserError
from velora_pretrain.hints import closest, hint, nearest
from velora_pretrain.llama_folder import follow_init_from


def build_run(values: dict[str, Any], *, where: str) -> Run:
    """Validates the nested `values` of a recipe.

    Args:
        values: tables and keys, as TOML gives them.
        where: what to name in errors: a recipe's path, or "command line".

    Raises:
        UserError: an unknown key, a wrong type or an impossible combination; names the dotted key.
    """
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a TOML recipe.

    Raises:
        UserError: no such file, or not TOML; names file and line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML recipe: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def apply_override(values: dict[str, Any], assignment: str) -> None:
    """Sets one `dotted.key=value` of `--set` in nested `values`; the value is TOML, or else a bare string.

    Raises:
        UserError: no `=`, or a key below something that is no table.
    """
    key, equals, text = assignment.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"--set {assignment}: write it as dotted.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    set_dotted(values, key, value)


def set_dotted(values: dict[str, Any], key: str, value: object) -> None:
    """Sets `key`, a dotted path, in nested `values`.

    Raises:
        UserError: the path leads below something that is no table.
    """
    *tables, last = key.split(".")
    table = values
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"{key}: {name} is a value, not a table")
    table[last] = value


def differences(left: Run, right: Run) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two runs differ, with both values."""
    ours, theirs = flat_settings(left), flat_settings(right)
    keys = sorted(ours.keys() | theirs.keys())
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def flat_settings(run: Run) -> dict[str, Any]:
    """The whole configuration by dotted keys."""
    return _flatten(run.model_dump(mode="json"))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


_IN_TOML = {"[Tt]uple": "list", r"dictionary or instance of \w+": "table", "Field required": "Too few values"}
"""Python's words in pydantic's messages, and TOML's for them."""


def _first_problem(error: ValidationError) -> str:
    """One line for the first problem, with its dotted key."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return f"{'.'.join(path)}: no such key; {hint(_meant_keys(path))}see the recipes for the keys"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    key = _dotted(problem)
    # A union has one problem per member.
    messages = [each["msg"] for each in problems if _dotted(each) == key]
    wanted = ", or ".join([messages[0], *(message.removeprefix("Input should be ") for message in messages[1:])])
    for python, toml in _IN_TOML.items():
        wanted = re.sub(python, toml, wanted)
    known = re.findall(r"'(\w[^']*)'", str(problem.get("ctx", {}).get("expected", "")))
    near = nearest(str(problem["input"]), known)
    return f"{key}: {wanted[0].lower()}{wanted[1:]}{'; ' if near else ' '}{near}(got {problem['input']!r})"


def _meant_keys(path: list[str]) -> list[str]:
    """The keys that an unknown one most likely meant: of its name in other tables, else of a name near to it.

    Args:
        path: the unknown key; the table that it stands in exists.
    """
    *table, name = path
    known = [key.split(".") for key in _known_keys(Run)]
    own = {key[-1]: key for key in known if key[:-1] == table}
    names = {key[-1] for key in known}
    near = name if name in names else closest(name, own)
    if near in own:
        return [".".join(own[near])]
    near = near or closest(name, sorted(names))
    found = [key for key in known if key[-1] == near]
    # Of the settings of modes, of which there are many, none is guessed where there is one for all.
    return [".".join(key) for key in found if len(key) == min(map(len, found))]


def _known_keys(table: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key below a table, tables included."""
    for name, field in table.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def _dotted(problem: ErrorDetails) -> str:
    """The key of a problem, without what a union's members and a literal's alternatives add to the path."""
    return ".".join(part for part in map(str, problem["loc"]) if part.isidentifier())


BUNDLED_RECIPES = Path(__file__).parent / "bundled_recipes"
"""Where the wheel holds recipes/; a source checkout has them beside the package."""


def bundled_recipes() -> dict[str, Path]:
    """Recipes that come with the tool, by name."""
    folders = (BUNDLED_RECIPES, Path(__file__).parent.parent / "recipes")
    return {path.stem: path for folder in folders if folder.is_dir() for path in folder.glob("*.toml")}


def find_recipe(name: str) -> Path:
    """The recipe at a path, or a bundled one by its name (`llama_60m`).

    Raises:
        UserError: there is no such recipe; names the bundled ones.
    """
    if Path(name).is_file():
        return Path(name)
    known = bundled_recipes()
    if name in known:
        return known[name]
    near = nearest(Path(name).stem, known)
    raise UserError(f"--recipe {name}: no such file; {near}bundled recipes: {', '.join(sorted(known))}")


def resolve(recipe: str | None, options: dict[str, Any], assignments: list[str], *, recorded: bool = False) -> Run:
    """The run that a recipe, named options and `--set` assignments describe, the later before the earlier.

    What is given also goes before what a recipe derived from its own value of it: `optimizer.lr` before the recipe's
    learning rates of modes, `batch.sequences` before its `batch.micro_batch`, `init_from`, which brings a tokenizer,
    before its `tokenizer`.

    Args:
        recipe: path or name; None starts from the defaults.
        options: dotted key to value; None values are options that were not given.
        assignments: `dotted.key=value`.
        recorded: the recipe is the config.toml of a run that goes on, where nothing is derived anew.

    Raises:
        UserError: as `build_run`, `find_recipe`, `apply_override` and `follow_init_from`; or a given value is one that
            nothing reads.
    """
    values = read_recipe(find_recipe(recipe)) if recipe else {}
    given = _overlaid({}, options, assignments)
    if not recorded:
        if "lr" in _table(given, "optimizer"):
            for mode in _table(values, "modes"):
                _table(values["modes"], mode).pop("lr", None)
        if "sequences" in _table(given, "batch"):
            _table(values, "batch").pop("micro_batch", None)
        if "init_from" in given:
            values.pop("tokenizer", None)
    values = _overlaid(values, options, assignments)
    if not recorded:
        values = follow_init_from(values)
    given_keys = _flatten(given)
    where = recipe or "command line"
    try:
        run = build_run(values, where=where)
    except UserError as error:
        key, colon, problem = str(error).removeprefix(f"{where}: ").partition(": ")
        is_given = any(f"{each}.".startswith(f"{key}.") or key.startswith(f"{each}.") for each in given_keys)
        raise UserError(f"{'command line' if is_given else where}: {key}{colon}{problem}") from None
    for key, reason in run.unused.items():
        if key in given_keys:
            raise UserError(f"command line: {key}: {reason}")
    return run


def _overlaid(values: dict[str, Any], options: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """`values`, in which options and then assignments have been set."""
    for key, value in options.items():
        if value is not None:
            set_dotted(values, key, value)
    for assignment in assignments:
        apply_override(values, assignment)
    return values


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of that name; an empty one where there is none or, by a mistake told later, something else."""
    table = values.get(name)
    return table if isinstance(table, dict) else {}
