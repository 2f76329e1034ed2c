"""The command `perennial`: each of its commands is `python -m` of a module, with its help and exit code."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.__main__ import COMMANDS, MARKERS, Command, check_checkout, check_extras, find_command
from stages.common.errors import InputError

ROOT = Path(__file__).parents[2]
ALL = [command for commands in COMMANDS.values() for command in commands]


def perennial(*arguments, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "dumb"} | environment,
        capture_output=True,
        text=True,
    )


def test_the_help_names_every_command():
    done = perennial("--help")
    assert done.returncode == 0
    for command in ALL:
        assert re.search(rf"\b{command.name} +{re.escape(command.help)}", done.stdout), command.name


def test_the_entry_point_is_this_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"perennial": "flows.__main__:main"}


def test_help_imports_no_heavy_package():
    code = (
        "import sys; sys.argv[1:] = ['--help']; from flows.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"torch", "prefect", "bentoml", "mlflow", "numpy", "pandas", "pydantic", "transformers", "yaml"}
    assert "typer" in loaded
    assert not loaded & heavy


@pytest.mark.parametrize("command", ALL, ids=lambda c: c.name)
def test_the_help_of_a_command_is_its_modules_own(command):
    done = perennial(command.name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: perennial {command.name} ")


@pytest.mark.parametrize("command", [c for c in ALL if c.subcommands], ids=lambda c: c.name)
def test_completion_offers_the_subcommands_that_the_parser_accepts(command):
    done = perennial(command.name, "no-such-word")
    assert done.returncode == 2
    accepted = re.search(r"choose from ([^)]*)\)", done.stderr)[1]
    assert list(command.subcommands) == accepted.replace("'", "").split(", ")


def complete(*words):
    """Return what bash would offer for the last of these words."""
    line = " ".join(("perennial", *words))
    done = perennial(
        _PERENNIAL_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words)), COMP_LINE=line
    )
    return done.stdout.split()


def test_a_shell_completes_commands_and_their_subcommands():
    assert complete("re") == ["retrain", "release", "registry"]
    assert complete("release", "p") == ["promote", "pin"]
    assert complete("release", "promote", "p") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_produced(shell):
    done = perennial(_PERENNIAL_COMPLETE=f"source_{shell}")
    assert done.returncode == 0
    assert "_PERENNIAL_COMPLETE" in done.stdout


@pytest.mark.parametrize("arguments", [("params",), ("params", "other.yaml"), ("keys", "revoke", "no one")])
def test_the_exit_code_and_the_output_are_the_modules(arguments, tmp_path):
    (tmp_path / "params.yaml").write_text("unknown: 1\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    command = find_command(arguments[0])
    module = subprocess.run(
        [sys.executable, "-m", command.module, *arguments[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    done = perennial(*arguments, folder=tmp_path)
    assert module.returncode != 0
    assert (done.returncode, done.stdout, done.stderr) == (module.returncode, module.stdout, module.stderr)


def test_options_reach_the_module_unchanged():
    command = find_command("release")
    done = perennial("release", "pin", "--why", "--by=x", "-z")
    assert done.returncode == 2
    assert f"usage: perennial {command.name} pin" in done.stderr


def test_an_unknown_command_is_answered_with_the_nearest():
    done = perennial("retrian")
    assert done.returncode == 2
    assert "retrain" in done.stderr


def test_outside_of_a_checkout_the_folder_is_named(tmp_path):
    done = perennial("run", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} is not a checkout of Perennial")
    assert "Traceback" not in done.stderr
    with pytest.raises(InputError, match=r"no params\.yaml and no dvc\.yaml"):
        check_checkout(tmp_path)
    check_checkout(ROOT)


def test_an_extra_that_is_not_installed_is_answered_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(MARKERS, "serve", "a_package_that_no_one_has")
    with pytest.raises(InputError, match=r"`perennial serve` needs .*: serve\n.*--editable '\.\[serve\]'"):
        check_extras(Command("serve", "flows.serve", "", ("core", "serve")))


def test_a_marker_is_a_package_that_its_extra_alone_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {
        extra: {re.split(r"[<>=\[]", line)[0] for line in lines}
        for extra, lines in project["optional-dependencies"].items()
        if extra in MARKERS
    }
    for extra, package in MARKERS.items():
        assert [name for name, packages in asked.items() if package in packages] == [extra]


def test_make_calls_the_command_of_the_same_work():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)+)", makefile, re.M))
    names = {command.name: command.name for command in ALL} | {"check-params": "params", "bento": "package"}
    for target, name in names.items():
        if target in recipes:
            assert f"perennial {name}" in recipes[target], target
    assert not re.findall(r"python -m (?:flows|services|stages)\b.*", makefile)
