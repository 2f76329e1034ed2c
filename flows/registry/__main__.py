"""Log the newest run in MLflow, or restore a version from it: `python -m flows.registry record|restore`."""

import argparse
import sys

from flows.registry import record, restore

COMMANDS = {"record": record.main, "restore": restore.main}


def main(arguments: list[str] | None = None) -> int:
    """Run the named command; return its exit code."""
    parser = argparse.ArgumentParser(prog="perennial registry", description=__doc__)
    parser.add_argument("command", choices=COMMANDS, help="its own --help shows its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    options = parser.parse_args(arguments)
    return COMMANDS[options.command](options.arguments)


if __name__ == "__main__":
    sys.exit(main())
