import pytest

from stages.common.markdown import format_code


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", "`a\\|b`"),
        ("two\nlines", "`two ⏎ lines`"),
        ("a\r\u2028b\0c", "`a ⏎ b c`"),
        ("tick ` inside", "``tick ` inside``"),
        ("`edge`", "`` `edge` ``"),
        ("  ", "(nothing)"),
        ("x" * 200, "`" + "x" * 159 + "…`"),
    ],
)
def test_any_text_fits_into_a_table_cell(text, cell):
    assert format_code(text) == cell
