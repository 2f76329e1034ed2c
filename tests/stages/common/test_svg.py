import sys
import xml.etree.ElementTree as ET

import pytest

from stages.common.escaping import escape_mathtext
from stages.common.svg import draw_figure


def draw(path, label):
    with draw_figure(path, 3, 2, font_size=9) as drawing:
        axes = drawing.subplots()
        axes.barh([escape_mathtext(label)], [1])
        axes.set_xscale("log")
    return path.read_bytes()


@pytest.mark.parametrize("label", ["under_$5_to_$10", "$x$", r"\$5", "$", "100 %", "a_b^c", "<&>"])
def test_a_label_is_drawn_as_it_is(tmp_path, label):
    texts = [element.text for element in ET.fromstring(draw(tmp_path / "a.svg", label)).iter()]
    assert label in texts


def test_equal_drawings_are_equal_bytes_without_a_date(tmp_path):
    first, second = draw(tmp_path / "a.svg", "a"), draw(tmp_path / "b.svg", "a")
    assert first == second
    assert b"dc:date" not in first


def test_no_figure_of_pyplot_is_made(tmp_path):
    draw(tmp_path / "a.svg", "a")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_drawing_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), draw_figure(tmp_path / "a.svg", 3, 2):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
