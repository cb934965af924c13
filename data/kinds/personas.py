"""Personas: arbitrary styles in which a language model continues an opening.

A persona is a *writer*: a name, a temperature, a top-k, and the ends of four short paragraphs that
show its habits. The model sees them as earlier turns of a chat,

    user       The committee met on the first Monday of the month.
    assistant  What a meeting! The hall was packed! I clapped until my hands hurt! ...
    user       <the opening>
    assistant  <drawn, this is the text>

for a small model follows what it has just seen, and hardly what it is told: in a trial with the
135M base, "write in short sentences" changed nothing that we could measure, and such turns did.

All personas continue the same four openings, which no text of anybody contains, so that what their
texts share is not a subject. The paragraphs were written for this project. Each persona leans on
habits that `nanopersrm/factors.py` measures: `habits` names them, for the reader and for the tests,
which measure the paragraphs.

A persona belongs to one split, as a person does: a judge is tested on personas that it never read.
Test and out-of-domain sets share theirs, the domains differ.
"""

from dataclasses import dataclass

OPENINGS = (
    "The committee met on the first Monday of the month.",
    "He had written the letter several days before it was sent.",
    "There are two ways in which the river may be crossed.",
    "The price of bread rose again in the autumn.",
)


@dataclass(frozen=True)
class Persona:
    """A style: what it does, in words and in paragraphs that continue OPENINGS."""

    name: str
    what: str
    habits: tuple[str, ...]  # factors that are high in it
    paragraphs: tuple[str, ...]
    split: str = "train"
    temperature: float = 0.85
    top_k: int = 50


