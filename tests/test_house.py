"""The rules of the house: who may import whom, one word everywhere, every shipped file against its code."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from benchmarks.structure import find_circles, fold_graph, import_graph
from flows.__main__ import COMMANDS
from stages.common.params.loading import Params, load_params
from tests.environments.wheels import PYTHONS

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "stages", "services", "monitoring")
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What a package may import, besides itself. Flows run stages through DVC and never import one.
MAY_IMPORT = {
    "stages.common": (),
    # Engines are below both stages and services: a model is evaluated by what serves it (ADR 0011).
    "services.engines": ("stages.common",),
    "stages": ("stages.common", "services.engines"),
    "monitoring": ("stages.common", "services.events"),
    "services": ("stages.common", "services.engines"),
    "flows": ("stages.common", "monitoring", "services"),
}


EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]}
GPU_EXTRAS = {"serve", "postgres", "gpu"}  # what is installed with vLLM


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def stage_modules(name: str) -> list[Path]:
    """The modules of a stage: a file, or the files of its folder."""
    place = ROOT / "stages" / name
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def file_of(module: str) -> Path | None:
    """The file of a module of ours; a package is a module if its file imports something."""
    place = ROOT / module.replace(".", "/")
    if (package := place / "__init__.py").exists():
        return package if "import " in package.read_text(encoding="utf-8") else None
    return found if (found := place.with_suffix(".py")).exists() else None


@cache
def our_imports(path: Path) -> frozenset[str]:
    """Every module of ours that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in PACKAGES and file_of(name):
                found.add(name)
    return frozenset(found)


@cache
def whole_graph() -> dict[str, set[str]]:
    return import_graph(ROOT)


def home(module: str) -> str:
    """The part of the house a module belongs to: a package, the shared code, or one stage."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "stages" or parts[:2] == ["services", "engines"] else parts[0]


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in modules(package)], ids=dotted)
def test_imports_go_one_way(path):
    here = home(dotted(path))
    for imported in our_imports(path):
        rule = MAY_IMPORT[here if here in MAY_IMPORT else here.split(".")[0]]
        allowed = any(imported == a or imported.startswith(a + ".") for a in rule)
        assert home(imported) == here or allowed, f"{dotted(path)} imports {imported}"


def test_no_module_imports_itself_through_others():
    assert find_circles(whole_graph()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_imports_itself_through_others(package):
    """A module directly in the package is a room of its own."""
    assert find_circles(fold_graph(whole_graph(), package)) == []


def test_no_module_is_named_in_a_string_to_be_imported():
    """An import hidden in a string is an arrow that no tool sees."""
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text(encoding="utf-8")
            assert "import_module(" not in text or dotted(path) in MAY_IMPORT_BY_NAME, dotted(path)


# Alembic's and other plug-in loaders; the value is the reason.
MAY_IMPORT_BY_NAME = {
    "stages.evaluate.simulation": "a simulator is a function of the user's own, named in params.yaml"
}
MAX_FILES = 13
# Folders with more files of logic, and why they are not split.
WIDE_FOLDERS: dict[str, str] = {}
MAX_LINES = 400
# Modules with more lines, and why they have no seam.
LONG_MODULES: dict[str, str] = {}


def test_no_folder_of_logic_is_wide():
    for package in PACKAGES:
        for place in {path.parent for path in modules(package)}:
            files = [path for path in place.glob("*.py") if path.name != "__init__.py"]
            name = str(place.relative_to(ROOT))
            assert len(files) <= MAX_FILES or name in WIDE_FOLDERS, f"{name} has {len(files)} files"


def test_no_module_is_long_without_a_reason():
    for package in PACKAGES:
        for path in modules(package):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= MAX_LINES or dotted(path) in LONG_MODULES, f"{dotted(path)} has {lines} lines"


def test_no_module_of_flows_bears_the_name_of_a_package():
    ours = {
        *PACKAGES,
        "tests",
        "prefect",
        "dvc",
        "torch",
        "transformers",
        "peft",
        "bentoml",
        "evidently",
        "mlflow",
    }
    assert not {path.stem for path in modules("flows")} & ours


def test_one_word_names_a_stage_its_module_its_parameters_and_its_folders():
    sections = [field.alias or name for name, field in Params.model_fields.items()]
    assert sections == ["task", *STAGES, "services", "monitoring", "flows"]
    found = {p.stem for p in (ROOT / "stages").glob("*.py")} | {
        p.parent.name for p in (ROOT / "stages").glob("*/__main__.py")
    }
    assert found - {"__init__"} == set(STAGES)
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m stages.{name}"
        own, *borrowed = stage["params"]
        assert own == name
        # A single key of another section, never a whole one: a stage that runs again needs a reason.
        sources = "|".join(["task", *STAGES])
        # And whether the service can compute the model and takes the rows, which preflight asks.
        served = r"services\.(engine\.kind|guard\.max_messages|guard\.max_prompt_tokens)"
        one_key = rf"(?!{name}\.)({sources})\.\w+|{served}"
        assert all(re.fullmatch(one_key, key) for key in borrowed), borrowed
        for kind in ("outs", "metrics", "plots"):
            for out in stage.get(kind, []):
                path = out if isinstance(out, str) else next(iter(out))
                assert path.split("/")[:2] in (["artifacts", name], ["reports", name])


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_every_file_of_ours_that_it_imports(name):
    """A missing file would let DVC call a stage unchanged though its code has changed."""
    known = {"stages.common.errors", "stages.common.logs"}
    known |= {dotted(path) for path in (ROOT / "stages" / "common" / "params").glob("*.py")}
    waiting, reached = [m for path in stage_modules(name) if file_of(m := dotted(path))], set()
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += our_imports(file_of(module)) - reached - known
    needed = {file_of(module).relative_to(ROOT) for module in reached - known}
    deps = {Path(dep) for dep in STAGES[name]["deps"]} | {Path("stages/common/artifacts.py")}
    assert {str(path) for path in needed if not deps & {path, *path.parents}} == set()


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_dependency(name):
    assert STAGES[name]["deps"], "DVC does not restore stages without one from a remote"


def test_the_shipped_parameters_are_right():
    assert load_params(ROOT / "params.yaml").flows.training.cron


@pytest.mark.parametrize(
    "path",
    sorted({*ROOT.glob("*.y*ml"), *ROOT.glob(".*.y*ml"), *ROOT.glob("docs/**/*.y*ml")}),
    ids=lambda p: p.name,
)
def test_every_shipped_yaml_parses(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_reference_of_the_parameters_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "-m", "docs.reference.generate", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def documented_commands() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = []
    for page in pages:
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            commands = (line.split("  #")[0].removeprefix("$ ").strip() for line in lines)
            found += [(page.name, c) for c in commands if c and not c.startswith("#")]
    return found


@pytest.mark.parametrize(("page", "command"), documented_commands())
def test_a_documented_command_exists(page, command):
    """A make target is one of the Makefile's, a module can be found, a DVC stage is in the graph."""
    words = [word for word in command.split() if "=" not in word or word.startswith("-")]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    if not words:  # only variables are set
        return
    if words[0] == "make":
        assert set(words[1:]) <= targets
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), f"{page} names {words[2]}"
    elif words[0] == "perennial":
        assert words[1] in {command.name for group in COMMANDS.values() for command in group}
    elif words[:2] == ["dvc", "repro"]:
        assert {word for word in words[2:] if not word.startswith("-")} <= set(STAGES)
    else:
        assert Path(words[0]).name in {
            "bentoml",
            "curl",
            "docker",
            "git",
            "llama-server",
            "sqlite3",
            "cd",
            "dvc",
            "pip",
            "cp",
            "export",
            "pre-commit",
            "python3.11",
            "prefect",
            "kubectl",
            "torchrun",
        }


