"""The pictures of the documentation are those that scripts/draw_diagrams.py draws, and name files that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.draw_diagrams import DIAGRAMS, FOLDER, Diagram, draw

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("diagram", DIAGRAMS, ids=lambda diagram: diagram.name)
def test_the_picture_is_the_one_that_the_script_draws(diagram: Diagram) -> None:
    assert (FOLDER / f"{diagram.name}.svg").read_text(encoding="utf-8") == draw(diagram)


@pytest.mark.parametrize("diagram", DIAGRAMS, ids=lambda diagram: diagram.name)
def test_every_file_in_the_picture_exists(diagram: Diagram) -> None:
    assert {box.file for box in diagram.boxes if not (ROOT / "moeless" / box.file).is_file()} == set()


@pytest.mark.parametrize("diagram", DIAGRAMS, ids=lambda diagram: diagram.name)
def test_every_arrow_joins_two_boxes(diagram: Diagram) -> None:
    names = {box.name for box in diagram.boxes}
    assert {end for arrow in diagram.arrows for end in (arrow.start, arrow.end)} <= names
