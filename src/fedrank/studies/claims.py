"""Claims that were written down before the runs, and what the runs say of each: confirmed, partly, refuted, or neither."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from fedrank.config import hint
from fedrank.studies.statistics import paired, ratio

SCORES = ("accuracy", "personal_accuracy", "personal_worst_decile")
COSTS = ("bytes", "bytes_up", "bytes_down", "adapter_bytes", "adapter_bytes_up", "adapter_bytes_down", "clock_seconds",
         "device_joules", "peak_memory_bytes")  # fmt: skip
Targets = Callable[[str, str, str], Mapping[str, Any]]
MEASURES = (*SCORES, *COSTS, "round")
# What one setting says -> the verdict where others say nothing of the kind.
PARTLY = {"confirmed": "partly", "refuted": "refuted in part", "less than claimed": "less than claimed in part"}


class Bound(BaseModel, extra="forbid", frozen=True):
    """Where the whole 95 % interval has to lie: above a number, or below it. Points of scores, factors of costs."""

    above: FiniteFloat | None = None
    below: FiniteFloat | None = None

    @model_validator(mode="after")
    def _one(self) -> "Bound":
        if (self.above is None) == (self.below is None):
            raise ValueError("above or below: one of the two")
        return self

    def holds(self, low: float, high: float) -> bool:
        return low > self.above if self.above is not None else high < (self.below or 0.0)

    def excluded(self, low: float, high: float) -> bool:
        """Whether the whole interval lies on the other side."""
        return high < self.above if self.above is not None else low > (self.below or 0.0)

    def overlaps(self, other: "Bound") -> bool:
        """Whether an interval could lie in both."""
        above, below = (self.above, other.below) if self.above is not None else (other.above, self.below)
        return above is None or below is None or above < below


class Claim(BaseModel, extra="forbid", frozen=True):
    """One claim about two arms, in each setting.

    claim: in a sentence. paper: what the paper says of it, and where that was read. arm, against: whose runs are compared
    over the same seeds; the study's reference where against is null. of: the measure; a score is compared by its difference
    in points, a cost by its ratio. to_target: not in the end, but up to the study's target or, where none is given, to what
    these two arms reach with every seed. confirmed, refuted: where the interval lies then. settings: all where empty.
    """

    claim: Annotated[str, Field(min_length=1)]
    paper: str = ""
    arm: str
    against: str | None = None
    of: str
    to_target: bool = False
    confirmed: Bound
    refuted: Bound
    settings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> "Claim":
        if self.of not in MEASURES:
            raise ValueError(
                f"of: there is no measure {self.of!r}{hint(self.of, MEASURES)}; measures are {', '.join(MEASURES)}"
            )
        if self.to_target and self.of in SCORES:
            raise ValueError(f"of: {self.of} up to a target is the target itself; a cost")
        if self.of == "round" and not self.to_target:
            raise ValueError("of: all arms play the same rounds; with to_target they differ")
        if self.confirmed.overlaps(self.refuted):
            raise ValueError(
                "confirmed, refuted: an interval could lie in both; "
                "one is above a number, the other below the same or a lower one"
            )
        return self


def judged(claim: Claim, baseline: str, results: Mapping[str, Any], targets: Targets) -> dict[str, Any]:
    """What the settings say of a claim, and the verdict of all. targets: setting and two arms -> their costs to what both reach.

    confirmed, refuted: in every setting; mixed: each in some; partly, refuted in part: in some, and the other in none; less
    than claimed: shown to lie between the two bounds, in every setting or in part; not shown: nothing of these in any. The
    intervals are each claim's own, not corrected for how many claims there are.
    """
    against = claim.against or baseline
    settings = {
        name: _in_setting(claim, against, targets(name, claim.arm, against) if claim.to_target else one["arms"])
        for name, one in results.items()
        if not claim.settings or name in claim.settings
    }
    said = {one["says"] for one in settings.values()}
    if {"confirmed", "refuted"} <= said:
        verdict = "mixed"
    elif len(said) == 1:
        (verdict,) = said
    else:
        verdict = next(partly for says, partly in PARTLY.items() if says in said)
    return {"verdict": verdict, "against": against, "settings": settings}


def _in_setting(claim: Claim, against: str, arms: Mapping[str, Any]) -> dict[str, Any]:
    """The difference or ratio with its interval, and what it says by itself. arms: their measures by seed."""
    ours, theirs = (
        dict(zip(arms[arm]["seeds"], arms[arm][claim.of]["values"], strict=True)) for arm in (claim.arm, against)
    )
    seeds = [seed for seed in ours if seed in theirs and ours[seed] is not None and theirs[seed] is not None]
    if len(seeds) < max(2, *(arms[arm].get("played", 0) for arm in (claim.arm, against))):
        return {"seeds": len(seeds), "says": "not shown", "why": f"{len(seeds)} seeds have it in both arms"}
    pairs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    if claim.of in SCORES:
        found = paired([100 * value for value in pairs[0]], [100 * value for value in pairs[1]])
    elif (factor := ratio(*pairs)) is not None:
        found = factor
    else:
        return {"seeds": len(seeds), "says": "not shown", "why": "a cost of 0 has no ratio"}
    low, high = found["interval"]
    told = {"seeds": len(seeds), "mean": found["mean"], "interval": [low, high]}
    if found["p"] is None and claim.of not in COSTS:  # traffic may well be the same with every seed, by design
        return told | {"says": "not shown", "why": "the same in every seed, so that chance is not known"}
    if claim.confirmed.holds(low, high):
        return told | {"says": "confirmed"}
    if claim.refuted.holds(low, high):
        return told | {"says": "refuted"}
    between = claim.confirmed.excluded(low, high) and claim.refuted.excluded(low, high)
    return told | {"says": "less than claimed" if between else "not shown"}
