"""Lowers short indices and raises halves: in fences of the kind "equation", and in prose after a single letter (e_j)."""

import re
from typing import Any

FENCE = re.compile(r'<div class="equation">.*?</div>', re.S)
APART = re.compile(r"(<(?:code|pre)\b.*?</(?:code|pre)>|<[^>]+>)", re.S)  # what prose is not
LETTER = re.compile(r"(?<!\w)([A-Za-z])_([a-z0-9]{1,2})(?!\w)")


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with each page. Names of the code, such as min_depth, stay as they are."""
    html = FENCE.sub(lambda found: _equation(found[0]), html)
    return "".join(
        part if at % 2 else LETTER.sub(r"\1<sub>\2</sub>", part) for at, part in enumerate(APART.split(html))
    )


def _equation(text: str) -> str:
    text = re.sub(r"_([a-z0-9]{1,2}|F)(?![a-z0-9_])", r"<sub>\1</sub>", text)
    text = re.sub(r"_\{([^{}]*)\}", r"<sub>\1</sub>", text)
    return text.replace("^½", "<sup>½</sup>")
