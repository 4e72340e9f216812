"""Imports go one way, nothing private crosses a file, one file holds the operators. Lazy imports count."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlkern"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "triton_kernels" not in path.parts)
# Each floor may import those named before it, and itself.
FLOORS = (
    {"layout", "reference", "requires"},
    {"backends"},
    {"operator"},
    {"checks", "parallel", "dtensors"},
    {"primitives", "advantages"},
    {"selection"},
    {"losses"},
    {"diffusion", "metrics"},
    {"integrations"},
    {"doctor"},
)
BACKENDS = {  # what each file of backends may import, of rlkern
    "contract": set(),
    "reference": {"layout", "backends"},
    "reference_keep": {"backends"},
    "reference_kept": {"layout", "backends"},
    "reference_pair": {"layout", "backends"},
    "reference_pair_parts": {"backends"},
    "reference_pair_terms": {"backends"},
    "reference_parts": {"layout", "backends"},
    "reference_rows": set(),
    "reference_sampler": {"layout", "backends"},
    "native": {"backends"},
    "native_library": set(),  # it names rlkern._cpu in a string: what fails to load is its subject
    "gradient_memory": set(),
    "__init__": {"backends", "triton_kernels", "rlkern"},  # the package itself for its version
}


def imports(path: Path):
    """(module, names) of every import of rlkern, absolute: ("rlkern.losses.aggregate", ["aggregate"])."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "rlkern")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if module.split(".")[0] == "rlkern":
                yield module, [alias.name for alias in node.names]


def rooms(path: Path) -> set[str]:
    """First components below rlkern of what a file imports."""
    found = set()
    for module, names in imports(path):
        below = module.split(".")[1:]
        rooms_of_names = {n if (PACKAGE / n).exists() or (PACKAGE / f"{n}.py").exists() else "rlkern" for n in names}
        found |= {below[0]} if below else rooms_of_names
    return found


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE).with_suffix("")))


@every_file
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "backends":
        assert rooms(path) <= BACKENDS[path.stem]
        return
    if room in ("__init__", "__main__"):
        return
    floor = next(i for i, floor in enumerate(FLOORS) if room in floor)
    assert rooms(path) <= set().union(*FLOORS[: floor + 1])


@every_file
def test_nothing_private_is_imported(path):
    private = [name for module, names in imports(path) for name in [*module.split("."), *names] if re.match(r"_(?!_)", name)]
    assert not private


@every_file
def test_one_file_names_the_machinery_of_operators(path):
    assert path.stem == "operator" or not re.search(r"torch\.library|_functorch|torch\.ops\.rlkern", path.read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "triton_kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (ROOT / "triton_kernels" / f"{node.module}.py").exists()
            continue
        assert {n.split(".")[0] for n in names} <= {"torch", "triton", "contextlib", "functools", "math", "typing"}
