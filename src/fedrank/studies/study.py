"""A study: what is compared with what, from one YAML file, and the config of each of its runs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedrank import config as settings
from fedrank import methods
from fedrank.config import Config, ConfigError, Positive
from fedrank.studies.claims import Claim
from fedrank.studies.configs import Part, dotted, flattened, located, merged

Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]  # it becomes a part of a folder's name

# One thread and one process for each run: as many as there are cores play at once, and give the same bits.
APART: Part = {"engine": {"threads": 1, "workers": 1}}
# What makes an arm, and takes nothing from another's data, work or fleet.
OWN = ("method", "adapter.rank", "adapter.alpha", "adapter.targets", "local.lr", "server.optimizer", "server.lr",
       "server.beta1", "server.beta2", "server.tau")  # fmt: skip


class Range(BaseModel, extra="forbid", frozen=True):
    """The values of a knob from low to high, evenly or, with log, by factors."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low:g}, high={self.high:g}: low is below high, and above 0 where log is true")
        return self


Knob = Range | Annotated[tuple[bool | int | float | str, ...], Field(min_length=1)]


class Tuning(BaseModel, extra="forbid", frozen=True):
    """The search for every arm's knobs on the validation share of the training rows, before any run.

    search: dotted key -> the values to try, a range or a list. own: arm -> knobs that it has beside these, or in their
    place. trials: of each arm, however many knobs it has. config: laid over the config of a trial, such as fewer rounds.
    seed: of all trials, and none of the study's. every_setting: search in each setting; else in the first, for all.
    """

    search: dict[str, Knob] = {"local.lr": Range(low=1e-3, high=3e-2, log=True)}
    own: dict[Name, dict[str, Knob]] = {}
    trials: Positive = 4
    config: Part = {}
    seed: int = 100
    every_setting: bool = False

    @field_validator("search", mode="before")
    @classmethod
    def _values(cls, given: Any) -> Any:
        """A value alone is no range of values, and what all arms share is no knob of one."""
        for key, knob in given.items() if isinstance(given, Mapping) else ():
            if not isinstance(knob, list | tuple | Mapping | Range):
                raise ValueError(f"{key}: a list of values, or {{low, high, log}}, got {knob!r}")
            if key.partition(".")[0] in ("seed", "data", "clients", "rounds", "engine", "task", "model", "observe"):
                raise ValueError(f"{key} is no knob of a method: all arms have the same")
            if key in ("method", "method.name", "method.object"):
                raise ValueError(f"{key} is no knob: an arm is one method; name an arm for each")
        return given

    @field_validator("own", mode="before")
    @classmethod
    def _of_arms(cls, given: Any) -> Any:
        for knobs in given.values() if isinstance(given, Mapping) else ():
            cls._values(knobs)
        return given

    def knobs(self, arm: str) -> dict[str, Knob]:
        return {**self.search, **self.own.get(arm, {})}


