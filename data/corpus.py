"""Corpora: what people wrote, divided by author into splits, and texts cut from it.

    pieces = read_corpora(path)                      one Piece a text
    corpora = split_corpora(pieces, seed)            {"train": Corpus, "validation": …}
    source = rng.choice(corpus.sources[rng.choice(corpus.writers)])
    text = cut(source.text, words, rng); others = draw_exemplars(corpus, rng, source, 3)

Three forms are read.
1. A folder with one folder per writer, `anna/letter.txt`, `.txt` or `.md`. The domain is the name
   of the outer folder. A file is a title; lines of three dashes part several texts in it.
2. A `.jsonl` or `.jsonl.gz` file, or a folder of them. A line is
   {"author": "Jane Austen", "title": "Emma", "year": 1815, "text": "…"}, with a "question" if the
   text answers one. The domain is the name of the file. `year` may be null or missing.
3. A `.json` file {author: [{"prompt": "…", "output": "…"}, …]}, as the code of PersRM-R1 has it.

Splits are by author. Some whole domains can be held out ("ood"). Of the writers of each other
domain about 9.5 % go to test and 5.5 % to validation, at least two each (a pair needs two), none
where there are fewer than eight. Writers with one work come last: exemplars from the book of the
candidate share its subject.

A *source* is a piece, or a part of a long one. Two texts of one proposal never come from the same
source. Texts are cut at ends of sentences, from a random sentence on; what lies between is kept to
the letter. A *rare name* stands in capitals inside sentences more often than in lower case, and at
most a fifth of the writers of its domain use it. When exemplar and candidate both speak of
Heathcliff, no style has to be read, so `proposals.py` refuses that.
"""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Strict, StrictStr, TypeAdapter

from nanopersrm import InputError
from nanopersrm.judge import texts
from nanopersrm.pairs import SPLITS, SUFFIXES, Text, lines, parse_object, validate
from nanopersrm.style.profile import CANDIDATE_WORDS, EXEMPLAR_WORDS
from nanopersrm.style.text import BULLET, CLOSERS, ENDS, WORD, sentences

FORMS = "one folder per writer, .jsonl or .jsonl.gz files, or a .json file"
TEST_SHARE, VALIDATION_SHARE = 0.095, 0.055  # of the writers of a domain
FEWEST_TO_DIVIDE = 8  # a domain with fewer writers is all for training
LONGEST = 700  # words; longer pieces become several sources
SOURCE_WORDS = 450  # about this many words each
NEAR = 0.1  # a cut may miss the wanted length by this share where the text allows it
RARE_SHARE = 0.2  # of the writers of a domain
LONGEST_ACRONYM = 5  # letters; a longer word in capitals is a raised voice
LONGEST_SIGNATURE = 4  # words
EVERYDAY = WORD.findall(  # in capitals, and no topic
    "monday tuesday wednesday thursday friday saturday sunday mondays tuesdays wednesdays thursdays"
    " fridays saturdays sundays january february march april may june july august september october"
    " november december mr mrs ms dr am pm i"
)
TITLES = frozenset({"jr", "sr", "ii", "iii", "iv", "phd", "md"})
INSIDE = re.compile(r"(?<=[\w,] )(?=[^\W\d_a-z])[^\W_]+(?:'[^\W_]+)*")  # capital, after a word
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
LINE = re.compile(r"\n")
TOKEN = re.compile(r"\S+")

Writer = tuple[str, str]  # domain, author


@dataclass(frozen=True)
class Piece:
    """One text of one writer. The title is the work that it was cut from."""

    author: Text
    title: Text
    year: Annotated[int, Strict()] | None
    text: Text
    domain: str
    question: StrictStr = ""


@dataclass(frozen=True)
class Answer:
    """One text in PersRM-R1's form."""

    output: Text
    prompt: StrictStr = ""


PIECE = TypeAdapter(Piece)
ANSWERS = TypeAdapter(dict[Text, list[Answer]])


