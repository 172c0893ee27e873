"""Instruction data: every shape becomes prompts and completions, as plain text or as a chat template writes them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedrank
from fedrank import config, experiment
from fedrank.config import ConfigError, Instructions
from fedrank.training import tasks, tiny
from fedrank.training.data import ClientData, Dataset, Rows, load, numbers
from fedrank.training.instructions import opening
from fedrank.training.sources import DataError

Row = dict[str, Any]
# The end of a turn is a special token other than the tokenizer's own end, and a line's end follows it.
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}[CLS]\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDS = "[CLS]\n"


def jsonl(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def get(folder: Path, *rows: Row, columns: Mapping[str, str] = {}, **form: Any) -> Rows:
    """These rows, read as a train split."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(jsonl(list(rows)))
    return load(None, folder, "generate", columns, None, 0, Instructions(**form)).train


def pairs(rows: Rows) -> list[tuple[str, str]]:
    assert rows.completion is not None
    return list(zip(rows.text, rows.completion, strict=True))


def talk(*said: str, system: str = "") -> Row:
    """A conversation: a user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


# ---- shapes

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
ADD, GO = (f"### Instruction:\n{task}.\n\n### Response:\n" for task in ("Add", "Go"))
CHOICE = {"prompt": "2+2=", "choices": ["3", "4", "5"], "answer": 1}
SHAPES: dict[str, tuple[Row, dict[str, Any], list[tuple[str, str]]]] = {
    "completion": ({"prompt": "a", "completion": "b"}, {}, [("a", "b")]),
    "several completions": ({"prompt": "a", "completion": ["b", "c"]}, {}, [("a", "b"), ("a", "c")]),
    "separator": ({"prompt": "a", "completion": "b"}, {"separator": " -> "}, [("a -> ", "b")]),
    "alpaca": (ALPACA, {}, [("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n", "3")]),
    "alpaca, empty input": (ALPACA | {"input": ""}, {}, [(ADD, "3")]),
    "alpaca, null input": (ALPACA | {"input": None}, {}, [(ADD, "3")]),
    "alpaca, no input": ({"instruction": "Go.", "output": "on"}, {}, [(GO, "on")]),
    "alpaca, several outputs": (
        {"instruction": "Go.", "output": ["on", "off"]}, {},
        [(GO, "on"), (GO, "off")],
    ),
    "choices by place": (CHOICE, {}, [("2+2=", "4")]),
    "choices by text": (CHOICE | {"answer": "5"}, {}, [("2+2=", "5")]),
    "choices, separator": (CHOICE, {"separator": " "}, [("2+2= ", "4")]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "form", "found"), SHAPES.values(), ids=SHAPES)
def test_a_record_becomes_prompts_and_completions(
    tmp_path: Path, row: Row, form: dict[str, Any], found: list[tuple[str, str]]
) -> None:
    rows = get(tmp_path, row, **form)
    assert pairs(rows) == found
    assert (rows.turns, rows.label, rows.client) == (None, None, None)


@pytest.mark.parametrize(
    ("row", "turn", "completions"),
    [
        ({"prompt": "a", "completion": ["b", "c"]}, "a", ["b", "c"]),
        (ALPACA, "Add.\n\n1 and 2", ["3"]),
        (ALPACA | {"input": ""}, "Add.", ["3"]),
        (CHOICE, "2+2=", ["4"]),
    ],
)
def test_with_a_chat_template_a_prompt_is_what_the_user_says(
    tmp_path: Path, row: Row, turn: str, completions: list[str]
) -> None:
    rows = get(tmp_path, row, template="chat")
    assert rows.turns == [(("user", turn),)] * len(completions)
    assert pairs(rows) == [(turn, text) for text in completions]


def test_every_turn_of_the_assistant_is_a_row(tmp_path: Path) -> None:
    rows = get(tmp_path, talk("q1", "a1", "q2", "a2", system="S"), talk("q", "a", "thanks"))
    said = (("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    assert rows.turns == [said[:2], said, (("user", "q"),)]
    assert rows.completion == ["a1", "a2", "a"]
    assert rows.text == ["system: S\nuser: q1", "system: S\nuser: q1\nassistant: a1\nuser: q2", "user: q"]
    assert rows.group.tolist() == [0, 0, 1]


def test_what_the_assistant_says_first_answers_nothing_and_what_it_says_twice_is_two_rows(tmp_path: Path) -> None:
    turns = [("assistant", "hi"), ("user", "q"), ("assistant", "a"), ("assistant", "b")]
    rows = get(tmp_path, {"messages": [{"role": role, "content": text, "more": 1} for role, text in turns]})
    assert rows.turns == [tuple(turns[:2]), tuple(turns[:3])]
    assert rows.completion == ["a", "b"]


def test_choices_and_the_right_one_come_along(tmp_path: Path) -> None:
    rows = get(tmp_path, CHOICE, {"prompt": "1+1=", "choices": ["2", "3"], "answer": "2"})
    assert rows.choices == [("3", "4", "5"), ("2", "3")]
    assert rows.answer is not None
    assert (rows.answer.dtype, rows.answer.tolist()) == (np.int64, [1, 0])
    taken = rows.take(np.array([1]))
    assert (taken.choices, pairs(taken)) == ([("2", "3")], [("1+1=", "2")])
    assert taken.answer is not None
    assert taken.answer.tolist() == [0]
    other = get(tmp_path, CHOICE | {"choices": ["3", "4", "6"]}, {"prompt": "1+1=", "choices": ["2", "3"], "answer": 0})
    assert pairs(other) == pairs(rows)
    assert other.digest() != rows.digest()


def test_a_client_s_name_goes_to_all_rows_of_its_record(tmp_path: Path) -> None:
    one, two = {"prompt": "a", "completion": ["b", "c"], "client": 7}, {"prompt": "d", "completion": "e", "client": "x"}
    rows = get(tmp_path, one, two)
    assert rows.client == ["7", "7", "x"]
    assert get(tmp_path, talk("q", "a", "r", "b") | {"client": "x"}).client == ["x", "x"]


def test_turns_are_part_of_the_digest_and_of_what_is_taken(tmp_path: Path) -> None:
    plain, chat = (get(tmp_path, {"prompt": "a", "completion": "b"}, template=t) for t in ("plain", "chat"))
    assert plain.digest() != chat.digest()
    rows = get(tmp_path, talk("q", "a"), talk("r", "b"))
    assert rows.take(np.array([1])).turns == [(("user", "r"),)]


# ---- which shape

BOTH = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}


@pytest.mark.parametrize(
    ("row", "format", "found"),
    [
        (BOTH, "auto", [("p", "c")]),
        (BOTH, "alpaca", [("### Instruction:\ni\n\n### Response:\n", "o")]),
        (BOTH | talk("q", "a"), "auto", [("user: q", "a")]),
        (BOTH | talk("q", "a"), "completion", [("p", "c")]),
        (BOTH | CHOICE, "auto", [("2+2=", "4")]),
        (BOTH | CHOICE, "completion", [("2+2=", "c")]),
        ({"prompt": "p", "completion": "c", "choices": ["a", "b"]}, "auto", [("p", "c")]),  # no answer: of that shape
    ],
)
def test_a_shape_is_told_by_its_columns_or_asked_for(
    tmp_path: Path, row: Row, format: str, found: list[tuple[str, str]]
) -> None:
    assert pairs(get(tmp_path, row, format=format)) == found


@pytest.mark.parametrize(
    ("row", "columns", "found"),
    [
        ({"q": "p", "a": "c"}, {"prompt": "q", "completion": "a"}, [("p", "c")]),
        ({"do": "i", "with": "x", "get": "o"}, {"instruction": "do", "input": "with", "output": "get"},
         [("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n", "o")]),
        ({"said": talk("q", "a")["messages"]}, {"messages": "said"}, [("user: q", "a")]),
        ({"q": "p", "ways": ["a", "b"], "way": "b"}, {"prompt": "q", "choices": "ways", "answer": "way"}, [("p", "b")]),
        (BOTH | {"q": "x"}, {"prompt": "q"}, [("x", "c")]),
    ],
)  # fmt: skip
def test_columns_may_have_other_names(
    tmp_path: Path, row: Row, columns: dict[str, str], found: list[tuple[str, str]]
) -> None:
    assert pairs(get(tmp_path, row, columns=columns)) == found


def test_tables_hold_these_shapes_too(tmp_path: Path) -> None:
    table = 'instruction,input,output\nAdd.,1 and 2,3\n"Go, on.",,ok\n'
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(table)
    rows = load(None, tmp_path, "generate", {}, None, 0).train
    heads = ["Add.\n\n### Input:\n1 and 2", "Go, on."]
    assert rows.text == [f"### Instruction:\n{head}\n\n### Response:\n" for head in heads]
    assert rows.completion == ["3", "ok"]


@pytest.mark.parametrize("row", [talk("q1", "a1", "q2", "a2"), CHOICE, {"prompt": "a", "completion": ["b", "c"]}])
def test_lists_and_conversations_come_from_parquet_as_from_json(tmp_path: Path, row: Row) -> None:
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split in ("train", "test"):
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist([row]), folder / f"{split}.parquet")
    assert load(None, folder, "generate", {}, None, 0).train.digest() == get(tmp_path, row).digest()


# ---- what is wrong with a record

MESSAGE = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
BAD: list[tuple[Row, dict[str, Any], str]] = [
    ({"question": "a", "reply": "b"}, {},
     r"columns 'question', 'reply' are of no known shape: prompt and completion; .*data\.columns"),
    ({"prompt": "a"}, {}, "of no known shape"),
    ({"promt": "a", "completion": "b"}, {"format": "completion"},
     r"no column 'prompt', the nearest is 'promt'; data\.instructions\.format=completion reads prompt, completion, by"),
    ({"prompt": "a", "choices": ["a", "b"], "anwser": 0}, {"format": "choices"},
     r"no column 'answer', the nearest is 'anwser'; .*prompt, choices, answer"),
    ({"instruction": "a", "outputs": "b"}, {"format": "alpaca"}, r"no column 'output', the nearest is 'outputs'"),
    ({"message": []}, {"format": "messages"}, r"no column 'messages', the nearest is 'message'"),
    ({"prompt": "a", "completion": ""}, {}, r"column 'completion' holds ''; it must be a non-empty string"),
    ({"prompt": "a", "completion": " \n"}, {}, r"column 'completion' holds ' \\n'; it must be a non-empty string"),
    ({"prompt": "a", "completion": []}, {}, r"column 'completion' holds \[\]; it must be a non-empty string"),
    ({"prompt": "a", "completion": ["b", ""]}, {}, r"column 'completion' holds ''"),
    ({"prompt": "a", "completion": [["b"]]}, {}, r"column 'completion' holds \['b'\]"),
    ({"prompt": "a", "completion": None}, {}, r"column 'completion' holds None"),
    ({"prompt": 3, "completion": "b"}, {}, r"column 'prompt' holds 3; it must be a non-empty string"),
    ({"prompt": "a", "completion": "b\ud800"}, {},
     r"column 'completion' holds a lone surrogate; it must be valid Unicode"),
    ({"prompt": "\udfff a", "completion": "b"}, {}, r"column 'prompt' holds a lone surrogate"),
    (ALPACA | {"instruction": " "}, {}, r"column 'instruction' holds ' '"),
    (ALPACA | {"input": 3}, {}, r"column 'input' holds 3; it must be a non-empty string"),
    (ALPACA | {"output": []}, {}, r"column 'output' holds \[\]"),
    ({"messages": "q"}, {}, r"column 'messages' holds 'q'; it must be a list of objects with role and content"),
    ({"messages": MESSAGE}, {}, r"column 'messages' holds \{.*; it must be a list"),
    ({"messages": [MESSAGE, "a"]}, {}, r"column 'messages', message 2: 'a' must be an object with role and content"),
    ({"messages": [MESSAGE, {"role": "assistant"}]}, {},
     r"message 2: \{'role': 'assistant'\} must be an object with role"),
    ({"messages": [MESSAGE, REPLY | {"role": "bot"}]}, {},
     r"message 2: role 'bot'; it must be one of system, user, assistant"),
    ({"messages": [MESSAGE, REPLY | {"role": None}]}, {}, r"message 2: role None"),
    ({"messages": [MESSAGE, REPLY | {"role": ["user"]}]}, {}, r"message 2: role \['user'\]"),
    ({"messages": [MESSAGE, REPLY | {"content": ""}]}, {},
     r"message 2: content holds ''; it must be a non-empty string"),
    ({"messages": [MESSAGE, REPLY | {"content": "\ud800"}]}, {}, r"message 2: content holds a lone surrogate"),
    ({"messages": []}, {}, r"column 'messages': no assistant's turn follows another's, so there is nothing to learn"),
    ({"messages": [MESSAGE]}, {}, r"no assistant's turn follows"),
    ({"messages": [REPLY, MESSAGE]}, {}, r"no assistant's turn follows"),
    (CHOICE | {"answer": 3}, {}, r"column 'answer' holds 3; of 3 choices it must be one, or its place from 0 on, and"),
    (CHOICE | {"answer": -1}, {}, r"column 'answer' holds -1"),
    (CHOICE | {"answer": True}, {}, r"column 'answer' holds True"),
    (CHOICE | {"answer": 1.0}, {}, r"column 'answer' holds 1\.0"),
    (CHOICE | {"answer": "B"}, {}, r"column 'answer' holds 'B'"),
    (CHOICE | {"answer": None}, {}, r"column 'answer' holds None"),
    (CHOICE | {"choices": ["4"], "answer": 0}, {},
     r"column 'answer' holds 0; of 1 choices .* there must be at least two"),
    (CHOICE | {"choices": []}, {}, r"column 'choices' holds \[\]"),
    (CHOICE | {"choices": ["3", ""]}, {}, r"column 'choices' holds ''"),
    (CHOICE | {"choices": {"text": ["3", "4"]}}, {}, r"column 'choices' holds \{'text'"),
    (talk("q", "a"), {"template": "plain"},
     r"messages are written by a chat template; data\.instructions\.template=chat or auto"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "form", "message"), BAD)
def test_a_bad_record_is_named(tmp_path: Path, row: Row, form: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*" + message):
        get(tmp_path, row, **form)


def test_the_first_record_says_what_the_others_are(tmp_path: Path) -> None:
    good = {"q": "a", "completion": "b"}
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: no column 'q', the nearest is 'p'; set data\.columns\.prompt"
    ):
        get(tmp_path, good, {"p": "a", "completion": "b"}, columns={"prompt": "q"})
    with pytest.raises(DataError, match=r"train\.jsonl:3: no column 'prompt', the nearest is 'messages'"):
        get(tmp_path, *[{"prompt": "a", "completion": "b"}] * 2, talk("q", "a"))
    with pytest.raises(DataError, match=r"train\.jsonl:2: no column 'client'"):
        get(tmp_path, {"prompt": "a", "completion": "b", "client": "x"}, {"prompt": "a", "completion": "b"})


def test_a_column_that_the_config_names_in_vain_is_named(tmp_path: Path) -> None:
    for columns, why in (
        ({"prompt": "promt"}, r"no column 'promt', the nearest is 'prompt'; set data\.columns\.prompt"),
        ({"completion": "c", "prompt": "p"}, r"no column 'c', the nearest is '.*'; set data\.columns\.completion"),
    ):
        with pytest.raises(DataError, match=r"train\.jsonl:1: " + why):
            get(tmp_path, {"prompt": "a", "p": "a", "reply": "b"}, columns=columns)


@pytest.mark.parametrize(
    ("row", "columns", "key"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, {"input": "inputs"}, "input"),  # else it would be left out
        (BOTH, {"prompt": "q"}, "prompt"),  # else it would be taken for alpaca
        (BOTH, {"messages": "said"}, "messages"),  # else for a completion
    ],
)
def test_even_where_another_shape_would_fit(tmp_path: Path, row: Row, columns: dict[str, str], key: str) -> None:
    why = rf"train\.jsonl:1: no column '{columns[key]}', the nearest is '.*'; set data\.columns\.{key}"
    for format in ("auto", "alpaca"):
        with pytest.raises(DataError, match=why):
            get(tmp_path, row, columns=columns, format=format)


def test_messages_as_plain_text_are_no_config() -> None:
    def settings(**form: str) -> dict[str, Any]:
        return {"task": "generate", "data": {"path": "x", "instructions": form}}

    with pytest.raises(
        ConfigError, match=r"data\.instructions: template: messages are written by the tokenizer's chat"
    ):
        config.load(settings(format="messages", template="plain"))
    with pytest.raises(ConfigError, match=r"data\.instructions\.format: .*'message'; did you mean 'messages'\?"):
        config.load(settings(format="message"))
    with pytest.raises(ConfigError, match=r"unknown key 'data.instructions.seperator'; did you mean .*separator"):
        config.load(settings(seperator=" "))
    for template in ("auto", "chat"):
        assert config.load(settings(format="messages", template=template)).data.instructions.template == template


# ---- what must not be split


def cut(path: Path, *rows: Row, **form: Any) -> Dataset:
    path.write_text(jsonl(list(rows)))
    return load(None, path, "generate", {}, None, 0, Instructions(**form))


def test_the_turns_of_a_conversation_stay_together_when_a_file_is_cut(tmp_path: Path) -> None:
    rows = [talk(f"q{at % 40}", "a", "more", f"b{at}", "and", "c") for at in range(50)]  # ten begin as others do
    data = cut(tmp_path / "all.jsonl", *rows)
    train, test = ({opening(turns) for turns in part.turns or ()} for part in (data.train, data.test))
    assert (len(train), len(test), train & test) == (32, 8, set())
    assert (len(data.train) + len(data.test), len(data.test) % 3) == (150, 0)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_completions_of_a_prompt_stay_together_when_a_file_is_cut(tmp_path: Path, template: str) -> None:
    rows = [{"prompt": f"p{at}", "completion": [f"c{at}", f"d{at}"]} for at in range(20)]
    data = cut(tmp_path / "all.jsonl", *rows, *rows[:5], template=template)
    assert (len(set(data.train.text)), len(set(data.test.text))) == (16, 4)
    assert not set(data.train.text) & set(data.test.text)


@pytest.mark.parametrize(
    ("row", "template"), [({"instruction": "q", "output": "a"}, "plain"), ({"prompt": "q", "completion": "a"}, "chat")]
)
def test_a_separator_that_would_part_nothing_is_refused(tmp_path: Path, row: Row, template: str) -> None:
    with pytest.raises(DataError, match=r"data\.instructions\.separator is of plain prompts"):
        cut(tmp_path / "all.jsonl", *[row] * 9, template=template, separator="\n")


def test_a_group_is_one_prompt_or_all_turns_of_one_conversation(tmp_path: Path) -> None:
    rows = get(tmp_path, *[{"prompt": text, "completion": "x"} for text in "baab"])
    assert rows.group.tolist() == [1, 0, 0, 1]
    rows = get(tmp_path, talk("q", "a", "r", "b"), talk("q", "a", system="S"), talk("q", "other"))
    assert rows.group[0] == rows.group[1] == rows.group[3] != rows.group[2]
    assert opening((("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "r"))) == (
        ("system", "S"),
        ("user", "q"),
    )
    assert opening((("user", "q"),)) == (("user", "q"),)
    first, system = ("assistant", "hello"), ("system", "S")
    for before in ((first,), (system, first), (first, first)):
        asked = (*before, ("user", "q"))
        assert opening((*asked, ("assistant", "a"), ("user", "r"))) == opening(asked) == asked


def test_numbers_are_places_among_different_texts() -> None:
    texts = ["b", "a", "é", "", "b", "\U0001f600", "ab", "Z"]
    assert np.array_equal(numbers(texts), np.unique(texts, return_inverse=True)[1])


def test_conversations_that_the_assistant_opens_are_apart(tmp_path: Path) -> None:
    def opened(before: list[Row], *said: str) -> Row:
        return {"messages": [*before, {"role": "assistant", "content": "hello"}, *talk(*said)["messages"]]}

    for before in (list[Row](), [{"role": "system", "content": "S"}]):
        rows = get(tmp_path, *(opened(before, *said) for said in (("q", "a", "r", "b"), ("other", "a"), ("q", "c"))))
        groups = rows.group[[at for at, completion in enumerate(rows.completion or ()) if completion != "hello"]]
        assert groups[0] == groups[1] == groups[3] != groups[2]


# ---- tokens


def tokenizer(template: str | None = CHAT) -> Any:
    found = tiny.tokenizer("generate")
    found.chat_template = template
    return found


def parts(encoded: tasks.Encoded, tokens: Any) -> list[tuple[str, str]]:
    """Of each row, what is only read, and what is learnt."""
    found = []
    for first, last in zip(encoded.starts[:-1], encoded.starts[1:], strict=True):
        ids, known = encoded.fields["input_ids"][first:last], encoded.labels[first:last] != tasks.IGNORED
        assert np.all(np.diff(known.astype(int)) >= 0)
        assert encoded.labels[first:last][known].tolist() == ids[known].tolist()
        found.append((tokens.decode(ids[~known]), tokens.decode(ids[known])))
    return found


def test_the_template_writes_the_prompt_and_the_reply_is_learnt_with_what_ends_it(tmp_path: Path) -> None:
    rows, tokens = get(tmp_path, talk("q1", "réply", "q2", "a2", system="S")), tokenizer()
    encoded = tasks.encode(rows, tokens, "generate", 99)
    first = "<system>S[CLS]\n<user>q1[CLS]\n<assistant>"
    second = first + "réply[CLS]\n<user>q2[CLS]\n<assistant>"
    assert parts(encoded, tokens) == [(first, "réply" + ENDS), (second, "a2" + ENDS)]
    assert encoded.cut == (0, 0)
    whole = [*rows.turns[1], ("assistant", "a2")] if rows.turns else []
    messages = [{"role": role, "content": text} for role, text in whole]
    own = tokens.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert encoded.fields["input_ids"][encoded.starts[1] :].tolist() == own
    assert (encoded.predictions == np.array([len("réply".encode()) + 2, 2 + 2])).all()


def test_a_plain_prompt_is_followed_by_its_completion_and_the_tokenizer_s_end(tmp_path: Path) -> None:
    tokens = tokenizer()  # its template is not used
    encoded = tasks.encode(get(tmp_path, ALPACA, {**ALPACA, "input": ""}), tokens, "generate", 99)
    assert parts(encoded, tokens) == [
        ("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n", "3[SEP]"),
        ("### Instruction:\nAdd.\n\n### Response:\n", "3[SEP]"),
    ]


def test_any_shape_may_be_a_chat(tmp_path: Path) -> None:
    tokens = tokenizer()
    for row, asked, reply in ((ALPACA, "Add.\n\n1 and 2", "3"), (CHOICE, "2+2=", "4")):
        encoded = tasks.encode(get(tmp_path, row, template="chat"), tokens, "generate", 99)
        assert parts(encoded, tokens) == [(f"<user>{asked}[CLS]\n<assistant>", reply + ENDS)]


def test_prompts_alone_are_those_of_the_rows(tmp_path: Path) -> None:
    rows, tokens = get(tmp_path, talk("q1", "a1", "q2", "a2")), tokenizer()
    encoded = tasks.encode(rows, tokens, "generate", 99)
    heads = tasks.prompt_tokens(rows, tokens)
    assert [tokens.decode(head) for head in heads] == [prompt for prompt, _ in parts(encoded, tokens)]


def test_thoughts_that_a_template_makes_up_are_of_the_prompt() -> None:
    """As in Qwen 3's, which opens the last reply with empty ones, and a prompt only when it is told that there are none."""
    prompt = "{% if add_generation_prompt %}<a>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
    turns = "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<a><think></think>{{ m.content }}[CLS]"
    tokens = tokenizer(turns + "{% else %}<u>{{ m.content }}{% endif %}{% endfor %}" + prompt)
    before, reply = tasks._chatted((("user", "q"),), "a", tokens)
    assert (before, reply) == ("<u>q<a><think></think>", "a[CLS]")


