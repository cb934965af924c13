"""A question to the judge: the prompts of one judgement, which differ in what they show.

    ask = Question(tokenizer, exemplars, candidates, question, principles, evidence)
    ask.ids(exemplars, (0,))          the prompt about candidate 0, up to the start of a reply

What is measured is measured once for each prompt, and of the whole exemplars; those that the prompt
shows may have been cut to fit.
"""

from collections.abc import Sequence

from nanopersrm.judge import verdict
from nanopersrm.judge.prompts import messages
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.style.profile import StyleEvidence, measured_block


class Question:
    """A prompt but for the exemplars, which may have to be cut; what is measured is of all."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None,
        principles: Sequence[str],
        evidence: bool,
    ):
        self.tokenizer, self.candidates = tokenizer, candidates
        self.question, self.principles = question, principles
        self.exemplars, self.evidence = exemplars, evidence
        self.near: list[StyleEvidence] | None = None  # one a candidate
        self.measured: dict[tuple[int, ...], str] = {}

    def ids(self, exemplars: Sequence[str], which: tuple[int, ...]) -> list[int]:
        """The prompt about candidates `which`, up to the start of the reply."""
        texts = [self.candidates[i] for i in which]
        if self.evidence and which not in self.measured:
            near = None if self.near is None else [self.near[i] for i in which]
            self.measured[which] = measured_block(self.exemplars, texts, style_evidence=near)
        measured = self.measured.get(which)
        chat = messages(exemplars, texts, self.question, self.principles, measured)
        return self.tokenizer.chat(chat, continuation=verdict.OPEN)

    def probe(self, exemplars: Sequence[str]) -> list[int]:
        """A prompt that has nothing but the exemplars and principles in common with any other."""
        other = messages(exemplars, ["\u2060"], principles=self.principles)
        return self.tokenizer.chat(other, continuation=verdict.OPEN)
