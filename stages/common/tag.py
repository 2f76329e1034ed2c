"""The tag of a model version: `NAME:VERSION`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from stages.common.artifacts import reports
from stages.common.errors import InputError


@dataclass(frozen=True, slots=True)
class Tag:
    """The name and the version of a model; as a string, the tag that every store uses.

    Attributes:
        version: content hash, 12 hex digits.
    """

    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Tag:
        """Split `NAME:VERSION`.

        Raises:
            InputError: one of the two parts is missing.
        """
        name, _, version = text.rpartition(":")
        if not name or not version:
            raise InputError(f"{text!r} is not a tag of a model version", "write it as NAME:VERSION")
        return cls(name, version)

    @override
    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    def report(self, folder: str) -> Path:
        """Return the path of this version's report in a folder of reports/: gate, canary or parity."""
        return reports(folder) / f"{self.version}.json"


def parse_version(text: str) -> str:
    """Return the version of a tag; a text without a name is a version already."""
    return text.rpartition(":")[2]
