"""The judge: exemplars and candidates in, reasons and scores out.

    judge = Judge.load()                                      # SmolLM2-135M-Instruct, fetched once
    judgement = judge.judge([text_of_the_writer], [draft_one, draft_two])
    judgement.scores, judgement.verdict                       # 1 to 9 each; index of the best

*Pointwise* (the default) shows the model one candidate a prompt, *pairwise* two, in both orders.
The swapped call has the mirrored answer, exactly: equal candidates are judged once and all others
in sorted order. All prompts begin with the exemplars, whose keys and values are kept for later
calls (`PrefixCache`).

What the reasoning puts in double quotes is copied from the texts (`verbatim.py`). What it claims is
measured again, and what is not so is listed beside it (`claims.py`). An adapter works beside the
weights and is never merged into them. The reading in the same folder (`style/reading.py`) adds its
evidence to the measured block.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings, judgement
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.judge.judgement import CandidateReading, JudgeConfig, Judgement
from nanopersrm.judge.prompts import LONGEST_TOKEN, PROBE, fit_exemplars, prompt_ids
from nanopersrm.judge.reply import FORCED_ROOM, Answer, answer
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import load_lora
from nanopersrm.model.sampler import PrefixCache, common_prefix
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.style.phrases import phrases
from nanopersrm.style.profile import measured_block
from nanopersrm.style.reading import Reading

ROWS_AT_ONCE = 32  # replies in one batch: bounds memory, and more is hardly faster
UNTRAINED = "this base has not been trained to judge: its scores do not tell who wrote what"


class Judge:
    """A loaded model that judges. Not for several threads at once: they hold `lock` meanwhile.

    While the adapter is being trained, make a new Judge for each evaluation: the keys and values it
    keeps would be out of date.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        trained: bool = False,
        reading: Reading | None = None,
        settings: AdapterSettings | None = None,
        notes: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.trained, self.reading = model, tokenizer, trained, reading
        self.settings = settings  # what the adapter's judge.json says
        self.notes = [*notes] if trained else [UNTRAINED, *notes]  # of every judgement
        self.lock = threading.Lock()
        self._prefixes = PrefixCache(model)

    @staticmethod
    def load(
        base: str | Path = DEFAULT_BASE,
        adapter: str | Path | None = adapter_settings.DEFAULT,
        device: str = "auto",
        dtype: str = "auto",
        say: Callable[[str], None] | None = None,
    ) -> "Judge":
        """Fetch what is missing, load and check it. `say` gets a line before anything slow.

        adapter: a folder; None: the base alone; default: the shipped one, for the default base.
        """
        folder = adapter_settings.resolve_adapter(adapter, base)
        settings = None if folder is None else adapter_settings.read(folder)
        place, source = device_of(device), resolve(str(base), say or (lambda line: None))
        note = settings.same_base(folder, source) if folder and settings else None
        nf4 = settings is not None and settings.nf4
        if settings is not None and nf4 and dtype == "auto":
            dtype = settings.dtype  # the codes are those of weights rounded to it
        tokenizer = Tokenizer.load(source)
        model = weights.load(source, dtype_of(dtype, place), place, nf4=nf4)
        if tokenizer.vocab_size > model.config.V:
            sizes = f"{model.config.V} ids, as the model knows, got {tokenizer.vocab_size}"
            raise InputError(f"{source.path}: expected a tokenizer of at most {sizes}")
        reading, notes = None, [note] if note else []
        if folder is not None:
            load_lora(folder, model).freeze().on(model)
            if (folder / "reading").is_dir() or (settings is not None and settings.reading):
                reading = Reading.load(folder / "reading", model, tokenizer)
        return Judge(model.pack(), tokenizer, folder is not None, reading, settings, notes)

    def judge(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None = None,
        principles: Sequence[str] = (),
        config: JudgeConfig | None = None,
        on_text: judgement.OnText | None = None,
    ) -> Judgement:
        """How well does each candidate (1 to 26 texts) fit the writer of the exemplars?

        `on_text(candidates, reasoning so far, ended)` follows the first sample of each prompt as it
        is drawn; `candidates` are the indices that the prompt shows, in its order.
        Raises InputError for what cannot be judged.
        """
        start, config = time.perf_counter(), config or JudgeConfig()
        judgement.check(exemplars, candidates, config, question, principles)
        notes = self._notes(candidates, question, config)
        exemplars = [text.strip() for text in exemplars]
        unique = sorted({candidate.strip() for candidate in candidates})
        index = [unique.index(candidate.strip()) for candidate in candidates]
        orders = judgement.orders_of(len(unique), config.mode)  # the candidates of each prompt
        shown = [[unique[i] for i in order] for order in orders]

        chances, readings = list[float](), list[CandidateReading]()  # of each of `unique`
        blocks: list[str | None] = [None] * len(orders)
        if config.evidence and self.reading is not None:
            chances, readings = self._read(self.reading, exemplars, unique)
        if config.evidence:
            blocks = [
                measured_block(exemplars, texts, [chances[i] for i in order if chances])
                for order, texts in zip(orders, shown, strict=True)
            ]

        def prompts_with(excerpts: Sequence[str]) -> list[list[int]]:
            return [
                prompt_ids(self.tokenizer, excerpts, texts, question, principles, block)
                for texts, block in zip(shown, blocks, strict=True)
            ]

        bare = max(map(len, prompts_with([""] * len(exemplars))))
        reply = FORCED_ROOM + config.think_tokens * config.think
        room = self.model.config.context - reply - bare - len(exemplars)  # joining can cost tokens
        excerpts, cuts = fit_exemplars(exemplars, room, self._count)
        prompts = prompts_with(excerpts)
        probe = prompt_ids(self.tokenizer, excerpts, [PROBE], principles=principles)
        prefix = self._prefixes.prefix_of(prompts[0][: common_prefix([*prompts, probe])])

        def follow(prompt: int, sample: int, text: str, ended: bool) -> None:
            if on_text is not None and sample == 0:
                on_text(tuple(index.index(i) for i in orders[prompt]), text, ended)

        texts = [[*excerpts, *texts] for texts in shown] if config.copy_quotes else None
        answers: list[list[Answer]] = []
        rows = max(1, ROWS_AT_ONCE // config.samples)
        for first in range(0, len(prompts), rows):
            part = slice(first, first + rows)
            answers += answer(
                self.model,
                self.tokenizer,
                prompts[part],
                len(orders[0]),
                config,
                prefix,
                None if on_text is None else lambda p, *rest, at=first: follow(at + p, *rest),
                None if texts is None else texts[part],
            )

        replies = [
            judgement.read_reply(
                tuple(index.index(i) for i in order), sample.text, sample.cut, exemplars, texts
            )
            for order, texts, samples in zip(orders, shown, answers, strict=True)
            for sample in samples
        ]
        sharpness, settings = None, self.settings
        if settings is not None and config.mode == "pointwise":
            sharpness = settings.sharpness_reasoned if config.think else settings.sharpness
        scores, table = judgement.preferences(len(unique), orders, answers, sharpness)
        shared = len(prefix.ids) if prefix else 0  # of every prompt, and counted once
        return judgement.conclude(
            index,
            scores,
            table,
            replies,
            tokens=sum(sample.tokens for samples in answers for sample in samples),
            prompt_tokens=shared + sum(len(prompt) - shared for prompt in prompts),
            seconds=time.perf_counter() - start,
            notes=[*notes, *cuts],
            measured=[chances[i] for i in index if chances] or None,
            readings=[
                readings[i].moved(len(candidate) - len(candidate.lstrip()))
                for i, candidate in zip(index, candidates, strict=True)
                if readings
            ]
            or None,
        )

    def _read(
        self, reading: Reading, exemplars: Sequence[str], texts: Sequence[str]
    ) -> tuple[list[float], list[CandidateReading]]:
        """Of each text the probability that prompts show, in percent, and what people see; nothing
        where they show none, or a number is not finite."""
        read = reading.read(exemplars, texts)
        scores = [one.score for one in read]
        chances = list[float]()
        if self.shows_style() and reading.evidence is not None:
            chances = reading.evidence.probabilities(exemplars, texts, scores)
        if not all(map(math.isfinite, scores)):
            return chances, []
        words = reading.words(exemplars, texts, read)
        return chances, [
            CandidateReading(round(one.forward, 4), round(one.back, 4), some, phrases(some, text))
            for one, some, text in zip(read, words, texts, strict=True)
        ]

    def shows_style(self) -> bool:
        """Whether prompts have what reading says: unless the adapter was trained without."""
        wanted = self.settings is None or self.settings.reading
        return wanted and self.reading is not None and self.reading.evidence is not None

    def _notes(
        self, candidates: Sequence[str], question: str | None, config: JudgeConfig
    ) -> list[str]:
        """Warnings for the caller; a text longer than the context is refused by its name."""
        context, stripped = self.model.config.context, [text.strip() for text in candidates]
        texts = {f"candidate {i + 1}": text for i, text in enumerate(candidates)}
        for name, text in (texts | {"the question": question or ""}).items():
            if self._count(text[: context * LONGEST_TOKEN]) > context:
                expected = f"expected a text that fits a context of {context} tokens"
                raise InputError(f"{name}: {expected}, got {len(text)} characters")
        notes = list(self.notes)
        if self.settings is not None:
            notes += self.settings.differences(config.evidence, config.mode)
        for i, first in enumerate(map(stripped.index, stripped)):
            if first < i:
                notes.append(f"candidates {first + 1} and {i + 1} are identical: a tie")
        return notes

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))
