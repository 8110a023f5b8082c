"""The ids of a tokenizer's special tokens by their role, as other programs want them."""

from smollm2.data.chat import ChatTemplate
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.tokenizer_files import GENERATION, TOKENIZER_CONFIG, parse
from smollm2.errors import DataError


def find_begin_of_text(tokenizer: Tokenizer) -> int:
    """Return the id that the tokenizer puts before a text, or that its files name, or else the end of text."""
    found = parse(tokenizer.files, GENERATION).get("bos_token_id")
    if len(tokenizer.begin) == 1:
        return tokenizer.begin[0]
    if isinstance(found, int):
        return found
    named = find_named(tokenizer, "bos_token")
    return tokenizer.end_of_text if named is None else named


def find_padding(tokenizer: Tokenizer) -> int | None:
    """Return the id of the padding that tokenizer_config.json names."""
    return find_named(tokenizer, "pad_token")


def find_end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Return the id that ends an answer in a chat, or None without a chat template."""
    if tokenizer.chat_template is None:
        return None
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer).end_of_turn
    except DataError:  # a template whose answers cannot be found, or do not end with a special token
        return min(tokenizer.stops - {tokenizer.end_of_text, tokenizer.document_end}, default=tokenizer.end_of_text)


def list_stop_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the tokens that end a text or an answer."""
    ids = {*tokenizer.stops, find_end_of_turn(tokenizer)}
    return [tokenizer.token(i) for i in sorted(i for i in ids if i is not None and i < tokenizer.vocab_size)]


def find_named(tokenizer: Tokenizer, role: str) -> int | None:
    """Return the id of the token that tokenizer_config.json gives a role, such as bos_token."""
    token = parse(tokenizer.files, TOKENIZER_CONFIG).get(role)
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.id_of(token) if isinstance(token, str) else None
