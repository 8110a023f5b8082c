"""The Modelfile, from which `ollama create` makes a model of a GGUF file."""

import json
from collections.abc import Sequence

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smollm2.data.tokenizer import Tokenizer
from smollm2.exporting.special_tokens import find_begin_of_text, list_stop_tokens

ROLES = ("system", "user", "assistant", "user")
CONTENTS = ("Xsystemx", "Xfirstx", "Xanswerx", "Xsecondx")


def write_modelfile(file: str, tokenizer: Tokenizer, positions: int) -> str:
    """Return the text of a Modelfile for the GGUF file beside it."""
    lines = [f"FROM ./{file}"]
    template = translate_template(tokenizer)
    if template:
        text, system = template
        lines.append(f'TEMPLATE """{text}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    elif tokenizer.chat_template:
        lines.append("# No TEMPLATE: this chat template has no simple form, and Ollama reads the one in the GGUF file.")
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in list_stop_tokens(tokenizer)]
    lines.append(f"PARAMETER num_ctx {positions}")
    return "\n".join(lines) + "\n"


def translate_template(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Return a chat template like ChatML's in Ollama's language, and its default system message, or None for others.

    Like ChatML's is one that writes the same text before a role, between role and message, and after each message.
    """
    messages = list(zip(ROLES, CONTENTS, strict=True))
    text = render(tokenizer, messages)
    head, _, rest = text.partition("system")
    middle, _, rest = rest.partition(CONTENTS[0])
    tail = rest.partition(f"{head}user{middle}{CONTENTS[1]}")[0]

    def lay_out(turns: Sequence[tuple[str, str]]) -> str:
        return "".join(f"{head}{role}{middle}{content}{tail}" for role, content in turns) + f"{head}assistant{middle}"

    if not head or not tail or text != lay_out(messages):
        return None
    alone = render(tokenizer, messages[1:2])
    system = alone.removeprefix(f"{head}system{middle}").partition(f"{tail}{head}user")[0] if "system" in alone else ""
    turns = [("system", system), *messages[1:2]] if system else messages[1:2]
    if alone != lay_out(turns) or any(mark in head + middle + tail + system for mark in ("{{", '"""')):
        return None
    loop = f"{head}{{{{ .Role }}}}{middle}{{{{ .Content }}}}{tail}"
    return f"{{{{- range .Messages }}}}{loop}{{{{ end }}}}{head}assistant{middle}", system


def render(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> str:
    """Return a chat as text, up to where the answer begins; empty without a chat template, or if it fails."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(tokenizer.chat_template or "").render(
            messages=[{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=True,
            bos_token=tokenizer.token(find_begin_of_text(tokenizer)),
            eos_token=tokenizer.token(tokenizer.end_of_text),
        )
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError):  # a template may fail in any way
        return ""
