import csv
import io
import json
import re

import pytest

from stages.common.escaping import (
    clean_line,
    escape_csv_cell,
    escape_markdown,
    escape_mathtext,
    escape_message,
    escape_script_json,
    escape_widget,
    format_code,
)


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


def test_markdown_renders_text_as_it_is():
    markdown_it = pytest.importorskip("markdown_it")
    render = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render
    hostile = (
        "<script>x</script>",
        "<img src=x onerror=y>",
        "![a](http://evil.example/a)",
        "[a](javascript:x)",
        "**bold** __bold__ _i_ `code`",
        "a | b",
        "\\<b>",
        "# title",
        "&lt;b&gt;",
        "~~gone~~",
        "a\n\n- list\n```\nfence",
        "intent_accuracy",
    )
    for text in hostile:
        html = render(f"x {escape_markdown(text)} y")
        assert html.startswith("<p>") and html.rstrip().endswith("</p>") and html.count("<") == 2, (
            text,
            html,
        )
    assert escape_markdown("intent_accuracy 0.95 (n = 3)") == "intent_accuracy 0.95 (n = 3)"
    assert "://" not in escape_markdown("see https://evil.example") and "www.e" not in escape_markdown(
        "www.e.x"
    )


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1", "\n=1", "＝1", "=cmd|' /C calc'!A0"]
)
def test_a_cell_of_csv_is_no_formula(text):
    assert escape_csv_cell(text).startswith("'")


@pytest.mark.parametrize("separator", [";", "\t", "|", "\n", "\r"])
@pytest.mark.parametrize("between", ["", " ", '"', ' "', "; "])
def test_no_cell_of_another_separator_begins_with_a_formula(separator, between):
    buffer = io.StringIO()
    csv.writer(buffer).writerow(["a", escape_csv_cell(f"hello{separator}{between}=cmd|' /C calc'!A0")])
    for cell in re.split(r"[;|\t\r\n]", buffer.getvalue()):
        assert not cell.lstrip(' "').startswith(("=", "+", "-", "@")), cell


def test_a_cell_of_csv_is_else_as_it_is():
    for text in ("", "a=b", '{"a": 1}', "1-2", "x@example.org", "a; b", "one\ntwo", "a;b-c"):
        assert escape_csv_cell(text) == text


def test_a_message_has_no_markup_no_link_and_calls_no_one():
    text = escape_message("<!channel> <http://evil.example|ok> @here [a](b)\nwww.evil.example")
    assert text == "‹!channel› ‹http[:]//evil.example|ok› ＠here [a] (b)\nwww[.]evil.example"


def test_a_widget_has_no_tag_and_no_link():
    assert escape_widget("</script> [a](b)\nc") == "‹/script› [a] (b) ⏎ c"


def test_a_string_cannot_end_the_script_that_holds_it():
    line = escape_script_json('var a = {"k": "</script>\u2028"};')
    assert "<" not in line and "\u2028" not in line
    assert json.loads(line[8:-1]) == {"k": "</script>\u2028"}


def test_no_text_moves_the_terminals_cursor_or_breaks_a_file():
    for escape in (clean_line, format_code, escape_markdown, escape_mathtext, escape_widget, escape_message):
        text = escape("a\x1b[2Jb\x9b\u202ec\ud800")
        assert not set(text) & {"\x1b", "\x9b", "\u202e", "\ud800"}
        text.encode()
