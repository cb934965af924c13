"""The word lists behind the features, read from lexicon.json.

All words are in lower case, apostrophes straight. The lists are short on purpose: common words that
carry a habit, not every word that could. A word of two habits stands in both lists.
"""

import json
import re
from importlib.resources import files

LISTS: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in json.loads(
        files("nanopersrm.style").joinpath("lexicon.json").read_text("utf-8")
    ).items()
}
PRONOUNS = frozenset[str]().union(
    *(LISTS[f"{who}_words"] for who in ("i", "we", "you", "they", "it"))
)
ENDINGS = {name: tuple(sorted(LISTS[name])) for name in ("latinate", "contracted")}
HEDGE_PHRASES = re.compile(
    r"\b(?:kind of|sort of|a bit|i think|i suppose|i guess|i believe|in a way|more or less|"
    r"to some extent)\b"
)
BRITISH = re.compile(
    r"(?:colo|favo|hono|labo|behavio|neighbo|flavo|humo|rumo|parlo|harbo|endeavo|vigo|savo|splendo)ur"
    r"(?:s|ed|ing|ite|able|ful|hood|less|ly|y)*|(?:cent|theat|lit|fib|met|lust|spect)res?|centred|"
    r"(?:real|organ|recogn|apolog|emphas|critic|summar|minim|maxim|special|util|final|author|memor)"
    r"is(?:e|es|ed|ing|ation|ations)|analys(?:e|es|ed|ing)|(?:travel|cancel|label|model|level|signal|"
    r"quarrel)l(?:ed|ing|er|ers)|grey(?:er|ish)?|cheques?|tyres?|mum|mums|defence|offence|licence|whilst|"
    r"amongst|jewellery|cosy|plough|maths|programmes?|kerb|sceptical|fulfil|skilful|favourites?"
)
AMERICAN = re.compile(
    r"(?:col|fav|hon|lab|behavi|neighb|flav|hum|rum|parl|harb|endeav|vig|sav|splend)or"
    r"(?:s|ed|ing|ite|ites|able|ful|hood|less|ly|y)*|(?:cent|theat|lit|fib|met|lust|spect)ers?|centered|"
    r"(?:real|organ|recogn|apolog|emphas|critic|summar|minim|maxim|special|util|final|author|memor)"
    r"iz(?:e|es|ed|ing|ation|ations)|analyz(?:e|es|ed|ing)|(?:travel|cancel|label|model|level|signal|"
    r"quarrel)(?:ed|ing|er|ers)|gray(?:er|ish)?|tires?|mom|moms|defense|offense|jewelry|cozy|plow|math|"
    r"programs?|curb|skeptical|fulfill|skillful"
)
