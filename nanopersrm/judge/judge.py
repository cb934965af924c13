"""The judge: exemplars and candidates in, reasons and scores out.

    judge = Judge.load()                                      # SmolLM2-135M-Instruct, fetched once
    judgement = judge.judge([text_of_the_writer], [draft_one, draft_two])
    judgement.scores, judgement.verdict                       # 1 to 9 each; index of the best

Two modes. *Pointwise* (the default) shows the model one candidate a prompt; no order exists, N
candidates cost N replies. *Pairwise* shows two, in both orders, and averages; more than two
candidates meet in pairs and are ranked by Bradley-Terry strengths (`ranking.py`).

The swapped call has the mirrored answer, exactly: equal candidates are judged once and all others
in an order of their own (sorted), so that any order of the same candidates runs the same numbers.
What the exemplars cost is paid once: all prompts begin with them, and their keys and values are
kept for later calls with the same exemplars (`prefixes.py`: those of the last four writers).

The reasoning quotes the texts: what it puts in double quotes is copied from them (`verbatim.py`).

The adapter that comes with the default base, or one of your own (`Judge.load(adapter=folder)`),
works beside the weights and is never merged into them. A style adapter in the same folder adds to
the measured block its percentile and, with all other instruments, a chance (`similarity.py`). What
the reasoning claims is measured again in the texts, and what is not so is said beside it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings, judgement, ranking
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.judge.answer import FORCED_ROOM, Answer, AnswerConfig, OnText, answer
from nanopersrm.judge.judgement import Asked, JudgeConfig, Judgement
from nanopersrm.judge.prefixes import Prefixes
from nanopersrm.judge.prompts import LONGEST_TOKEN, cut, water_level
from nanopersrm.judge.question import Question
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import load_lora
from nanopersrm.model.sampler import Prefix, common_prefix
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.style.profile import StyleEvidence
from nanopersrm.style.similarity import Style, cosines, probabilities, style_evidence_fn

ROWS_AT_ONCE = 32  # replies in one batch: bounds memory, and more is hardly faster
LEAST_EXEMPLAR = 24  # tokens; an exemplar cut shorter says nothing of its writer
UNTRAINED = (
    "this base has not been trained to judge: its scores show that everything runs, "
    "not who wrote what"
)


class Judge:
    """A loaded model that judges. Not for several threads at once: they hold `lock` meanwhile.

    The model judges as it is, with the adapter that is on. While that is being trained, make a new
    Judge for each evaluation: what it keeps of earlier exemplars would be out of date.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        trained: bool = False,
        style: Style | None = None,
        made_for: AdapterSettings | None = None,
        notes: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.trained, self.style = model, tokenizer, trained, style
        self.made_for = made_for  # what the adapter's judge.json says
        self.notes = [*notes] if trained else [UNTRAINED, *notes]  # of every judgement
        self.lock = threading.Lock()
        self._prefixes = Prefixes(model)  # what prompts about the last writers begin with

    @staticmethod
    def load(
        base: str | Path = DEFAULT_BASE,
        adapter: str | Path | None = adapter_settings.DEFAULT,
        device: str = "auto",
        dtype: str = "auto",
        say: Callable[[str], None] | None = None,
    ) -> "Judge":
        """Fetch what is missing, load and check it. `say` gets a line before anything slow.

        adapter: a folder; None: the base alone. By default the one that comes with the default
        base, and none with others.
        """
        folder = adapter_settings.resolve_adapter(adapter, base)
        made_for = None if folder is None else adapter_settings.read(folder)
        place = device_of(device)
        found = resolve(str(base), say)
        note = made_for.same_base(folder, found) if folder and made_for else None
        nf4 = made_for is not None and made_for.nf4
        if made_for is not None and nf4 and dtype == "auto":
            dtype = made_for.dtype  # the codes are those of weights rounded to it
        tokenizer = Tokenizer.load(found)
        model = weights.load(found, dtype_of(dtype, place), place, nf4=nf4)
        if tokenizer.vocab_size > model.config.V:
            raise InputError(
                f"{found.path}: expected a tokenizer of at most {model.config.V} ids, as the model "
                f"knows, found {tokenizer.vocab_size}"
            )
        style = None
        if folder is not None:
            load_lora(folder, model).freeze().on(model)
            if (folder / "style").is_dir():
                style = Style.load(folder / "style", model)
            elif made_for is not None and made_for.style:
                raise InputError(f"{folder}: expected the folder style, as judge.json says")
        notes = [note] if note else []
        return Judge(model.pack(), tokenizer, folder is not None, style, made_for, notes)

    def judge(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None = None,
        principles: Sequence[str] = (),
        config: JudgeConfig | None = None,
        on_text: judgement.OnText | None = None,
        alive: Callable[[], None] | None = None,
    ) -> Judgement:
        """How well does each candidate (1 to 26 texts) fit the writer of the exemplars?

        `on_text(candidates, reasoning so far, ended)` follows the first sample of each prompt as it
        is drawn; `candidates` are the indices that the prompt shows, in its order. `alive` is
        called before each block of the model; what it raises ends the judgement.
        Raises InputError for what cannot be judged.
        """
        self.model.before_block = alive
        try:
            return self._judged(exemplars, candidates, question, principles, config, on_text)
        finally:
            self.model.before_block = None

    def _judged(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None,
        principles: Sequence[str],
        config: JudgeConfig | None,
        on_text: judgement.OnText | None,
    ) -> Judgement:
        """`judge`, but for `alive`."""
        start, config = time.perf_counter(), config or JudgeConfig()
        judgement.check(exemplars, candidates, config, question, principles)
        notes = list(self.notes)
        if self.made_for is not None:
            notes += self.made_for.asked_otherwise(config.evidence, config.mode)
        for i, candidate in enumerate(candidates):
            self._check_length(f"candidate {i + 1}", candidate)
        self._check_length("the question", question or "")
        unique = sorted({candidate.strip() for candidate in candidates})
        place = [unique.index(candidate.strip()) for candidate in candidates]
        for i, spot in enumerate(place):
            if spot in place[:i]:
                notes.append(f"candidates {place.index(spot) + 1} and {i + 1} are identical: a tie")
        pairs = ranking.schedule(len(unique)) if config.mode == "pairwise" else []
        asked: Asked = [(i,) for i in range(len(unique))]
        if pairs:
            asked = [order for i, j in pairs for order in ((i, j), (j, i))]
        exemplars = [text.strip() for text in exemplars]
        ask = Question(
            self.tokenizer, list(exemplars), unique, question, principles, config.evidence
        )
        if config.evidence and self.shows_style():
            ask.near = self.style_evidence(exemplars, unique)
        exemplars = self._fit(ask, exemplars, asked, config, notes)
        prompts = [ask.ids(exemplars, which) for which in asked]
        shared = common_prefix([*prompts, ask.probe(exemplars)])
        prefix = self._prefixes.of(prompts[0][:shared])  # of all prompts about these exemplars

        def follow(prompt: int, number: int, text: str, ended: bool) -> None:
            if on_text is not None and number == 0:
                on_text(tuple(place.index(i) for i in asked[prompt]), text, ended)

        texts = [[*exemplars, *(unique[i] for i in which)] for which in asked]
        answers = self._answer(
            prompts,
            texts if config.copy_quotes else None,
            prefix,
            len(asked[0]),
            config,
            follow if on_text else None,
        )
        preferred = judgement.pairwise if pairs else judgement.pointwise
        scores, table = preferred(len(unique), asked, answers)
        if self.made_for is not None and config.mode == "pointwise":
            table = judgement.sharpened(table, self.made_for.sharpness_when(config.think))
        replies = [
            judgement.read_reply(
                tuple(place.index(i) for i in which),
                drawn.text,
                drawn.cut,
                ask.exemplars,
                [unique[i] for i in which],
            )
            for which, group in zip(asked, answers, strict=True)
            for drawn in group
        ]
        replies.sort(key=lambda reply: reply.candidates)  # stable: samples keep their order
        first = {reply.candidates: reply.reasoning for reply in reversed(replies)}
        reasoning = list(reversed(first.values()))  # of the first sample of each prompt
        if not pairs:
            reasoning = [first[(place.index(i),)] for i in place]  # of each candidate
        chances = probabilities(ask.near or [])
        scores = [scores[i] for i in place]
        table = [[table[i][j] for j in place] for i in place]
        order = judgement.ranked(table, None if pairs else scores)
        return Judgement(
            scores=scores,
            preference=table,
            ranking=order,
            verdict=judgement.verdict_of(scores, table, order),
            reasoning=reasoning,
            well_formed=all(reply.problem is None for reply in replies),
            tokens=sum(drawn.tokens for group in answers for drawn in group),
            prompt_tokens=_distinct(prompts, prefix),
            seconds=time.perf_counter() - start,
            replies=replies,
            notes=notes,
            measured=None if chances is None else [chances[i] for i in place],
        )

    def style_similarities(self, exemplars: Sequence[str], texts: Sequence[str]) -> list[float]:
        """The cosine of each text with the writer of the exemplars, see `style.py`."""
        assert self.style is not None, "this judge has no style adapter"
        return cosines(self.tokenizer, self.style)(exemplars, texts)

    def style_evidence(self, exemplars: Sequence[str], texts: Sequence[str]) -> list[StyleEvidence]:
        """What trained instruments say of each text, see `similarity.py`."""
        assert self.style is not None, "this judge has no style adapter"
        return style_evidence_fn(self.tokenizer, self.style)(exemplars, texts)

    def shows_style(self) -> bool:
        """Trained instruments stand in prompts, unless the adapter was trained without."""
        shown = self.made_for is None or self.made_for.style
        return shown and self.style is not None and bool(self.style.quantiles)

    def _answer(
        self,
        prompts: list[list[int]],
        texts: list[list[str]] | None,
        prefix: Prefix | None,
        labels: int,
        config: JudgeConfig,
        follow: OnText | None,
    ) -> list[list[Answer]]:
        """`answer` in batches of bounded size."""
        batch = max(1, ROWS_AT_ONCE // config.samples)
        answers: list[list[Answer]] = []
        for begin in range(0, len(prompts), batch):

            def shifted(p: int, k: int, text: str, ended: bool, begin: int = begin) -> None:
                if follow is not None:
                    follow(begin + p, k, text, ended)

            answers += answer(
                self.model,
                self.tokenizer,
                prompts[begin : begin + batch],
                labels,
                _answering(config),
                prefix,
                shifted if follow is not None else None,
                None if texts is None else texts[begin : begin + batch],
            )
        return answers

    def _fit(
        self,
        ask: "Question",
        exemplars: list[str],
        asked: Asked,
        config: JudgeConfig,
        notes: list[str],
    ) -> list[str]:
        """The exemplars, cut at sentence ends where a prompt would not fit the context."""
        context = self.model.config.context
        room = context - FORCED_ROOM - config.think_tokens * config.think
        bare = max(len(ask.ids([""] * len(exemplars), which)) for which in asked)
        share = room - bare - len(exemplars)  # joining two texts can cost a token
        lengths = [self._count(text) for text in exemplars]
        if sum(lengths) <= share:
            return exemplars
        if share < LEAST_EXEMPLAR * len(exemplars):
            raise InputError(
                f"expected texts that fit a context of {context} tokens: question, candidates and "
                f"reply need {context - share}, and each exemplar at least {LEAST_EXEMPLAR}"
            )
        limit = water_level(lengths, share)
        for i, length in enumerate(lengths):
            if length > limit:
                exemplars[i] = cut(exemplars[i], limit, self._count)
                notes.append(
                    f"exemplar {i + 1} was cut from {length} to {self._count(exemplars[i])} tokens "
                    f"at the end of a sentence, to fit the context of {context}"
                )
        return exemplars

    def _check_length(self, name: str, text: str) -> None:
        """A text that alone is longer than the context is named before anything is measured."""
        context = self.model.config.context
        tokens = self._count(text[: context * LONGEST_TOKEN])
        if tokens > context:
            raise InputError(
                f"{name}: expected a text that fits a context of {context} tokens, got {len(text)} "
                f"characters, at least {tokens} tokens"
            )

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


def _answering(config: JudgeConfig) -> AnswerConfig:
    temperature = config.temperature
    if temperature is None:
        temperature = 0.0 if config.samples == 1 else 1.0
    return AnswerConfig(config.think, config.think_tokens, config.samples, temperature, config.seed)


def _distinct(prompts: Sequence[list[int]], prefix: Prefix | None) -> int:
    """Prompt tokens, with what all prompts begin with counted once."""
    shared = len(prefix.ids) if prefix else 0
    return shared + sum(len(prompt) - shared for prompt in prompts)