@dataclass(frozen=True)
class Lengths:
    """How many words candidates and exemplars have, from and to."""

    candidate: tuple[int, int] = (CANDIDATE_WORDS - 20, CANDIDATE_WORDS + 20)
    exemplar: tuple[int, int] = (EXEMPLAR_WORDS - 30, EXEMPLAR_WORDS + 30)


@dataclass(frozen=True)
class Source:
    """A piece of writing that at most one text of a proposal is cut from."""

    domain: str
    author: str
    title: str
    year: int | None
    text: str
    question: str
    number: int  # over all pieces

    @property
    def label(self) -> str:  # as in `Pair.chosen_from`
        return f"{self.author}/{self.title}"


@dataclass(frozen=True)
class Corpus:
    """The sources of one split."""

    split: str
    sources: dict[Writer, list[Source]]
    rare_names: dict[str, frozenset[str]]  # of each domain, in lower case
    lengths: Lengths = Lengths()

    @property
    def writers(self) -> list[Writer]:
        """All writers, in a fixed order."""
        return list(self.sources)

    def of_domain(self, domain: str) -> list[Writer]:
        """The writers of one domain."""
        return [writer for writer in self.sources if writer[0] == domain]


def read_corpora(path: str | os.PathLike[str]) -> list[Piece]:
    """All pieces of a folder or file in one of the three forms, in a fixed order."""
    path = Path(path)
    if path.name.endswith(SUFFIXES) or path.suffix == ".json":
        pieces = _read_file(path)
    else:
        names = sorted(os.listdir(path)) if path.is_dir() else []
        inside = [path / name for name in names if not name.startswith(".")]
        files = [file for file in inside if file.name.endswith(SUFFIXES)]
        if len({_domain(file) for file in files}) < len(files):
            raise InputError(f"{path}: expected one file a domain")
        pieces = [piece for file in files for piece in _read_file(file)]
        for writer in (folder for folder in inside if folder.is_dir()):
            suffixes = {Path(name).suffix.lower() for name in os.listdir(writer)}
            if files and suffixes & set(texts.SUFFIXES):
                raise InputError(f"{path}: expected {FORMS}, got both")
            for file in texts.expand([writer]) if suffixes & set(texts.SUFFIXES) else ():
                about = (writer.name, file.stem, None)
                domain = path.resolve().name
                pieces += [Piece(*about, text, domain) for text in texts.read_texts([file])]
    if not pieces:
        raise InputError(f"{path}: expected {FORMS}, got no text")
    return pieces


def _domain(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".jsonl")


def _read_file(file: Path) -> list[Piece]:
    if file.suffix != ".json":
        return [
            validate(PIECE, {"year": None, **parse_object(line, at), "domain": _domain(file)}, at)
            for at, line in lines(file)
        ]
    answers = validate(ANSWERS, parse_object(texts.read_file(file), str(file)), str(file))
    return [
        Piece(author, str(number), None, item.output, file.stem, item.prompt)
        for author, items in answers.items()
        for number, item in enumerate(items, 1)
    ]


def find_rare_names(pieces: Sequence[Piece]) -> dict[str, frozenset[str]]:
    """The rare names of each domain, over all splits: they only decide what is thrown away."""
    users: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    balance: dict[str, Counter[str]] = defaultdict(Counter)  # in capitals minus in lower case
    writers: dict[str, set[str]] = defaultdict(set)
    for piece in pieces:
        writers[piece.domain].add(piece.author)
        used, counts = users[piece.domain], balance[piece.domain]
        for word, times in Counter(WORD.findall(piece.text)).items():
            if word.islower():
                counts[word] -= times
            elif word[0].isupper():
                used[_bare(word)].add(piece.author)
        for word in INSIDE.findall(piece.text):
            if len(word) <= LONGEST_ACRONYM or not word.isupper():
                counts[_bare(word)] += 1
    return {
        domain: frozenset(
            word
            for word, by in users[domain].items()
            if balance[domain][word] > 0
            and len(by) <= max(1, int(RARE_SHARE * len(authors)))
            and word not in EVERYDAY
            and not word.startswith("i'")
        )
        for domain, authors in writers.items()
    }


