"""Phrases: the wording of replies. Sentences are built of parts that are drawn one by one.

Slots: {w} the writer with a verb, {c} a candidate, {x} and {y} two candidates, {p} what is said of
the candidate, {pw} what is said of the writer, {px} and {py} of two candidates, {name} the habit.

No part says anything in the words of a factor (that is for the slots), so whatever is drawn, the
claims of a reply are those that were measured. A name must come before what is said of it, or right
after it with "in" (`nanopersrm/faithful.py` reads the sentence that way).

What we left out. The parts are plain English of one register; a model that learns from them learns
this voice.
"""

WRITER = (
    "The writer has {p}",
    "The writer shows {p}",
    "The writer writes with {p}",
    "The writer keeps to {p}",
    "The writer, by habit, has {p}",
    "This writer has {p}",
    "This writer works with {p}",
    "This writer comes with {p}",
    "The exemplars have {p}",
    "The exemplars show {p}",
    "The exemplars carry {p}",
    "Found in the exemplars: {p}",
    "Habits of the writer: {p}",
    "What marks the writer: {p}",
    "Typical of the writer: {p}",
    "Seen in the exemplars: {p}",
    "Throughout the exemplars: {p}",
    "First the writer: {p}",
    "Traits of this writer: {p}",
    "The hand of this writer: {p}",
    "Reading the exemplars, one meets {p}",
    "From the exemplars: {p}",
)
WRITER_MORE = (
    "Also typical of the writer: {p}",
    "The writer also has {p}",
    "The exemplars also show {p}",
    "There is more in the exemplars: {p}",
    "To this the writer adds {p}",
    "Besides, the writer has {p}",
    "The writer goes on with {p}",
    "Beyond that the exemplars have {p}",
)
KEEPS = (
    "{c} keeps to that: {p}",
    "{c} keeps to it with {p}",
    "{c} has the same, {p}",
    "{c} also has {p}",
    "{c} too has {p}",
    "{c} does likewise with {p}",
    "{c} shares that: {p}",
    "{c} agrees, with {p}",
    "{c} follows with {p}",
    "{c} meets this with {p}",
    "{c} holds to it, with {p}",
    "the same in {c}: {p}",
    "this returns in {c}: {p}",
    "one finds it again in {c}: {p}",
    "so too {c}, with {p}",
    "what fits in {c}: {p}",
    "common ground in {c}: {p}",
    "in step with that, {c} has {p}",
    "as expected, {c} has {p}",
    "{c} stays with it and has {p}",
)
BREAKS = (
    "{c} has {p} instead",
    "but {c} has {p}",
    "yet {c} has {p}",
    "{c} breaks with that: {p}",
    "{c} goes another way with {p}",
    "{c} differs: {p}",
    "{c} departs from it with {p}",
    "{c}, however, has {p}",
    "{c}, on the other hand, has {p}",
    "{c} stands apart with {p}",
    "{c} leaves that for {p}",
    "against that, {c} has {p}",
    "it does not fit that {c} has {p}",
    "a mismatch in {c}: {p}",
    "what does not fit in {c}: {p}",
    "otherwise in {c}: {p}",
    "unlike this, {c} has {p}",
    "that is missed where {c} has {p}",
)
NEAR = (
    "{c} is not far off, with {p}",
    "{c} comes near with {p}",
    "{c} has {p}, which is near",
    "near that, {c} has {p}",
    "{c} is close, though with {p}",
    "almost so in {c}: {p}",
    "{c} falls a little to one side with {p}",
)
SIDE_KEEPS = (
    "{w} {pw}, and {c} too has {p}",
    "{w} {pw}; so does {c}, with {p}",
    "{w} {pw}; {c} keeps to it: {p}",
    "{w} {pw}, and this returns in {c}: {p}",
    "{w} {pw}; {c} agrees with {p}",
    "{w} {pw}, and {c} follows with {p}",
    "{w} {pw}; the same in {c}, {p}",
    "on {name}, {w} {pw}, and {c} has {p}",
    "in {name} they meet: {w} {pw}, {c} has {p}",
    "as to {name}, {w} {pw} and {c} also has {p}",
)
SIDE_BREAKS = (
    "{w} {pw}, but {c} has {p}",
    "{w} {pw}; {c} has {p}",
    "{w} {pw}, whereas {c} has {p}",
    "{w} {pw}, while {c} shows {p}",
    "{w} {pw}; {c} breaks with it: {p}",
    "{w} {pw}, yet {c} comes with {p}",
    "on {name}, {w} {pw} and {c} has {p}",
    "in {name} they part: {w} {pw}, {c} has {p}",
    "as to {name}, {w} {pw}, {c} has {p}",
    "where {w} {pw}, {c} has {p}",
)
SIDE_NEAR = (
    "{w} {pw}, and {c} comes near with {p}",
    "{w} {pw}; {c} has {p}, not far from it",
    "on {name}, {w} {pw}; {c} is close with {p}",
    "{w} {pw}, {c} has {p}, a small step away",
)
SIDE_WRITER = (
    "the writer has",
    "the writer shows",
    "the writer keeps to",
    "the writer writes with",
    "the exemplars have",
    "the exemplars show",
    "this writer has",
)
TWO = (
    "{x} has {px}, {y} has {py}",
    "{x} has {px}; {y} has {py}",
    "{x} shows {px}, while {y} shows {py}",
    "{x} comes with {px}, {y} with {py}",
    "{x} has {px}, and {y} has {py}",
    "in {x}, {px}; in {y}, {py}",
    "on {name}, {x} has {px} and {y} {py}",
    "as to {name}, {x} has {px}, {y} {py}",
    "{name}: {x} has {px}, {y} {py}",
    "for {name}, look at {x} with {px} and {y} with {py}",
)
TWO_SIDES = (
    "{w} {pw}; {x} has {px}, {y} {py}",
    "{w} {pw}; {x} has {px} and {y} has {py}",
    "{w} {pw}, {x} shows {px}, {y} shows {py}",
    "where {w} {pw}, {x} has {px} and {y} has {py}",
    "on {name}, {w} {pw}; {x} has {px}, {y} {py}",
)
BOTH = (
    "both candidates have {p}",
    "both candidates show {p}",
    "both texts have {p}",
    "both texts come with {p}",
    "{name} does not part them: both candidates have {p}",
    "no help from {name}, both texts have {p}",
)
BOTH_SIDES = (
    "{w} {pw}; both candidates have {p}",
    "{w} {pw}, and both texts have {p}",
    "where {w} {pw}, both candidates show {p}",
    "on {name}, {w} {pw} and both candidates have {p}",
)
FAVOURS = (
    "that speaks for {x}",
    "this favours {x}",
    "a point for {x}",
    "here {x} is closer",
    "that helps {x}",
    "{x} is the nearer there",
    "on this {x} leads",
)
PERCENT = (
    "by n-grams {c} is closer than {n}% of strangers, by factors closer than {f}%",
    "{c} is closer than {n}% of strangers by n-grams and {f}% by factors",
    "for {c}, similarity says n-grams {n}%, factors {f}%",
    "measured against strangers, {c} stands at n-grams {n}%, factors {f}%",
    "{c} comes at n-grams {n}% and factors {f}%",
    "{c} beats {n}% of strangers by n-grams, {f}% by factors",
    "on similarity, {c} is at {f}% by factors and {n}% by n-grams",
)
PERCENT_TWO = (
    "{x} is at n-grams {nx}%, factors {fx}%; {y} at n-grams {ny}%, factors {fy}%",
    "{x} is closer than {nx}% of strangers by n-grams, {y} than {ny}% by n-grams",
    "{x} beats {fx}% of strangers by factors and {nx}% by n-grams, {y} {fy}% by factors and {ny}% "
    "by n-grams",
    "n-grams {nx}% for {x}, n-grams {ny}% for {y}",
    "by factors {x} is closer than {fx}% of strangers, by factors {y} is closer than {fy}%",
)
OPENERS = (
    "",
    "",
    "",
    "so ",
    "all in all, ",
    "taken together, ",
    "on balance, ",
    "in sum, ",
    "overall, ",
    "weighing this, ",
    "with that, ",
    "in the end, ",
    "put together, ",
)
# The last sentence by digit; of several candidates by the margin.
VERDICTS = {
    9: (
        "{c} sounds like the same hand",
        "{c} is very likely by the writer",
        "{c} could stand among the exemplars",
        "there is little doubt that {c} fits",
        "{c} fits the writer closely",
        "{c} reads like one more exemplar",
    ),
    7: (
        "{c} probably fits",
        "{c} leans towards the writer",
        "{c} is more likely theirs than not",
        "{c} fits, with some doubt",
        "a fair fit for {c}",
        "{c} goes well with the exemplars",
    ),
    6: (
        "{c} fits by a little",
        "a careful yes for {c}",
        "{c} may well fit, but this is not sure",
        "{c} gets the benefit of the doubt",
        "a weak lean towards {c}",
        "{c} could be theirs",
    ),
    5: (
        "{c} could go either way",
        "an open call on {c}",
        "hard to say of {c}",
        "{c} stays in the middle",
        "no clear answer on {c}",
        "{c} is left undecided",
    ),
    4: (
        "{c} falls a little short",
        "a careful no for {c}",
        "{c} may be another hand, but this is not sure",
        "a weak lean away from {c}",
        "{c} is not quite theirs",
        "not enough for {c}",
    ),
    3: (
        "{c} probably does not fit",
        "{c} leans away from the writer",
        "{c} is more likely another hand",
        "a poor fit for {c}",
        "{c} does not go well with the exemplars",
    ),
    1: (
        "{c} reads like another writer",
        "{c} is very likely somebody else",
        "{c} would stand out among the exemplars",
        "there is little of the writer in {c}",
        "{c} does not fit the writer",
        "a different hand wrote {c}",
    ),
}
VERDICTS_TWO = {
    6: (
        "{x} is clearly the closer",
        "{x} fits and {y} does not",
        "{x} sounds like the writer, {y} like somebody else",
        "little doubt: {x}, not {y}",
        "it is {x} by a wide margin",
        "{x} belongs with the exemplars, {y} does not",
    ),
    3: (
        "{x} is the closer",
        "{x} fits better than {y}",
        "{x} over {y}",
        "{x} is more likely theirs",
        "between the two, {x}",
        "it is {x} rather than {y}",
    ),
    1: (
        "{x} by a little",
        "a narrow call for {x}",
        "{x} is perhaps the closer, but not surely",
        "a slight lean to {x} over {y}",
        "{x}, with much doubt",
        "hard to part them; {x} by a hair",
    ),
}
# Said before the verdict where the measurements do not carry it.
CLOSE_COUNTS = (
    "the counts are close; ",
    "the measures do not settle this; ",
    "the evidence is thin, so with care: ",
    "not much to go by; ",
    "the counts pull both ways; ",
)
AGAINST_COUNTS = (
    "the counts point the other way, so with much care: ",
    "the measures argue against this; still, ",
    "most of what is measured says otherwise; even so, ",
    "going by counts alone one would say the opposite; yet ",
)
JOINTS = (". ", ". ", ". ", "; ")
QUOTED = (' ("{q}")', ', as in "{q}",', ', for one "{q}",', ', like "{q}",', ' ("{q}")')
QUOTED_LAST = (' ("{q}")', ', as in "{q}"', ': "{q}"', ', for instance "{q}"', ', say "{q}"')
NAMES = {
    "pointwise": ("A", "A", "A", "candidate A", "the candidate", "the text", "this text"),
    "pairwise": ("{}", "{}", "{}", "candidate {}", "text {}"),
}
# What {name} says where the factor's own label would be read as a claim.
NAMED = {"long_words": "big words", "short_sentences": "brief sentences", "british": "spelling"}
