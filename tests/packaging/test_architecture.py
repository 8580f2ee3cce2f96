"""CONTRIBUTING.md's rules about the code as a whole, read from its syntax: nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "psyche_fast"

# What each part may import. A part is a folder of the package or a file beside them.
BOTTOM = {
    *(
        "batch",
        "budgets",
        "compat",
        "config",
        "devices",
        "errors",
        "exchanges",
        "integers",
        "links",
    ),
    *("locations", "options", "presets", "ranks", "schedules", "sharding", "strict", "views"),
}
ALLOWED = {
    "batch": set(),
    "budgets": set(),
    "compat": set(),
    "devices": {"compat"},
    "errors": set(),
    "integers": set(),
    "links": set(),
    "locations": {"options", "strict"},
    "exchanges": {"links", "options"},
    "options": set(),
    "presets": {"locations"},
    "ranks": {"options"},
    "sharding": set(),
    "strict": set(),
    "schedules": {"budgets", "options", "strict"},
    "views": {"options"},
    "config": {"budgets", "exchanges", "locations", "options", "ranks", "schedules", "strict"}
    | {"views"},
    "runfile": {"config", "exchanges", "locations", "options", "schedules", "strict"},
    "conversion": {"config", "exchanges", "locations", "runfile", "strict"},
    "kernels": BOTTOM,
    "distro": BOTTOM | {"kernels"},
    "methods": BOTTOM | {"distro", "kernels"},
    "models": BOTTOM | {"distro", "kernels"},
    "data": BOTTOM,
    "metrics": BOTTOM,
    "start": BOTTOM,
    "rank": BOTTOM | {"distro", "kernels", "methods", "metrics", "models", "start"},
    "psyche": BOTTOM | {"distro", "models", "rank", "start"},
    "core": BOTTOM
    | {"data", "distro", "kernels", "metrics", "models", "psyche_fast", "rank", "start"},
    "bench": BOTTOM | {"distro", "kernels", "models", "psyche_fast", "rank", "start"},
    "sidecar": BOTTOM | {"psyche", "rank", "start"},
    "on_path": BOTTOM | {"distro", "psyche", "sidecar", "start"},
    "completion": set(),
    "doctor": BOTTOM | {"distro", "kernels", "metrics", "models", "start", "version"},
    "commands": BOTTOM
    | {"bench", "completion", "conversion", "core", "data", "doctor", "kernels", "psyche", "start"},
    "looking": BOTTOM | {"core", "metrics", "start"},
    "cli": BOTTOM
    | {"commands", "completion", "conversion", "core", "launching", "looking", "metrics"}
    | {"runfile", "start", "version"},
    "launching": BOTTOM | {"metrics", "psyche_fast", "sidecar", "start"},
    "__main__": {"cli"},
    "psyche_fast": {"distro", "methods", "schedules"},
    "version": {"psyche_fast"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module))


@cache
def source(module: str) -> str:
    return modules()[module].read_text(encoding="utf-8")


def part(module: str) -> str:
    if module.startswith("psyche_fast.psyche.on_path."):
        return "on_path"  # an entry of its own: a package that stands in for Psyche's
    return module.split(".")[1] if "." in module else module


def defining(module: str, name: str) -> str:
    """The module that a name comes from: what a package only hands on is looked up there."""
    if f"{module}.{name}" in modules():
        return f"{module}.{name}"
    if module in modules() and modules()[module].name == "__init__.py":
        for node in ast.walk(tree(module)):
            aliases = node.names if isinstance(node, ast.ImportFrom) and node.module else []
            if any((alias.asname or alias.name) == name for alias in aliases):
                return defining(node.module, name)  # type: ignore[attr-defined]
    return module


@cache
def imports(module: str) -> frozenset[str]:
    """Our modules that a module imports, at once or later, by a statement or `import_module`."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative imports hide where they lead"
            names = [defining(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [n.value for n in node.args if isinstance(n, ast.Constant)]
        else:
            continue
        found |= {name for name in names if name in modules()}
    return frozenset(found - {module})


def test_every_part_has_a_rule() -> None:
    assert {part(module) for module in modules()} == set(ALLOWED)


def test_imports_flow_one_way() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        lowest = [p for p in ALLOWED if p not in order and ALLOWED[p] - {p} <= {*order, *BOTTOM}]
        assert lowest, "the rules themselves go round in a circle"
        order += lowest
    wrong = {
        f"{module} imports {other}"
        for module in modules()
        for other in imports(module)
        if part(other) not in ALLOWED[part(module)] | {part(module)}
    }
    assert wrong == set()


def test_only_the_sidecars_entries_know_psyches_protocol() -> None:
    importers = {
        (part(m), i)
        for m in modules()
        for i in imports(m)
        if part(i) == "psyche" and part(m) not in ("psyche", "sidecar", "on_path")
    }
    assert importers == {("commands", "psyche_fast.psyche.dump")}, "files of Psyche's, no protocol"


def test_only_the_core_and_the_command_know_data() -> None:
    importers = {part(m) for m in modules() if any(part(i) == "data" for i in imports(m))}
    assert importers == {"data", "core", "commands"}


def private_names(module: str) -> Iterator[str]:
    """Uses of other packages' private names: imported, or asked of an object that is not ours."""
    ours = own_private_names()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole.split(".")[0] in ("torch", "transformers") and re.search(
                    r"\._[a-z]", whole
                ):
                    yield whole
        if not isinstance(node, ast.Attribute) or not re.match("_[a-z]", node.attr):
            continue
        if node.attr not in ours and not node.attr.startswith("_foreach_"):
            yield ast.unparse(node)


@cache
def own_private_names() -> frozenset[str]:
    found = {"_exit"}  # os._exit is documented
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                found.add(node.attr)
    return frozenset(found)


def test_private_names_of_torch_and_transformers_are_in_one_file() -> None:
    used = {m: list(private_names(m)) for m in modules() if m != "psyche_fast.compat"}
    allowed = {
        "psyche_fast.models.building": {"module._parameters"},
        "psyche_fast.models.tensor_parallel": {"module._parameters"},
        # Triton's
        "psyche_fast.kernels.interpreter": {
            "interpreter._patch_lang",
            "interpreter._patch_lang_tensor",
        },
        "psyche_fast.models.huggingface": {"compat._apply_liger_kernel_to_instance"},
    }
    left = {m: set(names) - allowed.get(m, set()) for m, names in used.items()}
    assert {m: names for m, names in left.items() if names} == {}
    assert list(private_names("psyche_fast.compat")), "the rule itself sees them"


def test_no_import_of_the_package_is_relative_or_of_everything() -> None:
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert all(alias.name != "*" for alias in node.names)


def test_the_rules_are_those_of_contributing() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert "`cli`, `sidecar` → `core` | `psyche` → `rank` → `models`" in text
    assert "→ `distro` → `kernels`" in text
    for name in BOTTOM:
        assert f"`{name}`" in text, "a file at the bottom that the rules do not name"


def test_a_module_says_what_it_is_in_a_few_hundred_lines() -> None:
    wrong = {}
    for module, path in modules().items():
        lines = path.read_text(encoding="utf-8").count("\n")
        documentation = ast.get_docstring(tree(module)) or ""
        first, *_ = documentation.splitlines() or [""]
        if lines > 500 or not (first.endswith((".", ":")) or module == "psyche_fast.__main__"):
            wrong[module] = (lines, first)
    assert wrong == {}


OPERATIONS = {"encode", "apply", "accumulate", "pack"}
STEP = ("psyche_fast.distro.optimizer", "psyche_fast.distro.exchange")


def definitions(module: str) -> list[str]:
    """Names of a module's public functions and methods."""
    return [
        n.name for n in tree(module).body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"
    ]


def test_each_operation_has_twins_of_one_name() -> None:
    """Files of one name, and in them a function for every one that dispatches to it."""
    for operation in OPERATIONS:
        public, *twins = (
            f"psyche_fast.kernels.{package}{operation}" for package in ("", "reference.", "triton.")
        )
        dispatched = set(
            re.findall(rf'implementation\(backend, "{operation}"\)\.(\w+)', source(public))
        )
        assert dispatched
        for twin in twins:
            assert dispatched <= set(definitions(twin)), twin


def test_no_backend_knows_the_other() -> None:
    for module in modules():
        for one, other in (("triton", "reference"), ("reference", "triton")):
            if module.startswith(f"psyche_fast.kernels.{one}"):
                others = f"psyche_fast.kernels.{other}"
                assert not any(i.startswith(others) for i in imports(module)), module


def road() -> set[str]:
    """The modules that a gradient passes on a GPU.

    From `.grad` to the bytes that are sent, and from those received to the updated parameter.
    Counted is every module of ours that is reached by imports from `distro/optimizer.py` (the step)
    and `distro/exchange.py` (messages, sent and received), at whatever level, through the dispatch
    of `kernels/` to the Triton backend. Left out are the files at the bottom that know nothing of
    gradients (`compat`, `devices` and so on, but not `sharding`), packages' `__init__.py`, which
    run nothing, and the repair of Triton's interpreter, which no GPU has.
    """
    reached: set[str] = set()
    left = set(STEP)
    while left:
        module = left.pop()
        reached.add(module)
        following = set(imports(module))
        if part(module) == "kernels":
            dispatched = re.findall(r'implementation\(backend, "(\w+)"\)', source(module))
            following |= {f"psyche_fast.kernels.triton.{name}" for name in dispatched}
        left |= {
            name
            for name in following - reached - {"psyche_fast.kernels.interpreter"}
            if part(name) not in BOTTOM - {"sharding"} and modules()[name].name != "__init__.py"
        }
    return reached


def test_the_gradients_road_is_short() -> None:
    assert {part(module) for module in road()} == {"distro", "kernels", "sharding"}
    assert len(road()) <= 21, sorted(road())
    for package in ("kernels", "kernels.triton", "kernels.reference"):
        assert definitions(f"psyche_fast.{package}") == [], "a package that only hands on"
        assert imports(f"psyche_fast.{package}") == frozenset()


def test_the_package_stays_small() -> None:
    """Lines that are not blank."""
    lines = {m: sum(1 for line in source(m).splitlines() if line.strip()) for m in modules()}
    assert (
        sum(n for module, n in lines.items() if part(module) == "kernels") < 6_200
    )  # those of methods are 1,300, of the loss 150
    methods = sum(n for module, n in lines.items() if part(module) == "methods")
    assert methods < 3_900  # levels of methods are 350 of them, exchanges and owners 900
    # What looks at machines grows with what can be wrong with them.
    doctor = sum(n for module, n in lines.items() if part(module) == "doctor")
    assert doctor < 2_200
    # Cases, their checks in float64, and the tables of `bench`: nothing that a run needs.
    bench = sum(n for module, n in lines.items() if part(module) == "bench")
    assert bench < 2_200
    assert sum(lines.values()) - methods - doctor - bench < 34_500


def test_an_implementation_is_chosen_in_one_place() -> None:
    choosers = {
        module
        for module in modules()
        for other in imports(module)
        if re.match(r"psyche_fast\.kernels\.(reference|triton)\b", other)
        and not re.match(r"psyche_fast\.kernels\.(reference|triton)\b", module)
    }
    choosers |= {
        module
        for module in modules()
        if part(module) == "kernels"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    }
    # `estimate` chooses nothing: it counts what the reference keeps on a CPU.
    assert choosers == {"psyche_fast.kernels.backends", "psyche_fast.core.estimate"}


def test_names_are_in_single_backticks() -> None:
    double = [m for m, path in modules().items() if "``" in path.read_text(encoding="utf-8")]
    assert double == []
