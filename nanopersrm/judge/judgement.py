"""From digit probabilities to a judgement: scores, preferences, ranking, verdict.

The model gives p(1) … p(9) for one candidate (pointwise) or p(a, b) for two (pairwise).

    pointwise   score = expected digit, over all samples
                P(i beats j) = from the two digit distributions
    pairwise    score = mean over the pairs that it is in
                P(i beats j) = mean of both orders; more than two candidates: by their strengths

P(j beats i) is always 1 - P(i beats j). A tie is a tie only when both are preferred exactly alike.
Where a probability is not finite, the verdict is "invalid" and the score None.

Strengths (Bradley and Terry, Biometrika, 1952): P(i beats j) = s[i] / (s[i] + s[j]), found by
repeating (Hunter, Annals of Statistics, 2004)

    s[i] <- wins[i] / Σ_j 1 / (s[i] + s[j])        wins[i] = Σ_j P(i beats j)

over the pairs that were compared. P = 0.75 gives the ratio 3 : 1. A half-weight draw against a
reference of strength 1 keeps a candidate that always wins from running to infinity. Up to 8
candidates every pair is compared; above, candidate i meets i ± 1, 2, 4, 8, … on a circle.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nanopersrm import InputError
from nanopersrm.judge.verdict import LABELS, beats, beats_jointly, mean, soft_score
from nanopersrm.style.evidence import FEATURES
from nanopersrm.style.ledger import CandidateReading, Line

if TYPE_CHECKING:
    from nanopersrm.judge.reply import Reply

Scores = list[float | None]
Table = list[list[float]]
Answers = Sequence[Sequence["Reply"]]  # the samples about each prompt
Orders = Sequence[tuple[int, ...]]  # the candidates of each prompt, in its order

ALL_PAIRS_UP_TO = 8
PRIOR = 0.5  # weight of the draw against the reference
ROUNDS, CLOSE_ENOUGH = 2000, 1e-12


@dataclass(frozen=True)
class JudgeConfig:
    """How to judge. Everything has a default that works."""

    mode: Literal["pointwise", "pairwise"] = "pointwise"  # one candidate a prompt, or two
    think: bool = True  # reason before scoring; without it the texts alone are scored
    think_lines: int = 8  # lines of evidence that the model may choose, at most
    all_evidence: bool = False  # every line of evidence is filled in at once, none is chosen
    # who chooses the lines: the model, or a rule to compare it with (reply.py)
    choose: Literal["model", "menu", "salience", "random", "largest"] = "model"
    free: bool = False  # reason in free prose instead, for bases that can
    think_tokens: int = 160  # budget of free prose, in tokens
    samples: int = 1  # replies for each prompt; their scores are averaged
    temperature: float | None = None  # of the reasoning; default: 0 for one sample, 1 for several
    seed: int = 0  # same seed, same judgement
    topics: bool = True  # mark words that only say the subject: a forward for each exemplar

    @property
    def drawing_temperature(self) -> float:
        """The temperature that replies are drawn with."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.samples == 1 else 1.0

    @property
    def by_rule(self) -> bool:
        """Lines are taken by a rule, not by the model."""
        return self.all_evidence or self.choose != "model"

    @property
    def rule(self) -> Literal["all", "menu", "salience", "random", "largest"]:
        """The rule, where they are."""
        return "all" if self.all_evidence or self.choose == "model" else self.choose

    @property
    def most_lines(self) -> int:
        """Lines of evidence in a reply, at most."""
        if not self.think or self.free:
            return 0
        return len(FEATURES) if self.all_evidence else self.think_lines

    def __post_init__(self) -> None:
        rules = ("model", "menu", "salience", "random", "largest")
        for name, holds, expected in (
            ("mode", self.mode in ("pointwise", "pairwise"), "pointwise or pairwise"),
            ("think_lines", self.think_lines >= 1, "at least 1"),
            ("think_tokens", self.think_tokens >= 1, "at least 1"),
            ("choose", self.choose in rules, f"one of {', '.join(rules)}"),
            (
                "free",
                not (self.free and (self.by_rule or not self.think)),
                "False without think, or with all_evidence or choose",
            ),
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", 0 <= self.drawing_temperature <= 100, "0 to 100"),
        ):
            if not holds:
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class JudgedReply:
    """A reply of the model, and which candidates it saw as A (and B)."""

    candidates: tuple[int, ...]  # indices into the call's candidates
    features: tuple[str, ...]  # of its lines, in order
    reasoning: str  # the lines told in sentences, or its prose
    cut: bool  # the budget ended the prose


