"""Scores of written texts against references: exact match, BLEU and ROUGE-L."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from fedrank.config import ConfigError

NEEDED = ("sacrebleu", "rouge_score")


def check() -> None:
    """ConfigError where the libraries are not here."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"generation.when: scoring texts needs {' and '.join(missing)}: pip install 'fedrank[generate]'; or never"
        )


def scores(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Each text against all of its references.

    exact_match: the share that is one of them. bleu: sacrebleu's corpus BLEU over 13a tokens (Post, 2018), from 0 to 100,
    of tens of texts or more. rouge_l: the F-measure of ROUGE-L over letters and digits (Lin, 2004), from 0 to 1, the best
    reference's, mean over the texts.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(map(len, references))
    streams: list[Any] = [[own[at] if at < len(own) else None for own in references] for at in range(most)]
    rouge = RougeScorer(["rougeL"])
    best = [rouge.score_multi(own, text)["rougeL"].fmeasure for text, own in zip(written, references, strict=True)]
    exact = [text in [one.strip() for one in own] for text, own in zip(written, references, strict=True)]
    return {
        "exact_match": sum(exact) / len(exact),
        "bleu": min(100.0, float(sacrebleu.corpus_bleu(list(written), streams).score)),  # rounding goes above
        "rouge_l": sum(best) / len(best),
    }