class Study(BaseModel, extra="forbid", frozen=True):
    """What is asked, and of which runs.

    about: whatever else was written down beforehand. claims: what is held against the runs. base: the config that all runs
    share. settings: name -> what is laid over it, such as another data set; arms are compared within a setting. arms: name
    -> the same; or methods: their names alone. reference: the arm that the others are compared with; the first where null.
    varies: keys in which arms may differ beside the method's own, as the study is about them. score: what trials are judged
    by and targets are of. target: the score up to which costs are told; what every arm reaches where null.
    """

    title: str = ""
    about: dict[str, str] = {}
    claims: dict[Name, Claim] = {}
    base: Part = {}
    settings: Annotated[dict[Name, Part | None], Field(min_length=1)] = {"all": None}
    arms: Annotated[dict[Name, Part | None], Field(min_length=1)]
    reference: str | None = None
    varies: tuple[str, ...] = ()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    score: Literal["accuracy", "personal_accuracy"] = "accuracy"
    target: Annotated[float, Field(gt=0, lt=1)] | None = None
    tuning: Tuning | None = Tuning()

    @model_validator(mode="before")
    @classmethod
    def _methods(cls, raw: Any) -> Any:
        """methods: [a, b] is short for arms that are these methods."""
        if not (isinstance(raw, Mapping) and raw.get("methods")):
            return raw
        if raw.get("arms"):
            raise ValueError(
                "methods and arms: one of the two; an arm that is a method alone is NAME: {method: {name: NAME}}"
            )
        if not (isinstance(raw["methods"], list) and all(isinstance(name, str) for name in raw["methods"])):
            raise ValueError(f"methods: a list of names, such as [fedavg, fedara], got {raw['methods']!r}")
        arms = {name: {"method": {"name": name}} for name in raw["methods"]}
        if len(arms) < len(raw["methods"]):
            raise ValueError(f"methods: each once, got {', '.join(raw['methods'])}")
        return {key: value for key, value in raw.items() if key != "methods"} | {"arms": arms}

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, seeds: Any) -> Any:
        """seeds: 5 is short for 1 to 5."""
        return tuple(range(1, seeds + 1)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @model_validator(mode="after")
    def _possible(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each once, got {list(self.seeds)}")
        named = [(f"claims.{name}", arm) for name, one in self.claims.items() for arm in (one.arm, one.against) if arm]
        named += [("reference", self.reference)] if self.reference else []
        if self.tuning is not None:
            named += [("tuning.own", arm) for arm in self.tuning.own]
            if self.tuning.seed in self.seeds:
                raise ValueError(f"tuning.seed: {self.tuning.seed} is one of the study's seeds; take another")
        for place, parts in (("settings", self.settings), ("arms", self.arms)):
            if odd := [name for name, part in parts.items() if part and "seed" in part]:
                raise ValueError(f"{place}.{odd[0]}.seed: every arm is played with the same seeds, which `seeds` names")
        for key, arm in named:
            if arm not in self.arms:
                raise ValueError(
                    f"{key}: {arm!r} is no arm{settings.hint(arm, self.arms)}; arms are {', '.join(self.arms)}"
                )
        known = [*settings.known_keys(), "method"]
        for key in self.varies:
            if key not in known and not key.startswith("method."):
                raise ValueError(f"varies: there is no key {key!r}{settings.hint(key, known)}")
        for name, one in self.claims.items():
            if odd := [setting for setting in one.settings if setting not in self.settings]:
                raise ValueError(
                    f"claims.{name}.settings: there is no setting {odd[0]!r}{settings.hint(odd[0], self.settings)}"
                )
            if one.arm == (one.against or self.baseline):
                raise ValueError(
                    f"claims.{name}: {one.arm} is compared with itself; against is another arm, and the reference, "
                    f"{self.baseline}, where it is left out"
                )
        return self

    @property
    def baseline(self) -> str:
        return self.reference or next(iter(self.arms))

    def free(self, key: str) -> bool:
        """Whether arms that differ in it are compared fairly: it is the method's own, or what the study is about."""
        return any(key == one or key.startswith(f"{one}.") for one in (*OWN, *self.varies))

    def config(self, setting: str, arm: str, *more: Part) -> Part:
        """The config of a run, as YAML holds it. more: laid over it, the last on top."""
        return merged(APART, self.base, self.settings[setting] or {}, self.arms[arm] or {}, *more)

    def resolved(self) -> dict[str, dict[str, Config]]:
        """Setting -> arm -> its config. ConfigError names the arm whose config, or whose tuning, cannot be used."""
        found: dict[str, dict[str, Config]] = {}
        for setting in self.settings:
            for arm in self.arms:
                found.setdefault(setting, {})[arm] = _checked(
                    self.config(setting, arm), f"arm {arm!r} in setting {setting!r}"
                )
                for knobs in _ends(self.tuning.knobs(arm)) if self.tuning else ():
                    config = self.config(setting, arm, self.tuning.config if self.tuning else {}, dotted(knobs))
                    _checked(config, f"tuning of arm {arm!r} in setting {setting!r}")
                    if odd := [key for key in knobs if not self.free(key)]:
                        raise ConfigError(
                            f"tuning of arm {arm!r}: {odd[0]} is no knob, as arms that differ in it are not compared "
                            "fairly; leave it out, or name it in varies where the study is about it"
                        )
        return found

    def differing(self) -> list[str]:
        """What arms of a setting differ in beside the method's own and what the study varies, each key once."""
        found: dict[str, str] = {}
        for arms in self.resolved().values():
            flat = {arm: flattened(config.model_dump(mode="json")) for arm, config in arms.items()}
            for one, other in combinations(flat, 2):
                for key in {**flat[one], **flat[other]}:
                    a, b = flat[one].get(key), flat[other].get(key)
                    if a != b and not self.free(key):
                        found.setdefault(key, f"{key} is {a} in {one} and {b} in {other}")
        return list(found.values())


def read(
    source: str | Path, overrides: Iterable[str] = (), names: Iterable[str] = (), seeds: int | None = None
) -> Study:
    """The study of a YAML file, with ``key=value`` overrides; where methods are named, of a run's config and these.

    ConfigError with what is wrong and what would be right.
    """
    where, raw = settings.read(source)
    if (names := [name.strip() for name in names]) and raw.keys() & {"arms", "methods", "base"}:
        raise ConfigError(f"{where}: a study says itself what it compares; --methods goes with a run's config")
    if names:
        raw = {"base": raw, "methods": names}  # the config's own method keeps its hyper-parameters: see `merged`
    elif not raw.keys() & {"arms", "methods"}:
        raise ConfigError(f"{where}: a study has arms or methods; to compare methods on a run's config name them: --methods fedavg,fedara")  # fmt: skip
    if seeds is not None:
        raw["seeds"] = seeds
    for item in overrides:
        settings.override(raw, item)
    if odd := [key for key in raw if key in Config.model_fields and key not in Study.model_fields]:
        raise ConfigError(
            f"{where}: {odd[0]!r} is a key of runs: what they share goes below base, such as base.{odd[0]}"
        )
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {settings.explain(e, known=Study)}" for e in error.errors())) from None
    study.resolved()
    return study


def _checked(config: Part, whose: str) -> Config:
    try:
        found = settings.load(located(config))
        if found.data.split != "test":
            raise ConfigError(
                "data.split: runs are scored on the test rows; trials on the validation share by themselves"
            )
        methods.build(found.method)
    except ConfigError as error:
        raise ConfigError(f"{whose}: {error}") from None
    return found


def _ends(knobs: Mapping[str, Knob]) -> Iterator[dict[str, Any]]:
    """Values of each knob that show whether all are possible: a range's ends and one between, no whole number; all of a list."""
    for key, knob in knobs.items():
        for value in (
            (knob.low, knob.low + (knob.high - knob.low) / math.e, knob.high) if isinstance(knob, Range) else knob
        ):
            yield {key: value}
