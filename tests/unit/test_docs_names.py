"""Files and names that the pages for developers mention exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_FOLDERS = (ROOT, ROOT / "moeless", ROOT / "predictors" / "moeless_predictors", ROOT / "moeless" / "dispatch")


@pytest.mark.parametrize("page", ["architecture.md", "extending.md"])
def test_every_file_that_the_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`([\w/-]+\.py)`", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert len(named) > 10
    assert {name for name in named if not any((folder / name).is_file() for folder in _FOLDERS)} == set()


@pytest.mark.parametrize("page", ["architecture.md", "extending.md"])
def test_every_name_that_the_page_mentions_is_in_the_code(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = {name.rpartition(".")[2] for name in re.findall(r"`((?:[A-Z]\w+\.)?_?[A-Za-z]\w+)`", text)}
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for folder in (ROOT / "moeless", ROOT / "predictors", ROOT / "benchmarks", ROOT / "tests")
        for file in folder.rglob("*.py")
    )
    code += " check_estimator"  # scikit-learn's
    words = set(re.findall(r"\w+", code))
    assert {name for name in names if name not in words} == set()
