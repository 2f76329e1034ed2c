"""The errors that a user can cause or meet, and mend."""

from __future__ import annotations


class InputError(Exception):
    """Something that came from outside is wrong: a file, a row, a model, a full disk.

    Args:
        what: the thing, and the value seen; several problems go on several lines.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  remedy: {self.remedy}"


class ParamsError(InputError):
    """`params.yaml` is wrong. Every problem of the file is in the one message."""

    exit_code = 2


class TransientError(InputError):
    """A trouble of the moment, such as a network that does not answer: the training flow tries again.

    The code is EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
    """

    exit_code = 75
