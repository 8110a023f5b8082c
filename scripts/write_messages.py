"""Write tests/messages.txt: every message of the package's errors, by where, what and advice. A test keeps it current.

Found by reading the source: calls of the error classes and of `lay_out`. A placeholder of an f-string is `{name}`; a part
that is not text in the source, such as a variable, is `{name}` too.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "messages.txt"
ERRORS = {"ConfigError", "DataError", "CheckpointError", "TrainingError", "ResourceError", "Smollm2Error"}
LAYOUTS = {"lay_out", "Interrupted"}
PARTS = ("where", "what", "advice")
BUILDERS = {"Contradiction": 1}
"""Calls whose arguments become parts of a message: the index of the first one that is `what`."""


class Message(NamedTuple):
    """One call that builds a message, with its parts as templates; `where` alone is a message in one piece."""

    module: str
    line: int
    kind: str
    where: str
    what: str
    advice: str

    def __str__(self) -> str:
        """Return its line in the snapshot, without the line number, which changes often."""
        return " | ".join([self.module, self.kind, *(part or "-" for part in (self.where, self.what, self.advice))])


def find_messages(package: Path) -> list[Message]:
    """Return every message of the package, sorted."""
    found: list[Message] = []
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        if module != "errors":
            found += find_in(ast.parse(path.read_text(encoding="utf-8")), module)
    return sorted(found, key=str)


def find_in(tree: ast.Module, module: str) -> Iterator[Message]:
    """Yield the messages of one file. A variable in them is replaced by the texts that its function, or the file, gives it."""
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        kind = ast.unparse(call.func).rpartition(".")[2]
        first = BUILDERS.get(kind, 0)
        if kind not in (*ERRORS, *BUILDERS) and not (kind in LAYOUTS and kind in imported):
            continue
        around = [node for node in functions if node.lineno <= call.lineno <= (node.end_lineno or 0)]
        texts = assigned_texts(tree.body) | assigned_texts(list(ast.walk(around[-1])) if around else [])
        names = PARTS[1:] if first else PARTS
        given = dict(zip(names, call.args[first:], strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg and word.arg in names}
        parts = {name: template(node, texts) for name, node in given.items()}
        if first:
            parts["where"] = template(call.args[0], texts)
        yield Message(module, call.lineno, kind, *(parts.get(name, "") for name in PARTS))


def assigned_texts(nodes: Sequence[ast.AST]) -> dict[str, list[ast.expr]]:
    """Return the texts that are assigned to each name among these statements."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_text(node.value):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def is_text(node: ast.expr) -> bool:
    """Return whether an expression is text in the source, in one or two versions."""
    if isinstance(node, ast.IfExp):
        return is_text(node.body) and is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def template(node: ast.expr, texts: dict[str, list[ast.expr]]) -> str:
    """Return an expression as text, with a placeholder for everything that is known only when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value).encode("unicode_escape").decode("ascii")
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value, {}) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.IfExp):
        return f"{template(node.body, texts)} / {template(node.orelse, texts)}"
    if isinstance(node, ast.Name) and node.id in texts:
        return " / ".join(template(text, {}) for text in texts[node.id])
    return f"{{{ast.unparse(node)}}}"


def render() -> str:
    """Return the text of the snapshot."""
    return "".join(f"{message}\n" for message in find_messages(ROOT / "smollm2"))


if __name__ == "__main__":
    SNAPSHOT.write_text(render(), encoding="utf-8", newline="\n")
    sys.stdout.write(f"{SNAPSHOT}\n")
