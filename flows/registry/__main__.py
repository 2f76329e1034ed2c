"""Log the newest run in MLflow, or restore a version from it: `python -m flows.registry record|restore`."""

import sys

from flows.registry import record, restore

COMMANDS = {"record": record.main, "restore": restore.main}


def main(arguments: list[str] | None = None) -> int:
    """Run the named command; return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in COMMANDS:
        sys.stderr.write(f"usage: python -m flows.registry {'|'.join(COMMANDS)} …\n")
        return 2
    return COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
