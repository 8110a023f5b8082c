"""The architecture, as one list: a file imports only what stands above it. README.md prints the list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from call_graph import CallGraph

from smollm2.config.schema import SECTIONS

PACKAGE = Path(__file__).resolve().parents[1] / "smollm2"

FOUNDATION = ["errors", "formatting", "config", "storage", "plan"]
"""No torch here."""

ORDER = [
    *FOUNDATION,
    "model",
    "data",
    "runtime",
    "tracking",
    "checkpoint",
    "inference",
    "analysis",
    "exporting",
    "report",
    "training",
    "cli",
]
"""Folders, and files of the root, each of which imports only what comes before it; the files of one folder may import one another."""

ENTRY_FILES = {"__init__", "__main__"}

NAMED_IN = {
    "accelerate": {"runtime.device"},
    "gguf": {"exporting.gguf", "exporting.gguf_contents", "exporting.gguf_readers"},
    "llama_cpp": {"exporting.gguf_readers"},
    "lm_eval": {"inference.harness"},
    "transformers": {"exporting.readers"},
    "wandb": {"tracking.wandb"},
}
"""Outside packages that only these files import."""

KEPT_FROM = {
    "model": {"smollm2.data", "smollm2.tracking", "smollm2.runtime"},
    "data": {"torch.distributed"},
    "checkpoint": {"torch.nn"},
}
"""What a file must not name, over and above the order: it moves what it is given and knows no more of it."""

SAID_IN = {
    "print": {"cli", "tracking.console"},
    "os.environ": {"runtime", "cli"},
    "os.getenv": {"runtime", "cli"},
    "sys.exit": {"cli", "__main__"},
    "SystemExit": {"cli", "__main__", "analysis.foreign"},  # somebody else's code may exit
}
"""Names that only these files use."""

FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "pickle.load": "runs code from a file",
    "pickle.loads": "runs code from a file",
    "pickle.Unpickler": "runs code from a file",
    "yaml.load": "builds any object that a file names",
    "yaml.unsafe_load": "builds any object that a file names",
    "os.system": "runs a shell",
}
FORBIDDEN_ARGUMENTS = {("weights_only", False), ("trust_remote_code", True), ("shell", True), ("allow_pickle", True)}


def modules() -> dict[str, ast.Module]:
    """Every file of the package by its dotted name without `smollm2.`, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def part_of(module: str) -> str:
    """The line of the list on which a module stands: a file, or the folder that holds it."""
    return module.split(".")[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever it does; `if TYPE_CHECKING` imports nothing."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: write the whole name, from smollm2..."
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (name for branch in child.orelse for name in imports(branch))
        else:
            yield from imports(child)


def own_imports(module: str) -> set[str]:
    """Lines of the list that a module imports, its own apart."""
    names = (name.split(".") for name in imports(MODULES[module]))
    return {name[1] for name in names if name[0] == "smollm2" and len(name) > 1 and name[1] in ORDER} - {
        part_of(module)
    }


def uses(tree: ast.AST) -> Iterator[str]:
    """Names and dotted names that a file uses, as `print` and `os.environ`; `from os import environ` counts too."""
    yield from imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield ast.unparse(node)


PLACED = [name for name in MODULES if name not in ENTRY_FILES]


def test_the_list_names_each_file_and_folder_once() -> None:
    assert {part_of(module) for module in PLACED} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", PLACED)
def test_a_file_imports_only_what_is_listed_above_it(module: str) -> None:
    above = ORDER[: ORDER.index(part_of(module))]
    assert own_imports(module) <= set(above)


def own_files(module: str) -> set[str]:
    """Modules of the same folder that a module imports."""
    names = {name.removeprefix("smollm2.") for name in imports(MODULES[module])}
    found = {".".join(name.split(".")[:2]) for name in names}
    return {name for name in found if name in MODULES and part_of(name) == part_of(module) and name != module}


def test_files_of_one_folder_never_import_in_a_circle() -> None:
    remaining = {module: own_files(module) for module in PLACED}
    while free := {module for module, needed in remaining.items() if not needed & remaining.keys()}:
        for module in free:
            del remaining[module]
    assert not remaining


@pytest.mark.parametrize("module", ["__init__", *(module for module in PLACED if part_of(module) in FOUNDATION)])
def test_nothing_above_the_first_line_imports_torch(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not outside & {"torch", "numpy", "accelerate", "tokenizers", "safetensors"}


@pytest.mark.parametrize("module", MODULES)
def test_an_outside_package_is_imported_only_where_it_belongs(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(MODULES[module])}
    assert {package for package in outside & set(NAMED_IN) if module not in NAMED_IN[package]} == set()


@pytest.mark.parametrize("module", [module for module in PLACED if part_of(module) in KEPT_FROM])
def test_a_file_is_kept_from_what_is_not_its_business(module: str) -> None:
    kept_from = KEPT_FROM[part_of(module)]
    assert not {name for name in uses(MODULES[module]) if any(f"{name}.".startswith(f"{ban}.") for ban in kept_from)}


@pytest.mark.parametrize("module", MODULES)
def test_words_exits_and_the_environment_have_their_places(module: str) -> None:
    used = set(uses(MODULES[module]))
    assert {
        name for name, places in SAID_IN.items() if name in used and not {module, part_of(module)} & places
    } == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_file_that_we_load_can_run_code(module: str) -> None:
    """Promise G1."""
    tree = MODULES[module]
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} | set(imports(tree))
    assert {f"{name} {FORBIDDEN[name]}" for name in called & set(FORBIDDEN)} == set()
    assert not {name for name in called if name.endswith((".extractall", ".instantiate"))}
    given = {
        (node.arg, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant)
    }
    assert not given & FORBIDDEN_ARGUMENTS


def test_the_names_of_the_tied_matrices_are_written_in_one_place() -> None:
    """The two checks that share nothing with the code that they check write them again."""
    apart = {"model.transformer", "analysis.reference", "exporting.gguf_contents"}
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    found = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == apart


@pytest.mark.parametrize("section", SECTIONS)
def test_every_config_key_is_read_by_some_code(section: str) -> None:
    """A key that no code reads is a promise that nobody keeps: drop it, or write the code that reads it."""
    readers: list[ast.AST] = [tree for name, tree in MODULES.items() if part_of(name) not in {"config", "plan"}]
    readers += properties_read(readers)
    read = {key for tree in readers for key in keys_read(tree, section)}
    unread = set(SECTIONS[section].model_fields) - read
    assert not unread, f"no code reads {', '.join(f'{section}.{key}' for key in sorted(unread))}"


def properties_read(readers: list[ast.AST]) -> list[ast.AST]:
    """The properties of Config that the readers use: what these read is read."""
    attributes = {node.attr for tree in readers for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [
        node
        for node in ast.walk(MODULES["config.schema"])
        if isinstance(node, ast.FunctionDef)
        and node.name in attributes
        and "property" in map(ast.unparse, node.decorator_list)
    ]


def keys_read(tree: ast.AST, section: str) -> Iterator[str]:
    """Attributes taken from a section: `config.training.seed`, or `t.seed` where t is annotated or assigned as one."""
    names = {f"self.{section}", *names_of_section(tree, section)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in names or owner.endswith(f"config.{section}"):
                yield node.attr


def names_of_section(tree: ast.AST, section: str) -> Iterator[str]:
    """Names, `self.config` among them, that hold the section somewhere in a file."""
    kind = SECTIONS[section].__name__
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation and kind in ast.unparse(node.annotation):
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            yield from (name, f"self.{name}")
        elif isinstance(node, ast.Assign):
            for target, value in assignments(node):
                if ast.unparse(value).endswith(f"config.{section}"):
                    yield ast.unparse(target)


def assignments(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) pairs of a statement, `a, b = x, y` taken apart."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


@pytest.mark.parametrize(
    "statement",
    ["import smollm2.model", "from smollm2 import model", "def f():\n    from smollm2.model import SmolLM2"],
)
def test_imports_are_found_in_each_form(statement: str) -> None:
    assert [name.split(".")[:2] for name in imports(ast.parse(statement))] == [["smollm2", "model"]]


READING = {
    "a forward pass with labels on a CPU": (
        350,
        "model.transformer.SmolLM2.forward",
        {
            "config",
            "model.cache",  # generation
            "model.varlen",  # a GPU
            "model.attention.attend_flex",
            "model.attention.lay_out_flex",
            "model.attention.eager_attention",  # the reference of tests and of the check at the start
        },
    ),
    "the training loop and the optimizer step": (
        400,
        "training.loop.run_steps",
        {
            "config",
            "errors",
            "model",  # counted above
            "data",  # batch n is a function of the seed and n
            "tracking",
            "checkpoint",
            "plan",
            "runtime.sharding",  # how the model is shared out
            "training.actions.run_actions",  # what happens between two steps
            "training.actions.save",
            "training.actions.check_replicas",
            "training.actions.Diagnostics",
            "training.actions.scheduled_diagnostics",
            "training.anomalies.report_skip",  # what is reported about a step with a problem
            "training.anomalies.report_spike",
            "training.anomalies.report_out_of_memory",
            "training.examiner",  # what happens to a step whose numbers are unusual
            "training.autopsy.SpikeExaminer",
            "training.anomalies.rewind_or_stop",
            "training.first_step",  # the step after a save, and after a resume
            "training.timing.Forecast",
            "training.timing.Stragglers",
            "training.timing.own_seconds",
            "training.timing.save_throughput",
        },
    ),
}
"""What matters most: the lines that it may take, where reading starts, and which calls are not followed.

Counted is every definition of the package that the first one reaches by calls, with its docstring (tests/call_graph.py).
"""


@pytest.mark.parametrize("what", READING)
def test_what_matters_most_is_read_in_one_sitting(what: str) -> None:
    limit, root, stops = READING[what]
    lines = CallGraph(MODULES).reach(root, stops)
    assert sum(lines.values()) <= limit, "\n".join(f"{count:4} {name}" for name, count in sorted(lines.items()))


@pytest.mark.parametrize("what", READING)
def test_every_call_that_is_not_followed_still_exists(what: str) -> None:
    graph, (_, root, stops) = CallGraph(MODULES), READING[what]
    known = {root, *graph.functions, *graph.classes, *MODULES, *map(part_of, MODULES)}
    assert stops <= known
