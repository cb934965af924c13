"""Which of these texts sounds like this writer?

    python judge.py --exemplar letters/ --candidates draft1.txt draft2.txt

reads what the writer wrote (files, folders, or one file with lines of three dashes between texts)
and prints the writer's habits. Of each candidate it prints a ledger: what the model chose to look
at, what was measured there, and what that says for the writer (+) or against (-), in decibans; ten
are ten to one. It ends with the scores, and with the words that sound like the writer: in colour,
or marked [+so+] and [-so-]. Without --candidates it reads them from standard input. `--adapter
FOLDER` uses what `train_sft.py` has learned, `--adapter none` the base alone, which was never
trained to judge.

    python judge.py --batch in.jsonl --out out.jsonl

judges every line of a file (nanopersrm/serve/batch.py has what lines may hold). The same command
goes on where a run has ended; a bad line does not stop it, the exit code is then 1.

What is slow is imported late, so that `--help` and a mistyped file name answer at once.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nanopersrm import InputError
from nanopersrm.command import exit_code, printable
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check
from nanopersrm.judge.texts import expand, read_file, read_question, read_standard_input, read_texts
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.style.evidence import NGRAMS, READING
from nanopersrm.style.ledger import SUM, CandidateReading, Line
from nanopersrm.style.phrases import Phrase, Word
from nanopersrm.style.profile import BY_NAME, figure, profile

HABITS = 8  # factors that the profile shows
LONGEST = 60  # characters of words that are quoted
QUOTES = 3  # in a line
COLOURED, BOLD = 0.5, 2.0  # nats of a word from which on it stands out
MEANING = (
    "+ for the writer and - against, in decibans: 10 are ten to one, 3 are two to one. By all "
    "evidence: the\nsum of all that is measured, and how probable it makes the text alone the "
    "writer's."
)
PROGRESS_EVERY = 30  # seconds between two lines of progress, where there is no terminal
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[PATH [PATH ...]]")]


@dataclass(frozen=True)
class Config:
    """Score how well texts fit a writer: exemplars and candidates in, reasons and scores out."""

    exemplar: Names = ()  # texts of the writer: files, folders, a file with --- lines
    candidates: Names = ()  # 1 to 26 files or folders; none: standard input, --- between
    question: str | None = None  # what the candidates answer: a text or a file
    principle: tuple[str, ...] = ()  # what the writer says they want, in their own words
    mode: Literal["pointwise", "pairwise"] = JudgeConfig.mode  # one candidate a prompt, or two
    think: bool = JudgeConfig.think  # look at evidence before scoring
    think_lines: int = JudgeConfig.think_lines  # lines of evidence that it may choose, at most
    all_evidence: bool = JudgeConfig.all_evidence  # every line at once, none is chosen
    # who chooses the lines: the model, or a rule to compare it with
    choose: Literal["model", "menu", "salience", "random", "largest"] = JudgeConfig.choose
    free: bool = JudgeConfig.free  # reason in free prose instead, for bases that can
    think_tokens: int = JudgeConfig.think_tokens  # budget of free prose, in tokens
    samples: int = JudgeConfig.samples  # replies for each prompt; their scores are averaged
    temperature: float | None = None  # of the reasoning; default: 0, or 1 with several samples
    seed: int = JudgeConfig.seed  # same seed, same judgement
    topics: bool = JudgeConfig.topics  # mark words that only say the subject; takes a while
    batch: Path | None = None  # judge the lines of this .jsonl file, which have their own texts
    out: Path | None = None  # with --batch: where the results go, a .jsonl file
    ray: int = 0  # with --batch: so many workers of Ray, on one machine or several; 0: no Ray
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False  # print one JSON object
    base: str = DEFAULT_BASE  # the embedded default, a folder, a .gguf file, or a hub name
    adapter: str = "default"  # a folder with a trained adapter; default: that of the base; or none
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (16 bits where they are fast), bf16, fp16, fp32


def main(config: Config) -> int | None:
    """Read, judge, print; gives 1 where a line of a batch was bad."""
    settings = JudgeConfig(
        **{field.name: getattr(config, field.name) for field in fields(JudgeConfig)}
    )
    exemplars = read_texts(config.exemplar, "--exemplar")
    if config.batch is not None or config.out is not None or config.ray:
        return judge_batch(config, settings, exemplars)
    if not exemplars:
        raise InputError("--exemplar: expected texts of the writer, got none")
    files = expand(config.candidates, "--candidates")
    names, candidates = [str(file) for file in files], [read_file(file) for file in files]
    question = None if config.question is None else read_question(config.question, "--question")
    if candidates:
        check(exemplars, candidates, settings)
    out = Console(quiet=config.as_json, highlight=False, soft_wrap=True)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    _print_profile(out, exemplars)
    if not candidates:
        candidates = read_standard_input(log.print)
        names = [f"candidate {i + 1}" for i in range(len(candidates))]
        check(exemplars, candidates, settings)

    from nanopersrm.judge.judge import Judge  # torch takes seconds

    status = log.status("loading the base", spinner="line")
    if log.is_terminal:
        status.start()
    try:
        judge = Judge.load(config.base, config.adapter, config.device, config.dtype, say=log.print)
        status.update("judging")
        judgement = judge.judge(exemplars, candidates, question, config.principle, settings)
    finally:
        status.stop()
    if config.as_json:
        plain = judgement.as_dict()
        for name, candidate in zip(names, plain["candidates"], strict=True):
            candidate["name"] = name
        print(json.dumps(plain, allow_nan=False), flush=True)
    else:
        _print_judgement(out, judgement, names, candidates)
    return None


def judge_batch(config: Config, settings: JudgeConfig, exemplars: list[str]) -> int:
    """Every line of --batch; the exemplars are of the lines that have none."""
    if config.batch is None or config.out is None:
        raise InputError("--batch and --out: expected both, a file to read and one to write")
    for name, value in (("candidates", config.candidates), ("question", config.question)):
        if value:
            raise InputError(f"--{name}: expected none, the lines of --batch have their own")
    if config.as_json:
        raise InputError("--json: expected no --json with --batch, --out has the results as JSON")

    from nanopersrm.judge.adapter_settings import fingerprint, resolve_adapter
    from nanopersrm.serve import batch
    from nanopersrm.serve.reward_fn import LazyJudge

    log = Console(stderr=True, highlight=False, soft_wrap=True)
    status = log.status("reading", spinner="line")
    start = last = time.monotonic()

    def progress(tally: batch.Tally, error: str | None) -> None:
        """Each bad line, and how far it is: on a terminal at once, else now and then."""
        nonlocal last
        if error is not None:
            _print(log, f"judge.py: {config.batch}, {error}")
        now = time.monotonic()
        done = tally.judged + tally.bad
        text = f"{done} of {tally.lines} lines, {tally.bad} bad, {now - start:.0f} s"
        status.update(text)
        if not log.is_terminal and now - last >= PROGRESS_EVERY:
            log.print(text)
            last = now

    folder = resolve_adapter(config.adapter, config.base)
    adapter, version = (None, None) if folder is None else (str(folder), fingerprint(folder))
    say = None if config.ray else log.print  # other machines can show nothing here
    judge = LazyJudge(config.base, adapter, config.device, config.dtype, say)
    model = f"{config.base}, {version}, {config.dtype}"
    lines = batch.Settings(tuple(exemplars), config.principle, settings, model)
    if log.is_terminal:
        status.start()
    try:
        tally = batch.run(judge.load, config.batch, config.out, lines, config.ray, progress)
    finally:
        status.stop()
    result = f"{config.out}: {tally.judged} judged, {tally.bad} bad"
    result += f", {tally.invalid} without a verdict" if tally.invalid else ""
    result += f" ({tally.kept} of them before)" if tally.kept else ""
    if tally.pairs:
        result += f"; {tally.right / tally.pairs:.1%} of {tally.pairs} pairs right, ties half"
    print(printable(result))
    return int(tally.bad > 0)


def _print(out: Console, text: str, **style: Any) -> None:
    """Print what others wrote: no markup, and nothing that a terminal would obey."""
    out.print(printable(text), markup=False, emoji=False, **style)


def _print_profile(out: Console, exemplars: list[str]) -> None:
    """The writer's most salient habits."""
    texts = f"{len(exemplars)} exemplar{'s' * (len(exemplars) > 1)}"
    words = sum(len(text.split()) for text in exemplars)
    out.print(f"[bold]The writer[/bold], from {texts} of {words} words")
    for trait in profile(exemplars, top=HABITS):
        _print(out, f"  {trait.phrase}")
    out.print()