def test_a_turn_ends_with_the_last_special_token() -> None:
    assert tasks.turn_end(tokenizer()) == tokenizer().convert_tokens_to_ids("[CLS]")
    assert tasks.turn_end(tokenizer(CHAT.replace("[CLS]", "[SEP]"))) == tokenizer().eos_token_id
    assert tasks.turn_end(tokenizer(CHAT.replace("[CLS]", "[CLS] [SEP]"))) == tokenizer().eos_token_id
    assert tasks.turn_end(tokenizer(CHAT.replace("[CLS]", ""))) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template, and data\.instructions\.template asks for one \(auto does so for messages\)"),
        (CHAT.replace("%}<assistant>", "%}<assistant>thinking: "),
         r"ends a prompt with '.*<assistant>thinking: ', but does not begin the assistant's turn so"),
        (CHAT + "{{ raise_exception('no   such\n role') }}", "the tokenizer's chat template: no such role$"),
        ("{{ messages[9].content }}", "the tokenizer's chat template: list object has no element 9"),
        ("{% for %}", "the tokenizer's chat template: "),
        ("{{ messages + 1 }}", "the tokenizer's chat template: can only concatenate list"),
        ("{{ 1 // 0 }}", "the tokenizer's chat template: .*zero"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_an_error(template: str | None, message: str) -> None:
    rows = Rows(["q"], completion=["a"], turns=[(("user", "q"),)])
    with pytest.raises(DataError, match=message):
        tasks.encode(rows, tokenizer(template), "generate", 99)


def test_without_a_template_plain_rows_are_as_good() -> None:
    rows = Rows(["q"], completion=["a"])
    assert parts(tasks.encode(rows, tokenizer(None), "generate", 99), tokenizer(None)) == [("q", "a[SEP]")]


def test_what_a_tokenizer_ends_texts_with_is_not_between_prompt_and_completion() -> None:
    framing = tiny.tokenizer("classify")
    for prompt, head in (("q", "[CLS]q"), ("", "[CLS]")):
        encoded = tasks.encode(Rows([prompt], completion=["a"]), framing, "generate", 99)
        assert parts(encoded, framing) == [(head, "a[SEP]")]


# ---- what does not fit


@pytest.mark.parametrize(
    ("max_length", "prompt", "completion", "cut"),
    [
        (13, "0123456789", "ab[SEP]", (0, 0)),
        (12, "123456789", "ab[SEP]", (1, 0)),
        (4, "9", "ab[SEP]", (1, 0)),
        (3, "9", "ab", (1, 1)),
        (2, "9", "a", (1, 1)),
    ],
)
def test_a_prompt_s_start_goes_first(max_length: int, prompt: str, completion: str, cut: tuple[int, int]) -> None:
    encoded = tasks.encode(Rows(["0123456789"], completion=["ab"]), tokenizer(), "generate", max_length)
    assert (parts(encoded, tokenizer()), encoded.cut) == ([(prompt, completion)], cut)


def test_a_prompt_of_one_token_is_kept_before_a_completion_that_is_cut() -> None:
    encoded = tasks.encode(Rows(["q"], completion=["abcdef"]), tokenizer(), "generate", 4)
    assert (parts(encoded, tokenizer()), encoded.cut) == ([("q", "abc")], (0, 1))


def test_a_chat_s_start_goes_first_too() -> None:
    rows = Rows(["q"], completion=["ab"], turns=[(("system", "long"), ("user", "q"))])
    encoded = tasks.encode(rows, tokenizer(), "generate", 16)
    assert (parts(encoded, tokenizer()), encoded.cut) == ([("\n<assistant>", "ab" + ENDS)], (1, 0))


def test_rows_that_were_cut_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(["a" * 9, "b", "c", "d" * 9, "e" * 2], completion=["x", "y" * 9, "z", "w" * 9, "v" * 5])
    encoded = tasks.encode(rows, tokenizer(), "generate", 8)
    assert encoded.cut == (2, 2)
    monkeypatch.setattr(tasks, "AT_ONCE", 2)
    assert tasks.encode(rows, tokenizer(), "generate", 8).cut == (2, 2)
    alone = [tasks.encode(rows.take(np.array([at])), tokenizer(), "generate", 8) for at in range(5)]
    assert [one.cut for one in alone] == [(1, 0), (0, 1), (0, 0), (1, 1), (0, 0)]
    whole = tasks.joined(alone)
    assert whole.cut == (2, 2)
    assert whole.fields["input_ids"].tolist() == encoded.fields["input_ids"].tolist()
    assert tasks.mapped(whole).cut == (2, 2)


def test_texts_to_classify_are_not_counted() -> None:
    rows = Rows(["a" * 99], label=np.array([0]))
    assert tasks.encode(rows, tiny.tokenizer("classify"), "classify", 8).cut == (0, 0)


# ---- clients that bring their own


def own(rows: Any, test: list[Row]) -> ClientData:
    return ClientData("own", 4, rows=rows, test=test)


def settings(**sections: Any) -> dict[str, Any]:
    return {
        "task": "generate", "model": {"name": "tiny-decoder"}, "local": {"max_length": 96, "batch_size": 4, "lr": 0.01},
        "rounds": {"count": 1, "cohort": 2, "personal": 2}, "adapter": {"rank": 2}, "data": {"name": "own"}, **sections,
    }  # fmt: skip


def tasks_of(at: int) -> Iterator[Row]:
    """25 rows of 15 records."""
    for number in range(15):
        text = f"{at} and {number}"
        yield {"instruction": "Add.", "input": text, "output": [text[::-1], "none"] if number < 10 else text[::-1]}


def test_clients_bring_instructions_of_their_own(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    data = own(tasks_of, list(tasks_of(9)))
    run = fedrank.run(settings(), out=tmp_path / "run", data=data, watch=seen.append)
    assert {event["examples"] for event in seen if event["event"] == "client"} == {20}
    assert json.loads((run.path / "data.json").read_text())["rows"] == {"train": None, "test": 25}
    assert (run.summary["clients_ok"], run.summary["clients_failed"]) == (2, 0)
    assert run.summary["perplexity"] == pytest.approx(np.exp(run.summary["loss"]))
    assert run.summary["personal_perplexity"] > 1
    assert 0 <= run.summary["personal_accuracy"] <= 1


def test_their_personal_tests_are_the_same_for_every_seed() -> None:
    """What is tuned with one is not tested on what another trained on."""
    data, found = own(tasks_of, list(tasks_of(9))), []
    for seed in (0, 1):
        made = experiment.prepare(config.load(settings(seed=seed, data={"name": "own"})), data=data)
        found.append([made.held(client).test.tolist() for client in made.devices])
    assert found[0] == found[1]
    assert all(found[0])


def test_their_columns_and_format_are_the_config_s(tmp_path: Path) -> None:
    def rows(at: int) -> Iterator[Row]:
        return ({**BOTH, "q": f"{at}, {number}"} for number in range(5))

    named = settings(data={"name": "own", "columns": {"prompt": "q"}, "instructions": {"separator": ":"}})
    run = fedrank.run(named, out=tmp_path / "run", data=own(rows, list(rows(9))))
    assert run.config.data.instructions.separator == ":"
    test = Rows([f"9, {number}:" for number in range(5)], completion=["c"] * 5)
    assert json.loads((run.path / "data.json").read_text())["hash"]["test"] == test.digest()
    with pytest.raises(DataError, match=r"own, test, row 1: no column 'messages', the nearest is '.*'; data\.instr"):
        fedrank.run(named, "data.instructions.format=messages", out=tmp_path / "other", data=own(rows, list(rows(9))))
    odd = own(lambda at: [BOTH | {"q": "a", "completion": ""}], list(rows(9)))
    with pytest.raises(DataError, match=r"own, client 0, row 1: column 'completion' holds ''"):
        fedrank.run(named, out=tmp_path / "other", data=odd)
    assert not (tmp_path / "other").exists()


def chatty(folder: Path) -> Path:
    """A decoder on disk whose tokenizer has a chat template."""
    torch.manual_seed(0)
    tiny.network("tiny-decoder", "generate", 0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_conversations_of_their_own_reach_a_model_made_for_chats(tmp_path: Path) -> None:
    def rows(at: int) -> Iterator[Row]:
        return (talk(f"{at}?", f"{number}!", "again", "no") for number in range(6))

    data = own(rows, list(rows(9)))
    with pytest.raises(DataError, match="the model's tokenizer has no chat template"):
        fedrank.run(settings(), out=tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()
    run = fedrank.run(settings(model={"name": str(chatty(tmp_path / "model"))}), out=tmp_path / "run", data=data)
    assert (run.summary["clients_ok"], run.summary["clients_failed"]) == (2, 0)
    assert run.rounds[0]["train_loss"] > 0