def _bare(word: str) -> str:
    return word.lower().removesuffix("'s")


def names_in(text: str, rare: frozenset[str]) -> set[str]:
    """The rare names of a text: "Mr. Darcy's hat." has {"darcy"} where few writers name him."""
    return {_bare(word) for word in WORD.findall(text) if word[0].isupper()} & rare


def surname(author: str) -> str:
    """The last word of a name with a capital: "ed-mullen" gives "Mullen"; "" when too short."""
    words = [word for word in WORD.findall(author) if word.lower() not in TITLES]
    return words[-1][:1].upper() + words[-1][1:] if words and len(words[-1]) > 2 else ""


def unsigned(text: str, author: str) -> str:
    """A text without the writer's name in its last line: "Thanks,\\nTessa" ends with "Thanks,"."""
    body, line_end, last = text.strip().rpartition("\n")
    names = {word.lower() for word in WORD.findall(author) if len(word) > 2}
    words = WORD.findall(last)
    if len(words) > LONGEST_SIGNATURE or names.isdisjoint(word.lower() for word in words):
        return text
    last = WORD.sub(lambda word: "" if word[0].lower() in names else word[0], last).strip()
    return f"{body}{line_end}{last}".strip() if WORD.search(last) else body.strip()


def assign_splits(
    pieces: Sequence[Piece], seed: int, hold_out: Sequence[str] = ()
) -> dict[str, str]:
    """author -> split. The same writers, seed and held-out domains give the same answer."""
    authors_of: dict[str, set[str]] = defaultdict(set)
    works: dict[str, set[str]] = defaultdict(set)
    for piece in pieces:
        authors_of[piece.domain].add(piece.author)
        works[piece.author].add(piece.title)
    splits = {author: "ood" for domain in hold_out for author in authors_of[domain]}
    for domain in sorted(set(authors_of) - set(hold_out)):
        authors = sorted(authors_of[domain] - set(splits))
        test, validation = quotas(len(authors))
        random.Random(f"{seed}/split/{domain}").shuffle(authors)
        authors.sort(key=lambda author: len(works[author]) == 1)  # stable
        for i, author in enumerate(authors):
            split = "test" if i < test else "validation" if i < test + validation else "train"
            splits[author] = split
    return splits


def quotas(writers: int) -> tuple[int, int]:
    """How many of so many writers are for test and for validation."""
    if writers < FEWEST_TO_DIVIDE:
        return 0, 0
    return max(2, round(writers * TEST_SHARE)), max(2, round(writers * VALIDATION_SHARE))


def split_corpora(
    pieces: Sequence[Piece],
    seed: int,
    hold_out: Sequence[str] = (),
    lengths: Lengths = Lengths(),
) -> dict[str, Corpus]:
    """One corpus a split, each with the writers and titles in a fixed order."""
    splits = assign_splits(pieces, seed, hold_out)
    sources: dict[str, dict[Writer, list[Source]]] = {split: {} for split in SPLITS}
    number = 0
    for piece in sorted(pieces, key=lambda p: (p.domain, p.author, p.title)):  # stable
        split = splits[piece.author]
        if split == "ood" and piece.domain not in hold_out:
            continue  # this writer is held out, here too
        for text in parts(unsigned(piece.text, piece.author)):
            about = (piece.domain, piece.author, piece.title, piece.year)
            source = Source(*about, text, piece.question, number)
            sources[split].setdefault((piece.domain, piece.author), []).append(source)
            number += 1
    rare = find_rare_names(pieces)
    return {split: Corpus(split, sources[split], rare, lengths) for split in SPLITS}


@dataclass(frozen=True)
class _Span:
    """A sentence of a text, and whether the text may be cut before and after it."""

    start: int
    end: int
    words: int
    may_begin: bool
    may_end: bool


