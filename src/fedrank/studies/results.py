"""What a study's runs come to: spread, costs up to a common target, paired differences, fairness, and a plain sentence."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from fedrank.ledger import OF_TEXTS
from fedrank.studies.claims import COSTS, SCORES, judged
from fedrank.studies.runs import best, late, reached
from fedrank.studies.statistics import LEVEL, holm, paired, ratio, spread
from fedrank.studies.study import Study
from fedrank.studies.tuning import count
from fedrank.told import total
from fedrank.units import points, share
from fedrank.units import ratio as times

Run = Mapping[str, Any]  # as `runs.measured` gives it
OTHERS = ("last_accuracy", "personal_majority", "rows_seen", "waiting_seconds", "epsilon", *OF_TEXTS,
          *(f"personal_{name}" for name in OF_TEXTS))  # fmt: skip
BOTH_WAYS = {"bytes": ("bytes_up", "bytes_down"), "adapter_bytes": ("adapter_bytes_up", "adapter_bytes_down")}
TO_TARGET = ("round", *COSTS)


def measures(run: Run) -> dict[str, float | None]:
    """A run's numbers: scores, `accuracy` as `late` takes it, and costs of all rounds."""
    summary = run["summary"]
    found = {name: summary.get(name) for name in (*SCORES, *COSTS, *OTHERS)}
    found |= {name: total(summary.get(part) for part in parts) for name, parts in BOTH_WAYS.items()}
    found |= {"last_accuracy": summary.get("accuracy"), "rows_seen": run["rows_seen"]}
    return {**found, "accuracy": late(run["curve"], "accuracy")}


def compared(study: Study, runs: Mapping[str, Any], fair: bool) -> dict[str, Any]:
    """Setting -> what its arms came to, of the runs that there are: {arm: {seed: run}} in each setting.

    fair: whether anything may be concluded.
    """
    return {setting: _setting(study, runs.get(setting, {}), fair) for setting in study.settings}


def _setting(study: Study, arms: Mapping[str, Mapping[str, Run]], fair: bool) -> dict[str, Any]:
    found = {}
    for arm in study.arms:
        mine = {str(seed): measures(run) for seed in study.seeds if (run := arms.get(arm, {}).get(str(seed)))}
        found[arm] = {
            "seeds": [*mine],
            **{n: spread([one[n] for one in mine.values()]) for n in (*SCORES, *COSTS, *OTHERS)},
        }
    target = _target(study, arms, study.arms)
    to_target = {arm: _to_target(study, arms.get(arm, {}), target) for arm in study.arms}
    differences = _differences(study, found, to_target)
    return {
        "arms": found, "target": {"score": study.score, "value": target, "given": study.target is not None, "arms": to_target},
        "differences": differences, "conclusion": conclusion(study, found, differences) if fair else None,
    }  # fmt: skip


def _target(study: Study, arms: Mapping[str, Mapping[str, Run]], names: Iterable[str]) -> float | None:
    """The study's target, or what every run of these arms reaches, less those whose method has no such score."""
    if study.target is not None:
        return study.target
    tops = [best(run["curve"], study.score) for arm in names for run in arms.get(arm, {}).values()]
    return min((top for top in tops if top is not None), default=None)


def _to_target(study: Study, mine: Mapping[str, Run], target: float | None) -> dict[str, Any]:
    """Costs up to the target, of the seeds that reach it; reached: how many do."""
    found = {seed: target and reached(run["curve"], study.score, target) for seed, run in mine.items()}
    there = {
        seed: point | {name: total(point.get(part) for part in parts) for name, parts in BOTH_WAYS.items()}
        for seed, point in found.items()
        if point
    }
    return {
        "played": len(mine), "reached": len(there), "seeds": [*there],
        **{name: spread([point[name] for point in there.values()]) for name in TO_TARGET},
    }  # fmt: skip


