"""List the stored model versions, or add the newest: `perennial versions`.

    perennial versions list         # the stored versions, with their aliases
    perennial versions add          # copy the pipeline's newest model into the store
    perennial versions show TAG     # where the files of one version are, and what it is

Aliases are moved by `perennial release`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from services.versions.aliases import Aliases, read_aliases
from services.versions.store import add_pipeline_output, get_version, list_versions
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.params.loading import load_params


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(
        prog="perennial versions", description="List, show or add the model versions in the store."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the stored versions, with their aliases")
    commands.add_parser("add", help="copy the pipeline's newest model into the store")
    show = commands.add_parser("show", help="show a version: its files, its base model and its task")
    show.add_argument("tag", help="NAME:VERSION")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            lines = list_lines(load_params().model_card.name)
        elif options.command == "add":
            lines = [f"{add_pipeline_output()} is in the store"]
        else:
            lines = show_lines(options.tag)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def list_lines(name: str) -> list[str]:
    """Return a line for each stored version of a model: its tag and aliases, oldest first."""
    aliases, tags = read_aliases(), list_versions(name)
    if not tags:
        return [f"no version of {name} is in the store; add one: perennial versions add"]
    return [" ".join(filter(None, (tag, _alias(aliases, tag)))) for tag in tags]


def _alias(aliases: Aliases, tag: str) -> str:
    if tag == aliases.champion:
        return "champion"
    challenger = aliases.challenger
    if challenger and challenger.tag == tag:
        return f"challenger ({challenger.mode}, {challenger.share:.0%})"
    return ""


def show_lines(tag: str) -> list[str]:
    """Return the files of one version and what the export recorded about it, as lines.

    Raises:
        InputError: the version is not in the store.
    """
    files = get_version(tag)
    about = {key: value for key, value in files.about.items() if isinstance(value, str | int | float)}
    places = {"files": files.tokenizer, "gguf": files.gguf, "base": files.base, "adapter": files.adapter}
    values = {**about, **{name: path for name, path in places.items() if path is not None}}
    width = max(len(name) for name in values)
    return [f"{name:<{width}}  {value}" for name, value in values.items()]


if __name__ == "__main__":
    sys.exit(main())
