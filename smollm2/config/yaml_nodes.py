"""Parse YAML text into nodes and report each problem with its line; values are not converted to types here."""

import yaml

from smollm2.errors import ConfigError

DEEPEST_NESTING = 8


def compose(text: str, name: str) -> yaml.Node | None:
    """Return the root node of a YAML text, or None if it is empty. If `name` ends in `:`, messages add the line number.

    Raise ConfigError if the text is not valid YAML or uses an unsupported feature.
    """

    def problem(what: str, advice: str, line: int) -> ConfigError:
        return ConfigError(f"{name}{line}" if name.endswith(":") else name, what, advice)

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            tag = getattr(event, "tag", None)
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if getattr(event, "anchor", None) is not None:
                raise problem("anchors and aliases (& and *) are not supported", "write out the value", line)
            if tag is not None:
                raise problem(f"tags ({show(tag)}) are not supported", "write the plain value", line)
            if depth > DEEPEST_NESTING:
                raise problem("is nested too deeply", "a config has only sections and keys", line)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not valid YAML ({show(error.problem or error.context)})"
        raise problem(what, "check its colons, indentation and quotes", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = text[error.position : error.position + 1]
        raise problem(f"contains the character {character!r}", "remove it", line) from None
    except (ValueError, OverflowError):  # an escape such as "\U99999999"
        raise problem(
            "not valid YAML (an escape sequence stands for no character)", "write the character itself", 1
        ) from None


def is_null(node: yaml.Node) -> bool:
    """Return whether a node is empty or an unquoted null."""
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value.lower() in ("", "~", "null")


def show_node(node: yaml.Node) -> str:
    """Return a node formatted for a one-line message."""
    if isinstance(node, yaml.SequenceNode):
        items = (item.value if isinstance(item, yaml.ScalarNode) else show_node(item) for item in node.value)
        return show(f"[{', '.join(items)}]")
    return "a section" if isinstance(node, yaml.MappingNode) else quote(node.value)


def quote(value: object) -> str:
    """Return a value formatted for a one-line message: numbers unchanged, other values in quotes."""
    try:
        float(str(value))
    except ValueError:
        return show(repr(value))
    return show(value)


def show(text: object) -> str:
    """Return text formatted for a one-line message: control characters escaped, shortened to 80 characters."""
    line = str(text)
    line = line if line.isprintable() and line.strip() else repr(line)
    return line if len(line) <= 80 else f"{line[:77]}..."
