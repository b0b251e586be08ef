"""Imports run one way: demo → llm → model → ops → layer → plan; the device is handed in.

Reads the sources, so that imports inside functions count too; imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Graph = Mapping[str, set[str]]  # module -> what it imports, by absolute names

DEVICES = {f"engine.device.{path.stem}" for path in (ROOT / "engine" / "device").glob("[!_]*.py")}
ABOVE_THE_MODEL = {
    "engine",
    *(f"engine.{name}" for name in "kvcache llm loading ranks.followers request runner scheduler verify".split()),
}
ROOMS = {"demo", "tools", "engine.model", "engine.ops"} | ABOVE_THE_MODEL

# Room -> what no module of it may reach, be it through others. "engine.*" is all of engine that is no room.
NEVER = {
    "engine.*": {"engine.ops", "engine.model", "demo", "tools"} | ABOVE_THE_MODEL,
    "engine.plan": {"engine.layer", "engine.step"},
    "engine.ops": {"engine.model", "demo", "tools"} | ABOVE_THE_MODEL | DEVICES,
    "engine.model": {"demo", "tools"} | ABOVE_THE_MODEL | DEVICES,
    **dict.fromkeys(ABOVE_THE_MODEL, {"demo", "tools"}),
}

# Package -> the only modules that import it.
ONLY = {
    "cffi": {"engine.abi"},
    "pycuda": {"engine.cuda.driver"},
    "mpi4py": {"engine.ranks.comm"},
    "huggingface_hub": {"engine.files.model_files"},
    "torch": {"tools"},
    "transformers": {"tools"},
}


def read_graph(*folders: str) -> dict[str, set[str]]:
    files = {name_of(path): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return {name: set(imports(ast.parse(path.read_bytes()), files.keys())) for name, path in files.items()}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, modules: Collection[str]) -> Iterator[str]:
    """What a source imports. `from package import name` is the module package.name where that is one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}: write it in full"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in modules else str(node.module)
        else:
            yield from imports(node, modules)


def is_within(module: str, room: str) -> bool:
    """Whether a module is the room or lies in it; "engine" is engine/__init__.py alone."""
    return module == room or (room != "engine" and module.startswith(f"{room}."))


def is_within_any(module: str, rooms: Iterable[str]) -> bool:
    return any(is_within(module, room) for room in rooms)


def members(graph: Graph, room: str) -> list[str]:
    if room == "engine.*":
        return sorted(m for m in graph if m.startswith("engine.") and not is_within_any(m, ROOMS))
    return sorted(module for module in graph if is_within(module, room))


def path_to(graph: Graph, start: str, is_target: Callable[[str], bool]) -> list[str]:
    """The modules from `start` to the first target that it reaches; empty if there is none."""
    paths: list[list[str]] = [[start]]
    seen: set[str] = set()
    for path in paths:
        for module in sorted(graph.get(path[-1], set()) - seen):
            seen.add(module)
            paths.append([*path, module])
            if is_target(module):
                return paths[-1]
    return []


def wrong_ways(graph: Graph) -> list[str]:
    """Every module that reaches what NEVER denies it, with the way it takes."""
    ways = [
        path_to(graph, module, partial(is_within_any, rooms=denied))
        for room, denied in NEVER.items()
        for module in members(graph, room)
    ]
    return sorted(" → ".join(way) for way in ways if way)


def cycles(graph: Graph) -> list[str]:
    ways = [path_to(graph, module, module.__eq__) for module in graph]
    return sorted(" → ".join(way) for way in ways if way)


def strangers(graph: Graph) -> list[str]:
    """Modules that import a package which is another module's business."""
    return sorted(
        f"{module} → {package}"
        for module, names in graph.items()
        for package, owners in ONLY.items()
        if any(is_within(name, package) for name in names) and not is_within_any(module, owners)
    )


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return read_graph("engine", "demo", "tools", "test")


def test_one_way(graph: Graph) -> None:
    assert wrong_ways(graph) == []


def test_no_cycles(graph: Graph) -> None:
    assert cycles(graph) == []


def test_each_package_has_its_module(graph: Graph) -> None:
    assert strangers(graph) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("engine.plan", "engine.layer"),
        ("engine.layer", "engine.ops.matmul"),
        ("engine.text.tokenizer", "engine.llm"),
        ("engine.ops.matmul", "engine.model.decoder"),
        ("engine.ops.matmul", "engine.device.cpu"),
        ("engine.model.decoder", "engine.llm"),
        ("engine.llm", "demo.infer"),
        ("engine.machine", "tools.random_model"),
    ],
)
def test_a_breach_is_found(graph: Graph, module: str, imported: str) -> None:
    broken = {**graph, module: graph[module] | {"engine.bridge"}, "engine.bridge": {imported}}
    assert any(module in way for way in wrong_ways(broken) + cycles(broken))


@pytest.mark.parametrize("package", ONLY)
def test_a_stranger_is_found(graph: Graph, package: str) -> None:
    assert strangers({**graph, "engine.text.chat": {f"{package}.part"}}) == [f"engine.text.chat → {package}"]


def test_reading_imports() -> None:
    source = """
import a.b
from engine import abi, LLM
if TYPE_CHECKING:
    import types_only
def later():
    from c import d
"""
    assert set(imports(ast.parse(source), {"engine.abi"})) == {"a.b", "engine.abi", "engine", "c"}


def test_the_engine_starts_without_the_extras() -> None:
    absent = [*(set(ONLY) - {"cffi"}), "matplotlib", "psutil"]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import engine, demo; engine.LLM"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
