"""A label: whose style counts for a completion, as a row of a data set says it.

    "I came; I saw."                                                  a text of the writer
    ["I came; I saw.", "So be it!"]                                   several
    {"exemplars": ["…"], "question": "…", "principles": ["…"]}        with what was asked and wanted

A list or an object may be JSON in a text too, as many data sets hold nothing but texts. A text that
begins like JSON and is none ("[Sigh.] I came.") is a text of the writer. OpenRLHF's labels are read
here for the function (`callers.py`) and for the server (`remote.py`), so that a label means the
same to both; verl's `extra_info` has the same fields.

What we chose. None is nothing: Arrow puts it where a row lacks a field that other rows have. A
label is written for us, so that a field without a meaning is an InputError; `extra_info`, and a
label where the writer is said for all rows, may be there for others: only `question` and
`principles` are looked at.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanopersrm import InputError
from nanopersrm.serve.reward_fn import question_text, texts_of

FIELDS = ("exemplars", "question", "principles")


@dataclass(frozen=True)
class Label:
    """What was said; None: nothing."""

    exemplars: tuple[str, ...] | None = None
    writer: str | None = None  # the name of one who was put on the server
    question: str | None = None
    principles: tuple[str, ...] | None = None

    def said(self) -> list[str]:
        """The fields that are not None."""
        return [name for name, value in vars(self).items() if value is not None]


def label_of(label: Any, place: str, names: Sequence[str] = FIELDS) -> Label:
    """A label in one of its forms. names: the fields that an object may have.

    >>> label_of('{"exemplars": ["So."], "question": null}', "labels[0]").said()
    ['exemplars']
    """
    given = _read(label)
    if given is None or _is_empty(given):
        return Label()
    if isinstance(given, str | list | tuple):
        return Label(texts_of(given, place))
    if not isinstance(given, Mapping):
        got = type(given).__name__
        raise InputError(f"{place}: expected a text, a list of texts or an object, got {got}")
    for name, value in given.items():
        if name not in names and value is not None:
            raise InputError(f"{place}: expected the fields {', '.join(names)}, got {name!r}")
    return fields_of(given, place, names)


def fields_of(given: Mapping[str, Any], place: str, names: Sequence[str] = FIELDS) -> Label:
    """What an object says in these fields; its others are for others."""
    found: dict[str, Any] = {}
    for name in names:
        value, where = given.get(name), f"{place}, field {name}"
        if value is None:
            continue
        if name == "writer" and not isinstance(value, str):
            raise InputError(f"{where}: expected a name, got {type(value).__name__}")
        if name == "question":
            value = question_text(value, where)
        elif name == "principles" and _is_empty(_plain(value)):
            value = ()
        elif name != "writer":
            value = texts_of(value, where)
        found[name] = value
    return Label(**found)


def question_of(label: Any, place: str) -> str | None:
    """What was asked, where the writer is said for all rows and what the label says is not read.

    Principles are the writer's own: an InputError, or they would be lost in silence.
    """
    given = _read(label)
    if not isinstance(given, Mapping):
        return None
    found = fields_of(given, place, ("question", "principles"))
    if found.principles:
        raise InputError(
            f"{place}, field principles: expected none, because the writer is said for all rows, "
            f"got {len(found.principles)}; say them for all rows, too"
        )
    return found.question


def _read(label: Any) -> Any:
    """JSON in a text as what it says."""
    label = _plain(label)
    if not isinstance(label, str) or label.lstrip()[:1] not in ("{", "["):
        return label
    try:
        return json.loads(label)
    except (ValueError, RecursionError):
        return label  # a text that begins so


def _plain(value: Any) -> Any:
    """Arrays as lists: parquet files give such lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value in ([], (), {})
