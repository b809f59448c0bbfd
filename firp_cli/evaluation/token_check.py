"""Check of every emitted token against the teacher, in any dtype, greedy or sampled, after decoding.

Each answer is fed to the teacher once, after its prompt. The forward is the library's own (`teacher.model`): lean
layers, trees, K/V caches and engines have no part in it, so that a fault of theirs cannot hide itself. Every teacher
has one: `check_against_model` compares the layers with it.

Greedy: a token's gap is the distance of its logit below the largest one. Sampled: a token's `tail` is the probability
of drawing a token at most as probable as the emitted one. Exact sampling gives P(tail <= x) <= x, and tail 0 is a token
that top-p removes. A token after an end token or after the limit, and an end before both, count as a token with an
infinite gap, or with tail 0.

Rounding: a decoder whose sums run in another order has slightly other logits. The change of the teacher's logits when
the input of every layer changes by a unit in the last place is measured (`measured_noise`). It depends on the teacher
far more than the dtype tells: a trained teacher's is a tenth of a random one's, relative to its logits. Gaps up to
a multiple of it are no faults.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firp_cli.decoding.sampling import top_p_thresholds
from firp_cli.evaluation.library_forward import chunks, library_logits, measured_noise, normed_states
from firp_cli.records import AnswerRecord, TokenPlace, Verified
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher

CALIBRATED = 4  # answers that measure the noise
# Gaps that rounding explains, in root mean squares of the noise. The largest one among 13,000 tokens of seven random
# teachers in bfloat16 was 6. In float32 the sums round as much as the states, which the noise alone changes.
FACTORS = {torch.float32: 120.0}
FACTOR = 8.0
ALPHA = 5e-4  # chance that the tokens of exact sampling, of all methods together, have one below the tolerance
PAIRS = 8  # prompts below which there is no two-sample test
FLIPS = 19_999
# Deviations stay near normal where few tokens, or nearly certain ones, have little variance: this is added to it.
LEAST_VARIANCE = 16.0
# Rounding shifts the mean surprisal by its variance, times the square of the noise over the temperature, times 0.1 to
# 0.2, and up to 14 times the share that top-p removes (random logits). Half of that counts as a standard deviation.
BIAS, TOP_P_BIAS = 0.1, 7.0

PromptOf = Callable[[AnswerRecord], Sequence[int]]


@dataclass(frozen=True)
class Tolerance:
    """Limits of the check of a run.

    Attributes:
        gap: largest gap of logits that rounding explains.
        tail: smallest plausible tail; None: greedy.
        bias: share of the surprisal's variance by which rounding may shift its sum.
    """

    gap: float
    tail: float | None = None
    bias: float = 0.0


@dataclass
class _Tokens:
    """Figures of an answer's tokens, each (n,). `best`: the teacher's best tokens, (n + 1,); the last one follows the
    answer. `values`: gaps, or tails.
    """

    values: Tensor
    best: Tensor
    log_probs: Tensor | None = None
    excess: Tensor | None = None
    variance: Tensor | None = None


def verify_answers(
    teacher: Teacher,
    records: Sequence[AnswerRecord],
    prompt_of: PromptOf,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: Progress = no_progress,
    max_new_tokens: int | None = None,
) -> Tolerance | None:
    """Check the answers of the records that hold token ids, and set their fields from `gap` to `tail`.

    Equal answers to equal prompts are fed once. Returns the tolerance; None where no record holds token ids.

    Args:
        prompt_of: returns the prompt's token ids of a record's turn.
        max_new_tokens: limit of the answers; None: no answer ends too early or too late.
    """
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[AnswerRecord]] = {}
    for record in records:
        if record.token_ids is not None:
            groups.setdefault((tuple(prompt_of(record)), tuple(record.token_ids)), []).append(record)
    if not groups:
        return None
    sequences = [[*prompt, *_known(teacher, answer)] for prompt, answer in itertools.islice(groups, CALIBRATED)]
    noise = measured_noise(teacher, sequences)
    gap = FACTORS.get(teacher.dtype, FACTOR) * noise
    tolerance = Tolerance(gap)
    if temperature > 0:
        count = sum(len(record.token_ids or ()) for record in records)
        bias = (BIAS + TOP_P_BIAS * (1.0 - top_p)) * (noise / temperature) ** 2
        tolerance = Tolerance(gap, ALPHA / max(1, count), bias)
    for done, ((prompt, answer), alike) in enumerate(groups.items(), start=1):
        tokens = _check(teacher, prompt, _known(teacher, answer), tolerance, temperature, top_p)
        for record in alike:
            _fill(record, tokens, tolerance, _fault(record, teacher, max_new_tokens))
        progress(done, len(groups))
    return tolerance


def _known(teacher: Teacher, answer: Sequence[int]) -> list[int]:
    """Return an answer with the first token of the vocabulary in place of ids that are no tokens."""
    return [token if 0 <= token < teacher.vocab_size else 0 for token in answer]


def _fault(record: AnswerRecord, teacher: Teacher, limit: int | None) -> int | None:
    """Return the first place at which an answer goes on after its end, ends before it, or holds no token; None without
    such a place.
    """
    answer, ends = record.token_ids or [], set(teacher.eos_token_ids)
    for place, token in enumerate(answer):
        ended = place == limit or (place > 0 and answer[place - 1] in ends)
        if ended or not 0 <= token < teacher.vocab_size:
            return place
    whole = limit is None or len(answer) == limit or (bool(answer) and answer[-1] in ends)
    return None if whole or record.finish_reason == "stop" else len(answer)


def _fill(record: AnswerRecord, tokens: _Tokens, tolerance: Tolerance, fault: int | None) -> None:
    """Set the fields of a record's check. `fault`: from there on no token is right."""
    sampled = tolerance.tail is not None
    values = tokens.values.tolist()
    if fault is not None:
        values = [*values[:fault], *[0.0 if sampled else math.inf] * max(1, len(values) - fault)]
    wrong = [place for place, value in enumerate(values) if _is_wrong(value, tolerance)]
    extreme = min(values, default=1.0) if sampled else max(values, default=0.0)
    # the tokens after a wrong one answer another text: only the first is surely wrong
    worst = wrong[0] if wrong else values.index(extreme) if values else None
    record.above, record.worst = len(wrong), worst
    if worst is not None:
        record.best, record.worst_value = int(tokens.best[worst]), values[worst]
    if sampled:
        assert tokens.log_probs is not None and tokens.excess is not None and tokens.variance is not None
        record.tail = extreme
        record.log_prob = tokens.log_probs.double().sum().item()
        record.excess = tokens.excess.double().sum().item()
        record.variance = tokens.variance.double().sum().item()
    else:
        record.gap = extreme


