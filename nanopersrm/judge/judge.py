"""The judge: exemplars and candidates in, reasons and scores out.

    judge = Judge.load()                                      # SmolLM2-135M-Instruct, fetched once
    judgement = judge.judge([text_of_the_writer], [draft_one, draft_two])
    judgement.scores, judgement.verdict                       # 1 to 9 each; index of the best

*Pointwise* (the default) shows the model one candidate a prompt, *pairwise* two, in both orders.
The swapped call has the mirrored answer, exactly: equal candidates are judged once and all others
in sorted order. All prompts begin with the exemplars, whose keys and values are kept for later
calls (`PrefixCache`).

The candidates are measured before the model sees them (`style/ledger.py`). In its reply the model
chooses which measurements to write down, and gives the score (`reply.py`). An adapter works beside
the weights and is never merged into them. Beside it lie the evidence, what each measurement is
worth, and the reading, an adapter of the same base.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings, judgement
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.judge.judgement import JudgeConfig, JudgedCandidate, JudgedReply, Judgement
from nanopersrm.judge.prompts import LONGEST_TOKEN, PROBE, fit_exemplars, prompt_ids
from nanopersrm.judge.reply import Prompt, Reply, draw, make_prompt, reply_room
from nanopersrm.judge.tell import sentence
from nanopersrm.judge.verdict import LABELS
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.lora import load_lora
from nanopersrm.model.sampler import PrefixCache, common_prefix
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import device_of, dtype_of
from nanopersrm.style import evidence as evidence_file
from nanopersrm.style.evidence import Evidence
from nanopersrm.style.ledger import Ledger, Measurer
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
        evidence: Evidence | None = None,
    ):
        """evidence: None: that of the adapter that comes with this package."""
        self.model, self.tokenizer, self.trained = model, tokenizer, trained
        self.measurer = Measurer(evidence or Evidence.load(adapter_settings.SHIPPED), reading)
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
        reading, evidence, notes = None, None, [note] if note else []
        if folder is not None:
            load_lora(folder, model).freeze().on(model)
            if (folder / "reading").is_dir():
                reading = Reading.load(folder / "reading", model, tokenizer)
            if (folder / evidence_file.FILE).is_file():
                evidence = Evidence.load(folder)
            else:
                notes.append(f"{folder} has no {evidence_file.FILE}: that of the package is used")
        trained = folder is not None
        return Judge(model.pack(), tokenizer, trained, reading, settings, notes, evidence)

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
        menu = self.measurer.menu(exemplars)
        ledgers = self.measurer.ledgers(exemplars, unique, topics=config.topics)

        def prompts_with(excerpts: Sequence[str]) -> list[Prompt]:
            return [
                make_prompt(
                    self.tokenizer,
                    excerpts,
                    [unique[i] for i in order],
                    [ledgers[i] for i in order],
                    menu,
                    question,
                    principles,
                    config.free,
                )
                for order in orders
            ]

        bare = prompts_with([""] * len(exemplars))
        room = self.model.config.context - reply_room(bare, config) - len(exemplars)
        room -= max(len(prompt.ids) for prompt in bare)  # joining can cost tokens
        excerpts, cuts = fit_exemplars(exemplars, room, self._count)
        prompts = prompts_with(excerpts)
        probe = prompt_ids(self.tokenizer, excerpts, [PROBE], None, principles, menu, config.free)
        shared = common_prefix([*(prompt.ids for prompt in prompts), probe])
        prefix = self._prefixes.prefix_of(prompts[0].ids[:shared])

        def reasoning_of(order: Sequence[int], reply: Sequence[str] | str, ended: bool) -> str:
            """The reasoning about the candidates of a prompt: lines told, or prose as it is."""
            if isinstance(reply, str):
                return reply
            shown = [ledgers[i].shown(reply)[: len(reply) + ended * bool(reply)] for i in order]
            names = ["It"] if len(order) == 1 else LABELS
            return " ".join(
                sentence(line, whom)
                for lines in zip(*shown, strict=True)
                for whom, line in zip(names, lines, strict=False)
            )

        def follow(row: int, reply: list[str] | str, ended: bool) -> None:
            prompt, sample = divmod(row, config.samples)
            if on_text is not None and sample == 0:
                order = orders[prompt]
                on_text(
                    tuple(index.index(i) for i in order), reasoning_of(order, reply, ended), ended
                )

        drawn: list[list[Reply]] = []
        rows = max(1, ROWS_AT_ONCE // config.samples)
        for at in range(0, len(prompts), rows):
            base = at * config.samples
            drawn += draw(
                self.model,
                self.tokenizer,
                prompts[at : at + rows],
                config,
                prefix,
                None
                if on_text is None
                else lambda row, *rest, base=base: follow(base + row, *rest),
            )

        replies = [
            JudgedReply(
                tuple(index.index(i) for i in order),
                tuple(reply.features),
                reasoning_of(order, reply.prose if config.free else reply.features, True),
                reply.cut,
            )
            for order, samples in zip(orders, drawn, strict=True)
            for reply in samples
        ]
        about = {
            i: samples[0]
            for order, samples in reversed(list(zip(orders, drawn, strict=True)))
            for i in order
        }  # the first reply about each
        scores, table = judgement.preferences(len(unique), orders, drawn)
        held = len(prefix.ids) if prefix else 0  # of every prompt, and counted once
        return judgement.conclude(
            index,
            scores,
            table,
            replies,
            candidates=[
                self._judged(ledgers[i], about[i], len(text) - len(text.lstrip()))
                for i, text in zip(index, candidates, strict=True)
            ],
            tokens=sum(len(reply.choices) for samples in drawn for reply in samples),
            prompt_tokens=held + sum(len(prompt.ids) - held for prompt in prompts),
            seconds=time.perf_counter() - start,
            notes=[*notes, *cuts],
        )

    def _judged(self, ledger: Ledger, reply: Reply, blanks: int) -> JudgedCandidate:
        """What is known of a candidate before which so many blanks stand."""
        total, moved = ledger.total(), ledger.moved(blanks)
        shown = moved.shown(reply.features) if reply.features else []
        percent = round(self.measurer.evidence.probability(total), 1)
        return JudgedCandidate(shown, total, percent, moved.reading)

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
            notes += self.settings.differences(config.mode, config.free)
        for i, first in enumerate(map(stripped.index, stripped)):
            if first < i:
                notes.append(f"candidates {first + 1} and {i + 1} are identical: a tie")
        return notes

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))
