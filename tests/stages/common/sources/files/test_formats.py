"""Every dialect, encoding and compression gives the same rows; what cannot be read is named by its line."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.common.errors import InputError
from stages.common.sources.files.encodings import detect_encoding, guess_encoding
from stages.common.sources.files.entries import BadRow
from stages.common.sources.files.formats import FormatOptions, detect_format, read_entries

ROWS = [
    {"frage": "Wo ist mein Paket; wo?", "antwort": "unterwegs, bald"},
    {"frage": 'Was heißt "Größe"?', "antwort": "eine\nZahl"},
    {"frage": "und\tTab?", "antwort": "ja | nein"},
]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(path, **options):
    return [entry.fields for entry in read_entries(path, detect_format(path, FormatOptions(**options)))]


def good(fields):
    return [row for row in fields if not isinstance(row, BadRow)]


def faults(path, **options):
    entries = read_entries(path, detect_format(path, FormatOptions(**options)))
    return [(e.line, e.fields.reason) for e in entries if isinstance(e.fields, BadRow)]


def as_csv(rows, delimiter=",", quoting=csv.QUOTE_MINIMAL, line_end="\r\n"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, list(rows[0]), delimiter=delimiter, quoting=quoting, lineterminator=line_end
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_delimited_text_gives_its_rows(tmp_path, delimiter, encoding, compression):
    content = as_csv(ROWS, delimiter).encode(encoding)
    assert read(write(tmp_path / f"a.csv{compression}", COMPRESS[compression](content))) == ROWS


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_in_all_its_forms_gives_its_rows(tmp_path, compression):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    array = json.dumps(ROWS, indent=2)
    inside = json.dumps({"version": 1, "data": ROWS})
    forms = {"a.jsonl": lines, "b.ndjson": lines, "c.json": lines, "d.json": array, "e.jsonl": array}
    forms |= {"f.json": inside, "g.json": json.dumps(ROWS), "h.json": "\ufeff" + array}
    for name, text in forms.items():
        path = write(tmp_path / f"{name}{compression}", COMPRESS[compression](text.encode()))
        assert read(path) == ROWS, name


def test_a_compressed_file_is_known_by_its_bytes_and_not_by_its_name(tmp_path):
    assert read(write(tmp_path / "a.csv", gzip.compress(as_csv(ROWS).encode()))) == ROWS
    assert read(write(tmp_path / "b.csv.gz", as_csv(ROWS))) == ROWS


def test_compressed_parquet_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    path = write(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read(path) == ROWS


def test_the_names_of_classes_in_hugging_face_metadata_take_the_place_of_their_numbers(tmp_path):
    feature = {"_type": "ClassLabel", "names": ["refund", "card"]}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature, "text": {}}}})}
    table = pa.table({"text": ["a", "b"], "label": [1, 0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row["label"] for row in read(tmp_path / "a.parquet")] == ["card", "refund"]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.zst"])
def test_a_truncated_compressed_file_is_an_error_that_names_it(tmp_path, name):
    content = COMPRESS[Path(name).suffix]((as_csv(ROWS) * 100).encode())
    with pytest.raises(InputError, match=f"{name} cannot be decompressed"):
        read(write(tmp_path / name, content[:-12]))


@pytest.mark.parametrize(("head", "what"), [(b"PK\x03\x04....", "ZIP"), (b"%PDF-1.7 ...", "PDF")])
def test_a_binary_file_is_refused_by_what_it_is(tmp_path, head, what):
    with pytest.raises(InputError, match=what):
        read(write(tmp_path / "a.csv", head))


# The dialects


def test_the_line_sep_of_excel_names_the_delimiter(tmp_path):
    path = write(tmp_path / "a.csv", "sep=;\r\nq;a\r\n1,2;3\r\n")
    assert read(path) == [{"q": "1,2", "a": "3"}]
    assert faults(write(tmp_path / "b.csv", "sep=;\nq;a\n1;2;3\n")) == [(3, "broken_csv")]


def test_a_space_after_the_delimiter_is_no_part_of_a_quoted_cell(tmp_path):
    assert read(write(tmp_path / "a.csv", 'q, a\n"x, y", "b"\n"z", "c"\n')) == [
        {"q": "x, y", "a": "b"},
        {"q": "z", "a": "c"},
    ]


def test_quotes_escaped_with_a_backslash_are_read(tmp_path):
    path = write(tmp_path / "a.csv", 'q,a\n"say \\"hi\\", please",b\n' * 3)
    assert read(path)[0] == {"q": 'say "hi", please', "a": "b"}


def test_a_tab_separated_file_without_quoting_keeps_its_quotes(tmp_path):
    lines = ['"Hi," she said.\tHallo', 'a 5" pipe\tRohr', '"Open\tOffen', "plain\tschlicht"]
    rows = read(write(tmp_path / "a.tsv", "\n".join(["q\ta", *lines])))
    assert [row["q"] for row in rows] == ['"Hi," she said.', 'a 5" pipe', '"Open', "plain"]


def test_the_header_decides_between_delimiters(tmp_path):
    assert read(write(tmp_path / "a.csv", "q;a\n1;a,b,c\n2;d,e,f\n"))[0] == {"q": "1", "a": "a,b,c"}


def test_two_delimiters_that_fit_alike_are_named_with_the_key_that_decides(tmp_path):
    path = write(tmp_path / "a.csv", "a;b,c\n1;2,3\n")
    with pytest.raises(InputError, match="',' and ';' are equally likely") as error:
        read(path)
    assert "delimiter" in str(error.value)
    assert read(path, delimiter=";") == [{"a": "1", "b,c": "2,3"}]


# The header


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(("after_header", "after_row"), [(0, 1), (0, 3), (1, 0), (2, 0), (1, 1), (1, 3)])
def test_delimiters_at_the_end_of_the_header_or_of_the_rows_shift_nothing(
    tmp_path, delimiter, after_header, after_row
):
    lines = [f"q {n}{delimiter}a {n}" + delimiter * after_row for n in range(20)]
    path = write(tmp_path / "a.csv", "\n".join([f"q{delimiter}a" + delimiter * after_header, *lines]))
    pairs = [(row["q"], row["a"]) for row in read(path)]
    assert pairs == [(f"q {n}", f"a {n}") for n in range(20)]


def test_a_row_is_not_cut_where_a_delimiter_in_its_text_was_not_quoted(tmp_path):
    lines = [*(f"q {n},a {n}," for n in range(20)), "how, are you?,fine,", "how,are you?,fine"]
    path = write(tmp_path / "a.csv", "\n".join(["q,a", *lines]))
    assert faults(path) == [(22, "broken_csv"), (23, "broken_csv")]
    lines = [*(f"q {n},a {n}" for n in range(20)), "how are you?,fine,"]
    path = write(tmp_path / "b.csv", "\n".join(["q,a", *lines]))
    assert faults(path) == [(22, "broken_csv")]
    path = write(tmp_path / "c.csv", "\n".join(["q,a,", *lines[:-1], "how,are you?,fine"]))
    assert faults(path) == [(22, "broken_csv")]


@pytest.mark.parametrize(
    ("content", "cause", "fix"),
    [
        (
            '"q","a"\n"1","w","x"\n"2","y","z"\n',
            "the header on line 1, 'q, a', has 2 columns",
            "col.names=NA",
        ),
        ("Report of May\n\nq,a\nw,x\n", "line 1, 'Report of May', has 1 column", "remove the lines above"),
        ("Report of May\nq;a\nw;x\n", "2 of 2 rows have 2, such as line 2: q;a", "remove the lines above"),
        ("q,a\nw\nx\n", "2 of 2 rows have 1, such as line 2: w", "quote cells"),
    ],
)
def test_a_header_that_no_row_fits_is_refused_with_the_cause(tmp_path, content, cause, fix):
    with pytest.raises(InputError) as error:
        read(write(tmp_path / "a.csv", content))
    assert "a.csv: the header on line 1" in error.value.what and cause in error.value.what
    assert fix in error.value.fix


def test_names_that_no_row_fits_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", "w,x\ny,z\n")
    with pytest.raises(InputError, match="`column_names`, 'q, a, b', has 3 columns"):
        read(path, column_names=("q", "a", "b"))
    with pytest.raises(InputError, match=r"a\.csv:1 is a header"):
        read(path, column_names=("w", "x"))


@pytest.mark.parametrize(
    "above",
    [
        "# made in May\n",
        "# a\n#b, c and d\n\n## e\n",
        '"# made, in May",,\n',
        "\n# a\r\n",
        "sep=,\n# a\n",
        "#\n",
    ],
)
def test_comments_above_the_header_are_skipped(tmp_path, above):
    path = write(tmp_path / "a.csv", f"{above}q,a\n# 1,x\n")
    assert read(path) == [{"q": "# 1", "a": "x"}]
    assert [entry.line for entry in read_entries(path, detect_format(path))] == [above.count("\n") + 2]


@pytest.mark.parametrize("name", ["#", "#q", "# "])
def test_a_header_may_begin_with_the_sign_of_a_comment(tmp_path, name):
    path = write(tmp_path / "a.tsv", f"# made in May\n{name}\ta\n1\tx\n")
    assert read(path) == [{name.strip(): "1", "a": "x"}]


def test_a_line_that_may_be_a_comment_or_the_header_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.csv:2: it is unclear .*: # made by me, in May") as error:
        read(write(tmp_path / "a.csv", "# one\n# made by me, in May\nq,a\nw,x\n"))
    assert "remove the line" in error.value.fix


def test_without_a_header_a_row_may_begin_with_the_sign_of_a_comment(tmp_path):
    path = write(tmp_path / "a.csv", "# made in May\n# Title,x\nText,y\n")
    assert read(path, column_names=("q", "a")) == [{"q": "# Title", "a": "x"}, {"q": "Text", "a": "y"}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_second_byte_order_mark_is_no_part_of_the_header(tmp_path, encoding):
    path = write(tmp_path / "a.csv", '\ufeff"q","a"\nw,x\n'.encode(encoding))
    assert read(path) == [{"q": "w", "a": "x"}]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_header_of_a_second_file_is_no_row(tmp_path, mark):
    path = write(tmp_path / "a.csv", f"q,a\nw,x\n{mark}q,a\ny,z\n")
    assert good(read(path)) == [{"q": "w", "a": "x"}, {"q": "y", "a": "z"}]
    assert faults(path) == [(3, "broken_csv")]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", "| q | a |\n|---|:--|\n| w | x |\n", "is a Markdown table"),
        ("a.csv", '{"q": "w", "a": "x"}\n{"q": "y", "a": "z"}\n', "has JSON objects"),
        ("a.tsv", "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "is an HTML page"),
        ("a.json", '[{"q": "w"}\n]\n[{"q": "y"}]\n', r"a\.json:3: broken JSON: Extra data after the array"),
    ],
)
def test_what_is_no_table_is_refused_by_what_it_is(tmp_path, name, content, what):
    with pytest.raises(InputError, match=what):
        read(write(tmp_path / name, content))


def test_a_single_column_of_conversations_is_read_from_tab_separated_text(tmp_path):
    turns = [{"role": "user", "content": "q, or not"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.tsv", "messages\n" + f"{json.dumps(turns)}\n" * 3)
    assert read(path) == [{"messages": json.dumps(turns)}] * 3


def test_a_line_of_nul_bytes_is_named_as_such(tmp_path):
    path = write(tmp_path / "a.csv", b"q,a\nw,x\n" + b"\0" * 500)
    assert good(read(path)) == [{"q": "w", "a": "x"}] and faults(path) == [(3, "not_text")]


# A quote left open


@pytest.mark.parametrize("place", [0, 10, 4999])
def test_an_open_quote_costs_its_own_line_only(tmp_path, place):
    lines = [f"question {n}?,answer {n}" for n in range(5000)]
    lines.insert(place, '"the broken quote,answer')
    path = write(tmp_path / "a.csv", "\n".join(["prompt,completion", *lines]))
    assert len(good(read(path))) == 5000
    assert faults(path) == [(place + 2, "broken_csv")]


def test_an_open_quote_that_a_later_one_happens_to_close_swallows_nothing(tmp_path):
    lines = [f"question {n}?,answer {n}" for n in range(500)]
    lines[10] = '"broken,x'
    lines[400] = 'a pipe of 5",b'
    path = write(tmp_path / "a.csv", "\n".join(["prompt,completion", *lines]))
    assert len(good(read(path))) == 499
    assert faults(path) == [(12, "broken_csv")]


@pytest.mark.parametrize("between", ["", "one, two, three"])
def test_one_line_that_is_no_row_hides_no_open_quote(tmp_path, between):
    lines = [f"question {n},answer {n}" for n in range(400)]
    lines[10], lines[200], lines[300] = 'question 10,"answer 10', between, 'question 300,it is 5"'
    path = write(tmp_path / "a.csv", "\n".join(["prompt,completion", *lines]))
    assert len(good(read(path))) == 398
    assert [line for line, _ in faults(path)] == [12, *([202] if between else [])]


def test_a_cell_of_a_few_lines_like_rows_is_a_row_and_is_told(tmp_path):
    lines = [f"question {n},answer {n}" for n in range(40)]
    lines[10], lines[13] = 'question 10,"answer 10', 'a pipe,of 5"'
    path = write(tmp_path / "a.csv", "\n".join(["prompt,completion", *lines]))
    told = [entry.line for entry in read_entries(path, detect_format(path)) if entry.may_hold_rows]
    assert told == [12] and len(good(read(path))) == 37


def test_the_rest_of_a_record_with_a_wrong_quote_is_not_taken_for_rows(tmp_path):
    path = write(tmp_path / "a.csv", 'q,a\nw,x\n"he said "hi" to\nme, and\nleft",y\nz,1\n')
    assert good(read(path)) == [{"q": "w", "a": "x"}, {"q": "z", "a": "1"}]
    assert [line for line, _ in faults(path)] == [3, 4, 5]


def test_every_line_of_a_file_is_a_row_or_rejected(tmp_path):
    lines = [f'"q {n}, or not",a' if n % 3 else f'"q {n}" open,b' for n in range(300)]
    path = write(tmp_path / "a.csv", "\n".join(["q,a", *lines]))
    assert len(read(path)) == 300


def test_a_long_cell_of_many_lines_is_a_row(tmp_path):
    rows = [{"q": "\n".join(f"line {n}, of a letter" for n in range(40)) + "\n\nBye", "a": "x"}] * 2
    assert read(write(tmp_path / "a.csv", as_csv(rows))) == rows


def test_compressed_parquet_is_not_read_into_memory_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"{n} " + chr(97 + n % 26) * 4000} for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet", compression="none", use_dictionary=False)
    size = Path("a.parquet").stat().st_size
    path = write(Path("a.parquet.gz"), gzip.compress(Path("a.parquet").read_bytes(), 1))
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    for row, entry in zip(rows, read_entries(path, detect_format(path)), strict=True):
        assert entry.fields == row
        most = max(most, pool.bytes_allocated() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 0.9 * size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", "a.parquet.gz"]


# JSON


def test_a_broken_document_is_named_with_its_line(tmp_path):
    with pytest.raises(InputError, match=r"a\.json:3: broken JSON: .* at character"):
        read(write(tmp_path / "a.json", '[\n{"a": 1},\n{"a" 2}\n]'))


def test_an_element_that_is_no_object_is_rejected_with_its_line(tmp_path):
    assert faults(write(tmp_path / "a.json", '[\n{"a": 1},\n[2],\n{"a": 3}]')) == [(3, "broken_json")]


def test_an_object_with_several_arrays_needs_the_key_of_one(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    with pytest.raises(InputError, match="'train', 'test'") as error:
        read(path)
    assert "records_key" in str(error.value)
    assert read(path, records_key="test") == ROWS[:1]
    with pytest.raises(InputError, match="no array 'tset'"):
        read(path, records_key="tset")


def test_one_conversation_in_a_document_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]


def test_the_line_separator_of_unicode_does_not_end_a_line(tmp_path):
    row = {"q": "a\u2028b\x85c"}
    assert read(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")) == [row]


# Encodings


def test_a_few_broken_bytes_do_not_make_a_utf8_file_another_encoding(tmp_path):
    lines = [f'{{"q": "größer {n}"}}'.encode() for n in range(50)]
    lines[7] = b'{"q": "gr\xf6\xdfer"}'
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    assert detect_encoding(path) == "utf-8"
    assert faults(path) == [(8, "undecodable")]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Wo ist mein Paket? Es müsste längst da sein, die Größe paßt nicht.\n"),
        ("cp1252", "Où est mon colis ? Il était prévu hier ; merci à l’équipe.\n"),
        ("cp1251", "Где моя посылка? Она должна была прийти вчера.\n"),
        ("gb18030", "我的包裹在哪里？昨天就应该到了，谢谢你们的帮助。\n"),
    ],
)
def test_a_code_page_is_guessed_from_its_text(tmp_path, encoding, text):
    path = write(tmp_path / "a.csv", ("q,a\n" + text * 5).encode(encoding))
    assert detect_encoding(path) is None
    assert guess_encoding(path) == encoding


def test_an_encoding_that_is_given_is_taken(tmp_path):
    path = write(tmp_path / "a.csv", "q,a\nmüde,ja\n".encode("cp850"))
    assert read(path, encoding="cp850") == [{"q": "müde", "a": "ja"}]
    with pytest.raises(InputError, match="unknown encoding 'cp85'"):
        read(path, encoding="cp85")


def test_a_file_that_is_not_the_utf16_it_claims_is_an_error(tmp_path):
    with pytest.raises(InputError, match="is not utf-16"):
        read(write(tmp_path / "a.csv", "q,a\n1,2\n".encode("utf-16") + b"\x00"))


# Round trips

# As people write them: no NUL, and line ends that every spreadsheet keeps.
CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t"), max_size=30)
TABLES = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])


@given(TABLES, st.sampled_from(",;\t|"), ENCODINGS, QUOTING, st.sampled_from(sorted(COMPRESS)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_written_as_delimited_text_are_the_rows_read(
    tmp_path, table, delimiter, encoding, quoting, suffix
):
    rows = [{"prompt": q, "completion": a} for q, a in table]
    content = as_csv(rows, delimiter, quoting).encode(encoding)
    path = write(tmp_path / f"a.csv{suffix}", COMPRESS[suffix](content))
    assert read(path) == rows


@given(TABLES, ENCODINGS, st.sampled_from(["lines", "array", "object"]), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_written_as_json_are_the_rows_read(tmp_path, table, encoding, form, ascii_only):
    rows = [{"prompt": q, "completion": a} for q, a in table]
    text = {
        "lines": "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows),
        "array": json.dumps(rows, ensure_ascii=ascii_only),
        "object": json.dumps({"rows": rows}, ensure_ascii=ascii_only, indent=1),
    }[form]
    assert read(write(tmp_path / "a.json", text.encode(encoding))) == rows


@given(st.binary(max_size=200), st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_bytes_end_in_a_traceback(tmp_path, content, name):
    try:
        read(write(tmp_path / name, content))
    except InputError as error:
        assert name in str(error)
