"""What a section of a config is made of: keys with bounds and a resume rule, and values that contradict each other."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from smollm2.config.values import Text

Resume = Literal["free", "noted", "refused"]
"""Whether a resumed run may change a key: `free` (it does not affect the results), `noted` (allowed and reported, but
the run is no longer bit-exact) or `refused` (it would be a different run)."""


def key(default: Any, resume: Resume, takes: str = "", **bounds: Any) -> Any:
    """Return a pydantic field. `default` may be a function of the preceding keys; `takes` describes valid values."""
    how = {"default_factory": default} if callable(default) else {"default": default}
    return Field(json_schema_extra={"resume": resume, "takes": takes}, **how, **bounds)


class Contradiction(NamedTuple):
    """Values that are valid individually but not together; the message names the first key."""

    keys: tuple[Text, ...]
    what: str
    advice: str


def refuse(name: str, found: list[Contradiction], parts: int) -> None:
    """Raise ValidationError if there are contradictions. The last `parts` of a dotted key are its path in `name`."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("contradiction", "{what}. {advice}", one._asdict()),
            loc=tuple(one.keys[0].split(".")[-parts:]),
            input=None,
        )
        for one in found
    ]
    if details:
        raise ValidationError.from_exception_data(name, details)


class Section(BaseModel):
    """A section of a config; it is immutable, and its numbers must be finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    @classmethod
    def resume_rule(cls, name: str) -> Resume:
        """Return the rule for changing the key `name` when a run is resumed."""
        rule: Resume = cls.model_fields[name].json_schema_extra["resume"]  # type: ignore[index,assignment]
        return rule

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield the contradictions within this section."""
        yield from ()

    @model_validator(mode="after")
    def refuse_contradictions(self) -> Self:
        """Raise ValidationError if there are contradictions, however the config is built."""
        refuse(type(self).__name__, list(self.contradictions()), parts=1)
        return self
