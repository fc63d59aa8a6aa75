"""What a comparison trains: variants of modes × learning rates × seeds, as written on the command line. No torch here.

    full,velora[layers=all,update=projected]      variants: a mode, in brackets settings of its own table
    1e-3,2e-3  and  full:2e-3,4e-3                learning rates of all variants, and of one variant or mode
    0,1                                           seeds

A cell is one variant at one learning rate with one seed. All cells read the same documents in the same order: their
`reading.shuffle_seed` is the recipe's own seed, whatever theirs is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from velora_pretrain.config import MODES, Run
from velora_pretrain.errors import UserError
from velora_pretrain.hints import nearest
from velora_pretrain.recipe import resolve

_PLACES = {"mode": "--modes", "seed": "--seeds", "optimizer.lr": "--learning-rates"}
"""Keys that cells differ in, and the option that takes the place of `--set`."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A mode with settings of its own."""

    label: str
    """As it was written."""
    mode: str
    assignments: tuple[str, ...] = ()
    """`modes.MODE.key=value`, as `--set` takes it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison."""

    variant: Variant
    learning_rate: float
    seed: int
    run: Run

    @property
    def slug(self) -> str:
        """Name of its folder."""
        label = re.sub(r"[^\w.=+-]+", "-", self.variant.label).strip("-")
        return f"{label}-lr{self.learning_rate:g}-seed{self.seed}"


def parse_variants(text: str) -> list[Variant]:
    """Reads `--modes`: commas separate variants, within brackets settings, and within a setting's lists nothing.

    Raises:
        UserError: brackets do not match, a mode is unknown, a setting is no `key=value`, or two variants are the same.
    """
    variants = [_parse_variant(part) for part in _cut(text)]
    _check_distinct("--modes", [variant.label for variant in variants])
    return variants


def _parse_variant(label: str) -> Variant:
    match = re.fullmatch(r"([^\[\]=]*?)\s*(\[(.*)\])?", label, re.DOTALL)
    if match is None:
        raise UserError(f"--modes {label}: write it as MODE or MODE[key=value,key=value]")
    mode, brackets, settings = match.groups()
    if mode not in MODES:
        raise UserError(f"--modes {label}: {mode!r} is no mode; {nearest(mode, MODES)}choose from {', '.join(MODES)}")
    assignments = [_own_assignment(label, mode, setting) for setting in _cut(settings)] if brackets else []
    return Variant(label=label, mode=mode, assignments=tuple(assignments))


def _own_assignment(label: str, mode: str, setting: str) -> str:
    """`key=value` of a mode's own table as an assignment by its dotted key."""
    key, equals, value = (part.strip() for part in setting.partition("="))
    if not key or not equals or not value:
        raise UserError(f"--modes {label}: {setting!r} is no setting; write it as key=value")
    parts = mode.split("+")
    if len(parts) > 1 and key.partition(".")[0] not in parts:
        ways = " or ".join(f"{part}.{key}" for part in parts)
        raise UserError(f"--modes {label}: {key}: say whose setting it is: {ways}")
    dotted = key if len(parts) > 1 else f"{mode}.{key}"
    if dotted.endswith(".lr"):
        raise UserError(f"--modes {label}: {key}: give learning rates by --learning-rates, as many to each variant")
    return f"modes.{dotted}={value}"


