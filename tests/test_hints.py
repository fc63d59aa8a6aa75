"""What a misspelt name gets for an answer."""

import pytest

from velora_pretrain.config import MODES
from velora_pretrain.dimensions import SIZES
from velora_pretrain.hints import closest, hint, nearest
from velora_pretrain.sections import TRACKERS


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("61m", "60m"),
        ("66m", "71m"),
        ("65m", "60m"),
        ("10m", "9m"),
        ("150M", "130m"),
        ("0.06b", "60m"),
        ("8B", "7b"),
        ("1.5b", "1b"),
        ("1400m", "1b"),
        ("60", "60m"),
        ("60mb", "60m"),
        ("70b", None),
        ("0m", "60m"),
        ("1k", None),
        ("large", None),
    ],
)
def test_sizes_are_near_as_numbers_are(word: str, size: str | None):
    assert closest(word, SIZES) == size


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("velra", MODES, "velora"),
        ("GaLore", MODES, "galore"),
        ("velora+galore", MODES, "galore+velora"),
        ("flora+velra", MODES, "flora+velora"),
        ("tensorbord", TRACKERS, "tensorboard"),
        ("WandB", TRACKERS, "wandb"),
        ("61m", TRACKERS, None),
        ("", MODES, None),
    ],
)
def test_other_names_are_near_by_their_letters(word: str, known: tuple[str, ...], meant: str | None):
    assert closest(word, known) == meant


def test_hints_are_questions_or_nothing():
    assert nearest("61m", SIZES) == "did you mean '60m'? "
    assert nearest("zzz", SIZES) == ""
    assert hint(["a.b", "c.b"]) == "did you mean 'a.b' or 'c.b'? "
    assert hint([]) == ""
