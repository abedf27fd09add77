"""The stand-ins of test_flash.py against flash-attn's own signatures (`make libraries`)."""

import ast
import inspect
from pathlib import Path

import pytest

from tests.support.transformer_engine import BUILD
from tests.unit.ops.test_flash import flash_attn_2, flash_attn_3

pytestmark = pytest.mark.libraries


def published(file: Path, name: str) -> dict[str, object]:
    """A function's parameters in order, with their defaults (empty: none)."""
    functions = (node for node in ast.parse(file.read_text()).body if hasattr(node, "name"))
    given = next(node for node in functions if node.name == name).args
    assert not given.posonlyargs and not given.kwonlyargs
    missing = [inspect.Parameter.empty] * (len(given.args) - len(given.defaults))
    defaults = [*missing, *map(ast.literal_eval, given.defaults)]
    return dict(zip((argument.arg for argument in given.args), defaults, strict=True))


@pytest.mark.parametrize(
    ("release", "file", "stand_ins"),
    [
        ("2.7.0.post2", "flash_attn/flash_attn_interface.py", flash_attn_2()),
        ("2.8.3.post2", "flash_attn/flash_attn_interface.py", flash_attn_2()),
        ("2.8.3.post2", "hopper/flash_attn_interface.py", flash_attn_3()),
    ],
    ids=["2.7", "2.8", "3"],
)
def test_stand_ins_take_what_is_published(release, file, stand_ins):
    """The same names in the same order with the same defaults; later releases add optional ones."""
    path = BUILD / f"flash_attn-{release}" / file
    if not path.is_file():
        pytest.fail("flash-attn's Python is not there; `make libraries` fetches it")
    for stand_in in stand_ins:
        theirs = published(path, stand_in.__name__)
        ours = {n: p.default for n, p in inspect.signature(stand_in).parameters.items()}
        assert dict(list(theirs.items())[: len(ours)]) == ours
        assert list(theirs)[: len(ours)] == list(ours)
        assert inspect.Parameter.empty not in list(theirs.values())[len(ours) :]
