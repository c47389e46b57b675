"""Who may import whom, what the wheel holds, and that ``import fxquant`` stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each group may import itself and the groups it lists. ``core`` is ordered: a module imports only those before it.
CORE = (
    "errors", "outputs", "direct", "files", "memory", "headers", "onnx_claims", "lazy", "spool", "tasks", "cache",
    "bulk", "dims", "grids", "shifts", "codebooks", "formats", "scheme", "scales", "bitops", "layouts", "packing",
    "tilings", "decodings", "qtensor", "deferred", "graph", "rewrite", "layers", "choice", "signature", "observations",
    "program", "ops", "draw", "qdq", "producers", "calibrate", "observe", "gradients", "blocks", "verify", "eager",
    "sizes", "symbolic", "flatten", "valueless", "capture",
)  # fmt: skip
MAY_IMPORT = {
    "core": set(),
    "solvers": {"core"},
    "passes": {"core", "solvers"},
    "codegen": {"core"},
    "show": {"core"},
    "config": {"core"},
    "store": {"core"},
    "evaluate": {"core"},
    "pipeline": {"core", "solvers", "passes", "codegen", "show", "config", "store", "evaluate"},
    "top": {"core", "pipeline", "codegen", "show", "store", "config", "evaluate"},
}
GROUP_OF = {
    "journal": "store", "results": "store", "origin": "pipeline", "jobs": "pipeline", "cli_jobs": "top",
    "downloads": "top", "compiled": "pipeline", "modules": "pipeline", "pipeline": "pipeline", "config": "config",
    "store": "store",
    "document": "store", "encoding": "store", "targets": "store", "evaluate": "evaluate", "intervals": "evaluate",
    "methods": "config", "recipes": "config", "grammar": "config", "places": "config", "config_schema": "config",
    "examples": "pipeline", "trials": "pipeline", "sensitivity": "pipeline", "allocation": "pipeline",
    "candidates": "pipeline", "recommend": "pipeline", "cli_recommend": "top", "kernels": "pipeline",
    "observed": "store", "comparison": "pipeline", "counterparts": "pipeline", "deviations": "pipeline",
    "weight_table": "pipeline", "hf_quantizer": "pipeline", "checkpoints": "top", "model_card": "top", "lm_eval": "top",
    "kv_cache": "top", "hf": "top", "generate": "top", "cli_generate": "top", "cli": "top", "cli_measure": "top",
    "cli_compare": "top", "cli_kernels": "top", "cli_onnx": "top", "outline": "top", "draft": "top",
    "weight_file": "store", "stream": "pipeline", "units": "pipeline", "weight_writer": "pipeline",
    "cli_config": "top", "cli_options": "top", "demo": "top",
    "engines": "pipeline",
    "cli_export": "top", "export_folder": "top", "export_ggml": "top", "export_check": "top", "dynamo": "top",
    "claims": "top", "gguf_header": "top",
}  # fmt: skip
HEAVY = {
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "triton",
    "transformers",
    "gguf",
    "lm_eval",
    "compressed_tensors",
    "ray",
    "joblib",
}
ON_DEMAND = {"hf_quantizer", "lm_eval"}  # they derive from classes of heavy packages; nothing imports them at its top


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name below fxquant, following the real folders."""
    found = {}
    for folder, prefix in (("fxquant", ""), ("passes", "passes."), ("codegen", "codegen.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == "fxquant" and inside.parts[0] in ("passes", "codegen"):
                continue  # the links
            found[prefix + ".".join(inside.with_suffix("").parts)] = path
    return found


SOURCES = sources()


def group(module: str) -> str:
    head = module.split(".")[0]
    return "core" if head in CORE else GROUP_OF.get(head, head)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere in it or at its top level only."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Modules of fxquant that a file imports, below ``fxquant``."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "fxquant" and len(parts) > 1:
            inner = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found |= {next((m for m in inner if m in SOURCES or f"{m}.__init__" in SOURCES), parts[1])}
    return found


@pytest.mark.parametrize("module", [m for m in SOURCES if m != "__init__"])
def test_imports_follow_the_layers(module: str) -> None:
    mine = group(module)
    assert mine in MAY_IMPORT, f"{module} belongs to no layer; add it to this test and to docs/architecture.md"
    for other in own_imports(SOURCES[module]):
        theirs = group(other)
        assert theirs == mine or theirs in MAY_IMPORT[mine], f"{module} ({mine}) must not import {other} ({theirs})"
        if mine == theirs == "core":
            assert CORE.index(other.split(".")[0]) < CORE.index(module.split(".")[0]), f"{module} imports {other}"
        if mine == theirs == "passes":
            pytest.fail(f"pass {module} imports another pass, {other}")


@pytest.mark.parametrize("module", [m for m in SOURCES if group(m) != "codegen" and m not in ON_DEMAND])
def test_heavy_packages_are_imported_inside_functions(module: str) -> None:
    found = {name.split(".")[0] for name in imports(SOURCES[module], top_level=True)} & HEAVY
    assert not found


def test_no_file_is_half_merged() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    assert not [page.name for page in pages if re.search(r"^(<<<<<<<|>>>>>>>)", page.read_text(), re.MULTILINE)]


def test_solvers_know_no_graphs() -> None:
    for module, path in SOURCES.items():
        if group(module) == "solvers":
            assert not any(name.startswith("torch.fx") for name in imports(path))


def test_import_is_light() -> None:
    code = f"import fxquant, sys; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import fxquant

    assert all(getattr(fxquant, name) is not None for name in fxquant.__all__)


def test_no_two_sources_of_codegen_are_alike() -> None:
    """No file shares more than a third of its lines with another, imports and single words aside."""
    lines = {}
    for path in sorted({*(ROOT / "codegen").rglob("*.py"), *(ROOT / "codegen").rglob("*.j2")}):
        stripped = [line.strip() for line in path.read_text().splitlines()]
        lines[path.name] = [q for q in stripped if len(q) > 8 and not q.startswith(("import ", "from ", "#"))]
    for name, own in lines.items():
        for other, theirs in lines.items():
            shared = sum(line in set(theirs) for line in own) if name != other else 0
            assert shared <= len(own) / 3, f"{shared} of {len(own)} lines of {name} stand in {other}"


def test_packages_are_complete() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"fxquant." + m.removesuffix(".__init__") for m in SOURCES if m.endswith(".__init__")} | {"fxquant"}
    assert set(config["packages"]) == {f.removesuffix(".__init__") for f in folders}
    assert (ROOT / "fxquant/passes").readlink() == Path("../passes")
    assert (ROOT / "fxquant/codegen").readlink() == Path("../codegen")


def test_every_pass_module_exports_one_pass() -> None:
    import importlib

    from fxquant.program import Pass

    for module in (m for m in SOURCES if m.startswith("passes.") and m != "passes.__init__"):
        loaded = importlib.import_module(f"fxquant.{module}")
        found = [v for v in vars(loaded).values() if isinstance(v, Pass)]
        assert len(found) == 1, module
        assert found[0].name == module.removeprefix("passes.")


def test_files_stay_readable() -> None:
    long = {m: n for m, p in SOURCES.items() if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_no_pickle_no_eval() -> None:
    """Nothing read from a file is executed: these calls do not occur in the package."""
    banned = {"eval", "exec", "__import__"}
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned, f"{module}:{node.lineno} calls {node.func.id}"
        used = {n.split(".")[0] for n in imports(path)} | imports(path)
        assert not used & {"pickle", "cloudpickle", "torch.load"}, module
