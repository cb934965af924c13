"""Lexicon: the word lists behind the factors. All words are in lower case, apostrophes straight.

The lists are short on purpose: common words that carry a habit, not every word that could. Where a
word belongs to two habits it is in both lists. Read next: `reading.py`, `factors.py`.
"""

import re


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


ABBREVIATIONS = _set(
    "mr. mrs. ms. dr. prof. rev. hon. gen. col. capt. lt. sgt. st. sen. gov. messrs. jr. sr. "
    "vs. v. cf. etc. fig. vol. pp. ed. approx. dept. inc. ltd. co. corp. jan. feb. aug. sept. "
    "oct. nov. dec."
)
I_WORDS = _set("i me my mine myself i'm i've i'll i'd im ive")
WE_WORDS = _set("we us our ours ourselves we're we've we'll we'd")
YOU_WORDS = _set("you your yours yourself yourselves you're you've you'll you'd u ur")
THEY_WORDS = _set(
    "he him his himself she her hers herself they them their theirs themselves he's she's "
    "they're they've they'll they'd he'd she'd he'll she'll"
)
PRONOUNS = I_WORDS | WE_WORDS | YOU_WORDS | THEY_WORDS | _set("it it's its this that these those")
CONJUNCTIONS = _set("and but or so yet nor because for though although however")
SUBORDINATORS = _set(
    "because although though while whereas if unless until since when whenever where wherever "
    "which who whom whose that whether after before as lest provided"
)
HEDGES = _set(
    "perhaps maybe possibly probably seemingly apparently arguably presumably somewhat rather "
    "fairly likely unlikely seem seems seemed appear appears appeared suggest suggests "
    "suggested tend tends might may roughly approximately partly largely generally usually "
    "broadly conceivably potentially"
)
HEDGE_PHRASES = re.compile(
    r"\b(?:kind of|sort of|a bit|i think|i suppose|i guess|i believe|in a way|more or less|"
    r"to some extent)\b"
)
BOOSTERS = _set(
    "very really extremely absolutely totally completely definitely certainly clearly "
    "obviously always never truly utterly incredibly entirely highly deeply indeed surely "
    "undoubtedly super literally simply perfectly amazing fantastic incredible every"
)
INFORMAL = _set(
    "ok okay yeah yep nope lol omg gonna wanna gotta kinda sorta hey hi wow stuff guys cool "
    "awesome tbh idk btw haha ur u cuz cos ya yay oh ugh pls thx mum mom kid kids folks dude "
    "bro ngl"
)
NEGATIONS = _set(
    "not no never none nothing nobody nowhere neither nor cannot without dont cant wont"
)
DUTIES = _set("must shall should ought need needs needed required requires")
BE_FORMS = _set("am is are was were be been being isn't aren't wasn't weren't")
PARTICIPLES = _set(
    "given taken made done seen known shown written held kept left lost found told brought "
    "built bought sent spent paid put set cut drawn driven thrown grown chosen spoken broken "
    "sold taught caught thought heard read led met won begun born worn torn sworn forgotten "
    "hidden beaten eaten fallen"
)
LATINATE = tuple(
    sorted(
        _set(
            "tion tions sion sions ment ments ity ities ance ence ances ences ancy ency ive ous "
            "ify ized ised ize ise ation ual ial able ible ular ate ates ated ating"
        )
    )
)
NOT_ADVERBS = _set(
    "family reply supply apply july italy assembly imply belly jelly bully folly friendly "
    "lovely silly lonely lively elderly ugly holy ally rely multiply comply daily weekly "
    "monthly likely unlikely"
)
BARE_CONTRACTIONS = _set(
    "dont cant wont didnt doesnt isnt wasnt arent couldnt wouldnt shouldnt havent hasnt im "
    "ive thats theyre youre gonna wanna gotta"
)
IS_CONTRACTIONS = _set(
    "it's that's he's she's what's there's here's let's who's where's how's when's everyone's "
    "nobody's something's"
)
CONTRACTED = ("n't", "'m", "'re", "'ve", "'ll", "'d")
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
