"""Claims that were written down before the runs, and what the runs say of each: confirmed, partly, refuted, not shown."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from fedrank.studies.statistics import paired, ratio

SCORES = ("accuracy", "personal_accuracy", "personal_worst_decile")
COSTS = ("bytes", "bytes_up", "bytes_down", "adapter_bytes", "adapter_bytes_up", "adapter_bytes_down", "clock_seconds",
         "device_joules", "peak_memory_bytes")  # fmt: skip
Measure = Literal["accuracy", "personal_accuracy", "personal_worst_decile", "bytes", "bytes_up", "bytes_down", "adapter_bytes",
                  "adapter_bytes_up", "adapter_bytes_down", "clock_seconds", "device_joules", "peak_memory_bytes",
                  "round"]  # fmt: skip


class Bound(BaseModel, extra="forbid", frozen=True):
    """Where the whole 95 % interval has to lie: above a number, or below it. Points of scores, factors of costs."""

    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _one(self) -> "Bound":
        if (self.above is None) == (self.below is None):
            raise ValueError("above or below: one of the two")
        return self

    def holds(self, low: float, high: float) -> bool:
        return low > self.above if self.above is not None else high < (self.below or 0.0)


class Claim(BaseModel, extra="forbid", frozen=True):
    """One claim about two arms, in each setting.

    claim: in a sentence. paper: what the paper says of it, and where that was read. arm, against: whose runs are compared
    over the same seeds; the study's reference where against is null. of: the measure; a score is compared by its difference
    in points, a cost by its ratio. to_target: up to the study's target, of the seeds in which both reach it, and not in the
    end. confirmed, refuted: where the interval lies then. settings: all where empty.
    """

    claim: Annotated[str, Field(min_length=1)]
    paper: str = ""
    arm: str
    against: str | None = None
    of: Measure
    to_target: bool = False
    confirmed: Bound
    refuted: Bound
    settings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> "Claim":
        if self.to_target and self.of in SCORES:
            raise ValueError(f"of: {self.of} up to a target is the target itself; a cost")
        if self.of == "round" and not self.to_target:
            raise ValueError("of: all arms play the same rounds; with to_target they differ")
        return self


def judged(claim: Claim, baseline: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings say of a claim, and the verdict of all.

    confirmed, refuted: in every setting; partly: confirmed in some; not shown: in none, and not refuted in all.
    """
    against = claim.against or baseline
    settings = {
        name: _in_setting(claim, against, one)
        for name, one in results.items()
        if not claim.settings or name in claim.settings
    }
    said = [one["says"] for one in settings.values()]
    verdict = next((word for word in ("confirmed", "refuted") if said and set(said) == {word}), None)
    verdict = verdict or ("partly" if "confirmed" in said else "not shown")
    return {"verdict": verdict, "against": against, "settings": settings}


def _in_setting(claim: Claim, against: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The difference or ratio with its interval, and what it says by itself."""
    ours, theirs = (_by_seed(claim, arm, result) for arm in (claim.arm, against))
    seeds = [seed for seed in ours if seed in theirs and ours[seed] is not None and theirs[seed] is not None]
    if claim.to_target and not all(result["target"]["arms"][arm]["reached"] for arm in (claim.arm, against)):
        return {"seeds": len(seeds), "says": "not shown", "why": "an arm never reached the target"}
    if len(seeds) < 2:
        return {"seeds": len(seeds), "says": "not shown", "why": "fewer than two seeds"}
    pairs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    if claim.of in SCORES:
        found = paired([100 * value for value in pairs[0]], [100 * value for value in pairs[1]])
    elif (factor := ratio(*pairs)) is not None:
        found = factor
    else:
        return {"seeds": len(seeds), "says": "not shown", "why": "a cost of 0 has no ratio"}
    low, high = found["interval"]
    says = (
        "confirmed"
        if claim.confirmed.holds(low, high)
        else "refuted"
        if claim.refuted.holds(low, high)
        else "not shown"
    )
    return {"seeds": len(seeds), "mean": found["mean"], "interval": [low, high], "says": says}


def _by_seed(claim: Claim, arm: str, result: Mapping[str, Any]) -> dict[str, Any]:
    if claim.to_target:
        mine = result["target"]["arms"][arm]
        return dict(zip(mine["seeds"], mine[claim.of]["values"], strict=True))
    mine = result["arms"][arm]
    return dict(zip(mine["seeds"], mine[claim.of]["values"], strict=True))
