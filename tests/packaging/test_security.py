"""SECURITY.md's promises about the code as a whole, read from its syntax."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.glob("psyche_fast/**/*.py"))}

# What unpickles, by any of its names: modules, functions, and switches of functions.
MODULES = re.compile(
    r"(pickle|cPickle|_pickle|dill|cloudpickle|joblib|marshal|shelve|torch\.package"
    r"|torch\.distributed\.checkpoint|torch\.distributed\.rpc|numpy\.core\.multiarray)\b"
)
OBJECTS = {
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list", "read_pickle", "fromfile_pickle",
}  # fmt: skip
LOADS = re.compile(r"^(torch|torch\.jit|torch\.export|joblib)\.load$|^np\.load$|^numpy\.load$")
SWITCHES = {"allow_pickle": False, "weights_only": True, "trust_remote_code": False, "shell": False}


def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def unpicklers(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if MODULES.match(a.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
            found += [n for n in names if MODULES.match(n) or n.rpartition(".")[2] in OBJECTS]
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if node.attr in OBJECTS or LOADS.match(whole) or MODULES.match(whole):
                found.append(whole)
        elif isinstance(node, ast.keyword) and node.arg in SWITCHES:
            value = ast.literal_eval(node.value) if isinstance(node.value, ast.Constant) else None
            if value is not SWITCHES[node.arg]:
                found.append(f"{node.arg}={ast.unparse(node.value)}")
    return found


def test_nothing_is_unpickled() -> None:
    found = {name: unpicklers(tree) for name, tree in trees().items()}
    assert {name: names for name, names in found.items() if names} == {}
    guilty = """
import pickle
from torch.distributed import broadcast_object_list
from torch.distributed.checkpoint import load
torch.load(x, weights_only=False)
dist.all_gather_object(a, b)
np.load(x, allow_pickle=True)
AutoModel.from_pretrained(x, trust_remote_code=given)
"""
    assert len(unpicklers(ast.parse(guilty))) == 9, "the rule itself sees them"


def test_no_text_is_run() -> None:
    for name, tree in trees().items():
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec", "compile", "__import__"}, name


def test_where_modules_are_imported_by_name() -> None:
    """Only one place takes the name from somebody: who calls it with another's has asked first."""
    named: dict[str, list[str]] = {}
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                argument = node.args[0]
                if not isinstance(argument, ast.Constant):
                    named.setdefault(name, []).append(ast.unparse(argument))
    assert named == {
        "psyche_fast/__init__.py": ["_LAZY[name]"],
        "psyche_fast/compat.py": ["_NAMES[name]"],
        "psyche_fast/kernels/backends.py": ["f'psyche_fast.kernels.{package}.{operation}'"],
        "psyche_fast/metrics/trackers.py": [
            "'torch.utils.tensorboard' if name == 'tensorboard' else name"  # a `Literal`
        ],
        "psyche_fast/models/__init__.py": ["f'{__name__}.{_LAZY[name]}'"],
        "psyche_fast/models/registry.py": ["module_name"],
    }
    for reader in ("psyche_fast/rank/serve.py", "psyche_fast/psyche/serving.py"):
        source = SOURCES[reader].read_text(encoding="utf-8")
        assert source.index("check_named(") < source.index("log.info("), reader


def test_the_threat_model_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for word in ("stranger", "path", "replica", "model folder", "checkpoint", "rank 0", "pickle"):
        assert word in text
