"""Imports point one way: losses -> primitives -> backends -> kernels. Read from the sources, so a lazy import counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRIMITIVES = {"ops", "linear", "divergence", "moments", "covariance", "ratio", "selection", "advantages", "elbo", "diffusion_masks"}
MAY_IMPORT = {  # module of rlkern: modules of rlkern; whatever is not listed here is a primitive
    "reference": set(),
    "rows": {"checks"},
    "checks": set(),
    "spare": set(),
    "metrics": {"checks"},
    "native": {"_cpu"},
    "backends": {"reference", "native", "triton_kernels", "__init__"},
    "__main__": {"__init__"},
}


def imported(path: Path, package: list[str]) -> set[str]:
    """First components of the rlkern modules that a file imports; "__init__" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] if "." in a.name else "__init__" for a in node.names if a.name.split(".")[0] == "rlkern"}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "rlkern"):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module or "").split(".")] if node.module else base
            parts = parts[1:] if parts[:1] == ["rlkern"] else parts
            found |= {parts[0]} if parts else {a.name if (ROOT / "rlkern" / f"{a.name}.py").exists() else "__init__" for a in node.names}
    return found - ({"_cpu"} if path.stem == "native" else set())


@pytest.mark.parametrize("path", sorted((ROOT / "rlkern").glob("*.py")), ids=lambda p: p.stem)
def test_modules(path):
    if path.stem == "__init__":
        return
    allowed = MAY_IMPORT.get(path.stem, PRIMITIVES | {"rows", "checks", "backends", "spare"})
    names = {n for n in imported(path, ["rlkern"]) if n != path.stem}
    assert {n for n in names if n not in allowed} <= ({"__init__"} if path.stem in ("backends", "__main__", "native") else set())


@pytest.mark.parametrize("path", sorted((ROOT / "rlkern" / "losses").glob("*.py")), ids=lambda p: p.stem)
def test_losses_use_primitives_only(path):
    assert imported(path, ["rlkern", "losses"]) <= PRIMITIVES | {"rows", "checks", "losses"}


@pytest.mark.parametrize("path", sorted((ROOT / "rlkern" / "integrations").rglob("*.py")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_integrations_use_what_users_may(path):
    package = list(path.relative_to(ROOT).parent.parts)
    assert imported(path, package) <= PRIMITIVES | {"rows", "checks", "metrics", "losses", "integrations", "__init__"}


@pytest.mark.parametrize("path", sorted((ROOT / "triton_kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (ROOT / "triton_kernels" / f"{node.module}.py").exists()
            continue
        assert {n.split(".")[0] for n in names} <= {"torch", "triton", "contextlib", "functools", "math", "typing"}
