"""Count the structure and the words of a checkout: modules, imports, circles, widths, verbs, docstrings.

    python -m benchmarks.structure [CHECKOUT ...]

Prints one Markdown table with a column per checkout, so that two revisions can be compared (`git worktree
add`). Only text is read: nothing of a checkout is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeGuard

PACKAGES = ("flows", "stages", "services", "monitoring")
# The first word of a function that does something or answers yes or no.
VERBS = frozenset(
    """
    add advance announce answer append apply ask assign atomic attach build can cap check choose clear
    close collect compare complete compute convert copy count cross cut deal decide decode define derive
    describe detect divide download drain draw drop edit embed encode end enter estimate evaluate
    execute expand export extract fail fetch fill filter find finish fit fits flush format free fresh
    gather generate get give gives group guess has hash hide hold holds import init insert is join judge
    keep label lay learn limit link list listen listens load lock log main make mark match measure merge
    migrate move needs normalise notify open order parse patch pick pin plan plot poison pool prepare
    print promote propose prune publish pull push put quarantine raise read recognise recognize record
    recover redact refuse register reject release remove rename render replace replay report require
    resolve restart restore retrain retry return revoke roll run sample save say score search select
    send serve set shorten show signals sort speed split stage start stop store strip sum summarise
    supervise sync take tap tell terminate test tie to tokenize train translate trim try unpin update
    upgrade use validate verify wait warm watch weigh with write
    """.split()  # noqa: SIM905
)
# Words of the project's earlier prose; the eight codebases it was compared with use them rarely or never.
WORDS = {
    "said/says/say": r"said|says|say",
    "beside": r"beside",
    "nobody/somebody": r"nobody|somebody",
    "stands": r"stands?",
    "lie(s)": r"lies?",
    "anew": r"anew",
    "whom": r"whom",
    "hangs": r"hangs?",
    "bears": r"bears?",
}
LONG_FUNCTION = 60  # lines


def main() -> None:
    """Print the table for the checkouts named, or for this one."""
    checkouts = [Path(name) for name in sys.argv[1:]] or [Path()]
    columns = [measure_checkout(root) for root in checkouts]
    print("| | " + " | ".join(str(root) for root in checkouts) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


def measure_checkout(root: Path) -> dict[str, str]:
    """Return every count of a checkout, as text."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in python_files(root)}
    found: dict[str, str] = {}
    for package in PACKAGES:
        graph = fold_graph(import_graph(root), package)
        arrows = sum(len(targets) for targets in graph.values())
        found[f"{package}: rooms · floors · arrows · circles"] = (
            f"{len(graph)} · {count_floors(graph)} · {arrows} · {len(find_circles(graph))}"
        )
    found["circles of modules"] = str(len(find_circles(import_graph(root))))
    found["widest folder, files"] = str(
        max(len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) for folder in folders(trees))
    )
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in trees)
    found["modules · longest, lines"] = f"{len(lengths)} · {lengths[-1]}"
    functions = [node for tree in trees.values() for node in ast.walk(tree) if is_function(node)]
    long = sum((node.end_lineno or 0) - node.lineno >= LONG_FUNCTION for node in functions)
    found[f"functions over {LONG_FUNCTION} lines"] = f"{long / len(functions):.1%}"
    public = [node.name for tree in trees.values() for node in tree.body if is_function(node)]
    public = [name for name in public if not name.startswith("_")]
    found["public functions that begin with a verb"] = f"{sum(map(is_verb, public)) / len(public):.0%}"
    text = "\n".join(docstrings(trees.values()))
    words = len(re.findall(r"\w+", text))
    found["words of docstrings"] = f"{words:,}"
    for name, pattern in WORDS.items():
        count = len(re.findall(rf"\b(?:{pattern})\b", text, re.IGNORECASE))
        found[f"{name}, per 10,000 words"] = f"{count / words * 10_000:.1f}"
    return found


def python_files(root: Path) -> list[Path]:
    """Return the modules of the four packages."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return which module imports which, at its top, inside a function, or by its name in a string.

    A package is its `__init__`. A string counts if it is the whole name of a module, with an attribute or
    without (`flows.dashboard.app:make_guarded_app`), as commands, uvicorn and Prefect take them.
    """
    names = {name_of(path, root): path for path in python_files(root)}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {one for one in inner if one in names} or {node.module}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                wanted |= {node.value.split(":")[0]}
        graph[name] = {one for one in wanted if one in names and one != name}
    return graph


def fold_graph(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """Return one package's graph with each of its folders as one node."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    folded: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module.split(".")[0] == package and module != package:
            inside = {room(one) for one in targets if one.split(".")[0] == package and one != package}
            folded.setdefault(room(module), set()).update(inside - {room(module)})
    return folded


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (strongly connected components: Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return [group for group in found if len(group) > 1]


def count_floors(graph: dict[str, set[str]]) -> int:
    """Return the longest chain of imports, counted in nodes; a circle counts as one node."""
    group_of = {node: number for number, group in enumerate(find_circles(graph)) for node in group}
    depth: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in depth:
            depth[node] = 1  # what a circle leads back to
            below = [other for other in graph.get(node, ()) if group_of.get(other, -1) != group_of.get(node)]
            depth[node] = 1 + max((floor(other) for other in below), default=0)
        return depth[node]

    return max(map(floor, graph), default=0)


def name_of(path: Path, root: Path) -> str:
    """Return the dotted name of a module; a package's `__init__` has the package's name."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def folders(trees: dict[Path, ast.Module]) -> set[Path]:
    """Return every folder with a module."""
    return {path.parent for path in trees}


def is_function(node: ast.AST) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return whether a node defines a function."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_verb(name: str) -> bool:
    """Return whether a function's name begins with a verb."""
    return name.split("_")[0] in VERBS


def docstrings(trees: Iterable[ast.Module]) -> Iterator[str]:
    """Yield every docstring."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


if __name__ == "__main__":
    main()
