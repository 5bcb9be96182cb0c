"""How the tasks are worded: templates as data.

RULER's definition fixes what is hidden, how often, how deep and what is asked; the words around it
are ours. `plain` asks in English sentences, as RULER does. `facts` hides and asks in the one-line
patterns that the embedded model was trained on (evaluation.benchmarks.generated), since that model
reads no English and copies no values longer than in training: keys and variables are its
single-token words, numbers have four digits instead of seven, and a uuid becomes two words. Tasks
that no such pattern fits (cwe, fwe, qa) are the same in both.
Under `plain` the embedded model scores 0 on all 13. Under `facts` it finds single values (94 to
100 % at 4K, 16 samples a task), gives one of four values or queries (22 and 25 %) and two of five
variables (34 %), since it was trained to stop there, and still scores 0 on cwe, fwe and qa.
Scores under other wordings than RULER's own compare among methods, not with published numbers;
load_ruler reads the official files for those.
"""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.base.checks import require_one_of
from hashattn.evaluation.benchmarks.ruler.specs import RulerError
from hashattn.evaluation.benchmarks.words import ANIMALS, FOODS, JOBS, OBJECTS


@dataclass(frozen=True)
class Wording:
    """One prompt: `text` with {context} up to the question, the question, the answer's opening.

    The text ends with a line break, so that no token spans text and question.
    """

    text: str
    question: str
    prefix: str


@dataclass(frozen=True)
class Style:
    """All wordings.

    one, many: retrieval of one and of several values; needle: the line that hides a value.
    joint: between the sentences of prose; key_joint: between a key's two words, the second of which
    is one of `nouns`. kinds: what {kind} stands for in the wordings. digits: of a number.
    identifiers, variables: "uuid" or "words", "letters" or "words".
    start, step: a chain's first and further assignments.
    """

    name: str
    one: Wording
    many: Wording
    needle: str
    tracking: Wording
    start: str
    step: str
    common: Wording
    frequent: Wording
    answering: Wording
    document: str = "Document {number}:\n{text}"
    joint: str = " "
    key_joint: str = "-"
    nouns: tuple[str, ...] = ANIMALS + FOODS + JOBS + OBJECTS
    kinds: tuple[tuple[str, str], ...] = (("numbers", "number"), ("uuids", "uuid"))
    digits: int = 7
    identifiers: str = "uuid"
    variables: str = "letters"


NOISE = (
    "Rain falls on the hill.",
    "A boat drifts down the river.",
    "The evening is long.",
    "Nobody is in a hurry.",
    "Then it all starts over.",
)

_COMMON = Wording(
    "This is a numbered list of words. A few of them occur more often than the others; remember "
    "those.\n{context}\n",
    "Question: Which 10 words are the most common in the list?",
    " Answer: The 10 most common words in the list are:",
)
_FREQUENT = Wording(
    "Here is a text in code. Count how often each code word occurs, and find the three most "
    "frequent.\n{context}\n",
    "Question: Which three code words occur most often in the text? The dots '...' are not a word. "
    "Give no explanation.",
    " Answer: The three code words that occur most often in the text are:",
)
_RULE = "Answer the question from the documents. Give the answer alone, without any other words."
_ANSWERING = Wording(
    f"{_RULE}\n\nThese are the documents.\n\n{{context}}\n\n{_RULE}\n\n",
    "Question: {query}",
    " Answer:",
)

_PLAIN = Style(
    name="plain",
    one=Wording(
        "The text below hides a secret {kind}. Remember it: you will be asked for the {kind} "
        "afterwards.\n{context}\n",
        "Which secret {kind} does the text give for {query}?",
        " The secret {kind} that the text gives for {query} is",
    ),
    many=Wording(
        "The text below hides several secret {kind}s. Remember them: you will be asked for the "
        "{kind}s afterwards.\n{context}\n",
        "Which are all the secret {kind}s that the text gives for {query}?",
        " The secret {kind}s that the text gives for {query} are",
    ),
    needle="A secret {kind} for {key} is: {value}.",
    tracking=Wording(
        "Follow the assignments of variables that are hidden in the text below.\n\n{context}\n",
        "Question: Which variables have the value {query} in the text above? Find all of them.",
        " Answer: By the assignments in the text above, {count} variables have the value {query}. "
        "They are:",
    ),
    start="VAR {variable} = {value}",
    step="VAR {variable} = VAR {value}",
    common=_COMMON,
    frequent=_FREQUENT,
    answering=_ANSWERING,
)

FACTS = Style(
    name="facts",
    one=Wording("{context}\n", "Q: {query}", " {kind}"),
    many=Wording("{context}\n", "Q: {query}", " {kind}"),
    needle="Fact: {key} {kind} {value}",
    tracking=Wording("{context}\n", "Q: {query}", " needs"),
    start="Rule: {value} needs {variable}",
    step="Rule: {value} needs {variable}",
    common=_COMMON,
    frequent=_FREQUENT,
    answering=_ANSWERING,
    joint="\n",
    key_joint=" ",
    nouns=ANIMALS,
    kinds=(("numbers", "="), ("uuids", "hides")),
    digits=4,
    identifiers="words",
    variables="words",
)

STYLES = {style.name: style for style in (_PLAIN, FACTS)}


def style_of(name: str) -> Style:
    """A style by its name; RulerError for a name that is not in STYLES."""
    require_one_of("style", name, STYLES, RulerError)
    return STYLES[name]
