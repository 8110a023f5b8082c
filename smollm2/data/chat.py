"""Conversations to text by a chat template, and to ids with the positions that are trained on.

Templates are Jinja, as transformers renders them, in a sandbox: a template comes with a model and is not trusted. Where a
message stands in the text is found by rendering the conversation again with a mark in place of each content, because the
role names of a template may occur in a content, too.
"""

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from smollm2.data.conversations import Conversation, Message, from_json
from smollm2.data.stream import MARK
from smollm2.data.template_sandbox import LimitedEnvironment, render_template
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.tokenizer_files import CHAT_TEMPLATE, GENERATION, SPECIAL_TOKENS, TOKENIZER_CONFIG, parse
from smollm2.errors import DataError

START, END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + SYSTEM
    + "<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
"""SmolLM2's template: ChatML, and a system message if the conversation has none."""

TEMPLATES = {"smollm2": SMOLLM2, "chatml": CHATML}

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoded(NamedTuple):
    """The ids of a conversation, which of them are targets, and the bytes that the tokenizer cannot encode."""

    ids: list[int]
    targets: list[bool]
    unknown_bytes: int


class Piece(NamedTuple):
    """A part of a rendered conversation: the text of a template, or the content of a message."""

    text: str
    role: str  # empty for the template's own text


