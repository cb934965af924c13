"""Summary: the figures of a build, as an object for programs and as a page of tables.

One row for each kind in each split: how many pairs, of how many writers, out of how many proposals,
and why the others were rejected. Read next: `build.py`, which fills this in.
"""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.shards import Chunk
from data.shelf import Shelf
from nanopersrm import __version__


@dataclass(frozen=True)
class Row:
    """One kind in one split."""

    split: str
    kind: str
    wanted: int  # pairs, twins counted
    pairs: int
    authors: int  # whose exemplars are shown
    proposals: int
    accepted: float  # share of the proposals
    rejected: dict[str, int]  # reason -> proposals, the commonest first
    domains: dict[str, int]  # pairs of each
    exemplars: dict[str, int]  # pairs with so many
    seconds: float


def row(split: str, kind: str, wanted: int, chunks: Sequence[Chunk]) -> Row:
    """The figures of all chunks of a kind in a split; `wanted` counts drafts."""
    pairs = [pair for chunk in chunks for pair in chunk.pairs]
    proposals = sum(chunk.proposals for chunk in chunks)
    rejected: Counter[str] = Counter()
    for chunk in chunks:
        rejected.update(chunk.rejected)
    return Row(
        split=split,
        kind=kind,
        wanted=2 * wanted,
        pairs=len(pairs),
        authors=len({pair.author for pair in pairs}),
        proposals=proposals,
        accepted=round(len(pairs) / 2 / proposals, 4) if proposals else 0.0,
        rejected=_commonest(rejected),
        domains=_commonest(Counter(pair.domain for pair in pairs)),
        exemplars=dict(sorted(Counter(str(len(pair.exemplars)) for pair in pairs).items())),
        seconds=round(sum(chunk.seconds for chunk in chunks), 1),
    )


def _commonest(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def facts(
    settings: Mapping[str, Any], command: str, shelf_of: Mapping[str, Shelf], rows: Sequence[Row]
) -> dict[str, Any]:
    """Everything that is known of a finished build."""
    return {
        "command": command,
        "settings": dict(settings),
        "versions": {"nanopersrm": __version__, "python": platform.python_version()},
        "writers": {
            split: _commonest(Counter(domain for domain, _ in shelf.sources))
            for split, shelf in shelf_of.items()
        },
        "sets": [asdict(row) for row in rows],
        "notes": notes(shelf_of, rows),
    }


def notes(shelf_of: Mapping[str, Shelf], rows: Sequence[Row]) -> list[str]:
    """What a reader must not overlook: empty splits and sets that came out small."""
    found = [
        f"{split}: no writers; a domain needs eight for test and validation, --hold-out for ood"
        for split, shelf in shelf_of.items()
        if not shelf.sources
    ]
    return found + [
        f"{row.split} {row.kind}: {row.pairs} pairs of {row.wanted}; then nearly all proposals "
        f"were rejected: {reasons([row])}"
        for row in rows
        if row.pairs < row.wanted
    ]


def reasons(rows: Sequence[Row], most: int = 4) -> str:
    """The commonest reasons for rejection: "candidate already taken 52, markup 4"."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.rejected)
    items = list(_commonest(counts).items())[:most]
    return ", ".join(f"{reason} {number}" for reason, number in items) or "no proposals"


def dump(facts: Mapping[str, Any]) -> str:
    """summary.json."""
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def page(facts: Mapping[str, Any]) -> str:
    """summary.md: a table of the sets, one of the writers, the notes."""
    settings, versions = facts["settings"], facts["versions"]
    lines = [
        "# Pairs\n",
        f"`{facts['command']}`\n" if facts["command"] else "",
        f"seed {settings['seed']}, writings {settings['writings'][:12]}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "\n",
        "| split | kind | pairs | writers | proposals | accepted | seconds | rejected |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in facts["sets"]:
        rejected = ", ".join(f"{reason} {number}" for reason, number in row["rejected"].items())
        lines.append(
            f"| {row['split']} | {row['kind']} | {row['pairs']:,} | {row['authors']} "
            f"| {row['proposals']:,} | {row['accepted']:.0%} | {row['seconds']:.0f} "
            f"| {rejected} |"
        )
    domains = sorted({domain for counts in facts["writers"].values() for domain in counts})
    lines += [
        "",
        f"| writers | {' | '.join(domains)} | all |",
        "| --- |" + " ---: |" * (len(domains) + 1),
    ]
    for split, counts in facts["writers"].items():
        cells = [*(counts.get(domain, 0) for domain in domains), sum(counts.values())]
        lines.append(f"| {split} | {' | '.join(map(str, cells))} |")
    lines += ["", *(f"* {note}" for note in facts["notes"])]
    return "\n".join(line for line in lines if line is not None).rstrip() + "\n"
