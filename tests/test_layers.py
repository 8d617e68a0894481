"""Who may import whom, and how large things may be: docs/architecture.md, read from the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted([*ROOT.glob("fastssl/**/*.py"), *ROOT.glob("kernels/*.py")])
NATIVE = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.cu*"), *ROOT.glob("csrc/*.h")])
OTHERS = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), ROOT / "setup.py"])

VALUES = {
    "contract",
    "bounds",
    "files",
    "milestones",
    "text",
}  # what the parts agree on: no part of ours is imported there
RUN_ACTIONS = {"evaluation", "pretraining", "report", "weights"}
# room: the rooms of ours that it may import (a module by its full name where only that one is allowed)
MAY_IMPORT = {
    "ops": {"kernels", "_C"},  # the kernels of the same stem, and _C through dispatch.py alone
    "kernels": set(),
    "contract": set(),  # what methods, loaders and trainers agree on
    "bounds": {"settings"},  # names of flags
    "files": set(),
    "milestones": {"settings"},
    "text": set(),  # names from outside, made safe to show
    "launch": set(),  # how this process was started, from environment variables
    "distributed": {"launch"},
    # `nn.dvae.load_tokenizer` reads weights of runs and files
    "nn": {"extras", "ops", "distributed", "text", "train.checkpoint", "weight_files"},
    "methods": {
        "contract",
        "bounds",
        "milestones",
        "nn",
        "ops",
        "distributed",
        "data.augmentation",
        "data.lab",
        "data.text",
        "train.config",
        "train.schedule",
        "eval.protocols",
    },
    "data": {*VALUES, "extras", "ops"},
    "train": {*VALUES, "ops", "distributed"},
    "eval": {*VALUES, "extras", "ops", "nn", "data", "distributed", "train.optim", "train.config", "train.schedule"},
    "extras": set(),  # what a missing optional dependency raises
    "settings": set(),  # dataclass fields by flat names
    "report": {*VALUES, "extras", "run", "ops", "data", "train.records", "eval"},
    # `Run` calls evaluation, pretraining, report and weights inside its methods; they import `Run`
    "method_modules": {"methods", "data"},
    "run": {
        *VALUES,
        "extras",
        "settings",
        "method_modules",
        "data",
        "eval.few_labels_table",
        "eval.labels",
        "eval.retrieval",
        "train",
        *RUN_ACTIONS,
    },
    "evaluation": {
        *VALUES,
        "settings",
        "method_modules",
        "run",
        "data",
        "eval",
        "machine",
        "distributed",
        "train.checkpoint",
    },
    "preparation": {*VALUES, "extras", "settings", "run", "data", "machine", "train", "weights", "distributed"},
    "pretraining": {
        *VALUES,
        "extras",
        "settings",
        "method_modules",
        "run",
        "data",
        "eval",
        "evaluation",
        "preparation",
        "machine",
        "train",
        "weights",
        "distributed",
    },
    "weights": {*VALUES, "weight_files", "weight_names", "tower_names", "nn.momentum"},
    "weight_files": {*VALUES, "weight_names", "tower_names"},
    "tower_names": {"weight_names"},  # names of CLIP's and SigLIP's towers
    "weight_names": set(),  # names of other libraries
    "machine": {"data", "ops", "_C"},
    "cli": {
        *VALUES,
        "extras",
        "settings",
        "method_modules",
        "run",
        "evaluation",
        "pretraining",
        "ops",
        "data",
        "eval",
        "report",
        "weights",
        "train",
        "machine",
        "distributed",
    },
    "__main__": {"cli"},
    "__init__": {"extras"},
}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL, MOST_PARAMETERS = 500, 75, 150, 8
LONGEST_METHOD = 240  # the whole file


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    package = ("fastssl", *package) if package[0] == "kernels" else package  # where setup.py installs it
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    room = room_of(path)
    for name in imports_of(path):
        assert name.split(".")[0] != "kernels", f"{name}: the installed name is fastssl.kernels"
        if not name.startswith("fastssl.") or name == "fastssl.__version__":
            continue
        target = name.removeprefix("fastssl.")
        allowed = MAY_IMPORT[room] | {room}
        fits = any(target == other or target.startswith(f"{other}.") for other in allowed)
        is_parent = any(other.startswith(f"{target}.") for other in allowed)  # `from fastssl.data import recipe`
        assert fits or is_parent, f"{room} may import {sorted(allowed)}, not {name}"
        if room == "ops" and target != "kernels" and target.split(".")[0] in ("kernels", "_C"):
            allowed = "_C" if path.stem == "dispatch" else f"kernels.{path.stem}"
            assert target == allowed, f"ops/{path.name} may import {allowed}, not {target}"


def test_the_table_refuses_what_it_should():
    """The check above would be worthless if it read no imports."""
    assert "fastssl.ops.check" in imports_of(ROOT / "fastssl/ops/ema.py")
    assert "fastssl.train.config" in imports_of(ROOT / "fastssl/methods/mae.py")
    assert room_of(ROOT / "fastssl/methods/mae.py") == "methods"


@pytest.mark.parametrize("path", PYTHON + NATIVE + OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", PYTHON + OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            limit = LONGEST_KERNEL if path.parent.name == "kernels" else LONGEST_FUNCTION
            assert node.end_lineno - node.lineno < limit, f"{node.name}: {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", sorted(ROOT.glob("fastssl/ops/*.py")), ids=lambda path: path.name)
def test_public_ops_are_documented_and_small(path):
    public = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    for function in public:
        assert len(function.args.args + function.args.kwonlyargs) <= MOST_PARAMETERS
        assert ast.get_docstring(function) or path.name == "check.py", f"{function.name} has no docstring"


@pytest.mark.parametrize("path", sorted(ROOT.glob("fastssl/methods/*.py")), ids=lambda path: path.name)
def test_methods_fit_a_few_screens(path):
    assert len(path.read_text().splitlines()) <= LONGEST_METHOD


def test_setup_is_short():
    """Most of it finds nvcc's toolkit and says what is missing."""
    assert len((ROOT / "setup.py").read_text().splitlines()) < 125


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_named_like_a_function_in_it(path):
    """`from .attention import attention` in an __init__ hides the module: the one exception."""
    names = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert path.stem not in names or path.stem == "attention"


def test_a_run_imports_its_actions_when_they_are_called():
    """`fastssl.run` is imported by the modules that its methods call."""
    tree = ast.parse((ROOT / "fastssl/run.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {f"{node.module}" for node in top if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {f"fastssl.{name}" for name in RUN_ACTIONS}
