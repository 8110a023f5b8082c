"""Jinja2 for chat templates, which come from strangers: sandboxed as in transformers, and limited in time and size.

The sandbox keeps a template away from Python's internals. It does not limit loops, so each iteration and each call is
counted here, and what a template writes, joins and pads is limited. A list that contains itself many times over is not.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 50_000_000
MAX_SECONDS = 5.0
MAX_ITERATIONS = 2_000_000
MAX_WIDTH = 1_000_000
"""The largest width that a filter or a method may pad a text to."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; `begin` starts the limits of one rendering."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, moment: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.filters["tojson"] = to_json
        self.filters = {name: self.limit_filter(function) for name, function in self.filters.items()}
        self.filters |= {"_each": _each, "_limit": _limit}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": moment.strftime}
        self.begin()

    def begin(self) -> None:
        """Start to count the time and the iterations."""
        self.deadline, self.iterations = time.monotonic() + MAX_SECONDS, 0

    def count(self) -> None:
        """Count an iteration or a call. Raise SecurityError if there are too many."""
        self.iterations += 1
        if self.iterations > MAX_ITERATIONS or time.monotonic() > self.deadline:
            raise SecurityError("it takes too long")

    def check_size(self, value: Any) -> Any:
        """Return the value. Raise SecurityError if it is a text or list that is too long."""
        if isinstance(value, str | list | tuple) and len(value) > MAX_CHARACTERS:
            raise SecurityError("it writes too much")
        return value

    def limit_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that is counted, and limited in what it takes and returns."""

        @functools.wraps(function)  # it keeps the marks of filters that take the context
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.count()
            check_widths((*args, *kwargs.values()), args[0] if function is do_format and args else "")
            return self.check_size(function(*args, **kwargs))

        return limited

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call as the sandbox does, and count it."""
        __self.count()
        # The sandbox wraps `str.format`, and keeps the method itself in this attribute.
        method = getattr(__obj, "__wrapped__", None)
        check_widths((*args, *kwargs.values()), getattr(method, "__self__", ""))
        return __self.check_size(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result may be much larger than its operands."""
        self.count()
        if operator == "**" and not (abs(left) < 2**31 and abs(right) < 64):
            raise SecurityError("it computes a number that is too large")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and len(sequence) * times > MAX_CHARACTERS:
                    raise SecurityError("it writes too much")
        check_widths((), left if operator == "%" else "")
        return self.check_size(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template, and pass what its loops iterate over, and the texts that it joins, through the limits."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = apply_filter("_each", loop.iter)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = apply_filter("_limit", block.filter)
        for node in list(tree.find_all(nodes.Node)):
            for field, value in list(node.iter_fields()):
                if isinstance(value, list):
                    value[:] = [apply_filter("_limit", one) if isinstance(one, nodes.Concat) else one for one in value]
                elif isinstance(value, nodes.Concat):
                    setattr(node, field, apply_filter("_limit", value))
        tree.set_environment(self)
        return tree


class GenerationTag(Extension):
    """`{% generation %}`, which marks an assistant's text in newer templates: its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that Jinja2 reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the tag's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_template(template: Template, values: Mapping[str, Any]) -> str:
    """Return the rendered template. Raise what it raises, and SecurityError if it exceeds a limit."""
    environment = template.environment
    if isinstance(environment, LimitedEnvironment):
        environment.begin()
    parts, size = [], 0
    for part in template.generate(values):
        size += len(part)
        if size > MAX_CHARACTERS:
            raise SecurityError("it writes too much")
        parts.append(part)
    return "".join(parts)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without the HTML escapes of Jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """Raise TemplateError: how a template refuses a conversation."""
    raise TemplateError(message)


def check_widths(arguments: Iterable[Any], pattern: Any) -> None:
    """Raise SecurityError if an argument, or a number in the format `pattern`, would pad a text to a huge width."""
    huge = any(isinstance(value, int) and value > MAX_WIDTH for value in arguments)
    if huge or (isinstance(pattern, str) and re.search(r"[0-9]{7}", pattern)):
        raise SecurityError("it uses a number that is too large")


def apply_filter(name: str, value: Any) -> nodes.Filter:
    """Return the node of a filter without arguments."""
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno if value else 1)


# A filter that takes the context is not computed in advance, when the template is compiled.
@pass_context
def _each(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        context.environment.count()
        yield value


@pass_context
def _limit(context: Any, value: str) -> Any:
    return context.environment.check_size(value)