def _is_wrong(value: float, tolerance: Tolerance) -> bool:
    return value > tolerance.gap if tolerance.tail is None else value < tolerance.tail


@torch.inference_mode()
def _check(
    teacher: Teacher,
    prompt: Sequence[int],
    answer: Sequence[int],
    tolerance: Tolerance,
    temperature: float,
    top_p: float,
) -> _Tokens:
    """Feed a prompt and its answer, and return the figures of the answer's tokens."""
    states = normed_states(teacher, [*prompt, *answer])[len(prompt) - 1 :]
    emitted = torch.tensor([*answer, 0], device=states.device)
    parts = [
        _figures(library_logits(teacher, rows), tokens, tolerance, temperature, top_p)
        for rows, tokens in zip(chunks(teacher, states), chunks(teacher, emitted), strict=True)
    ]
    count = len(answer)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).cpu()

    made = _Tokens(joined("values")[:count], joined("best"))
    if tolerance.tail is not None:
        made.log_probs, made.excess, made.variance = (
            joined(name)[:count] for name in ("log_probs", "excess", "variance")
        )
    return made


def _figures(logits: Tensor, emitted: Tensor, tolerance: Tolerance, temperature: float, top_p: float) -> _Tokens:
    """Return the figures of emitted tokens (R,) under float32 logits (R, V)."""
    largest, best = logits.max(-1)
    own = logits.gather(-1, emitted[:, None])
    if tolerance.tail is None:
        return _Tokens((largest - own[:, 0]).nan_to_num(nan=torch.inf, posinf=torch.inf), best)
    tails, log_probs, excess, variance = sampled_figures(logits, own, tolerance.gap, temperature, top_p)
    return _Tokens(tails.nan_to_num(nan=0.0), best, log_probs, excess.nan_to_num(nan=0.0), variance.nan_to_num(nan=0.0))


