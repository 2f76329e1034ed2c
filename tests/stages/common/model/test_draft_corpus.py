"""What goes with a model for guessing."""

from stages.common.messages import Message
from stages.common.model.draft_corpus import encode_corpus, read_corpus, write_corpus
from stages.common.records import make_row
from tests.tiny import make_tokenizer


def rows(count):
    return [
        make_row(
            [Message("user", f"question {n}"), Message("assistant", f"answer {n}")],
            source="test",
            license="mit",
        )
        for n in range(count)
    ]


def test_examples_are_read_as_they_were_written(tmp_path):
    tokenizer = make_tokenizer()
    examples = encode_corpus(tokenizer, rows(5), 5)
    write_corpus(tmp_path / "draft_corpus.npz", examples)
    assert read_corpus(tmp_path / "draft_corpus.npz") == examples
    assert tokenizer.decode(examples[3][1]) == "answer 3"
    assert tokenizer.decode(examples[3][0]).endswith("assistant\n")


def test_no_examples_is_a_file_of_none_and_no_file_too(tmp_path):
    write_corpus(tmp_path / "draft_corpus.npz", [])
    assert read_corpus(tmp_path / "draft_corpus.npz") == []
    assert read_corpus(tmp_path / "nothing.npz") == []


def test_more_rows_than_the_limit_are_thinned_out_evenly():
    answers = [answer for _, answer in encode_corpus(make_tokenizer(), rows(10), 4)]
    assert [make_tokenizer().decode(answer) for answer in answers] == [
        "answer 0",
        "answer 3",
        "answer 6",
        "answer 9",
    ]
    assert encode_corpus(make_tokenizer(), rows(3), 0) == []


def test_equal_examples_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_corpus(tmp_path / name, [([1, 2], [3])])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
