"""The WebUI's prompt syntax: which parts of a prompt count more, and where a chunk ends.

    (word)      counts 1.1 times          (word:1.3)  counts 1.3 times
    [word]      counts 1 / 1.1 times      \\( \\) \\[ \\]  are brackets of the text
    BREAK       ends a chunk of 75 tokens

Weights of brackets inside each other multiply; a bracket that is not closed closes at the end.
Importing this module does not import torch.
"""

from __future__ import annotations

import math
import re

from .errors import InvalidRequest

__all__ = ["Piece", "escaped", "read"]

Piece = tuple[str, float]  # a text and how much it counts

MORE = 1.1
DEEPEST = 32  # brackets inside each other
LARGEST = 100.0  # weight
_TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|(?P<weight>:\s*[+-]?(\d+\.?\d*|\.\d+)\s*\))"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<ends>\bBREAK\b)"
    r"|(?P<text>\w+|.)",
    re.DOTALL,
)


def escaped(text: str) -> str:
    """`text` as a prompt says it, with its brackets as they are."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def read(prompt: str, field: str = "prompt") -> list[list[Piece]]:
    """Split a prompt at each BREAK, and each of these sections into pieces that count alike.

    Returns:
        Sections, at least one; one without a text has no pieces.

    Raises:
        InvalidRequest: brackets are too deep inside each other, or a weight is too large.
    """
    texts: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for k in range(opened[bracket].pop(), len(weights)):
            weights[k] *= factor

    for token in _TOKEN.finditer(prompt):
        text: str | None = token["escaped"] or token[0]
        if token["bracket"] in opened:
            opened[token["bracket"]].append(len(texts))
            if sum(map(len, opened.values())) > DEEPEST:
                hint = f"at most {DEEPEST} brackets inside each other; write (word:1.3) for weights"
                raise InvalidRequest(field, prompt, hint)
            continue
        if token["weight"] and opened["("]:
            close("(", float(token["weight"][1:-1]))
            continue
        if token["bracket"] == ")" and opened["("]:
            close("(", MORE)
            continue
        if token["bracket"] == "]" and opened["["]:
            close("[", 1 / MORE)
            continue
        if token["ends"]:
            text = None
        texts.append(text)
        weights.append(1.0)
    while opened["("]:
        close("(", MORE)
    while opened["["]:
        close("[", 1 / MORE)

    sections: list[list[Piece]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        if not abs(weight) <= LARGEST:
            hint = f"weights lie between {-LARGEST:g} and {LARGEST:g}"
            raise InvalidRequest(field, prompt, hint)
        section = sections[-1]
        if text is None:
            sections.append([])
        elif section and math.isclose(section[-1][1], weight):  # read as one text by the tokenizer
            section[-1] = (section[-1][0] + text, weight)
        else:
            section.append((text, weight))
    if len(sections) > 1 and not any(text.strip() for text, _ in sections[-1]):
        sections.pop()  # after a last BREAK nothing begins
    return sections