def _cut(text: str) -> list[str]:
    """Cuts at the commas that stand in no bracket.

    Raises:
        UserError: brackets do not match, or nothing stands between two commas.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth < 0:
            raise UserError(f"--modes {text}: a bracket is closed that was not opened")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UserError(f"--modes {text}: a bracket is not closed")
    parts = [part.strip() for part in parts]
    if "" in parts:
        raise UserError(f"--modes {text}: nothing stands {'there' if parts == [''] else 'between two commas'}")
    return parts


def parse_rates(texts: Sequence[str], variants: Sequence[Variant]) -> dict[str, list[float]]:
    """Reads `--learning-rates`: for each variant's label its learning rates, none where none were given.

    Rates of a label go before those of a mode, and those before rates of all.

    Raises:
        UserError: a rate is no number or given twice, or a label is that of no variant.
    """
    known = {variant.label: variant.label for variant in variants} | {
        variant.mode: variant.mode for variant in variants
    }
    given: dict[str, list[float]] = {}
    for text in texts:
        name, _, rates = text.rpartition(":")
        name = name.strip()
        if name and name not in known:
            raise UserError(
                f"--learning-rates {text}: {name!r} is not compared; {nearest(name, known)}choose from"
                f" {', '.join(variant.label for variant in variants)}"
            )
        if name in given:
            raise UserError(f"--learning-rates {text}: rates {f'of {name}' if name else 'of all'} are given twice")
        given[name] = [_number(f"--learning-rates {text}", rate, float) for rate in rates.split(",")]
        _check_distinct(f"--learning-rates {text}", given[name])
    return {each.label: given.get(each.label) or given.get(each.mode) or given.get("", []) for each in variants}


def plan_cells(
    recipe: str | None,
    options: dict[str, Any],
    assignments: list[str],
    *,
    modes: str | None = None,
    learning_rates: Sequence[str] = (),
    seeds: str | None = None,
) -> list[Cell]:
    """All cells of a comparison, in the order in which they are trained: everything with the first seed first.

    Args:
        recipe: path or name, as `recipe.resolve` takes it.
        options: dotted keys to values, likewise.
        assignments: `dotted.key=value`, likewise.
        modes: variants, see `parse_variants`; by default those that the recipe would compare, else every mode.
        learning_rates: see `parse_rates`; by default those that the recipe would compare. A variant without any has
            the recipe's own.
        seeds: numbers with commas between; by default those that the recipe would compare, else its own.

    Raises:
        UserError: any of it is not understood, or one variant would be tuned over more rates than another.
    """
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        place = "--learning-rates" if re.fullmatch(r"modes\.[^.]+\.lr", key) else _PLACES.get(key)
        if place:
            raise UserError(f"--set {assignment}: cells differ in it; give it by {place}")
    base = resolve(recipe, options, assignments)
    variants = parse_variants(modes if modes is not None else ",".join(base.compare.modes or MODES))
    if not learning_rates:
        compared = {variant.mode for variant in variants} | {variant.label for variant in variants}
        rate_lists = base.compare.learning_rates
        learning_rates = [text for text in rate_lists if text.rpartition(":")[0].strip() in {"", *compared}]
    rates = parse_rates(learning_rates, variants)
    numbers = list(base.compare.seeds) or [base.seed]
    if seeds is not None:
        numbers = [_number("--seeds", text, int) for text in seeds.split(",")]
    _check_distinct("--seeds", numbers)

    def run_of(variant: Variant, **more: Any) -> Run:
        try:
            return resolve(recipe, {**options, "mode": variant.mode, **more}, [*assignments, *variant.assignments])
        except UserError as error:
            # Without its settings it is the recipe, or an option, that is wrong.
            resolve(recipe, {**options, "mode": variant.mode, **more}, assignments)
            raise UserError(f"--modes {variant.label}: {str(error).partition(': ')[2]}") from None

    rates = {each.label: rates[each.label] or [run_of(each).lr] for each in variants}
    _check_equal_budgets(rates)
    order = {"reading.shuffle_seed": base.shuffle_seed}
    cells = [
        Cell(
            variant=variant,
            learning_rate=rate,
            seed=seed,
            run=run_of(variant, **{"optimizer.lr": rate, "seed": seed, **order}),
        )
        for seed in numbers
        for variant in variants
        for rate in rates[variant.label]
    ]
    for cell in cells:
        # A table that was given whole, by --set modes.MODE={lr=...}, goes before the options.
        if (cell.run.lr, cell.run.seed, cell.run.mode) != (cell.learning_rate, cell.seed, cell.variant.mode):
            raise UserError("--set: cells differ in mode, learning rate and seed; give them by --modes and so on")
    _check_distinct("run folders", [cell.slug for cell in cells])
    return cells


def _check_equal_budgets(rates: dict[str, list[float]]) -> None:
    """Refuses a comparison in which one variant is tuned more than another."""
    (first, first_rates), *others = rates.items()
    for label, own in others:
        if len(own) != len(first_rates):
            raise UserError(
                f"--learning-rates: {first} has {len(first_rates)} and {label} has {len(own)}; give every variant as"
                " many, so that none is tuned more than another"
            )


def _number(where: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise UserError(f"{where}: {text.strip()!r} is not {word}") from None


def _check_distinct(where: str, values: Sequence[object]) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UserError(f"{where}: {value} is given twice")
