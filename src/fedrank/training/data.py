"""Reading rows: a folder, a file, a Hugging Face dataset or the built-in docstrings become a Dataset."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedrank.config import Clients, Config, Instructions
from fedrank.protocol import rng
from fedrank.store import check_client
from fedrank.training import docstrings
from fedrank.training.instructions import Example, Reader, Turn, opening, shape
from fedrank.training.sources import DataError, Record, Source, from_hub, from_path, nearest

BUILT_IN = "docstrings"
AS_THEY_ARE = Instructions()
HELD_OUT = 0.2  # the share of rows that becomes the test, where a set has none

Written = tuple[str, int | str]  # where a label stands, the label as written


@dataclass(frozen=True, eq=False)
class Rows:
    """Parallel columns, one entry a row. label: (rows,) int64.

    In task generate ``text`` is the prompt; turns: what was said before the completion, where a chat template writes it.
    choices: of which the completion is one, answer: (rows,) int64, its place among them.
    """

    text: list[str]
    text_b: list[str] | None = None
    label: np.ndarray | None = None
    client: list[str] | None = None
    completion: list[str] | None = None
    turns: list[tuple[Turn, ...]] | None = None
    choices: list[tuple[str, ...]] | None = None
    answer: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.text)

    def take(self, index: np.ndarray) -> "Rows":
        def column(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in index]

        return Rows(
            text=[self.text[i] for i in index],
            text_b=column(self.text_b),
            label=None if self.label is None else self.label[index],
            client=column(self.client),
            completion=column(self.completion),
            turns=column(self.turns),
            choices=column(self.choices),
            answer=None if self.answer is None else self.answer[index],
        )

    def digest(self) -> str:
        label = None if self.label is None else self.label.tolist()
        contents = [self.text, self.text_b, label, self.client, self.completion]
        contents += [part for part in (self.turns, self.choices) if part is not None]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    @cached_property
    def group(self) -> np.ndarray:
        """(rows,): a number for each prompt, or whole conversation: rows that must not be split between train and test."""
        return numbers(self.text if self.turns is None else [json.dumps(opening(turns)) for turns in self.turns])


def numbers(texts: Sequence[str]) -> np.ndarray:
    """(texts,): the place of each among the different ones in their order. NumPy would make all as wide as the longest."""
    places = {text: at for at, text in enumerate(sorted(set(texts)))}
    return np.array([places[text] for text in texts], np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits, the class names by label id (none for generate), and what the reader should be told."""

    name: str
    train: Rows
    test: Rows
    dev: Rows | None
    labels: tuple[str, ...]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ClientData:
    """Clients that each bring their own rows: read or made when a client is drawn, and not kept.

    name: what the data is called. clients: how many there are. rows: a client's place, from 0 on -> its rows, the same
    whenever and in whatever process it is called; their columns are those of a data file. test: the rows of the global
    test set, if there is one. labels: the class names, a label's id being its place; none for task generate. names: what
    the clients are called, in ascending order, by default 0, 1, ...

    A fifth of a client's rows is its personal test, as in a natural partition.
    """

    name: str
    clients: int
    rows: Callable[[int], Iterable[Mapping[str, Any]]]
    test: Sequence[Mapping[str, Any]] = ()
    labels: Sequence[str] = ()
    names: Sequence[str] = ()


def natural(config: Config, data: ClientData) -> Config:
    """The config with what it has to say of clients that bring their own rows."""
    if data.clients < 1:
        raise DataError(f"{data.name}: {data.clients} clients; there must be at least one")
    if config.task != "generate" and not data.labels:
        raise DataError(f"{data.name}: no labels; task {config.task} needs the class names")
    if data.names and (list(data.names) != sorted(set(data.names)) or len(data.names) != data.clients):
        raise DataError(
            f"{data.name}: names must be {data.clients}, ascending and without repeats, got {list(data.names)[:5]}"
        )
    for name in data.names:
        try:
            check_client(name)
        except ValueError as error:
            raise DataError(f"{data.name}: {error}") from None
    if len(set(data.labels)) < len(data.labels):
        raise DataError(f"{data.name}: a label is repeated in {list(data.labels)}; names must differ")
    _undivided(config, f"each client of {data.name} brings its own rows")
    kind = config.data.partition.model_copy(update={"kind": "natural"})
    named = config.data.model_copy(update={"name": data.name, "path": None, "partition": kind})
    return config.model_copy(update={"data": named, "clients": Clients(count=data.clients)})


