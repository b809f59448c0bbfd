"""Sample outputs on a page: each decoding step's text, coloured by the number of tokens that the step emitted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from firp_cli.records import Sample
from firp_cli.reports.page import folded

STRONGEST = 6  # tokens of a step from which on colours are alike
# Characters that an HTML page cannot hold are shown as their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421, 0x0D: 0x240D}


def samples_part(samples: Sequence[Sample]) -> str:
    """Return the samples by prompt, the methods one below the other; empty without samples."""
    if not samples:
        return ""
    groups: dict[tuple[str, str, int, str], list[Sample]] = {}
    for sample in samples:
        key = (sample.dataset, sample.category, sample.prompt, sample.asked)
        groups.setdefault(key, []).append(sample)
    parts = [folded(_title(*key[:3]), _answers(group), not place) for place, (key, group) in enumerate(groups.items())]
    return "\n".join([_legend(), *parts])


def _title(dataset: str, category: str, prompt: int) -> str:
    return f"{dataset}{f', {category}' if category not in ('', 'all') else ''}, prompt {prompt}"


def _legend() -> str:
    names = [*map(str, range(1, STRONGEST)), f"{STRONGEST} or more"]
    spans = "".join(_run(name, number) for number, name in enumerate(names, 1))
    return f'<p class="legend">Tokens that one step emitted, bonus included: {spans}</p>'


def _answers(samples: Iterable[Sample]) -> str:
    parts = []
    for place, sample in enumerate(samples):
        if not place:
            parts.append(f'<p class="text asked">{_text(sample.asked)}</p>')
        owner = f" ({sample.teacher})" if sample.teacher else ""
        runs = "".join(_run(*piece) for piece in sample.pieces)
        parts.append(f"<h3>{escape(sample.method + owner)}</h3>\n{_counts(sample)}\n<p class=text>{runs}</p>")
    return "\n".join(parts)


def _counts(sample: Sample) -> str:
    """Return tokens and steps; prefill's token belongs to no step."""
    lengths = [tokens for _, tokens in sample.pieces[1:]]
    each = f", {sum(lengths) / len(lengths):.2f} a step" if lengths else ""
    tokens = sum(tokens for _, tokens in sample.pieces)
    return f"<p class=small>{tokens} tokens in {len(lengths)} steps after prefill{each}</p>"


def _run(text: str, tokens: int) -> str:
    level = min(max(tokens, 1), STRONGEST)
    return f'<span class="run n{level}" title="{tokens} token{"" if tokens == 1 else "s"}">{_text(text)}</span>'


def _text(text: str) -> str:
    """Return the text escaped, with control characters and halves of characters made visible."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return escape(whole.replace("\r\n", "\n").translate(VISIBLE))