def sampled_figures(
    logits: Tensor, own: Tensor, slack: float, temperature: float, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of tokens with logits `own` (R, 1), each (R,): tail, log-probability, surprisal minus entropy, and the
    surprisal's variance, under the distribution of `Sampler` for logits (R, V).

    `slack`: a distance of logits that rounding explains. Tokens up to it above the emitted one count as not more
    probable, and top-p may keep as many more tokens as such a shift of their logits would. A token that top-p removes
    has the log-probability that it would have beside those that are kept.
    """
    log_probabilities = (logits / temperature).log_softmax(-1)
    probabilities = log_probabilities.exp()
    above = logits > own + slack
    tail = probabilities.masked_fill(above, 0.0).sum(-1)
    kept_mass = torch.ones_like(tail)
    if top_p < 1.0:
        kept = probabilities >= top_p_thresholds(probabilities, top_p)
        kept_mass = probabilities.masked_fill(~kept, 0.0).sum(-1)
        odds = probabilities.masked_fill(~above, 0.0).sum(-1) / tail
        removed = odds * math.exp(-slack / temperature) >= top_p / (1.0 - top_p)
        near = kept | (logits >= own - slack)
        tail = probabilities.masked_fill(above | ~near, 0.0).sum(-1) / kept_mass
        tail = tail.clamp(max=1.0).masked_fill(removed, 0.0)
        log_probabilities = log_probabilities - kept_mass.log()[:, None]
        probabilities = probabilities.masked_fill(~kept, 0.0) / kept_mass[:, None]
    finite = log_probabilities.clamp(min=-1e4)  # zero times infinity is NaN
    entropy = -(probabilities * finite).sum(-1)
    variance = (probabilities * (finite + entropy[:, None]).square()).sum(-1)
    own_log_prob = (own[:, 0] / temperature - (logits / temperature).logsumexp(-1) - kept_mass.log()).clamp(min=-1e4)
    return tail, own_log_prob, -own_log_prob - entropy, variance


def verified(
    records: Sequence[AnswerRecord],
    ar_records: Sequence[AnswerRecord] | None,
    tolerance: Tolerance | None,
    label_of: Callable[[AnswerRecord], str] | None = None,
    text_of: Callable[[int], str] | None = None,
) -> Verified | None:
    """Return the check of a method's answers, in one row of a report; None where none was checked.

    Args:
        records: of the method, checked by `verify_answers`. ar_records: those of `ar` to the same prompts; None: these
            are `ar`'s own, or it was not measured.
        label_of: returns the name of a record's prompt, as its row and data set. text_of: the text of a token.
    """
    checked = [record for record in records if record.above is not None]
    if not checked or tolerance is None:
        return None
    sampled = tolerance.tail is not None
    made = Verified(
        tokens=sum(len(record.token_ids or ()) for record in checked),
        above=sum(record.above or 0 for record in checked),
        tolerance=tolerance.gap if tolerance.tail is None else tolerance.tail,
        worst=_worst(checked, sampled, label_of, text_of),
    )
    if not sampled:
        made.gap = max(record.gap or 0.0 for record in checked)
        return made
    made.tail = min(1.0 if record.tail is None else record.tail for record in checked)
    excess = sum(record.excess or 0.0 for record in checked)
    variance = sum(record.variance or 0.0 for record in checked)
    made.log_prob = sum(record.log_prob or 0.0 for record in checked) / made.tokens if made.tokens else None
    made.deviation = excess / math.sqrt(variance + LEAST_VARIANCE + (tolerance.bias * variance) ** 2)
    if ar_records is not None:
        made.p_value = two_sample_p_value(checked, [record for record in ar_records if record.above is not None])
    return made


def _worst(
    records: Sequence[AnswerRecord],
    sampled: bool,
    label_of: Callable[[AnswerRecord], str] | None,
    text_of: Callable[[int], str] | None,
) -> TokenPlace | None:
    """Return the place of the least plausible token, or the first token beyond the tolerance of its answer."""
    found = [record for record in records if record.worst is not None and record.worst_value is not None]
    if not found:
        return None
    sign = -1.0 if sampled else 1.0
    record = max(found, key=lambda item: (bool(item.above), sign * (item.worst_value or 0.0)))
    answer, place = record.token_ids or [], record.worst or 0
    emitted, best = answer[place] if place < len(answer) else -1, -1 if record.best is None else record.best
    return TokenPlace(
        prompt=record.prompt,
        turn=record.turn,
        position=place,
        emitted=emitted,
        best=best,
        value=record.worst_value,
        label=label_of(record) if label_of else "",
        emitted_text=text_of(emitted) if text_of and emitted >= 0 else "",
        best_text=text_of(best) if text_of and best >= 0 else "",
    )


def two_sample_p_value(records: Sequence[AnswerRecord], ar_records: Sequence[AnswerRecord]) -> float | None:
    """Return the two-sided p-value of the hypothesis that a method's answers are as probable as those of `ar`, by
    flipping the signs of the differences of prompts; None below 8 prompts that both answered.

    A prompt's surprisal is standardised: its excess over its expectation, over its standard deviation.
    """
    own, base = _standardised(records), _standardised(ar_records)
    shared = [key for key in own if key in base]
    if len(shared) < PAIRS:
        return None
    return sign_flip_p_value(np.array([own[key] - base[key] for key in shared]))


def _standardised(records: Sequence[AnswerRecord]) -> dict[tuple[str, int], float]:
    """Return the standardised surprisal by prompt, over its turns and repeats."""
    sums: dict[tuple[str, int], list[float]] = {}
    for record in records:
        total = sums.setdefault((record.dataset, record.prompt), [0.0, 0.0])
        total[0] += record.excess or 0.0
        total[1] += record.variance or 0.0
    return {key: excess / math.sqrt(variance + 1.0) for key, (excess, variance) in sums.items()}


def sign_flip_p_value(differences: NDArray[np.float64]) -> float:
    """Return the share of random signs that give the differences (n,) a sum as far from zero as their own."""
    generator = np.random.default_rng(0)
    observed, beyond = abs(differences.sum()) * (1 - 1e-9), 0
    block = max(1, (1 << 21) // len(differences))
    for start in range(0, FLIPS, block):
        signs = generator.integers(0, 2, size=(min(block, FLIPS - start), len(differences)), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + beyond) / (1 + FLIPS)
