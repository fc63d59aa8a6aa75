"""What holds across the package's source: modes have names in few places, so that a new one is added there alone."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "velora_pretrain"
NAMING = {"modes.py", "config.py", "library.py", "nn/velora.py", "nn/lora.py", "optim/galore.py", "optim/flora.py"}
"""Files that know modes by name: settings, the table of modes, each method's own file, and what others call it by."""
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in NAMING)
MODE_NAME = re.compile(r"(?<![a-z])(velora|galore|flora|relora|lora)(?![a-z])(?![-_]pretrain)", re.IGNORECASE)


def mode_names(source: str) -> list[str]:
    """Modes that code names; comments and docstrings, which cite where a number was published, are left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A bare string is a docstring: of a module, class or function, or of the attribute before it.
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # pyright: ignore[reportAttributeAccessIssue]
    return MODE_NAME.findall(ast.unparse(tree))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_mode_is_named_here(path: Path):
    assert mode_names(path.read_text(encoding="utf-8")) == []


def test_the_files_that_name_modes_do():
    assert len(OTHERS) > 20
    assert all(mode_names((PACKAGE / name).read_text(encoding="utf-8")) for name in NAMING)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("if run.mode == 'velora': pass", ["velora"]),
        ("settings = run.modes.velora", ["velora"]),
        ("raise UserError(f'{step}: GaLore does not do this')", ["GaLore"]),
        ("is_lora = flora_rank = 1", ["lora", "flora"]),
        ("from velora_pretrain.nn.velora import compress_linears", ["velora"]),
        ("print('go on with: velora-pretrain train')  # as VeLoRA's script", []),
        ("import velora_pretrain.nn\nrank = 1\n'''As ReLoRA's.'''", []),
        ("def explore(floral, exploratory):\n    '''GaLore's.'''", []),
    ],
)
def test_a_mode_named_in_the_trainer_is_found(line: str, names: list[str]):
    source = (PACKAGE / "trainer.py").read_text(encoding="utf-8")
    assert mode_names(f"{source}\n{line}\n") == names