def test_the_lock_is_exact_and_holds_for_any_machine():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith((" ", "#"))]
    assert pins
    # No file:// of ours, no +cpu of a machine without a GPU.
    assert all(re.fullmatch(r"==[A-Za-z0-9.!]+", str(pin.specifier)) for pin in pins), pins
    assert not [pin for pin in pins if pin.url]
    # CUDA comes with a build of torch that has it, which pins its versions.
    names = {pin.name for pin in pins} - {"nvidia-ml-py"}
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_the_lock_has_one_version_of_a_package_on_every_python():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0] for line in lines if "==" in line and not line.startswith((" ", "#"))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "without"),
    [("requirements.lock", {"gpu"}), ("requirements-gpu.lock", EXTRAS - GPU_EXTRAS)],
)
def test_a_lock_has_every_dependency_within_its_bounds(name, without):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / name).read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", lock, re.M))
    asked_for = [line for extra in EXTRAS - without for line in project["optional-dependencies"][extra]]
    for asked in map(Requirement, [*project["dependencies"], *asked_for]):
        assert locked[canonicalize_name(asked.name)] in asked.specifier, f"{asked}: run make lock"


def test_the_lock_for_vllm_is_whole_and_names_no_index():
    """It is installed without a resolver, as an old pip finds no versions: CUDA's packages are in it."""
    text = (ROOT / "requirements-gpu.lock").read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find" not in text
    names = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    assert {"vllm", "torch", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "bentoml"} <= names


def test_the_supported_pythons_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    supported = SpecifierSet(project["requires-python"])
    minors = [minor for minor in range(9, 30) if f"3.{minor}" in supported]
    assert [(3, minor) for minor in minors] == list(PYTHONS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})" in makefile
    assert all(f"python3.{minor} " in makefile for minor in minors)


def test_nothing_committed_names_a_machine():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    leak = re.compile(r"/(?:home|Users|root|work)/(?!bentoml)[a-z]")
    for name in tracked:
        path = ROOT / name
        if (
            path.suffix in {".md", ".py", ".yaml", ".toml", ".json", ".cfg", ".lock", ".j2", ""}
            and path.is_file()
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not leak.search(text), f"{name}: {leak.search(text)}"


@pytest.mark.parametrize(("minutes", "found"), [("0", "skipped"), ("9", "passed")])
def test_no_test_begins_once_the_minutes_are_over(minutes, found):
    command = [sys.executable, "-m", "pytest", "tests/stages/common/test_escaping.py", "--minutes", minutes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    [last] = re.findall(r"^\d+ (passed|skipped) in .*$", done.stdout, re.M)
    assert last == found
