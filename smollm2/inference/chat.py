"""A conversation with a model: its history, and as much of it as the context holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from smollm2.data.chat import ChatTemplate
from smollm2.data.conversations import Conversation, Message


@dataclass
class Chat:
    """The turns so far. `positions` is the context of the model, of which `room` is kept for an answer."""

    template: ChatTemplate
    positions: int
    room: int
    report: Callable[[str], None] = lambda message: None
    system: str = ""
    turns: Conversation = field(default_factory=list)

    @property
    def messages(self) -> Conversation:
        """The system message, if there is one, and the turns."""
        return [Message("system", self.system), *self.turns] if self.system else list(self.turns)

    def ask(self, text: str) -> list[int]:
        """Add a turn of the user, and return the ids after which the answer begins.

        If they do not fit into the context, the oldest turns are left out of them, and reported.
        """
        self.turns.append(Message("user", text))
        dropped, ids = 0, self.template.encode_prompt(self.messages)
        limit = max(1, self.positions - min(self.room, self.positions // 2))
        while len(ids) > limit and (kept := self.turns[next_user_turn(self.turns, dropped) :]):
            dropped = len(self.turns) - len(kept)
            ids = self.template.encode_prompt([*self.messages[: bool(self.system)], *kept])
        if dropped:
            what = "1 turn does" if dropped == 1 else f"the first {dropped} turns do"
            self.report(
                f"{what} not fit into the context of {self.positions:,} tokens any more: the model does not read them"
            )
        return ids

    def answer(self, text: str) -> None:
        """Add the answer to the last question; without any text, the question is taken back."""
        if text:
            self.turns.append(Message("assistant", text))
        else:
            self.turns.pop()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()


def next_user_turn(turns: Sequence[Message], start: int) -> int:
    """Return the position of the first turn of the user after `start`; the number of turns if there is none."""
    return next((n for n in range(start + 1, len(turns)) if turns[n].role == "user"), len(turns))
