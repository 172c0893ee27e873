"""Sources of rows: files, folders and Hugging Face data sets as records, each with the place where it stands."""

import csv
import difflib
import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "dev", "test")
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
LONGEST = 1 << 30  # characters of a cell of CSV, for which the standard library's own limit is 128 thousand

Record = tuple[str, Mapping[str, Any]]  # where the row stands ("train.csv:12"), its columns


class DataError(ValueError):
    """The data cannot be used: the file and the line, what is wrong, what would be right."""


@dataclass(frozen=True, eq=False)
class Source:
    """Splits not read yet: split -> (its name in messages, its records); a split "all" is cut later."""

    name: str
    splits: Mapping[str, tuple[str, Iterable[Record]]]
    names: tuple[str, ...] | None = None
    notices: tuple[str, ...] = ()


def from_hub(name: str, columns: Mapping[str, str]) -> Source:
    path, _, config = name.partition(":")
    try:
        found = optional("datasets", name).load_dataset(path, config or None)
    except (OSError, ValueError, RuntimeError) as error:  # what it raises for a wrong name, config or network
        raise DataError(f"{name}: Hugging Face cannot load it: {error}") from error
    splits = {split.replace("validation", "dev"): split for split in found}
    missing = [split for split in ("train", "test") if split not in splits]
    if missing:
        raise DataError(f"{name}: no split {missing[0]!r}; it has {', '.join(found)}")
    places = {split: f"{name}/{splits[split]}" for split in SPLITS if split in splits}
    records = {split: (place, numbered(place, found[splits[split]])) for split, place in places.items()}
    names = getattr(found["train"].features.get(columns.get("label", "label")), "names", None)
    return Source(name, records, tuple(names) if names else None, ignored(name, set(splits) - set(SPLITS)))


def from_path(path: Path, needed: Sequence[str] = ("train", "test")) -> Source:
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder{nearest(path.name, siblings)}")
    if path.is_file():
        return Source(str(path), {"all": (str(path), read(path))})
    files: dict[str, Path] = {}
    for file in sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")):
        split = file.name.split(".")[0]
        if split not in SPLITS and suffix(file) not in (*TEXT_SUFFIXES, ".parquet"):
            continue
        if split in files:
            raise DataError(f"{file}: {files[split].name} is there too; keep one file for {split}")
        files[split] = file
    for split in needed:
        if split not in files:
            held = ", ".join(f.name for f in files.values()) or "no data files"
            raise DataError(f"{path}: no file {split}.jsonl (or .csv, .tsv, .parquet); it holds {held}")
    names = path / "labels.txt"
    return Source(
        path.name,
        {split: (str(files[split]), read(files[split])) for split in SPLITS if split in files},
        names_in(names) if names.exists() else None,
        ignored(str(path), set(files) - set(SPLITS)),
    )


def ignored(name: str, splits: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}: split {split} is ignored; train, dev and test are read" for split in sorted(splits))


def names_in(path: Path) -> tuple[str, ...]:
    """labels.txt: the class names, label id = 0-based line."""
    names: list[str] = []
    for number, line in enumerate(lines(path), 1):
        if not line.strip() or line.strip() in names:
            raise DataError(f"{path}:{number}: an empty or repeated class name; each line names another class")
        names.append(line.strip())
    if not names:
        raise DataError(f"{path}:1: no class names; write one a line, or remove the file")
    return tuple(names)


def suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read(path: Path) -> Iterator[Record]:
    kind = suffix(path)
    if kind in (".jsonl", ".json"):
        return read_json(path)
    if kind in (".csv", ".tsv"):
        return read_csv(path, kind)
    if path.suffix.lower() == ".parquet":
        return read_parquet(path)
    raise DataError(f"{path}:1: unknown suffix; use {', '.join(TEXT_SUFFIXES)} (each also .gz) or .parquet")


def lines(path: Path) -> Iterator[str]:
    """The decoded lines with their ends; line by line, so that an error can name the line."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from error


def read_json(path: Path) -> Iterator[Record]:
    """JSON lines. One array over the whole file is refused: its rows have no lines to name."""
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}; each line must be one object") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {line.strip()!r:.40} is not an object, as each line must be")
        yield f"{path}:{number}", row


def read_csv(path: Path, kind: str) -> Iterator[Record]:
    """A header line, then rows. Tab-separated files have no quoting, as their media type defines it."""
    if kind == ".tsv":
        table = csv.reader(lines(path), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        table = csv.reader(lines(path), strict=True)
    csv.field_size_limit(LONGEST)
    header: list[str] = []
    start = 1
    try:
        for fields in table:
            if fields and not header:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{start}: a column name is repeated in {header}; names must differ")
            elif fields and len(fields) != len(header):
                raise DataError(f"{path}:{start}: {len(fields)} fields; the header has {len(header)}")
            elif fields:
                yield f"{path}:{start}", dict(zip(header, fields, strict=True))
            start = table.line_num + 1  # a quoted field may span lines: a row is named by its first
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid CSV: {error}") from error


def read_parquet(path: Path) -> Iterator[Record]:
    arrow, parquet = optional("pyarrow", str(path)), optional("pyarrow.parquet", str(path))
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        yield from numbered(str(path), (row for batch in batches for row in batch.to_pylist()))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}:1: not a readable parquet file: {error}") from error


def numbered(place: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    return ((f"{place}, row {number}", row) for number, row in enumerate(rows, 1))


def optional(module: str, place: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{place}: reading it needs {module}: pip install fedrank[data]") from error


def nearest(word: str, known: Sequence[str]) -> str:
    return "".join(f", the nearest is {near!r}" for near in difflib.get_close_matches(word, known, 1, 0.0))