@lru_cache(maxsize=20_000)
def _spans(text: str) -> tuple[_Span, ...]:
    """The sentences of a text.

    A passage may begin after an end mark or where a paragraph does, though not in a list, and end
    at an end mark; neither inside a quotation that was opened in the same paragraph.
    """
    spans: list[_Span] = []
    after_mark = True
    for first, last in _blocks(text):
        tokens = list(TOKEN.finditer(text, first, last))
        at = quotes = 0
        for sentence in sentences(text[first:last]):
            words = len(sentence.split())
            opens = at == 0 and not BULLET.match(text, first)
            begins = not spans or opens or (after_mark and quotes % 2 == 0)
            start, end = tokens[at].start(), tokens[at + words - 1].end()
            at += words
            quotes += sentence.count('"')
            after_mark = sentence.rstrip(CLOSERS)[-1:] in ENDS
            ends = after_mark and (quotes % 2 == 0 or at == len(tokens))
            spans.append(_Span(start, end, words, begins, ends))
    return tuple(spans)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Where paragraphs and list lines begin and end."""
    cuts = [(m.start(), m.end()) for m in PARAGRAPH.finditer(text)]
    cuts += [(m.start(), m.end()) for m in LINE.finditer(text) if BULLET.match(text, m.end())]
    first = 0
    for start, end in sorted(cuts):
        if start >= first:
            yield first, start
            first = end
    yield first, len(text)


def parts(text: str) -> list[str]:
    """The whole text, or, when it is very long, even parts that end where sentences end."""
    words = len(text.split())
    if words <= LONGEST:
        return [text.strip()]
    spans = _spans(text)
    number = round(words / SOURCE_WORDS)
    pieces: list[str] = []
    begin, read = spans[0].start, 0
    for span, following in zip(spans, (*spans[1:], None), strict=True):
        read += span.words
        if following is None or read >= words * (len(pieces) + 1) / number:
            pieces.append(text[begin : span.end])
            begin = following.start if following else span.end
    return pieces


def cut(text: str, words: int, rng: random.Random) -> str:
    """A run of whole sentences of about `words` words, from a random sentence on.

    It ends with an end mark wherever there is one in reach; else where the text ends, as a person
    may end it. A shorter text comes back whole.
    """
    spans = _spans(text)
    total = sum(span.words for span in spans)
    if total <= words:
        return text.strip()
    runs: list[tuple[int, int, int]] = []  # how far from the wanted length, start, end
    for first, span in enumerate(spans):
        if not span.may_begin:
            continue
        read, ends = 0, []
        for i, later in enumerate(spans[first:], first):
            read += later.words
            if later.may_end or i + 1 == len(spans):
                ends.append((abs(read - words), span.start, later.end))
            if ends and read > 2 * words:
                break
        runs.append(min(ends))
    near = [run for run in runs if run[0] <= NEAR * words] or [min(runs)]
    _, start, end = rng.choice(near)
    return text[start:end]


def draw_exemplars(
    corpus: Corpus, rng: random.Random, source: Source, number: int
) -> tuple[str, ...] | None:
    """Texts by the writer of `source` from other sources; None when there are too few."""
    sources, words = draw_sources(corpus, rng, source, number), corpus.lengths.exemplar
    if sources is None:
        return None
    return tuple(cut(other.text, rng.randint(*words), rng) for other in sources)


def draw_sources(
    corpus: Corpus,
    rng: random.Random,
    source: Source,
    number: int,
    excluded: Sequence[Source] = (),
) -> list[Source] | None:
    """Other sources by the writer of `source`; None when there are too few.

    Other works are taken wherever the writer has several, each work once before any twice.
    """
    by_writer = corpus.sources[source.domain, source.author]
    numbers = {source.number, *(other.number for other in excluded)}
    apart = [other for other in by_writer if other.title != source.title]
    left = [other for other in apart or by_writer if other.number not in numbers]
    if len(left) < number:
        return None
    rng.shuffle(left)
    seen: Counter[str] = Counter()

    def turn(other: Source) -> int:
        seen[other.title] += 1
        return seen[other.title]

    return sorted(left, key=turn)[:number]  # stable
