"""What the model is asked, word for word.

One prompt holds the exemplars, the question if there is one, and one candidate (pointwise) or two
(pairwise):

    system    what a judge is
    user      <exemplar> … </exemplar>        one for each text of the writer ┐
              <principle> … </principle>      what the writer says they want  │ the part that all
              <profile> … </profile>          the menu: what can be measured, │ candidates share,
                                              and how the writer has it       │ computed once
              the task and the form of the answer                             │
              <question> … </question>        what the candidates answer      ┘
              <candidate A> … </candidate A>

A line of the menu is a letter, a feature, how the writer has it, and the share of writers who have
less of it: "f semicolons 2.7 (97%)". The shared part comes first, so that the sampler finds the
longest common beginning of the ids and keeps it. Texts are data: no text keeps one of the tags
above. A small model still listens to what a text says ("score this 9"): `hostile.py`.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nanopersrm import InputError
from nanopersrm.judge.verdict import CLOSE, LABELS, OPEN, SCORES, SCORES_END
from nanopersrm.style.ledger import LETTERS

if TYPE_CHECKING:
    from nanopersrm.model.tokenizer import Tokenizer

Message = dict[str, str]

SYSTEM = (
    "You are a judge of personal style. You read texts by one writer, name the habits of that "
    "writer, and say how well a candidate text fits the writer."
)
TASK = (
    "Judge how well {whom} fits the writer. Inside {open} and {close} write lines of evidence: a "
    "letter of the profile, then what is measured, in decibans, + for this writer and - against. "
    "A full stop ends them, and their sum follows. Then score {whom} with a digit from 1 (another "
    "writer) to 9 (surely this writer), like {line}."
)
FREE_TASK = (
    "Compare {whom} with the writer of the exemplars. Inside {open} and {close}, name the habits "
    "of the writer, say how {whom} keeps or breaks them, and quote telling words in "
    '"double quotes". Then score {whom} with a digit from 1 (another writer) to 9 (surely this '
    "writer), like {line}, and write nothing more."
)
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+|\n{2,}")
# A text may not close its own tag or open another: "<" of such a tag becomes a look-alike. Neither
# may what a model could take for one: other angle brackets, more slashes, and characters that do
# not show (Unicode's Default_Ignorable_Code_Point) before the word or inside it.
OPENING = "<\uff1c\ufe64\u2039\u2329\u27e8\u276e\u3008"
UNSEEN = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff"
)
TAGS = ("exemplar", "principle", "question", "candidate", "profile", "think", "scores")
OUR_TAG = re.compile(
    rf"[{OPENING}](?=[\s/\\{UNSEEN}]*(?:"
    + "|".join(rf"[{UNSEEN}]*".join(tag) for tag in TAGS)
    + "))",
    re.I,
)
LOOKALIKE = "\u2039"
PROBE = "\u2060"  # a candidate: its prompt has only exemplars and principles in common with others
LEAST_EXEMPLAR = 24  # tokens; an exemplar cut shorter says nothing of its writer
LONGEST_TOKEN = 16  # characters; a text of more than 16 a token on average is not prose


def messages(
    exemplars: Sequence[str],
    candidates: Sequence[str],
    question: str | None = None,
    principles: Sequence[str] = (),
    menu: Mapping[str, str] | None = None,
    free: bool = False,
) -> list[Message]:
    """The chat that asks for a judgement of 1 to 26 candidates, labelled A, B, C.

    menu: feature -> how the writer has it (`Measurer.menu`). free: reasons in free prose.
    """
    parts = [_tagged("exemplar", text) for text in exemplars]
    parts += [_tagged("principle", text) for text in principles]
    if menu:
        lines = (f"{LETTERS[feature]} {has}" for feature, has in menu.items())
        parts.append(_tagged("profile", "\n".join(lines)))
    labels = LABELS[: len(candidates)]
    parts.append(
        (FREE_TASK if free else TASK).format(
            whom="candidate A" if len(labels) == 1 else "each candidate",
            open=OPEN.strip(),
            close=CLOSE,
            line=SCORES + " ".join(f"{label}=digit" for label in labels) + SCORES_END,
        )
    )
    if question:
        parts.append(_tagged("question", question))
    parts += map(_tagged, (f"candidate {label}" for label in labels), candidates)
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def prompt_ids(
    tokenizer: "Tokenizer",
    exemplars: Sequence[str],
    candidates: Sequence[str],
    question: str | None = None,
    principles: Sequence[str] = (),
    menu: Mapping[str, str] | None = None,
    free: bool = False,
) -> list[int]:
    """The same chat as ids, up to the start of the reply."""
    chat = messages(exemplars, candidates, question, principles, menu, free)
    return tokenizer.chat(chat, continuation=OPEN)


def _tagged(name: str, text: str) -> str:
    return f"<{name}>\n{OUR_TAG.sub(LOOKALIKE, text.strip())}\n</{name}>"


def cut(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The longest beginning of `text` that ends a sentence and has at most `limit` tokens.

    A first sentence that is too long alone is cut after a word, a first word that is too long
    inside it.
    """
    if len(text) <= limit * LONGEST_TOKEN and count(text) <= limit:
        return text
    text = text[: limit * LONGEST_TOKEN]  # no need to count the tokens of a whole library
    for end in (SENTENCE_END, re.compile(r"\s+"), re.compile(r"(?s:.)")):
        ends = [match.end() for match in end.finditer(text)]
        fitting = bisect_right(ends, limit, key=lambda end: count(text[:end].rstrip()))
        if fitting and (excerpt := text[: ends[fitting - 1]].rstrip()):
            return excerpt
    return ""


def fit_exemplars(
    exemplars: Sequence[str], room: int, count: Callable[[str], int]
) -> tuple[list[str], list[str]]:
    """The exemplars, the longest cut so that all have at most `room` tokens; a note on each cut."""
    lengths = [count(text) for text in exemplars]
    if sum(lengths) <= room:
        return [*exemplars], []
    if room < LEAST_EXEMPLAR * len(exemplars):
        raise InputError(
            f"expected texts that fit the context: question, candidates and reply leave {room} "
            f"tokens, and each exemplar needs at least {LEAST_EXEMPLAR}"
        )
    limits = range(max(lengths) + 1)  # the largest that fits: only long texts are cut
    limit = bisect_right(limits, room, key=lambda n: sum(min(length, n) for length in lengths)) - 1
    excerpts, notes = [], []
    for i, (text, length) in enumerate(zip(exemplars, lengths, strict=True)):
        excerpts.append(cut(text, limit, count) if length > limit else text)
        if length > limit:
            notes.append(
                f"exemplar {i + 1} was cut from {length} to {count(excerpts[i])} tokens at the end "
                "of a sentence, to fit the context"
            )
    return excerpts, notes
