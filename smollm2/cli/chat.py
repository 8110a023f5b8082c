"""`smollm2 chat`: a conversation in the terminal, or the answers to the conversations in a file."""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2.cli.flags import Commands, Parser, add_command, add_device_flag, add_model_flags, path, print_note
from smollm2.cli.generate import (
    PRECISIONS,
    Write,
    add_number_flags,
    find_bad_character,
    load_for_writing,
    make_writer,
    read_json_lines,
    show,
)
from smollm2.errors import ConfigError, DataError, ResourceError

if TYPE_CHECKING:
    from smollm2.inference.chat import Chat

HELP = """/reset        forget the conversation
/system TEXT  set the system message, and forget the conversation
/save FILE    append the conversation to a JSONL file, as training reads it
/exit         end, as Ctrl-D does
Ctrl-C ends an answer; what was written of it stays in the conversation."""


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 chat`."""
    text = (
        "Talk with a model that was trained on conversations. Answers go to standard output, notes to standard error."
    )
    parser = add_command(commands, "chat", run, "a conversation with a model", text)
    add_model_flags(parser)
    add_device_flag(parser)
    parser.add_argument("--system", metavar="TEXT", default="", help="the system message; default: the template's own")
    text = "JSON Lines of conversations to answer; - is standard input; writes JSON Lines"
    parser.add_argument("--conversations", metavar="FILE", type=path, help=text)
    text = "smollm2, chatml or a Jinja file; default: the template of the model"
    parser.add_argument("--template", metavar="NAME", help=text)
    add_number_flags(parser, without=("samples", "batch_size"))
    parser.add_argument("--precision", choices=PRECISIONS, help="default: float32; bf16 on a GPU")
    parser.set_defaults(stop=[])


def run(args: argparse.Namespace) -> None:
    """Talk, or answer the conversations of a file."""
    if problem := find_bad_character(args.system):
        raise ConfigError("--system", problem, "encode it as UTF-8")
    rows = read_conversations(args.conversations) if args.conversations else []
    chat, write = open_chat(args)
    if args.conversations:
        answer_all(chat, write, rows, args.seed)
    else:
        talk(chat, write, args.seed)


def open_chat(args: argparse.Namespace) -> "tuple[Chat, Write]":
    """Return a new conversation with the model, and the function that writes its answers.

    Raise ConfigError if the model has no chat template and none is given.
    """
    from smollm2.data.chat import choose_template, with_chat
    from smollm2.data.corpus import read_template
    from smollm2.inference.chat import Chat

    model, tokenizer = load_for_writing(args)
    if not (args.template or tokenizer.chat_template):
        what = "the model has no chat template: it was trained on plain text, not on conversations"
        raise ConfigError(args.model, what, "use smollm2 generate, or give the template that it knows with --template")
    template = choose_template(tokenizer, read_template(args.template))
    if template.end_of_turn not in tokenizer.stops:
        tokenizer = with_chat(template)
    positions = model.config.max_position_embeddings
    chat = Chat(template, positions, args.max_new_tokens, print_note, args.system)
    return chat, make_writer(args, model, tokenizer, lambda note: print_note(f"\n({note})"))


def talk(chat: "Chat", write: Write, seed: int) -> None:
    """Ask for messages until the end of input; each answer has the next seed."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Without readline, a terminal passes on only the first 4,095 characters of a line.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print_note("Type a message and Enter. /help lists the commands, Ctrl-C ends an answer, Ctrl-D the program.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        try:
            message = input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print_note("\nCtrl-D or /exit ends the program.")
            continue
        if problem := find_bad_character(message):
            raise DataError("standard input", problem, "encode the messages as UTF-8")
        if message.startswith("/"):
            if message.strip() == "/exit":
                return
            obey(chat, message)
        elif message.strip():
            speak(chat, write, message, seed)
            seed = (seed + 1) % 2**62


def obey(chat: "Chat", message: str) -> None:
    """Run a command of the conversation; a mistake in it is reported, and the conversation goes on."""
    command, _, rest = message.strip().partition(" ")
    match command:
        case "/reset":
            chat.reset()
            print_note("The conversation is forgotten.")
        case "/system":
            chat.system = rest.strip()
            chat.reset()
            print_note("The system message is set, and the conversation is forgotten.")
        case "/save" if rest.strip():
            save(chat, Path(rest.strip()).expanduser())
        case _:
            print_note(HELP)


def save(chat: "Chat", file: Path) -> None:
    """Append the conversation to a JSONL file. A problem is reported, since the conversation would be lost otherwise."""
    from smollm2.storage.atomic import write_atomically

    if not any(message.role == "assistant" for message in chat.messages):
        print_note("not saved: the conversation has no answer yet")
        return
    row = json.dumps({"messages": [message._asdict() for message in chat.messages]}, ensure_ascii=False)
    try:
        before = file.read_bytes() if file.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        write_atomically(file, before + row.encode() + b"\n")
    except (OSError, ResourceError) as error:
        print_note(f"not saved: {error}")
    else:
        print_note(f"saved {file}")


def speak(chat: "Chat", write: Write, message: str, seed: int) -> None:
    """Write the answer to a message as it is generated."""
    answer = ""
    try:
        for piece in write([chat.ask(message)], [seed]):
            answer += piece.text
            show(piece.text)
            if piece.end == "length":
                print_note("\n(the answer has --max_new_tokens tokens and did not end)")
    except KeyboardInterrupt:
        print_note("\n(stopped)")
    show("\n")
    chat.answer(answer)


def read_conversations(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of conversations. Raise DataError for the first that is not one."""
    from smollm2.data.conversations import read_conversation

    rows = []
    for where, row in read_json_lines(name):
        try:
            if not isinstance(row, dict):
                raise ValueError("the line is not a JSON object")
            messages = read_conversation(row, is_answered=False)
            while messages and messages[-1].role != "user":
                messages.pop()
            if not messages:
                raise ValueError("the conversation has no turn of the user")
        except ValueError as error:
            raise DataError(where, str(error), 'write {"messages": [...]} on each line') from None
        rows.append({**row, "messages": messages})
    return rows


def answer_all(chat: "Chat", write: Write, rows: list[dict[str, Any]], seed: int) -> None:
    """Print one object for each conversation: the row with the messages, the answer added, and why it ended."""
    system = chat.system
    for row in rows:
        first, *_ = row["messages"]
        chat.system = first.content if first.role == "system" else system
        chat.turns = [message for message in row["messages"][:-1] if message.role != "system"]
        answer, end = "", ""
        for piece in write([chat.ask(row["messages"][-1].content)], [seed]):
            answer, end = answer + piece.text, piece.end
        chat.answer(answer)
        messages = [message._asdict() for message in chat.messages]
        print(json.dumps({**row, "messages": messages, "answer": answer, "end": end}), flush=True)
