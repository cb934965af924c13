"""Spelling: British to American and back, for the words that the factor `british` knows and more.

    to_american("The colour of the centre, whilst grey.")   "The color of the center, while gray."

How it works. One table of word to word is made from stems and endings when the file is loaded; a
text is read once and every word in the table is replaced in its own casing. What we chose: only
words whose other spelling means the same. So "while" does not become "whilst", nor "check" a
"cheque", and "practice", "licence", "meter" and "story" are left alone. "among" does become
"amongst".
"""

import random
import re

from nanopersrm.style.text import WORD

OUR = "colo favo hono labo behavio neighbo flavo humo rumo parlo harbo endeavo vigo savo splendo"
OUR_ENDINGS = " s ed ing ite ites able ful hood less ly y er ers fully ably"
RE = "cent theat lit fib lust spect somb calib"
ISE = (
    "real organ recogn apolog emphas critic summar minim maxim special util final author memor "
    "civil modern sympath general character"
)
ISE_ENDINGS = "e es ed ing ation ations"
LL = "travel cancel label model level signal quarrel marvel counsel jewel"
LL_ENDINGS = "ed ing er ers"
WORDS = (
    "analyse analyze|analysed analyzed|analyses analyzes|analysing analyzing|centred centered|"
    "grey gray|greyer grayer|greyish grayish|defence defense|defences defenses|offence offense|"
    "offences offenses|amongst among|jewellery jewelry|cosy cozy|plough plow|ploughs plows|"
    "ploughed plowed|ploughing plowing|sceptical skeptical|fulfil fulfill|fulfils fulfills|"
    "skilful skillful|skilfully skillfully|programme program|programmes programs|mum mom|"
    "mums moms|maths math|marvellous marvelous|pretence pretense|manoeuvre maneuver|"
    "catalogue catalog|woollen woolen|moustache mustache|travelling traveling"
)
ONE_WAY = "whilst while|cheque check|cheques checks|tyre tire|tyres tires|kerb curb"


def _table() -> dict[str, str]:
    table: dict[str, str] = {}
    for stem in OUR.split():
        for ending in OUR_ENDINGS.split(" "):
            table[f"{stem}ur{ending}"] = f"{stem}r{ending}"
    for stem in RE.split():
        table |= {f"{stem}re": f"{stem}er", f"{stem}res": f"{stem}ers"}
    for stem in ISE.split():
        for ending in ISE_ENDINGS.split():
            table[f"{stem}is{ending}"] = f"{stem}iz{ending}"
    for stem in LL.split():
        for ending in LL_ENDINGS.split():
            table[f"{stem}l{ending}"] = f"{stem}{ending}"
    return table | dict(pair.split() for pair in WORDS.split("|"))  # type: ignore[misc]


BRITISH_TO_AMERICAN = _table()
AMERICAN_TO_BRITISH = {american: british for british, american in BRITISH_TO_AMERICAN.items()}
BRITISH_TO_AMERICAN |= dict(pair.split() for pair in ONE_WAY.split("|"))  # type: ignore[misc]


def _respell(text: str, table: dict[str, str]) -> str:
    def other(match: re.Match[str]) -> str:
        word = match[0]
        found = table.get(word.lower().removesuffix("'s"))
        if found is None:
            return word
        found += word[-2:] if word.lower().endswith("'s") else ""
        if word.isupper() and len(word) > 1:
            return found.upper()
        if not (word.islower() or word[1:].islower()):
            return word
        return found.capitalize() if word[0].isupper() else found

    return WORD.sub(other, text)


def to_american(text: str, rng: random.Random) -> str:
    """Every British spelling in the table as an American writes it."""
    return _respell(text, BRITISH_TO_AMERICAN)


def to_british(text: str, rng: random.Random) -> str:
    """Every American spelling in the table as a Briton writes it."""
    return _respell(text, AMERICAN_TO_BRITISH)