def _differences(
    study: Study, arms: Mapping[str, Any], to_target: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> measure -> its difference from the reference over the seeds that both have; of costs the ratio.

    Costs up to the target have "to_target." before their names, and are compared where every seed of both gets there: those
    that do are the lucky ones. Each p is corrected for the number of arms.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in study.arms if arm != study.baseline}
    for prefix, sides, names in (("", arms, (*SCORES, *COSTS)), ("to_target.", to_target, TO_TARGET)):
        for name in names:
            theirs = _by_seed(sides[study.baseline], name)
            for arm, mine in found.items():
                if prefix and any(sides[one]["reached"] < sides[one]["played"] for one in (arm, study.baseline)):
                    continue
                ours = _by_seed(sides[arm], name)
                seeds = [seed for seed in ours if seed in theirs]
                compare = paired if name in SCORES else ratio
                one = compare([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None
                if one is not None:
                    mine[prefix + name] = one
            corrected = holm({arm: mine[prefix + name]["p"] for arm, mine in found.items() if prefix + name in mine})
            for arm, p in corrected.items():
                found[arm][prefix + name]["p_corrected"] = p
    return found


def _by_seed(side: Mapping[str, Any], name: str) -> dict[str, float | int]:
    return {s: value for s, value in zip(side["seeds"], side[name]["values"], strict=True) if value is not None}


def verdicts(study: Study, runs: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs say of each of the study's claims; those up to a target by what their two arms reach."""

    def targets(setting: str, *arms: str) -> dict[str, Any]:
        target = _target(study, runs[setting], arms)
        return {arm: _to_target(study, runs[setting][arm], target) for arm in arms}

    return {name: judged(claim, study.baseline, results, targets) for name, claim in study.claims.items()}


# ---- in words


def fairness(study: Study, found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the arms had the same data, seeds, work and tuning. why: what is against it; notes: what else to know."""
    why, notes = study.differing(), list[str]()
    for setting in study.settings:
        arms = found.get("runs", {}).get(setting, {})
        for arm in study.arms:
            if missing := [seed for seed in study.seeds if str(seed) not in arms.get(arm, {})]:
                why.append(
                    f"{setting}: {arm} has no run of seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                )
        facts = [(seed, run["facts"]) for mine in arms.values() for seed, run in mine.items()]
        for what in ("data", "model"):
            if len({(seed, str(one[what])) for seed, one in facts}) > len({seed for seed, _ in facts}):
                why.append(f"{setting}: runs of a seed had not the same {what}")
        if len({one["numerics"]["compute"] for _, one in facts}) > 1:
            why.append(f"{setting}: some runs were computed in bfloat16 and some in float32 (engine.compute)")
        tried = (trial for one in found.get("tuning", {}).get(setting, {}).values() for trial in one.get("trials", []))
        versions = [one["code"] or "" for _, one in facts]
        versions += [trial.get("code") or "" for trial in tried if trial.get("score") is not None]
        codes = {code for version in versions for code in version.split("+")}
        if "" in codes:  # of a run of before it was written down
            notes.append(
                f"{setting}: it is not known of all runs and trials which version of this program's code played them"
            )
        elif len(codes) > 1:
            notes.append(f"{setting}: not all runs and trials were played with the same version of this program's code")
        if len({str(one["numerics"]) for _, one in facts}) > 1:
            notes.append(f"{setting}: not all runs were played with the same numerics")
        seen = {arm: fmean(run["rows_seen"] for run in mine.values()) for arm, mine in arms.items() if mine}
        least = min((rows for rows in seen.values() if rows), default=0.0)
        if more := [f"{arm} {rows / least:.2g}" for arm, rows in seen.items() if rows > 1.01 * least > 0]:
            notes.append(f"{setting}: rows seen in training, times the least: {', '.join(more)}")
        alike = defaultdict[str, list[str]](list)
        for arm, mine in arms.items():
            rows = [[row.get(name) for name in SCORES] for seed in sorted(mine) for row in mine[seed]["curve"]]
            if rows:
                alike[str(rows)].append(arm)
        for same in alike.values():
            if len(same) > 1:
                notes.append(
                    f"{setting}: {' and '.join(same)} came to the same scores with every seed, as if they were one"
                )
    tuning = study.tuning
    effort = {arm: count(tuning.knobs(arm), tuning.trials) for arm in study.arms} if tuning else {}
    if len(set(effort.values())) > 1:
        why.append(f"tuned with unequal effort, trials: {', '.join(f'{arm} {n}' for arm, n in effort.items())}")
    for at, setting in enumerate(study.settings):
        if tuning is None or (at and not tuning.every_setting):
            break
        arms = found.get("tuning", {}).get(setting, {})
        trials = {arm: arms.get(arm, {}).get("trials", []) for arm in study.arms}
        counts = {arm: len(mine) for arm, mine in trials.items()}
        if short := [arm for arm, n in counts.items() if n != effort[arm]]:
            why.append(f"{setting}: the tuning of {', '.join(short)} has not come to its end")
        failed = {arm: sum("error" in trial for trial in mine) for arm, mine in trials.items()}
        if nothing := [f"{arm} {n}" for arm, n in failed.items() if n]:
            notes.append(f"{setting}: trials that came to nothing and count as the worst: {', '.join(nothing)}")
        if none := [arm for arm, n in failed.items() if n == counts[arm] > 0]:
            why.append(f"{setting}: no trial of {', '.join(none)} has a score")
        if edged := [f"{arm} ({', '.join(mine['edge'])})" for arm, mine in arms.items() if mine.get("edge")]:
            notes.append(f"{setting}: the best value that was tried is at an edge for {', '.join(edged)}")
    sizes = {(c.adapter.rank, str(c.adapter.targets)) for arms in study.resolved().values() for c in arms.values()}
    if len(sizes) > 1:
        notes.append("arms begin with adapters of different ranks or targets")
    if tuning is None:
        notes.append("no knob was searched: learning rates are each method's default or as the study sets them")
    elif own := [f"{arm} ({', '.join(knobs)})" for arm, knobs in tuning.own.items() if knobs]:
        notes.append(f"with as many trials, knobs or values of their own were searched for {', '.join(own)}")
    if len(study.seeds) < 3:
        notes.append(f"{len(study.seeds)} seed{'s' * (len(study.seeds) > 1)}: the spread is hardly known")
    return {"verdict": not why, "why": why, "notes": notes}


def conclusion(study: Study, arms: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    """What may be said of the arms' scores, by corrected tests at 5 %, and no more than that."""
    name = study.score
    base = arms[study.baseline][name]
    what = name.replace("_", " ")
    if base["mean"] is None:
        return f"The reference, {study.baseline}, has no {what}, so nothing is compared with it."
    compared = {arm: one[name] for arm, one in differences.items() if name in one}
    if not compared:
        return f"No other arm has a {what} over the same seeds."
    above, below, level, same = list[str](), list[str](), list[str](), list[str]()
    tests = sum(one["p"] is not None for one in compared.values())
    for arm, one in sorted(compared.items(), key=lambda item: -item[1]["mean"]):
        if one.get("p_corrected") is not None and one["p_corrected"] < LEVEL:
            low, high = sorted(100 * abs(end) for end in one["interval"])
            text = f"{arm} by {points(abs(one['mean']))} (95 % interval {low:.1f} to {high:.1f}{_bytes_up(differences[arm])})"
            (above if one["mean"] > 0 else below).append(text)
        elif one["p"] is None and len(one["values"]) > 1:
            same.append(f"{arm} ({100 * one['mean']:+.1f} points)")
        else:
            level.append(arm)
    start = f"{study.baseline} has {what} {share(base['mean'])} over {len(base['values'])} seed{'s' * (len(base['values']) != 1)}."
    said = [start]
    if above:
        said.append(f"Better: {'; '.join(above)}.")
    if below:
        said.append(f"Worse: {'; '.join(below)}.")
    if same:
        said.append(f"As far from it in every seed, of which no test can be made: {', '.join(same)}.")
    if level and tests:
        said.append(
            f"Not told apart from it at 5 %, corrected for {tests} comparison{'s' * (tests != 1)}: {', '.join(level)}; that is no proof of being equal."
        )
    elif level:
        said.append("One seed tells no difference from chance.")
    return " ".join(said)


def _bytes_up(differences: Mapping[str, Any]) -> str:
    """What an arm sends beside the reference, in a sentence."""
    if (factor := differences.get("bytes_up")) is None:
        return ""
    return ", as many bytes up" if abs(factor["mean"] - 1) < 0.005 else f", {times(factor['mean'])} the bytes up"