@dataclass(frozen=True)
class JudgedCandidate:
    """What is known of a candidate."""

    ledger: list[Line]  # in the order drawn, the sum last; of the first reply about it
    decibans: float  # of all evidence, chosen or not
    measured: float  # probability by all evidence that it is by the writer, 1 to 99 percent
    reading: CandidateReading | None  # None: nothing reads


@dataclass
class Judgement:
    """What `Judge.judge` gives. Lists follow the order of the candidates in the call."""

    scores: Scores  # expected digit, 1 to 9; None where it is no number
    preference: Table  # preference[i][j] = P(i fits better than j), ½ on the diagonal
    ranking: list[int]  # indices, best first
    verdict: int | Literal["tie", "invalid"]  # index of the best
    reasoning: list[str]  # a text for each candidate (pointwise) or ordered pair (pairwise)
    candidates: list[JudgedCandidate]
    tokens: int  # drawn
    prompt_tokens: int  # of all prompts, the shared beginning counted once
    seconds: float
    replies: list[JudgedReply]
    notes: list[str] = field(default_factory=list)  # warnings for the caller

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain lists, numbers and strings; a preference that is not finite is None."""
        table = [[p if math.isfinite(p) else None for p in row] for row in self.preference]
        plain = asdict(self)
        for candidate, score in zip(plain["candidates"], self.scores, strict=True):
            candidate["score"] = score
        return plain | {"preference": table}


# As `Judge.judge` calls it: (candidates, reasoning so far, ended).
OnText = Callable[[tuple[int, ...], str, bool], None]


class Judges(Protocol):
    """What others use of a judge; `judge.Judge` is one."""

    def judge(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None = None,
        principles: Sequence[str] = (),
        config: JudgeConfig | None = None,
        on_text: OnText | None = None,
    ) -> Judgement: ...


def check(
    exemplars: Sequence[str],
    candidates: Sequence[str],
    config: JudgeConfig,
    question: str | None = None,
    principles: Sequence[str] = (),
) -> None:
    """Refuse what cannot be judged before anything is loaded or computed."""
    if question is not None and not isinstance(question, str):
        raise InputError(f"question: expected a text, got {type(question).__name__}")
    lists = {"exemplars": exemplars, "candidates": candidates, "principles": principles}
    for name, texts in lists.items():
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
            raise InputError(f"{name}: expected a list of texts, got {type(texts).__name__}")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name[:-1]} {i + 1}: expected a text, got {text!r}")
    if not exemplars:
        raise InputError("expected at least one exemplar, got none")
    least, n = 2 if config.mode == "pairwise" else 1, len(candidates)
    if not least <= n <= len(LABELS):
        raise InputError(f"expected {least} to {len(LABELS)} candidates ({config.mode}), got {n}")


def orders_of(n: int, mode: str) -> list[tuple[int, ...]]:
    """Which of n different candidates each prompt shows: one each, or pairs in both orders."""
    if mode == "pointwise" or n == 1:
        return [(i,) for i in range(n)]
    return [order for i, j in schedule(n) for order in ((i, j), (j, i))]


def preferences(n: int, orders: Orders, answers: Answers) -> tuple[Scores, Table]:
    """Scores of n candidates, and P(i beats j)."""
    return (pointwise if len(orders[0]) == 1 else pairwise)(n, orders, answers)


def conclude(
    index: Sequence[int], scores: Scores, table: Table, replies: list[JudgedReply], **rest: Any
) -> Judgement:
    """A judgement of the candidates of a call; index: which of the different texts each one is.

    scores and table are of the different texts, replies of candidates, rest: other fields.
    """
    scores = [scores[i] for i in index]
    table = [[table[i][j] for j in index] for i in index]
    replies.sort(key=lambda reply: reply.candidates)  # stable: samples keep their order
    reasoning = {reply.candidates: reply.reasoning for reply in reversed(replies)}
    shown = sorted(reasoning)  # the first sample of each prompt
    paired = len(shown[0]) == 2
    ranking = ranked(table, None if paired else scores)
    return Judgement(
        scores,
        table,
        ranking,
        verdict_of(scores, table, ranking),
        [reasoning[i] for i in (shown if paired else [(index.index(i),) for i in index])],
        replies=replies,
        **rest,
    )


def pointwise(n: int, orders: Orders, answers: Answers) -> tuple[Scores, Table]:
    """answers[i] are the samples about candidate i -> n scores and the table of preferences."""
    digits = [mean([sample.digits for sample in group]) for group in answers]
    table = _table(n, {(i, j): beats(digits[i], digits[j]) for i, j in combinations(range(n), 2)})
    return [_finite(soft_score(p)) for p in digits], table


def pairwise(n: int, orders: Orders, answers: Answers) -> tuple[Scores, Table]:
    """answers[k] are the samples about the ordered pair orders[k]; pairs stand in both orders."""
    wins: dict[tuple[int, int], list[float]] = {}
    digits: list[list[float]] = [[] for _ in range(n)]
    for (a, b), group in zip(orders, answers, strict=True):
        for sample in group:
            assert sample.joint is not None, "a pair without joint digits"
            p = beats_jointly(sample.joint)
            wins.setdefault((min(a, b), max(a, b)), []).append(p if a < b else 1 - p)
            digits[a].append(soft_score([math.fsum(row) for row in sample.joint]))
            digits[b].append(soft_score(mean(sample.joint, 1)))
    pairs = {pair: math.fsum(ps) / len(ps) for pair, ps in wins.items()}
    if n > 2:
        strengths = bradley_terry(n, pairs)
        every = combinations(range(n), 2)
        pairs = {(i, j): strength_preference(strengths[i], strengths[j]) for i, j in every}
    scores = [_finite(math.fsum(values) / len(values)) for values in digits]
    return scores, _table(n, pairs)


def ranked(table: Table, scores: Scores | None = None) -> list[int]:
    """Indices, best first: by score, then by preference; exact ties keep their order.

    The better score may have a preference below ½: 4 for sure is above 0.4 · 1 + 0.6 · 5 = 3.4, and
    is beaten by it in 60 % of cases.
    """
    wins = [math.fsum(row) for row in table]
    worth = [0.0 if score is None else score for score in scores or [None] * len(table)]
    return sorted(range(len(table)), key=lambda i: (-worth[i], -wins[i], i))


def verdict_of(scores: Scores, table: Table, order: list[int]) -> int | Literal["tie", "invalid"]:
    """The index of the best, or "tie" of the best two, or "invalid" if any score is."""
    if any(score is None for score in scores) or not all(map(math.isfinite, chain(*table))):
        return "invalid"
    if len(order) > 1 and table[order[0]][order[1]] == 0.5:
        return "tie"
    return order[0]


def _table(n: int, pairs: dict[tuple[int, int], float]) -> Table:
    """pairs[i, j] = P(i beats j) for i < j -> all of them, ½ on the diagonal."""
    table = [[0.5] * n for _ in range(n)]
    for (i, j), p in pairs.items():
        table[i][j], table[j][i] = p, 1 - p
    return table


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def schedule(n: int) -> list[tuple[int, int]]:
    """The pairs (i < j) to compare among n candidates, in a fixed order."""
    if n <= ALL_PAIRS_UP_TO:
        return [*combinations(range(n), 2)]
    steps = [1 << k for k in range(n.bit_length()) if 1 << k <= n // 2]
    pairs = {(min(i, j), max(i, j)) for i in range(n) for j in ((i + step) % n for step in steps)}
    return sorted(pairs)


def bradley_terry(n: int, preferences: dict[tuple[int, int], float]) -> list[float]:
    """preferences[i, j] = P(i beats j), each pair once -> log strengths, around 0."""
    wins = [PRIOR / 2] * n
    rivals: list[list[int]] = [[] for _ in range(n)]
    for (i, j), p in preferences.items():
        wins[i] += p
        wins[j] += 1 - p
        rivals[i].append(j)
        rivals[j].append(i)
    strengths = [1.0] * n
    for _ in range(ROUNDS):
        new = []
        for i, s in enumerate(strengths):
            total = math.fsum(1 / (s + strengths[j]) for j in rivals[i])
            new.append(wins[i] / (total + PRIOR / (s + 1)))
        moved = max(abs(math.log(a / b)) for a, b in zip(new, strengths, strict=True))
        strengths = new
        if moved < CLOSE_ENOUGH:
            break
    return [math.log(s) for s in strengths]


def strength_preference(first: float, second: float) -> float:
    """P(the first beats the second) from log strengths."""
    return 1 / (1 + math.exp(second - first))
