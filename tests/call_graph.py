"""The functions of the package that a function reaches, found in the source: how much there is to read.

Names are resolved through the imports of a file; methods through the class of the receiver, if that is annotated,
constructed, or an attribute of such an object. A call of a module (`self.norm(x)`) and `Function.apply` reach `forward`.
A call that cannot be resolved in this way reaches nothing, and neither does an annotation.
"""

import ast
from collections.abc import Iterator, Mapping

Classes = set[str]


class CallGraph:
    """The functions, methods and classes of the package by dotted name, such as `training.step.train_step`."""

    def __init__(self, modules: Mapping[str, ast.Module]) -> None:
        self.modules = modules
        self.names = {module: dict(imported(tree)) for module, tree in modules.items()}
        self.functions: dict[str, ast.FunctionDef] = {}  # methods as well
        self.classes: dict[str, ast.ClassDef] = {}
        for module, tree in modules.items():
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    self.names[module][node.name] = f"{module}.{node.name}"
                    self._add(f"{module}.{node.name}", node)
        self.attributes = {name: self._attributes(name) for name in self.classes}

    def reach(self, root: str, stops: set[str]) -> dict[str, int]:
        """Return the lines of each definition that `root` reaches. `stops`, names or their beginnings, are not entered.

        A class counts without its methods, which are reached one by one.
        """
        lines: dict[str, int] = {}
        waiting = [root]
        while waiting:
            name = waiting.pop()
            if name in lines or any(f"{name}.".startswith(f"{stop}.") for stop in stops):
                continue
            if name in self.functions:
                lines[name] = span(self.functions[name])
                waiting += self._targets(name)
            elif name in self.classes:
                methods = (item for item in self.classes[name].body if isinstance(item, ast.FunctionDef))
                lines[name] = span(self.classes[name]) - sum(map(span, methods))
                waiting += [f"{name}.__init__", f"{name}.__enter__", f"{name}.__exit__"]
        return lines

    def _add(self, name: str, node: ast.FunctionDef | ast.ClassDef) -> None:
        if isinstance(node, ast.FunctionDef):
            self.functions[name] = node
            return
        self.classes[name] = node
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                self.functions[f"{name}.{item.name}"] = item

    def _module(self, name: str) -> str:
        return (
            name.rpartition(".")[0]
            if name.rpartition(".")[0] in self.modules
            else self._module(name.rpartition(".")[0])
        )

    def _attributes(self, name: str) -> dict[str, Classes]:
        """Return the classes of a class's attributes: of annotated fields, properties, and what `__init__` assigns."""
        module, found = self._module(name), dict[str, Classes]()
        for item in self.classes[name].body:
            if isinstance(item, ast.AnnAssign):
                found[ast.unparse(item.target)] = self._named(module, item.annotation)
            elif isinstance(item, ast.FunctionDef):
                if "property" in map(ast.unparse, item.decorator_list):
                    found[item.name] = self._named(module, item.returns)
                parameters = self._parameters(module, item)
                for target, value in assigned(item):
                    if ast.unparse(target).startswith("self."):
                        classes = self._constructed(module, value) | parameters.get(ast.unparse(value), set())
                        found.setdefault(ast.unparse(target).removeprefix("self."), set()).update(classes)
        return found

    def _parameters(self, module: str, function: ast.AST) -> dict[str, Classes]:
        arguments = (node for node in ast.walk(function) if isinstance(node, ast.arg) and node.annotation)
        return {node.arg: self._named(module, node.annotation) for node in arguments}

    def _named(self, module: str, annotation: ast.AST | None) -> Classes:
        """Return the classes of the package that an annotation or a table names."""
        names: list[str] = []
        for part in ast.walk(annotation) if annotation else ():
            names += [part.id] if isinstance(part, ast.Name) else []
            names += [part.value] if isinstance(part, ast.Constant) and isinstance(part.value, str) else []
        return {self.names[module].get(name, "") for name in names} & self.classes.keys()

    def _constructed(self, module: str, value: ast.AST) -> Classes:
        """Return the classes that an expression makes: `Norm(config)`, `NORMS[name](config)`, `(Block(c) for c in ...)`."""
        found: Classes = set()
        for call in ast.walk(value):
            if not isinstance(call, ast.Call):
                continue
            target = self.names[module].get(ast.unparse(call.func), "")
            if isinstance(call.func, ast.Subscript):
                tables = (node for node in self.modules[module].body if isinstance(node, ast.AnnAssign))
                name = ast.unparse(call.func.value)
                found |= {
                    cls
                    for node in tables
                    if ast.unparse(node.target) == name
                    for cls in self._named(module, node.value)
                }
            elif target in self.functions:
                found |= self._named(self._module(target), self.functions[target].returns)
            found |= {target} & self.classes.keys()
        return found

    def _targets(self, name: str) -> Iterator[str]:
        """Yield what a function calls or passes on; some of it may be no function."""
        function, module, owner = self.functions[name], self._module(name), name.rpartition(".")[0]
        types = self._parameters(module, function) | ({"self": {owner}} if owner in self.classes else {})
        for target, value in assigned(function):
            if isinstance(target, ast.Name):
                types[target.id] = types.get(target.id, set()) | self._types_of(module, value, types)
        for node in (node for statement in function.body for node in ast.walk(statement)):
            if isinstance(node, ast.Name):
                yield self.names[module].get(node.id, "")
            elif isinstance(node, ast.Attribute):
                owners = self._types_of(module, node.value, types) | {
                    self.names[module].get(ast.unparse(node.value), "")
                }
                yield from (f"{cls}.{node.attr}" for cls in owners)
                if node.attr == "apply":
                    yield from (f"{cls}.forward" for cls in owners)
            elif isinstance(node, ast.Call):
                yield from (f"{cls}.forward" for cls in self._types_of(module, node.func, types))

    def _types_of(self, module: str, value: ast.AST, types: Mapping[str, Classes]) -> Classes:
        if isinstance(value, ast.Name):
            return types.get(value.id, set())
        if isinstance(value, ast.Attribute):
            owners = self._types_of(module, value.value, types)
            return {cls for owner in owners for cls in self.attributes[owner].get(value.attr, set())}
        return self._constructed(module, value) if isinstance(value, ast.Call) else set()


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (name in the file, dotted name) of everything that a file imports from the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smollm2"):
            source = (node.module or "").removeprefix("smollm2").removeprefix(".")
            for alias in node.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}".removeprefix(".")


def assigned(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield (target, value) of each assignment, loop and with-block; `a, b = x, y` is two."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=False)
                else:
                    yield target, node.value
        elif isinstance(node, ast.For):
            yield node.target, node.iter
        elif isinstance(node, ast.withitem) and node.optional_vars:
            yield node.optional_vars, node.context_expr


def span(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Return the lines of a definition, its docstring included, its decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1