def _print_judgement(
    out: Console, judgement: Judgement, names: list[str], candidates: list[str]
) -> None:
    """Of each candidate, best first, its ledger and its text; then a small table."""
    names = [printable(name) for name in names]
    for i in judgement.ranking:
        _print(out, names[i], style="bold")
        known = judgement.candidates[i]
        if known.ledger:
            _print_ledger(out, known.ledger)
        if known.reading is not None:
            _print_reading(out, known.reading, candidates[i])
        out.print()
    for reply in judgement.replies:
        if not reply.features and reply.reasoning:
            _print(out, " against ".join(names[i] for i in reply.candidates), style="bold")
            _print(out, reply.reasoning)
            out.print()
    out.print(MEANING, style="dim")
    out.print()
    table = Table("", box=None, pad_edge=False)
    table.add_column("candidate", overflow="fold")  # the ends of file names tell them apart
    many = len(names) > 1
    for column in ["score", "by all evidence", *["fits better than the next"] * many]:
        table.add_column(column, justify="right")
    for rank, i in enumerate(judgement.ranking):
        score, known = judgement.scores[i], judgement.candidates[i]
        cells = [str(rank + 1), escape(names[i]), "invalid" if score is None else f"{score:.2f}"]
        cells.append(f"{known.decibans:+.1f}, {known.measured:.0f}%")
        if many and rank + 1 < len(names):
            cells.append(f"{judgement.preference[i][judgement.ranking[rank + 1]]:.1%}")
        table.add_row(*cells)
    for note in judgement.notes:
        _print(out, f"note: {note}")
    out.print(table)
    out.print()
    best = judgement.verdict
    if isinstance(best, str):
        out.print({"tie": "a tie", "invalid": "invalid: some replies gave no score"}[best])
    elif many:
        out.print(f"closest to the writer: [bold]{escape(names[best])}[/bold]")
    speed = f"{judgement.tokens} tokens drawn, {judgement.prompt_tokens} read"
    out.print(f"{speed}, {judgement.seconds:.1f} s", style="dim")