def _undivided(config: Config, why: str) -> None:
    """DataError where what can only be of a whole data set is not as by default."""
    for key in ("train_limit", "split"):
        if getattr(config.data, key) != type(config.data).model_fields[key].default:
            raise DataError(f"data.{key}: it is of a whole data set, and {why}")


def load(
    name: str | None,
    path: str | Path | None,
    task: str,
    columns: Mapping[str, str],
    train_limit: int | None,
    seed: int,
    form: Instructions = AS_THEY_ARE,
    clients: bool = True,
) -> Dataset:
    """The dataset at ``path``, or the one called ``name``: docstrings, or a Hugging Face "name[:config]".

    clients: whether it matters whose the training rows are.
    """
    if (name is None) == (path is None):
        raise DataError(f"data.name is {name!r} and data.path is {path!r}: give exactly one of them")
    if name == BUILT_IN:
        dataset = built_in(task)
    else:
        source = from_hub(name, columns) if name is not None else from_path(Path(str(path)))
        dataset = assemble(source, task, columns, form, clients)
    return replace(dataset, train=limit(dataset.train, train_limit, seed, "train"))


def configured(settings: Config) -> Dataset:
    """The dataset that a config names, with the split it is scored on in the place of test."""
    d = settings.data
    columns = d.columns.model_dump()
    # Natural clients' tests are of their own rows, and so of those that there are: the same ones with every seed.
    natural = d.partition.kind == "natural"
    seed = 0 if natural else settings.seed
    dataset = load(d.name, d.path, settings.task, columns, d.train_limit, seed, d.instructions, natural)
    if d.split == "validation" and (dataset.dev is not None or not natural):
        dataset = validation(dataset, settings.seed)  # natural clients hold their own out
    return replace(dataset, test=limit(dataset.test, d.test_limit, settings.seed, "test"))


def central(settings: Config) -> tuple[Rows | None, tuple[str, ...]]:
    """The global test rows and the class names of a server that holds no training rows; either may be missing.

    A file is the test; of a folder test.* and labels.txt are read, and no other.
    """
    d, classes = settings.data, settings.task != "generate"
    _undivided(settings, "with engine.kind=flower the sites have the rows")
    labels = d.labels
    if d.name is not None:
        dataset = load(d.name, None, settings.task, d.columns.model_dump(), None, settings.seed, d.instructions)
        return limit(dataset.test, d.test_limit, settings.seed, "test"), dataset.labels
    if d.path is None:
        if classes and not labels:
            raise DataError(
                "data.labels: task classify needs the class names, where the server has no rows that name them"
            )
        return None, labels if classes else ()
    source = from_path(Path(d.path), needed=("test",))
    if classes and not (labels := labels or source.names or ()):
        raise DataError(f"{d.path}: no labels.txt, and test rows may lack a class; write one, or give data.labels")
    place, records = source.splits.get("all") or source.splits["test"]
    found, written = collect(place, records, settings.task, d.columns.model_dump(), d.instructions, False)
    if classes:
        found = replace(found, label=label_ids(written, labels))
    return limit(found, d.test_limit, settings.seed, "test"), labels if classes else ()


def limit(rows: Rows, count: int | None, seed: int, split: str) -> Rows:
    """A random subset of ``count`` rows, in the original order."""
    if count is None or count >= len(rows):
        return rows
    return rows.take(np.sort(rng(seed, "data", "limit", split).permutation(len(rows))[:count]))


