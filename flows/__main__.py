"""The console command `perennial`: one name for every command of this project.

`perennial release status` runs `python -m flows.release status`: each command has its own options and help.
Nothing heavy is imported before the command is known, so that help and shell completion answer at once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from stages.common.errors import InputError

# A package that only this extra of pyproject.toml installs.
MARKERS = {"core": "prefect", "serve": "bentoml", "monitor": "mlflow", "sweep": "optuna"}
# What every checkout has, and every command reads or writes next to.
CHECKOUT = ("params.yaml", "dvc.yaml")


@dataclass(frozen=True)
class Command:
    """A command, and the module that runs it.

    Args:
        module: run as `python -m MODULE`, with the arguments that follow the command's name.
        extras: of pyproject.toml, that must be installed.
        subcommands: offered by shell completion; the module's own parser is what accepts them.
    """

    name: str
    module: str
    help: str
    extras: tuple[str, ...] = ()
    subcommands: tuple[str, ...] = ()


COMMANDS = {
    "Train": (
        Command("init", "flows.init", "Set up params.yaml for your own data.", ("core",)),
        Command("run", "flows.training", "Run the pipeline: collect, check, train, evaluate.", ("core",)),
        Command("params", "stages.common.params", "Check params.yaml; run nothing."),
    ),
    "Serve": (
        Command("serve", "flows.serve", "Serve the champion: OpenAI's API and a page.", ("serve",)),
        Command(
            "up", "flows.up", "Run the service, Prefect, MLflow, Evidently and the dashboard.", ("core",)
        ),
        Command(
            *("keys", "services.keys", "Add, list or revoke API keys."),
            subcommands=("add", "list", "revoke"),
        ),
        Command(
            *("events", "services.events", "Export, prune or migrate events; forget a person.", ("serve",)),
            subcommands=("export", "prune", "forget", "migrate"),
        ),
        Command(
            "parity", "services.parity", "Compare the served model with the trained one.", ("core", "serve")
        ),
        Command(
            "package", "services.package", "Package the champion and the service as a Bento.", ("serve",)
        ),
    ),
    "Improve": (
        Command("watch", "flows.watch", "Test the traffic for drift once.", ("core", "monitor")),
        Command(
            *("verdicts", "monitoring.verdicts", "List or show the drift verdicts.", ("monitor",)),
            subcommands=("list", "show"),
        ),
        Command("feedback", "flows.feedback", "Show the training rows that feedback yields.", ("monitor",)),
        Command(
            "retrain", "flows.retrain", "Train, judge and release a candidate.", ("core", "serve", "monitor")
        ),
        Command("sweep", "flows.sweep", "Try other values of finetune and compare them.", ("core", "sweep")),
        Command("gate", "flows.gate", "Judge a candidate against the champion.", ("core", "serve")),
        Command(
            *("release", "flows.release", "Show or change which versions are served.", ("core", "serve")),
            subcommands=("status", "canary", "promote", "reject", "rollback", "pin", "unpin"),
        ),
        Command(
            *("versions", "services.versions", "List or add stored versions.", ("serve",)),
            subcommands=("list", "add", "show"),
        ),
        Command(
            *("registry", "flows.registry", "Register the newest run in MLflow, or restore a version."),
            extras=("core", "monitor"),
            subcommands=("register", "restore"),
        ),
        Command("schedule", "flows.deployments", "Register the flows and their schedules.", ("core",)),
        Command(
            "demo", "flows.demo", "Run the whole loop on generated traffic.", ("core", "serve", "monitor")
        ),
    ),
}


def main() -> None:
    """Run the command line; a missing extra or a wrong folder is reported without a traceback."""
    try:
        build_app()(prog_name="perennial")
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def build_app() -> typer.Typer:
    """Return the command line; every command passes its arguments on."""
    app = typer.Typer(
        help="Keep a fine-tuned language model fresh: train, serve, watch, retrain.",
        epilog="`perennial COMMAND --help` shows the options of a command.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for panel, commands in COMMANDS.items():
        for command in commands:
            app.command(
                command.name,
                help=command.help,
                rich_help_panel=panel,
                add_help_option=False,
                context_settings={"ignore_unknown_options": True},
            )(run)
    return app


def find_command(name: str | None) -> Command:
    """Return the command of a name."""
    return next(command for commands in COMMANDS.values() for command in commands if command.name == name)


def complete_subcommand(context: typer.Context, incomplete: str) -> list[str]:
    """Return the subcommands that a shell offers; after the first argument there is none."""
    if context.params.get("arguments"):
        return []
    return [word for word in find_command(context.info_name).subcommands if word.startswith(incomplete)]


Arguments = Annotated[list[str] | None, typer.Argument(autocompletion=complete_subcommand)]


def run(context: typer.Context, arguments: Arguments = None) -> None:
    """Run the command that the user named."""
    run_command(find_command(context.info_name), arguments or [])


def run_command(command: Command, arguments: list[str]) -> NoReturn:
    """Replace this process by the command's, so that signals and the exit code are its own.

    Raises:
        InputError: an extra is not installed, or the working directory is no checkout.
    """
    check_extras(command)
    if not {"-h", "--help"} & set(arguments):
        check_checkout(Path.cwd())
    os.execv(sys.executable, [sys.executable, "-m", command.module, *arguments])


def check_extras(command: Command) -> None:
    """Check that the packages of a command are installed.

    Raises:
        InputError: one is not.
    """
    missing = [extra for extra in command.extras if importlib.util.find_spec(MARKERS[extra]) is None]
    if missing:
        raise InputError(
            f"`perennial {command.name}` needs packages that are not installed: {', '.join(missing)}",
            f"pip install --constraint requirements.lock --editable '.[{','.join(missing)}]'",
        )


def check_checkout(folder: Path) -> None:
    """Check that a folder is the root of a checkout.

    Raises:
        InputError: it is not.
    """
    missing = [name for name in CHECKOUT if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"{folder} is not a checkout of Perennial: it has no {' and no '.join(missing)}",
            "cd to the folder that you cloned, and run the command there",
        )


if __name__ == "__main__":
    main()
