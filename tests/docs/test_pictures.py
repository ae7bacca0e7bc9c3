"""Pictures of the pages: each is there, each is shown, and drawings are plain and readable."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.docs.blocks import PAGES, ROOT

DRAWINGS = sorted((ROOT / "docs" / "diagrams").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
#: A letter's width over the size of the font: of usual fonts, on average, with some room.
LETTER = 0.54


def shown() -> set[Path]:
    """What all pages show, by ![]() and by Sphinx's directive."""
    return {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)|```\{image\} (\S+)", page.read_text())
        for name in name
        if name
    }


def test_pictures_that_are_shown_are_there_and_the_other_way_round() -> None:
    there = {*DRAWINGS, *(ROOT / "docs").glob("*.png")}
    assert shown() == there
    assert len(there) > 5


def sizes(drawing: ElementTree.Element) -> tuple[float, float]:
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    return width, height


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_says_what_it_shows_and_needs_nothing_else(path: Path) -> None:
    drawing = ElementTree.parse(path).getroot()
    assert drawing.findtext(f"{SVG}title")
    kinds = {element.tag.removeprefix(SVG) for element in drawing.iter()}
    assert kinds <= {"svg", "title", "style", "defs", "marker", "path", "rect", "text"}
    assert "http" not in path.read_text().replace(SVG.strip("{}"), "")
    # Its own ground, so that it can be read on a dark page as well.
    ground = drawing.find(f"{SVG}rect")
    assert ground is not None
    assert (float(ground.attrib["width"]) + 1, float(ground.attrib["height"]) + 1) == sizes(drawing)


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_s_words_have_room(path: Path) -> None:
    drawing = ElementTree.parse(path).getroot()
    width, height = sizes(drawing)
    boxes = [
        tuple(float(b.attrib[side]) for side in ("x", "y", "width", "height"))
        for b in drawing.iter(f"{SVG}rect")
        if b.attrib["class"] not in ("panel", "room") or float(b.attrib["height"]) < 60
    ]
    for text in drawing.iter(f"{SVG}text"):
        words, x, y = text.text or "", float(text.attrib["x"]), float(text.attrib["y"])
        long = len(words) * LETTER * (12 if "small" in text.attrib.get("class", "") else 14)
        left = x - long * {"middle": 0.5, "end": 1.0}.get(text.attrib.get("text-anchor", ""), 0.0)
        assert left >= 0, words
        assert left + long <= width, words
        assert y < height, words
        for bx, by, bwidth, bheight in boxes:
            if by < y < by + bheight and bx < x < bx + bwidth:
                assert bx <= left, words
                assert left + long <= bx + bwidth, words
