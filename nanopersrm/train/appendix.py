"""The appendix of data/README.md: what the replies to imitate look like, and whether they are true.

    python -m nanopersrm.train.appendix --pairs pairs/test.jsonl            print it
    python -m nanopersrm.train.appendix --pairs pairs/test.jsonl --write    and put it into data/README.md

Pairs are drawn from the set, some of each kind, and replies written for them as `replies.py` does.
Every reply is read back by `nanopersrm/faithful.py`; its counts are the table. Ten of each kind
follow, drawn by the seed and not chosen.
"""

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanopersrm.command import exit_code
from nanopersrm.judge.faithful import check as faithful
from nanopersrm.pairs import KINDS, Pair, read
from nanopersrm.train.facts import asked
from nanopersrm.train.replies import Imitation, check, reply

START, END = "<!-- made by python -m nanopersrm.train.appendix --write -->", "<!-- end -->"
PAGE = Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Config:
    """Show replies to imitate, and how many of their quotes and claims are true."""

    pairs: Path  # a file of pairs
    count: int = 100  # replies of each kind that are counted
    show: int = 10  # of these shown
    seed: int = 0
    write: bool = False  # also update data/README.md


def imitations(pairs: Sequence[Pair], kind: str, config: Config) -> list[tuple[Pair, Imitation]]:
    """Up to `count` replies about pairs of one kind, in an order drawn by the seed."""
    of_kind = [pair for pair in pairs if pair.kind == kind]
    random.Random(f"{config.seed}/{kind}").shuffle(of_kind)
    made = []
    for pair in of_kind:
        form, role, rng = random.Random(f"{config.seed}/{pair.id}").choice(
            list(asked(pair, "both", config.seed))
        )
        made.append((pair, reply(pair, form, role, rng)))
        if len(made) == config.count:
            break
    return made


def row(kind: str, made: Sequence[tuple[Pair, Imitation]]) -> str:
    """One line of the table: counts of what was read back from the replies' own text."""
    quotes = placed = claims = true = sound = 0
    for pair, imitation in made:
        texts = {
            label: str(getattr(pair, role))
            for label, role in zip(imitation.labels, imitation.candidates, strict=True)
        }
        report = faithful(imitation.text, pair.exemplars, texts)
        quotes, placed = quotes + report.quotes, placed + report.quotes_placed
        claims, true = claims + report.claims, true + report.claims_true
        sound += not check(imitation, pair)
    share = [f"{part} of {whole} ({part / max(whole, 1):.1%})" for part, whole in
             ((placed, quotes), (true, claims))]  # fmt: skip
    return f"| {kind} | {len(made)} | {share[0]} | {share[1]} | {sound} |"


def page(pairs: Sequence[Pair], config: Config) -> str:
    """The whole appendix as Markdown."""
    made = {kind: imitations(pairs, kind, config) for kind in KINDS}
    lines = [
        "| kind | replies | quotes verbatim, in the text named | claims that hold by measurement "
        "| without any fault |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(row(kind, found) for kind, found in made.items() if found),
    ]
    for kind, found in made.items():
        lines += ["", f"### {kind}"] if found else []
        for pair, imitation in found[: config.show]:
            roles = ", ".join(
                f"{label} is {role}"
                for label, role in zip(imitation.labels, imitation.candidates, strict=True)
            )
            lines += ["", f"`{pair.id}`, {roles}:", "", "```text", imitation.text.strip(), "```"]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Read, measure, print; with --write also into the page."""
    text = page(read(config.pairs), config)
    print(text)
    if config.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        fresh = PAGE.with_suffix(".new")
        fresh.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        os.replace(fresh, PAGE)


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.train.appendix", lambda: main(config))


if __name__ == "__main__":
    sys.exit(
        run(
            tyro.cli(
                Config, prog="nanopersrm.train.appendix", description=__doc__.split("Pairs are")[0]
            )
        )
    )
