from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.common.tag import Tag, parse_version


def test_a_tag_is_parsed_and_written_back():
    tag = Tag.parse("team/model:0123456789ab")
    assert (tag.name, tag.version, str(tag)) == ("team/model", "0123456789ab", "team/model:0123456789ab")
    assert tag.report("gate") == Path("reports/gate/0123456789ab.json")


@pytest.mark.parametrize("text", ["", "model", "model:", ":0123456789ab"])
def test_what_lacks_a_part_is_not_a_tag(text):
    with pytest.raises(InputError, match="is not a tag of a model version"):
        Tag.parse(text)


def test_a_version_is_taken_from_its_tag():
    assert parse_version("home:0123456789ab") == parse_version("0123456789ab") == "0123456789ab"