class ChatTemplate:
    """A chat template and the tokenizer that it belongs to. Raise DataError if it cannot be used."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        try:
            self.template = LimitedEnvironment(datetime.datetime.now()).from_string(source)
        except Exception as error:  # compiling computes constants, which may raise whatever Python raises
            raise unusable(error) from None
        self.variables = name_special_tokens(tokenizer)
        self.backend = tokenizer.backend
        added = self.backend.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}

    def render(self, messages: Conversation, *, answers: bool = False) -> str:
        """Return the text of a conversation; with `answers`, up to where the assistant's next turn begins."""
        turns = [message._asdict() for message in messages]
        values = {
            **self.variables,
            "messages": turns,
            "add_generation_prompt": answers,
            "tools": None,
            "documents": None,
        }
        try:
            return render_template(self.template, values)
        except Exception as error:  # a template may raise whatever Python raises
            raise unusable(error) from None

    def trace(self, messages: Conversation, *, answers: bool = False) -> list[Piece]:
        """Return the parts of the rendered conversation: the template's own text and the contents, by turns.

        Raise DataError if a content does not occur exactly once, as it is or without white space around it.
        """
        marks = [f"qzxmark{n}xzq" for n in range(len(messages))]
        text = self.render(messages, answers=answers)
        rest = self.render(
            [Message(one.role, mark) for one, mark in zip(messages, marks, strict=True)], answers=answers
        )
        own = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise untraceable()
            own.append(before)
        own.append(rest)
        pieces, at = [Piece(own[0], "")], len(own[0])
        for message, after in zip(messages, own[1:], strict=True):
            content = message.content
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            found_form = next((form for form in forms if text.startswith(form + after, at)), None)
            if found_form is None:
                raise untraceable()
            pieces += [Piece(found_form, message.role), Piece(after, "")]
            at += len(found_form) + len(after)
        if "".join(piece.text for piece in pieces) != text:
            raise untraceable()
        return pieces

    def encode(self, messages: Conversation, train_on: str = "assistant") -> Encoded:
        """Return the ids of a conversation. Targets are the assistant's contents and the token that ends each turn, or
        with `all`, everything but the first token."""
        pieces = self.trace(messages)
        spans = list(self.find_targets(pieces))
        ids, targets, lost, at = [], [], 0, 0
        for found, places, unknown, length in self.encode_pieces(pieces):
            for i, (start, end) in zip(found, places, strict=True):
                start, end = at + start, at + max(end, start + 1)
                ids.append(i)
                targets.append(any(start < last and end > first for first, last in spans))
            lost, at = lost + unknown, at + length
        if train_on == "all":
            targets = [False, *[True] * (len(ids) - 1)]
        return Encoded(ids, targets, lost)

    def encode_prompt(self, messages: Conversation) -> list[int]:
        """Return the ids after which the assistant's next turn begins."""
        pieces = self.trace(messages, answers=True)
        return [i for found, _, _, _ in self.encode_pieces(pieces) for i in found]

    def find_targets(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of each turn of the assistant in the text, the token that ends it included."""
        at = 0
        for piece, after in zip(pieces, [*pieces[1:], Piece("", "")], strict=True):
            if piece.role == "assistant":
                name, place = self.find_end(after)
                yield at, at + len(piece.text) + place + len(name)
            at += len(piece.text)

    def find_end(self, after: Piece) -> tuple[str, int]:
        """Return the special token that ends an assistant's turn, and its place in the template's text `after` it."""
        found = self.find_special(after.text)
        if not found[0]:
            raise DataError("the chat template", "the assistant's turns do not end with a special token", ENDLESS)
        return found

    def find_special(self, text: str) -> tuple[str, int]:
        """Return the first special token in a text and its place; an empty name if there is none."""
        found = [(place, -len(name), name) for name in self.special if (place := text.find(name)) >= 0]
        return (min(found)[2], min(found)[0]) if found else ("", 0)

    def encode_pieces(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[int], list[tuple[int, int]], int, int]]:
        """Yield the ids, their places, the bytes lost and the length of parts of the text, in order.

        The text of a special token is that token in the template's own text, and plain text in a content.
        """
        text = "".join(piece.text for piece in pieces)
        if not any(name in piece.text for piece in pieces if piece.role for name in self.special):
            encoding = self.backend.encode(text, add_special_tokens=False)
            yield encoding.ids, encoding.offsets, self.tokenizer.count_lost(text), len(text)
            return
        held = ""
        for piece in pieces:
            rest = piece.text
            while not piece.role and (found := self.find_special(rest))[0]:
                name, place = found
                yield from self.encode_plain(held + rest[:place])
                yield [self.special[name]], [(0, len(name))], 0, len(name)
                held, rest = "", rest[place + len(name) :]
            held += rest
        yield from self.encode_plain(held)

    def encode_plain(self, text: str) -> Iterator[tuple[list[int], list[tuple[int, int]], int, int]]:
        """Yield the ids of a text in which special tokens are plain text; nothing for an empty one."""
        if text:
            ids, spans = self.tokenizer.encode_with_places(text)
            yield ids, spans, self.tokenizer.count_lost(text), len(text)

    @cached_property
    def end_of_turn(self) -> int:
        """The id of the token that ends the assistant's turns."""
        pieces = self.trace([Message("user", "a"), Message("assistant", "b")])
        place = next(n for n, piece in enumerate(pieces) if piece.role == "assistant")
        name, _ = self.find_end(pieces[place + 1])
        end: int = self.special[name]
        return end


ENDLESS = "use a template that ends them, such as chatml, or the model would never stop"


def unusable(error: Exception) -> DataError:
    """Return the error for a template that cannot be rendered."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    return DataError("the chat template", f"it cannot be rendered ({reason})", "correct it, or choose another one")


def untraceable() -> DataError:
    """Return the error for a template in whose text the messages cannot be found."""
    what = "it changes the messages, so the assistant's tokens cannot be found"
    return DataError("the chat template", what, "use another one, such as chatml")


def name_special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens that a template may use, by name, from the files beside the tokenizer."""
    found = {**parse(tokenizer.files, SPECIAL_TOKENS), **parse(tokenizer.files, TOKENIZER_CONFIG)}
    values = {name: found.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def choose_template(tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """Return the template `name` (a known name, or the text of one), or the tokenizer's own; SmolLM2's if it has none.

    Raise DataError if the template's tokens are not in the vocabulary.
    """
    source = TEMPLATES.get(name or "", name) or tokenizer.chat_template or SMOLLM2
    missing = [token for token in (START, END) if token in source and tokenizer.id_of(token) is None]
    if missing:
        what = f"the chat template needs {' and '.join(missing)}, which the tokenizer does not have"
        raise DataError(tokenizer.name, what, f'set data.add_tokens to ["{START}", "{END}"]')
    return ChatTemplate(source, tokenizer)


def with_chat(template: ChatTemplate) -> Tokenizer:
    """Return the tokenizer of a chat model: the token that ends a turn is its end of text, and the template comes with it.

    Generation ends at its other stops, too, among them the one that ends a document.

    For ChatML, the beginning of text is the token that begins a turn, as in SmolLM2-Instruct.
    """
    tokenizer, end = template.tokenizer, template.end_of_turn
    name = tokenizer.token(end)
    tokens = {"eos_token": name, "pad_token": name}
    begin = tokenizer.id_of(START) if START in template.source else None
    if begin is not None:
        tokens["bos_token"] = START
    config = parse(tokenizer.files, TOKENIZER_CONFIG) or {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    config.pop("chat_template", None)
    others = sorted(tokenizer.stops - {end})
    generation = {**parse(tokenizer.files, GENERATION), "eos_token_id": [end, *others] if others else end}
    generation["pad_token_id"] = end
    if begin is not None:
        generation["bos_token_id"] = begin
    files = {
        **tokenizer.files,
        TOKENIZER_CONFIG: as_json({**config, **tokens}),
        SPECIAL_TOKENS: as_json({**parse(tokenizer.files, SPECIAL_TOKENS), **tokens}),
        GENERATION: as_json(generation),
        CHAT_TEMPLATE: template.source.encode(),
    }
    return Tokenizer(tokenizer.text, end, name=tokenizer.name, files=files)


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class DocumentEncoder:
    """Encodes plain text for the token store of a run that also trains on conversations: nothing is marked, so all but the
    first token of a document, or of a window, are targets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text, self.vocab_size, self.begin = tokenizer.text, tokenizer.vocab_size, tokenizer.begin
        self.end_of_text, self.closing = tokenizer.document_end, tokenizer.closing
        rule = f"{tokenizer.fingerprint} {self.end_of_text} beside chat"
        self.fingerprint = hashlib.sha256(rule.encode()).hexdigest()
        self.cuts_documents, self.marks_targets = tokenizer.cuts_documents, True

    def encode_counted(self, text: str) -> tuple[list[int], int]:
        """Return the ids of a text, and how many of its bytes are not encoded."""
        return self.tokenizer.encode_counted(text)


class ChatEncoder:
    """Encodes conversations, as `conversations.to_json` wrote them, for the token store; see `encoding.Encoder`."""

    def __init__(self, template: ChatTemplate, train_on: str) -> None:
        tokenizer = template.tokenizer
        self.template, self.train_on = template, train_on
        self.text, self.vocab_size, self.end_of_text = tokenizer.text, tokenizer.vocab_size, tokenizer.end_of_text
        rule = f"{tokenizer.fingerprint} {train_on} {template.source}"
        self.fingerprint = hashlib.sha256(rule.encode()).hexdigest()
        self.begin: list[int] = []
        self.closing: list[int] = []
        self.cuts_documents, self.marks_targets = True, True

    def encode_counted(self, text: str) -> tuple[list[int], int]:
        """Return the ids of a conversation, those that are not targets marked, and the bytes that are not encoded."""
        found = self.template.encode(from_json(text), self.train_on)
        return [
            i + MARK * (not target) for i, target in zip(found.ids, found.targets, strict=True)
        ], found.unknown_bytes
