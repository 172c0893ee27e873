"""Instruction data in its usual shapes: a record becomes prompts, each with its completion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedrank.training.sources import DataError, nearest

Turn = tuple[str, str]  # role, what it says
Shape = Literal["completion", "alpaca", "messages", "choices"]

ROLES = ("system", "user", "assistant")
# The columns that tell a shape; their names are keys of data.columns too.
NEEDED: Mapping[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "choices": ("prompt", "choices", "answer"),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}

KEYS = tuple(dict.fromkeys(("input", *(key for needed in NEEDED.values() for key in needed))))


@dataclass(frozen=True)
class Example:
    """text: the prompt, as the model reads it unless `turns` are there. turns: what was said before the completion, for
    the tokenizer's chat template. choices: of which the completion is one, at `answer`.
    """

    text: str
    completion: str
    turns: tuple[Turn, ...] | None = None
    choices: tuple[str, ...] | None = None
    answer: int = -1


def shape(where: str, row: Mapping[str, Any], columns: Mapping[str, str], asked: str) -> Shape:
    """The shape of a record: as asked, else the first whose columns it has. A column that the config names must be there."""
    for key in KEYS:
        if (column := columns.get(key, key)) not in (key, *row):
            raise DataError(f"{where}: no column {column!r}{nearest(column, list(row))}; set data.columns.{key}")
    for name, needed in NEEDED.items():
        lacking = [column for key in needed if (column := columns.get(key, key)) not in row]
        if asked == name and lacking:
            raise DataError(
                f"{where}: no column {lacking[0]!r}{nearest(lacking[0], list(row))}; data.instructions.format={name} reads "
                f"{', '.join(needed)}, by the names in data.columns"
            )
        if asked == name or (asked == "auto" and not lacking):
            return name
    raise DataError(
        f"{where}: columns {', '.join(map(repr, row))} are of no known shape: prompt and completion; instruction and output "
        "(and input); messages; or prompt, choices and answer. Say in data.columns what they are called here"
    )


@dataclass(frozen=True)
class Reader:
    """Makes examples of a record and its place: several where it has several completions, or assistant's turns.

    chat: prompts are turns for a chat template. separator: between a plain prompt and its completion.
    """

    kind: Shape
    columns: Mapping[str, str]
    chat: bool
    separator: str

    def __call__(self, where: str, row: Mapping[str, Any]) -> Iterator[Example]:
        match self.kind:
            case "messages":
                return self._messages(*self._value(where, row, "messages"))
            case "choices":
                return iter([self._chosen(where, row)])
            case "alpaca":
                prompt = self._alpaca(where, row)
                return (self._made(prompt, text) for text in self._texts(where, row, "output"))
            case "completion":
                prompt = said(*self._value(where, row, "prompt")) + ("" if self.chat else self.separator)
                return (self._made(prompt, text) for text in self._texts(where, row, "completion"))

    def _value(self, where: str, row: Mapping[str, Any], key: str) -> tuple[str, Any]:
        """What to call it in messages, and what is there."""
        column = self.columns.get(key, key)
        if column not in row:
            raise DataError(f"{where}: no column {column!r}{nearest(column, list(row))}; set data.columns.{key}")
        return f"{where}: column {column!r}", row[column]

    def _texts(self, where: str, row: Mapping[str, Any], key: str) -> list[str]:
        """One text, or a list of several."""
        what, found = self._value(where, row, key)
        return [said(what, text) for text in (found if isinstance(found, list) and found else [found])]

    def _made(self, prompt: str, completion: str, choices: tuple[str, ...] | None = None, answer: int = -1) -> Example:
        return Example(prompt, completion, (("user", prompt),) if self.chat else None, choices, answer)

    def _alpaca(self, where: str, row: Mapping[str, Any]) -> str:
        task = said(*self._value(where, row, "instruction"))
        given = row.get(self.columns.get("input", "input"))
        given = "" if given in (None, "") else said(*self._value(where, row, "input"))
        if self.chat:
            return f"{task}\n\n{given}" if given else task
        return f"### Instruction:\n{task}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"

    def _chosen(self, where: str, row: Mapping[str, Any]) -> Example:
        prompt = said(*self._value(where, row, "prompt")) + ("" if self.chat else self.separator)
        choices, (what, answer) = self._texts(where, row, "choices"), self._value(where, row, "answer")
        if answer in choices:
            answer = choices.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices) > 1:
            raise DataError(
                f"{what} holds {answer!r:.60}; of {len(choices)} choices it must be one, or its place from 0 on, "
                "and there must be at least two"
            )
        return self._made(prompt, choices[answer], tuple(choices), answer)

    def _messages(self, what: str, messages: Any) -> Iterator[Example]:
        turns = conversation(what, messages)
        replies = [at for at, (role, _) in enumerate(turns) if role == "assistant" and at]
        if not replies:
            raise DataError(f"{what}: no assistant's turn follows another's, so there is nothing to learn")
        for at in replies:
            text = "\n".join(f"{role}: {words}" for role, words in turns[:at])
            yield Example(text, turns[at][1], tuple(turns[:at]))


def conversation(what: str, messages: Any) -> list[Turn]:
    if not isinstance(messages, list):
        raise DataError(f"{what} holds {messages!r:.60}; it must be a list of objects with role and content")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{what}, message {number}: {message!r:.60} must be an object with role and content")
        if (role := message["role"]) not in ROLES:
            raise DataError(f"{what}, message {number}: role {role!r:.30}; it must be one of {', '.join(ROLES)}")
        turns.append((role, said(f"{what}, message {number}: content", message["content"])))
    return turns


def said(what: str, text: Any) -> str:
    """A checked text."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{what} holds {text!r:.60}; it must be a non-empty string")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{what} holds a lone surrogate; it must be valid Unicode text")
    return text


def opening(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """What came before the assistant first replied to a user: the same for all examples of one conversation."""
    roles = [role for role, _ in turns]
    asked = roles.index("user") if "user" in roles else len(roles)
    return tuple(turns[: roles.index("assistant", asked) if "assistant" in roles[asked:] else len(turns)])
