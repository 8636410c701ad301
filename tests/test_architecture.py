"""The rules of the house that a parser can check: which way imports run, and how long things may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import autopar

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Layer -> the layers it may import. "core" is all of autopar/ that no other layer claims.
ALLOWED = {
    "solver": {"solver"},
    "core": {"solver", "core"},
    "codegen": {"core", "codegen"},  # runs a plan, knows nothing of how it was found
    "runtime": {"core", "codegen", "runtime"},
    "face": {"solver", "core", "codegen", "runtime", "face"},
}
FACE = {"autopar.api", "autopar.cli", "autopar.verification", "autopar.verifying", "autopar.profiling"}
SOLVER_THIRD_PARTY = {"numpy", "networkx", "pulp", "highspy"}
PRIVATE_TORCH_HOME = "autopar._torch_compat"


def module_files() -> list[tuple[str, Path]]:
    """(module name, file) of everything in the package, the linked folders included."""
    found = []
    for folder, prefix in (("autopar", "autopar"), ("solver", "autopar.solver"), ("codegen", "autopar.codegen")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "autopar" and parts[0] in ("solver", "codegen"):
                continue  # seen through the link; counted at its real place
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found.append((name, path))
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """(imported module, line) for every import, also those inside functions and TYPE_CHECKING blocks."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def layer_of(module: str) -> str | None:
    """The layer of a module of ours, or None for others."""
    if module != "autopar" and not module.startswith("autopar."):
        return None
    for face in FACE:
        if module == face or module.startswith(face + "."):
            return "face"
    second = [*module.split("."), ""][1]
    return second if second in ("solver", "codegen", "runtime") else "core"


MODULES = module_files()


def test_the_walk_finds_the_package() -> None:
    names = {name for name, _ in MODULES}
    assert {"autopar", "autopar.errors", "autopar.solver.problem", "autopar.codegen.emit"} <= names


def test_links_lead_to_the_folders_at_the_top() -> None:
    for folder in ("solver", "codegen"):
        link = ROOT / "autopar" / folder
        assert link.is_symlink() or not (ROOT / ".git").exists()
        assert link.resolve() == (ROOT / folder).resolve()


def test_imports_run_one_way() -> None:
    wrong = []
    for name, path in MODULES:
        if name == "autopar":
            continue  # it names the face; what it imports at once is tested below
        layer = layer_of(name)
        assert layer is not None
        for target, line in imports(name, path):
            other = layer_of(target)
            if other is not None and other not in ALLOWED[layer]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {layer} must not import {target} ({other})")
    assert not wrong, "\n".join(wrong)


def test_solver_knows_only_its_libraries() -> None:
    allowed = SOLVER_THIRD_PARTY | set(sys.stdlib_module_names) | {"autopar"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for name, path in MODULES
        if layer_of(name) == "solver"
        for target, line in imports(name, path)
        if target.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_bare_import_of_the_linked_packages() -> None:
    files = [path for _, path in MODULES]
    for folder in ("tests", "examples", "benchmarks", "docs"):
        files += sorted((ROOT / folder).rglob("*.py"))
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: import autopar.{target} instead of {target}"
        for path in files
        for target, line in imports("", path)
        if target.split(".")[0] in ("solver", "codegen")
    ]
    assert not wrong, "\n".join(wrong)


def is_private_torch(dotted: str) -> bool:
    """Whether a dotted name goes through a private part of torch; `torch.ops` is the public door to ops."""
    parts = dotted.split(".")
    private = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
    return parts[0] == "torch" and parts[1:2] != ["ops"] and private


def dotted_name(node: ast.expr) -> str | None:
    """The text of an expression that is a chain of names (a.b.c), else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def test_private_torch_api_has_one_door() -> None:
    wrong = []
    for name, path in MODULES:
        if name == PRIVATE_TORCH_HOME:
            continue
        used = list(imports(name, path))
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and (dotted := dotted_name(node)) is not None:
                used.append((dotted, node.lineno))
        wrong += [f"{path.relative_to(ROOT)}:{line}: {target}" for target, line in used if is_private_torch(target)]
    assert not wrong, "private torch API outside autopar/_torch_compat.py:\n" + "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize(
    ("dotted", "private"),
    [
        ("torch._dynamo.config", True),
        ("torch.distributed.tensor._ops", True),
        ("torch.ops._c10d_functional.all_reduce", False),
        ("torch.nn.functional", False),
        ("torch.__version__", False),
        ("numpy._core", False),
    ],
)
def test_what_counts_as_private(dotted: str, private: bool) -> None:
    assert is_private_torch(dotted) is private


def test_files_and_functions_are_short() -> None:
    wrong = []
    for _, path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_FILE_LINES}: split it by idea")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines, at most 60")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for _, path in MODULES
        if path.read_text(encoding="utf-8").strip() and ast.get_docstring(parsed(path)) is None
    ]
    assert not wrong, f"no module docstring: {wrong}"


def test_import_is_free_of_torch() -> None:
    script = (
        "import sys, autopar, autopar.solver; print([m for m in ('torch', 'rich', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    """The face is pinned: to add or drop a name is a decision, not an accident."""
    assert sorted(autopar.__all__) == [
        "AutoparError",
        "ClusterSpec",
        "ClusterSpecError",
        "Infeasible",
        "Layout",
        "LayoutError",
        "PinError",
        "Plan",
        "PlanError",
        "PlanMismatch",
        "Prediction",
        "Program",
        "Report",
        "RuntimeFailure",
        "Simulation",
        "Sizing",
        "TraceError",
        "VerifyError",
        "__version__",
        "compile",
        "plan",
        "predict",
        "profile",
        "simulate",
        "size",
        "verify",
    ]
    for name in autopar.__all__:
        assert getattr(autopar, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'shard'; the public names are"):
        autopar.shard  # noqa: B018


def test_no_submodule_shadows_a_public_name() -> None:
    submodules = {path.stem for path in (ROOT / "autopar").iterdir()}
    assert not submodules & set(autopar.__all__)