def _print_ledger(out: Console, lines: Sequence[Line]) -> None:
    """The lines of one candidate in columns, the sum last."""
    rows = []
    for line in lines:
        factor = BY_NAME.get(line.feature)
        value = "" if line.candidate is None else _figure(line.feature, line.candidate)
        writer = "" if line.writer is None else f"writer {_figure(line.feature, line.writer)}"
        rows.append([factor.label if factor else line.feature, value, writer])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for line, (label, value, writer) in zip(lines, rows, strict=True):
        side = [words.text for words in line.words if words.decibans * line.decibans > 0]
        short = dict.fromkeys(" ".join(printable(text).split()) for text in side)
        quoted = [f'"{text}"' for text in short if len(text) <= LONGEST][:QUOTES]
        cells = [f"  {label:<{widths[0]}}", f"{value:>{widths[1]}}", f"{writer:<{widths[2]}}"]
        text = "  ".join([*cells, f"{line.decibans:>+6.1f}", ", ".join(quoted)]).rstrip()
        _print(out, text, style="bold" if line.feature == SUM else "")


def _figure(feature: str, value: float) -> str:
    """A measurement in a few characters."""
    if feature == READING:
        return f"{value:+.2f}"
    return f"{value:.1f}%" if feature == NGRAMS else figure(value)


def _print_reading(out: Console, reading: CandidateReading, text: str) -> None:
    """The text with its words coloured; where there is no colour its phrases are marked.

    What was not read is not shown.
    """
    marks = out.no_color or out.color_system is None
    by_place = sorted(reading.phrases, key=lambda phrase: phrase.start)
    parts: Sequence[Word | Phrase] = by_place if marks else reading.words
    first, end = (reading.words[0].start, reading.words[-1].end) if reading.words else (0, 0)
    shown, at = Text(), first
    for part in parts:
        piece, mark = printable(text[part.start : part.end]), "+" if part.gain > 0 else "-"
        shown.append(printable(text[at : part.start]))
        shown.append(f"[{mark}{piece}{mark}]" if marks and not part.topic else piece, _style(part))
        at = part.end
    shown.append(printable(text[at:end]))
    shown.append(" … (the rest was not read)" if text[end:].strip() else "")
    out.print(shown)


def _style(part: Word | Phrase) -> str:
    """Green is like the writer, red unlike, bold where it is much, and topic is dim."""
    if part.topic or abs(part.gain) < COLOURED:
        return "dim" if part.topic else ""
    return ("bold " if abs(part.gain) >= BOLD else "") + ("green" if part.gain > 0 else "red")


def run(config: Config) -> int:
    """`main` with an exit code."""
    goes_on = "" if config.batch is None else "; the same command goes on from here"
    return exit_code("judge.py", lambda: main(config), f"interrupted{goes_on}")


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__.split("What is slow")[0])))