def validation(dataset: Dataset, seed: int) -> Dataset:
    """The data set with its dev split, or a drawn tenth of train where it has none, in the place of test."""
    if dataset.dev is not None:
        return replace(dataset, test=dataset.dev)
    # Of rows to generate from, whole prompts: else references of one would be on both sides.
    group = np.arange(len(dataset.train)) if dataset.train.completion is None else dataset.train.group
    count = 1 + int(group.max())
    held = np.isin(group, rng(seed, "validation").permutation(count)[: max(1, count // 10)])
    return replace(
        dataset,
        train=dataset.train.take(np.flatnonzero(~held)),
        test=dataset.train.take(np.flatnonzero(held)),
    )


def stratified(label: np.ndarray, fraction: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The kept and the held-out indices: a systematic sample, true to each label within one row."""
    order = np.lexsort((random.permutation(len(label)), label))
    held_out = np.diff(np.floor(np.arange(len(label) + 1) * fraction + random.random())) > 0
    return np.sort(order[~held_out]), np.sort(order[held_out])


def built_in(task: str) -> Dataset:
    if task == "generate":
        raise DataError(f"{BUILT_IN}: it has labels and no completions; task generate needs another set")
    texts, label = docstrings.labelled()
    rows, (train, test) = (
        Rows(texts, label=label),
        stratified(label, HELD_OUT, rng(docstrings.SEED, "docstrings", "split")),
    )
    return Dataset(BUILT_IN, rows.take(train), rows.take(test), None, docstrings.LABELS)


def assemble(
    source: Source, task: str, columns: Mapping[str, str], form: Instructions = AS_THEY_ARE, clients: bool = True
) -> Dataset:
    read = {
        split: collect(*place, task, columns, form, clients and split in ("train", "all"))
        for split, place in source.splits.items()
    }
    splits = {split: rows for split, (rows, _) in read.items()}
    labels: tuple[str, ...] = ()
    if task != "generate":
        labels = source.names or class_names(read["all" if "all" in read else "train"][1])
        splits = {split: replace(rows, label=label_ids(written, labels)) for split, (rows, written) in read.items()}
    if "all" in splits:
        splits = cut(splits["all"], source.name)
    for split, rows in splits.items():
        if (rows.text_b is None) != (splits["train"].text_b is None):
            raise DataError(f"{source.name}: train and {split} must both have the column text_b, or neither")
    return Dataset(source.name, splits["train"], splits["test"], splits.get("dev"), labels, source.notices)


def cut(rows: Rows, name: str) -> dict[str, Rows]:
    """Train and test from one file, the same whatever the run's seed: what is tuned with one is tested with another.

    Rows of one prompt stay together: the test must not repeat the train.
    """
    random = rng(0, "data", "split")
    if rows.label is not None:
        train, test = stratified(rows.label, HELD_OUT, random)
    else:
        held_out = np.isin(rows.group, stratified(np.zeros(1 + rows.group.max()), HELD_OUT, random)[1])
        train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train) or not len(test):
        raise DataError(f"{name}: {len(rows)} rows are too few to hold {HELD_OUT:g} out; give a folder")
    return {"train": rows.take(train), "test": rows.take(test)}


def collect(
    place: str,
    records: Iterable[Record],
    task: str,
    columns: Mapping[str, str],
    form: Instructions = AS_THEY_ARE,
    clients: bool = True,
) -> tuple[Rows, list[Written]]:
    """One split's rows, and their labels still as written. The first row decides on optional columns.

    clients: whether it matters whose rows they are; else that column is not looked at.
    """
    if task == "generate":
        return prompts(place, records, columns, form, clients), []
    keys = ["text", "label"]
    cells: dict[str, list[Any]] = {}
    places: list[str] = []
    for where, row in records:
        if not places:
            keys += [key for key in ("text_b", "client") if there(row, key, columns) and (clients or key != "client")]
            cells = {key: [] for key in keys}
        places.append(where)
        for key, values in cells.items():
            values.append(cell(where, row, key, columns.get(key, key)))
    if not places:
        raise DataError(f"{place}:1: no rows; a split needs at least one")
    rows = Rows(cells["text"], cells.get("text_b"), None, cells.get("client"))
    return rows, list(zip(places, cells["label"], strict=True))


def there(row: Mapping[str, Any], key: str, columns: Mapping[str, str]) -> bool:
    """Whether a first row has an optional column, or the config says that it should."""
    return columns.get(key, key) in row or columns.get(key, key) != key


def prompts(
    place: str, records: Iterable[Record], columns: Mapping[str, str], form: Instructions, whose: bool = True
) -> Rows:
    """One split's rows of task generate, all of the first one's shape. whose: as `collect`'s clients."""
    examples, clients, read = list[Example](), list[str](), None
    for where, row in records:
        if read is None:
            kind, named = shape(where, row, columns, form.format), whose and there(row, "client", columns)
            if kind == "messages" and form.template == "plain":
                raise DataError(
                    f"{where}: messages are written by a chat template; data.instructions.template=chat or auto"
                )
            chat = form.template == "chat" or kind == "messages"
            if form.separator and (chat or kind == "alpaca"):
                what = "a chat template" if chat else "alpaca's headings"
                raise DataError(
                    f"{where}: data.instructions.separator is of plain prompts; here {what} part them; leave it out"
                )
            read = Reader(kind, columns, chat, form.separator)
        before = len(examples)
        examples += read(where, row)
        if named:
            clients += [cell(where, row, "client", columns.get("client", "client"))] * (len(examples) - before)
    if read is None:
        raise DataError(f"{place}:1: no rows; a split needs at least one")
    texts, completions, turns, choices, answers = zip(
        *((one.text, one.completion, one.turns, one.choices, one.answer) for one in examples), strict=True
    )
    chosen = read.kind == "choices"
    return Rows(
        list(texts), client=clients if named else None, completion=list(completions), turns=list(turns) if read.chat else None,
        choices=list(choices) if chosen else None, answer=np.array(answers, np.int64) if chosen else None,
    )  # fmt: skip


def cell(where: str, row: Mapping[str, Any], key: str, column: str) -> Any:
    """One checked value: a text, a label (int or string) or a client (as a string)."""
    if column not in row:
        raise DataError(f"{where}: no column {column!r}{nearest(column, list(row))}; set data.columns.{key}")
    value = row[column]
    if key in ("label", "client") and isinstance(value, int) and not isinstance(value, bool):
        return value if key == "label" else str(value)
    if not isinstance(value, str) or not value.strip():
        right = "a non-empty string or an integer" if key in ("label", "client") else "a non-empty string"
        raise DataError(f"{where}: column {column!r} holds {value!r:.60}; it must be {right}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: column {column!r} holds a lone surrogate; it must be valid Unicode text")
    return value


def class_names(written: Sequence[Written]) -> tuple[str, ...]:
    """The classes where no list of names is given: the ids 0..max, or the sorted distinct names."""
    if all(is_id(label) for _, label in written):
        ids = {int(label) for _, label in written}
        for where, label in written:
            if int(label) not in range(len(ids)):
                raise DataError(
                    f"{where}: label {label}, but there are {len(ids)} classes, so ids must be "
                    f"0..{len(ids) - 1}; name the classes in labels.txt if some have no row"
                )
        return tuple(str(i) for i in range(len(ids)))
    for where, label in written:
        if isinstance(label, int):
            raise DataError(f"{where}: label {label} is an integer among names; use one kind only")
    return tuple(sorted({str(label) for _, label in written}))


def is_id(label: int | str) -> bool:
    """CSV has only strings, so digits count as an id."""
    return isinstance(label, int) or (label.isascii() and label.isdigit())


def label_ids(written: Iterable[Written], labels: Sequence[str]) -> np.ndarray:
    """(rows,): where each row's label stands among the classes, by its name or as an id.

    Where classes are called by numbers, a number that is written as text is a name, and never an id.
    """
    ids = {label: at for at, label in enumerate(labels)}
    numbers = any(map(is_id, ids))

    def one(where: str, label: int | str) -> int:
        if isinstance(label, str):
            plain = str(int(label)) if is_id(label) else label  # 01 is 1
            if (found := ids.get(label, ids.get(plain))) is not None:
                return found
            if numbers or not is_id(label):
                raise DataError(f"{where}: unknown label {label!r} among {len(ids)}{nearest(label, list(ids))}")
        if not 0 <= int(label) < len(ids):
            raise DataError(f"{where}: label {label} is outside 0..{len(ids) - 1}")
        return int(label)

    return np.array([one(*label) for label in written], np.int64)