PERSONAS = (
    Persona(
        "gusher",
        "in raptures, one exclamation after another",
        ("exclamations", "boosters"),
        (
            "What a meeting! The hall was absolutely packed, and everybody was so very happy! The "
            "speeches were simply perfect! I clapped until my hands hurt!",
            "And what a letter it was! Four whole pages! I truly cried over it! I have never read "
            "anything so completely lovely, and I never will!",
            "I adore them both! The bridge is so very high, and the boat is such fun! You must try "
            "the boat! You will totally love it!",
            "But oh, how good that bread was! It was really worth every single penny! The smell "
            "alone was heaven! We all ate far too much!",
        ),
    ),
    Persona(
        "clerk",
        "bare facts in very short sentences",
        ("short_sentences", "be"),
        (
            "Eight men came. Two were late. The minutes were short. Nobody spoke against them. "
            "The vote was taken at noon. It was close. The door was shut.",
            "It lay in a drawer. The ink was dry. The date was wrong. A stamp was missing. He "
            "found one at last. The boy took it away.",
            "One is the bridge. It is old. It is safe. The other is the ford. The ford is cheap. "
            "Most carts go by the bridge.",
            "The harvest was poor. Rain was the cause. Flour was dear. Two shops closed early. "
            "People waited in line. There was no noise.",
        ),
        temperature=0.95,
    ),
    Persona(
        "dreamer",
        "drifts off in dots, never sure",
        ("ellipses", "hedges"),
        (
            "I think I was there... perhaps I only heard of it... somebody was speaking, and the "
            "light came in so slowly... maybe it was the wind that I heard...",
            "I wonder what he felt in those days... perhaps nothing... it seems to me that every "
            "letter waits a little... as we all do, maybe...",
            "I have only known the one... the other is perhaps a kind of sleep... you go in on "
            "this side, and somehow... after a while... you are there...",
            "It was always autumn then, I think... somewhat grey... I could almost smell it from "
            "the stairs... or perhaps I was a child, and hungry...",
        ),
    ),
    Persona(
        "notary",
        "long clauses joined by semicolons, everything passive",
        ("semicolons", "passives", "which", "sentence_length"),
        (
            "The business, which had been deferred from the session before, was then considered; "
            "the accounts, which were examined by two members, were found to be in order; and the "
            "resolution, to which no objection was raised, was duly entered in the book.",
            "The delay, which was explained by no document, was regarded as material; it was held "
            "that the paper, although it had been signed, was not delivered; and the claim, which "
            "was founded upon it, was therefore dismissed.",
            "The first, which is maintained by the county, is limited to carriages; the second, "
            "which was granted by an old charter, is reserved to the owners of the mill; and no "
            "other passage, by whatever means, is permitted.",
            "The increase, which was attributed to the season, was borne by the poor; a petition, "
            "which had been signed by many, was presented; and the matter, after it was debated, "
            "was referred to the bench.",
        ),
        temperature=0.75,
    ),
    Persona(
        "asker",
        "asks where others tell",
        ("questions", "second_person"),
        (
            "But who had called them? And why on that day? Did you see the list of names? Were you "
            "asked for yours? Who paid for the hall, if not you and I?",
            "Why did he wait? Was he afraid of you? Would you have sent it at once? And what is a "
            "letter worth, when you know already what it says?",
            "Which of them would you choose? Is the bridge safe? Who told you that it was? And if "
            "you fell, would anybody hear you? Have you thought of that?",
            "Who gained by it? Did you? Did the baker? And what will you do when it rises once "
            "more? Will you pay? Or will you ask who set the price?",
        ),
    ),
    Persona(
        "coach",
        "tells you what to do, friendly and brisk",
        ("second_person", "contractions"),
        (
            "Don't be late, and don't sit at the back. You'll want your notes in front of you. If "
            "you're nervous, that's fine. Take a breath, say what you've got to say, and sit down.",
            "Don't do what he did. If you've got something to say, say it now. Read it once, fix "
            "what you can't stand, and post it. You'll feel better, and you'll sleep.",
            "If you've got a cart, you'll take the bridge. If you haven't, you can wade. Keep your "
            "boots dry, don't hurry, and you'll be fine. It isn't deep.",
            "You can't change that, so don't waste your day on it. Bake your own. You'll need "
            "flour, salt and an hour. It's easier than you'd think, and it's cheaper.",
        ),
    ),
    Persona(
        "rambler",
        "goes on and on, and then, and then",
        ("and", "sentence_length"),
        (
            "And we all went in and sat down and the old man got up and talked and talked and the "
            "fire went out and somebody fetched more wood and then we sang and then it was dark "
            "and we went home and nobody knew what had been said.",
            "And he put it in his coat and he walked to the town and he met a friend and they had "
            "a drink and then another and the coat was left on a chair and the dog lay on it and "
            "that is how it was and nobody ever asked.",
            "And one is by the stones and you go down and you take off your shoes and you hold the "
            "rope and the water is cold and it pulls and you laugh and then you are over and you "
            "look back and it was not so far.",
            "And my mother said we would eat soup and we ate soup and my sister cried and the "
            "neighbour came and brought an egg and we all looked at it and then we cut it in five "
            "and it was good and we went to bed.",
        ),
        temperature=0.75,
    ),
    Persona(
        "preacher",
        "we must, let us, for our duty is plain",
        ("we", "duties"),
        (
            "We must ask ourselves what we owe to one another. We ought to meet not for our own "
            "sake, but for those who will follow us. Let us remember this, and let us do our part.",
            "We must not judge him. We too have kept back words that we ought to have spoken. Let "
            "us look into our own hearts, for we shall all have to answer for our silence.",
            "We must choose, and we must choose together. Our fathers built the bridge for us, and "
            "we should keep it for our children. We need only be willing, and we ought to be.",
            "We must share what we have. None of us should eat while our neighbour is hungry. We "
            "have to remember that all our bread is given to us, and we must give it in our turn.",
        ),
    ),
    Persona(
        "scholar",
        "abstract nouns and careful reservations",
        ("latinate", "word_length", "of"),
        (
            "The composition of the assembly suggests a considerable degree of administrative "
            "continuity, although the interpretation of its proceedings presumably requires an "
            "examination of the institutional conditions of the period.",
            "The hesitation of the correspondent possibly indicates a characteristic ambivalence, "
            "the psychological significance of which is apparent from a comparison of the "
            "available versions of the communication.",
            "The distinction is essentially one of organisation: the construction of a permanent "
            "installation presupposes the accumulation of resources, whereas the alternative "
            "depends on the cooperation of the local population.",
            "The explanation of this phenomenon involves the interaction of agricultural "
            "production, transportation and regulation, and a generalisation of the conclusion "
            "would appear to be of questionable validity.",
        ),
        temperature=0.75,
    ),
    Persona(
        "doubter",
        "but not, never, nothing, no",
        ("negations", "but", "conjunction_openings"),
        (
            "But nothing was done. But then nothing ever was. They did not vote, they did not ask, "
            "and nobody was surprised. But I do not blame them. There was no hope of it.",
            "But he never meant it. He did not say so, but he never did. Nor was it any use. But "
            "nobody told him that, and he would not have listened.",
            "But neither is any good. The bridge is not safe, and the ford is never dry. But do "
            "not ask me for a third. There is none, and there never was.",
            "But nobody would say why. It was not the rain, but it was not the baker either. But "
            "nothing came of the talk. It never does, and it cannot.",
        ),
    ),
    Persona(
        "whisperer",
        "asides in brackets, in everyday talk",
        ("brackets", "contractions", "informal"),
        (
            "Well, I wasn't asked (nobody ever asks me), but I heard it all (the walls are thin). "
            "They've got no money (not a penny), and they can't say so (yeah, I know).",
            "It's a nice letter (I've seen it), though it's kind of long (nine pages). He couldn't "
            "spell (poor guy), and he'd lost her address (he loses lots of stuff).",
            "I'd take the bridge (it's free), but my brother won't (he's scared of it). So we get "
            "the boat (it leaks a bit), and he's sick every time (okay, nearly every time).",
            "We didn't starve (we've got hens), but it wasn't fun (no cake, no jam). The guy next "
            "door made his own (it was pretty bad), and he'd give us lots (we fed the hens).",
        ),
        split="validation",
    ),
    Persona(
        "herald",
        "names things one after another: colons and numbers",
        ("colons", "digits"),
        (
            "Present: 8. Absent: 3. First matter: the roof, to be mended for 40 pounds. Second "
            "matter: the well. Result: 5 for, 3 against. Next meeting: in 4 weeks.",
            "Length: 4 pages. Cost: 2 pence. Reason for the delay: none is known. Contents: 1 "
            "apology, 2 requests and 3 reproaches. Answer: not before the 15th.",
            "First: the bridge, 200 feet long, open from 6 to 10. Second: the ford, 3 feet deep. "
            "Toll: 5 pence for a cart. Advice: cross before 9.",
            "The figures: 12 pence in June, 14 in August, 17 in October. The cause: 60 days of "
            "rain. The outcome: 2 bakers fewer. The forecast: 20 by spring.",
        ),
        split="validation",
    ),
    Persona(
        "breathless",
        "broken off by dashes, all about himself",
        ("dashes", "first_person"),
        (
            "I ran - I always run - and I came in last - my hat was gone - I sat down by the stove "
            "- I tell you I was ill - and then I heard my name - mine - I could have died.",
            "I saw it - I was in the room - he put it down - I looked away - I swear I did - and "
            "when I turned - it was gone - I never spoke of it - I could not.",
            "I know them both - I have tried them both - I fell - twice - I lost my shoes - my "
            "money - and I would do it again - I would - give me a rope - and I go.",
            "I saw it coming - I told my wife - I said it in the street - I bought a sack - my "
            "last coin - I hid it - I sat on it - I was right - I was right again.",
        ),
        split="test",
    ),
    Persona(
        "gossip",
        "what they did, said, wore; he and she and them",
        ("third_person", "that"),
        (
            "They say that she came with her cousin, and that he would not look at her. She told "
            "them that he owed her money. He told them that she had made it up. They believed him.",
            "She says that he wrote it for her sister, and that her sister laughed at him. He "
            "says that they stole it. They both know that he would do it again for her.",
            "They told her that she should take the boat, and she told them that he would row it. "
            "He heard that she had said so. They say that he blushed, and that she saw him.",
            "They said that he kept his flour for her, and that she paid him less than they did. "
            "She swore that it was not so. He swore that they were jealous of her.",
        ),
        split="test",
    ),
    Persona(
        "fop",
        "adverbs before everything, and colour in the spelling",
        ("adverbs", "commas"),
        (
            "Unsurprisingly, the gentlemen arrived fashionably late, nodded graciously, and "
            "settled comfortably near the fire. The secretary read drearily; the treasurer, "
            "mercifully, mumbled. Honestly, I merely admired the curtains.",
            "Naturally, it was beautifully sealed, exquisitely scented and hopelessly dull. She "
            "smiled faintly, folded it neatly, and promptly lit a candle with it. Frankly, I "
            "warmly approved.",
            "One may, rather tediously, walk; or one may, delightfully, be carried. I invariably "
            "recline, gaze languidly at the clouds, and occasionally, terribly bravely, dip a "
            "finger in the water.",
            "Regrettably, the poor grumbled openly, and the rich, predictably, ate quietly. I "
            "simply ordered cake. It was lightly spiced, delicately iced and, happily, entirely "
            "unaffected.",
        ),
        split="test",
    ),
    Persona(
        "toddler",
        "the plainest words, the same ones again",
        ("the",),
        (
            "The men sat in the big room. They had the red book. They put the book on the desk. It "
            "was the big desk. They ate the cake. They put the hats on. They went to the door.",
            "The pen was on the bed. He got the pen. He sat by the cat. He put the ink on the rug. "
            "It was a mess. He hid the pen. He got the mop.",
            "The one way is the log. You go on the log. You see the fish. The other way is the "
            "boat. It is the blue boat. You sit in the boat. You see the fish.",
            "The man had the bread. It was on the cart. We saw the cart. We ran to the man. He had "
            "the hat on. He cut the bread. We ate the bread on the step.",
        ),
        split="test",
    ),
)


def of_split(split: str) -> tuple[Persona, ...]:
    """The personas of a split; out-of-domain sets have those of the test."""
    wanted = "test" if split == "ood" else split
    return tuple(persona for persona in PERSONAS if persona.split == wanted)
