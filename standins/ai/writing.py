"""What the stand-in writes: articles, replies, continuations, revisions and image prompts, in readable English.

Everything is a pure function of what was asked: the same request gives the same text.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

FAULT_MARKER = re.compile(r"\[\[fault:([^\[\]]*)\]\]")


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOPICS = (
    re.compile(r"\b(?:topic|subject|title|brief)\s*:\s*[\"“']?([^\n.,;:!?\"”']{3,60})", re.IGNORECASE),
    re.compile(r"\b(?:about|regarding)\s+(?:the\s+)?[\"“']?([^\n.,;:!?\"”']{3,60})", re.IGNORECASE),
)
# Five letters, or four and a capital: the likely nouns.
KEYWORD = re.compile(r"\b(?:[A-ZÀ-Þ][^\W\d_]{3,23}|[^\W\d_]{5,24})\b")
TOPIC_END = re.compile(r"\s(?:in an?|with|using|that|which|aimed at|to be)\s|\[\[", re.IGNORECASE)
# Words that say what to do rather than what about.
STOPWORDS = _names(
    "about after again also article because been before being blog both brief caption continue could create "
    "does draft each email exactly five following four friendly from give have headline hello into just know "
    "like long make makes more most much must newsletter only other over paragraph paragraphs please point "
    "points post professional prompt rewrite sentence sentences short should some subject such summarise "
    "summarize tell text than thank thanks that their them then there these they think this those three title "
    "tone topic tweet under very want well were what when where which while will with word words would write "
    "your"
)
# Words that end a phrase, next to those above.
SMALL_WORDS = _names(
    "a am an and any are as at be but by can did do for get got had has he her his how i if in is it its may me "
    "my no not of off ok okay on or our out she so the to too up us was we who why yes you"
)
SPARE_KEYWORDS = (
    "patience",
    "good questions",
    "small details",
    "steady habits",
    "the right moment",
    "local advice",
)

OPENINGS = (
    "Few things reward attention as quietly as {topic}. What looks simple from a distance turns out to have "
    "its own rhythm, its own vocabulary and its own small surprises. This piece looks at {topic} the way a "
    "curious neighbour would: where it begins, what makes it worth the effort, and how {a} and {b} fit into "
    "the picture.",
    "Ask three people about {topic} and you will hear three different stories. One will mention {a}, "
    "another will insist on {b}, and the third will simply smile. All of them are right. Here is a short "
    "guide to {topic} that keeps the useful parts, leaves out the jargon and ends with something to try "
    "today.",
    "There has never been a better moment to look again at {topic}. Interest is growing, good information "
    "is easy to find, and the first steps cost little more than time. Between {a} and {b} lies most of what "
    "matters, and the next few paragraphs walk through it at an easy pace.",
)
SECTIONS = (
    (
        "Why {topic} matters now",
        "The interest in {topic} is not a passing fashion. It answers a wish for things that are made with "
        "care and can be explained in plain words. One reason is {a}, another is {b}: both make people slow "
        "down, compare and choose on purpose instead of by habit.",
    ),
    (
        "Where to begin with {a}",
        "Start small. Pick one aspect, {a} for instance, and give it a week of honest attention. Keep "
        "notes, however short, because the second attempt is where the learning happens. By the time {b} "
        "enters the picture, the basics of {topic} will feel familiar and the next decision will come "
        "easily.",
    ),
    (
        "The role of {b}",
        "Much of what people admire in {topic} comes down to {b}. It is rarely the first thing anyone "
        "notices, yet when it is missing the whole impression falls flat. Those who have done this for "
        "years treat {b} as a craft in its own right and come back to it whenever something feels out of "
        "balance.",
    ),
    (
        "What beginners overlook",
        "The most common mistake is to hurry. With {topic}, a little preparation saves a lot of repair, and "
        "{c} is the place where haste shows first. Set aside a quiet hour, gather what you need before you "
        "start, and ask someone with experience how they handle {a}. Their answer is usually shorter than "
        "any manual.",
    ),
    (
        "A look behind the scenes",
        "Talk to the people who live with {topic} every day and a pattern appears. They care about {c}, "
        "they are relaxed about trends, and they measure success over seasons and not over days. What "
        "sounds like modesty is really a method: change one thing at a time, watch the effect on {b}, and "
        "keep only what works.",
    ),
    (
        "How {a} and {c} work together",
        "It helps to think of {a} and {c} as partners. The first sets the direction, the second keeps "
        "things honest. When both are in place, {topic} stops being a list of rules and becomes something "
        "you can adapt to your own taste, your own budget and the time you really have.",
    ),
)
LISTS = (
    "## Three things to try\n\n- Spend ten minutes with {a} before making any decision about {topic}.\n- "
    "Write down what you expect of {b}, and compare it with what you find.\n- Share the result with someone "
    "who sees {topic} for the first time.",
    "## A short checklist\n\n- Is it clear what {topic} should achieve, and for whom?\n- Has {a} been given "
    "enough time?\n- Does {c} still fit the plan, or is it there out of habit?",
)
CLOSINGS = (
    "In the end {topic} is an invitation. Take what is useful here, leave the rest, and let {a} show you "
    "the next step. The best stories about it are still to be told, and one of them may well be yours.",
    "None of this needs to happen at once. Choose one idea, give it a fair chance and see how {topic} "
    "changes when {b} gets the attention it deserves. If it works, tell a friend; if it does not, try again "
    "next week.",
)

# Sentences that finish one which was cut off, and carry on from there.
CUT_OFF_ENDINGS = (
    "and that is where {a} makes the difference.",
    "which is easier than it sounds, as {b} may show.",
    "and little by little the rest follows.",
)

GREETINGS = (
    "Hello! I am glad to help with whatever you are writing. Tell me what it is about and who will read it, and we "
    "can start with an outline or go straight to a first version.",
    "Hello! What are you working on today? A sentence or two is enough to begin with: the topic, the readers and "
    "the feeling that should stay with them.",
)
THANKS = (
    "You are welcome! If anything about it does not sit right yet, tell me which part, and I will try another way.",
    "My pleasure. Whenever you would like to take it further, just say where to pick it up.",
)
REPLY_OPENINGS = (
    "Good question. With {topic}, the short answer is: start with {a}, and let the rest follow from there. Most of "
    "the trouble people have comes from wanting everything at once.",
    "There are several ways to look at {topic}, but one of them is helpful almost every time: ask what {a} can "
    "add. Once that is clear, the choices become smaller and easier.",
    "In my view {topic} rewards a little patience. Give {a} some room before you decide anything, and keep what "
    "still seems right the next morning.",
)
REPLY_DETAILS = (
    "If you want something practical: set aside half an hour, write down three things you already know about "
    "{topic}, and mark the one you would miss most. That is your angle. Then look at {b} and see what can go.",
    "A common mistake is to treat {a} and {b} as rivals. They support each other: the first gives {topic} its "
    "direction, the second keeps it honest. When in doubt, cut a sentence rather than add one.",
    "Think of somebody who sees {topic} for the first time. They need one clear picture and one reason to care. "
    "{A} can be the picture; the reason is usually closer to {b} than one expects.",
)
REPLY_ENDINGS = (
    "Shall I draft a short version, or would you rather see a list of options for {topic} first?",
    "If you tell me who the readers are, I can make this more specific.",
    "Which of these sounds closest to what you have in mind?",
)
EARLIER = "This fits what you said before about {earlier}: the two can share the same idea."

IMAGE_PROMPTS = (
    "A {mood} scene that makes {topic} the clear centre of attention, seen {view}. {Light} falls across the picture "
    "and brings out the texture of {a}, while {b} stands a little out of focus in the background. The palette is "
    "{palette}, with one strong accent that leads the eye. {Style}, fine detail, generous empty space on one side, "
    "no lettering and no logos.",
    "{Style} of {topic}: {a} in the foreground, close enough to touch, and {b} suggested behind it in soft shapes. "
    "The view is {view}, the mood {mood}. {Light} gives the surfaces depth, the colours are {palette}, and small "
    "imperfections keep it natural. A balanced composition with a calm horizon, no text in the picture.",
)
MOODS = ("quiet and hopeful", "warm and inviting", "bright and playful", "calm and thoughtful", "bold and energetic")
VIEWS = ("from slightly above", "at eye level", "through a wide lens", "in a close-up", "from a low angle")
LIGHTS = ("soft morning light", "golden evening light", "cool window light", "the glow after rain", "clear noon light")
PALETTES = (
    "sage green and cream",
    "deep blue and copper",
    "terracotta and sand",
    "plum and pale gold",
    "teal and coral",
)
STYLES = (
    "natural photograph",
    "gentle watercolour",
    "modern flat illustration",
    "detailed ink drawing",
    "oil painting",
)

# How a text is revised, by a word in what is asked for; the first that fits.
REVISIONS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"\b(?:{words})", re.IGNORECASE))
    for kind, words in (
        ("expand", "expand|longer|lengthen|detail|elaborat|more about|add "),
        ("correct", "grammar|spelling|correct|proofread|typo|mistake"),
        ("shorten", "shorter|shorten|concis|brief|trim|condens|tight|half|cut"),
    )
)
EXPANSIONS = (
    "A small example makes this clearer: think of the first time you came across it, and of what you would have "
    "liked to know then.",
    "This is worth a second look, because the details decide how it feels in everyday use.",
    "There is a practical side to it as well, and it is simpler than it may seem at first.",
)
# Other words for the same thing: what a revision that has no other orders changes.
REWORDINGS = {
    "because": "since",
    "begin": "start",
    "big": "large",
    "easy": "simple",
    "good": "fine",
    "great": "excellent",
    "help": "support",
    "important": "essential",
    "many": "plenty of",
    "new": "fresh",
    "often": "time and again",
    "quick": "swift",
    "show": "reveal",
    "shows": "reveals",
    "small": "little",
    "start": "begin",
    "uses": "makes use of",
    "very much": "a great deal",
}
REWORDED = re.compile(rf"\b(?:{'|'.join(REWORDINGS)})\b", re.IGNORECASE)
REWORDING_STARTS = ("Put simply, ", "In other words, ", "To put it plainly, ")
ORDINARY_START = re.compile(r"(?:An?|The|It|This|That|These|There|We|You|People|Many|Most|Some|If|When|With)\b")
TAGGED_TEXT = re.compile(r"^[ \t]*<text>[ \t]*\n(.*)\n[ \t]*</text>[ \t]*$", re.DOTALL | re.MULTILINE)
TAGGED_SELECTION = re.compile(r"<selection>\n?(.*?)\n?</selection>", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+")


def write(system: str, turns: Sequence[Turn]) -> str:
    """What the model answers: `system` says what kind of text is wanted, the last turn of the user what about."""
    prompt = last_prompt(turns)
    if re.search(r"\bcontinue exactly where\b", prompt, re.IGNORECASE) and any(t.role == "assistant" for t in turns):
        return continue_text(system, turns)
    wanted = system.lower()
    if "answer with the revised text alone" in wanted:
        return revise(prompt, system)
    if "image prompt" in wanted:
        return write_image_prompt(prompt)
    if "conversation" in wanted:
        return write_reply(turns)
    return write_article(prompt)


def last_prompt(turns: Sequence[Turn]) -> str:
    """The newest message of the user, which decides what is answered and what fails."""
    return next((turn.text for turn in reversed(turns) if turn.role == "user"), "")


def write_article(prompt: str) -> str:
    """An article in Markdown, 250 to 400 words, about what the prompt is about; a pure function of it."""
    prompt = FAULT_MARKER.sub("", prompt)
    dice = _dice(prompt)
    headings = dice.sample(SECTIONS, k=3)
    parts = [
        "# {Topic}",
        dice.choice(OPENINGS),
        *(f"## {heading}\n\n{paragraph}" for heading, paragraph in headings),
        dice.choice(LISTS),
        dice.choice(CLOSINGS),
    ]
    return "\n\n".join(parts).format_map(_find_words(prompt))


def continue_text(system: str, turns: Sequence[Turn]) -> str:
    """The text that follows the last one of the assistant, without starting anew.

    When that was the beginning of what the stand-in writes for the same request, it is the rest of it.
    """
    at = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    written = turns[at].text
    whole = write(system, turns[:at])
    if whole.startswith(written) and whole[len(written) :].strip():
        return whole[len(written) :]
    first_prompt = next((turn.text for turn in turns if turn.role == "user"), "")
    words = _find_words(FAULT_MARKER.sub("", first_prompt))
    dice = _dice(written)
    paragraphs = [paragraph for _, paragraph in dice.sample(SECTIONS, k=2)] + [dice.choice(CLOSINGS)]
    text = "\n\n".join(paragraphs).format_map(words)
    if not written or written.endswith(("\n", " ")):
        return text
    if written.rstrip().endswith((".", "!", "?", "…", ":")):
        return "\n\n" + text
    return " " + dice.choice(CUT_OFF_ENDINGS).format_map(words) + "\n\n" + text


def write_reply(turns: Sequence[Turn]) -> str:
    """A reply in a conversation: one to three paragraphs about what the user asked last, or before."""
    asked = [FAULT_MARKER.sub("", turn.text).strip() for turn in turns if turn.role == "user"] or [""]
    dice = _dice("\n".join(asked))
    keywords = _keywords(asked[-1])
    if not keywords and re.match(r"(?:hello|hi|hey|good (?:morning|evening|day))\b", asked[-1], re.IGNORECASE):
        return dice.choice(GREETINGS)
    if not keywords and re.search(r"\bthank", asked[-1], re.IGNORECASE):
        return dice.choice(THANKS)
    about = next((text for text in reversed(asked) if _keywords(text)), asked[-1])
    a, b = dice.sample(SPARE_KEYWORDS, k=2)
    words = {**_find_words(about), "a": a, "A": _capitalised(a), "b": b}
    parts = [dice.choice(REPLY_OPENINGS)]
    if len(asked[-1].split()) > 5:
        parts.append(dice.choice(REPLY_DETAILS))
    parts.append(dice.choice(REPLY_ENDINGS))
    earlier = next((_find_words(text)["topic"] for text in asked[:-1] if _keywords(text)), words["topic"])
    if earlier != words["topic"]:
        parts[-1] = f"{EARLIER.format(earlier='{earlier}')} {parts[-1]}"
    return "\n\n".join(parts).format_map({**words, "earlier": earlier})


def write_image_prompt(prompt: str) -> str:
    """One paragraph that describes an image of what the prompt is about."""
    prompt = FAULT_MARKER.sub("", prompt)
    dice = _dice(prompt)
    light, style = dice.choice(LIGHTS), dice.choice(STYLES)
    scene = {"mood": dice.choice(MOODS), "view": dice.choice(VIEWS), "palette": dice.choice(PALETTES)}
    words = {**_find_words(prompt), **scene, "Light": _capitalised(light), "Style": _capitalised(style)}
    return dice.choice(IMAGE_PROMPTS).format_map(words)


def revise(prompt: str, system: str = "") -> str:
    """The text that the prompt carries between tags, or the selection in it, revised as the rest of it asks for.

    Always another text than the one given: shorter, longer, corrected or in other words.
    """
    carried = TAGGED_TEXT.search(prompt)
    selection = TAGGED_SELECTION.search(carried[1] if carried else prompt) or TAGGED_SELECTION.search(prompt)
    given = selection[1] if selection else carried[1] if carried else prompt
    order = TAGGED_SELECTION.sub("", TAGGED_TEXT.sub("", prompt)) if given != prompt else ""
    given = FAULT_MARKER.sub("", given).strip()
    kind = next((kind for text in (order, system) for kind, words in REVISIONS if words.search(text)), "reword")
    dice = _dice(prompt)
    paragraphs = [_revise_paragraph(paragraph, kind, dice) for paragraph in given.split("\n\n")]
    revised = "\n\n".join(paragraphs)
    if revised != given:
        return revised
    separator = "\n\n" if "\n" in given else " "
    return f"{given}{separator}{dice.choice(EXPANSIONS)}".lstrip()


def _revise_paragraph(paragraph: str, kind: str, dice: random.Random) -> str:
    """Headings and lists keep their form and their words."""
    if re.match(r"\s*(?:#|[-*] |\d+\. |>)", paragraph):
        return paragraph
    sentences = SENTENCE_END.split(paragraph)
    if kind == "shorten":
        if len(sentences) > 1:
            return " ".join(sentences[: (len(sentences) + 1) // 2])
        words = sentences[0].split()
        kept = " ".join(words[: max(1, len(words) * 2 // 3)]).rstrip(",;:.")
        return f"{kept}." if len(words) > 3 else paragraph
    if kind == "expand":
        return f"{paragraph} {dice.choice(EXPANSIONS)}"
    if kind == "correct":
        tidy = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"[ \t]{2,}", " ", paragraph))
        tidy = " ".join(_capitalised(sentence) for sentence in SENTENCE_END.split(tidy))
        tidy = re.sub(r"\bi\b", "I", tidy)
        return tidy if tidy.endswith((".", "!", "?", "…", ":")) else f"{tidy}."
    reworded = REWORDED.sub(_reword, paragraph)
    if ORDINARY_START.match(reworded):
        reworded = dice.choice(REWORDING_STARTS) + reworded[0].lower() + reworded[1:]
    return reworded


def _reword(match: re.Match[str]) -> str:
    other = REWORDINGS[match[0].lower()]
    return _capitalised(other) if match[0][0].isupper() else other


def _dice(seed: str) -> random.Random:
    return random.Random(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest())


def _keywords(text: str) -> list[str]:
    """The words that say what a text is about, each once, in their order."""
    words = [word for word in KEYWORD.findall(text) if word.lower() not in STOPWORDS]
    return list({word.lower(): word for word in reversed(words)}.values())[::-1]


def _longest_phrase(text: str) -> str:
    """The longest run of words that say something, of three at most; the first of several."""
    runs: list[list[str]] = [[]]
    for word in re.findall(r"[^\W\d_][\w’'-]*|[^\w\s]", text):
        if word.lower() in STOPWORDS | SMALL_WORDS or not word[0].isalpha():
            runs.append([])
        else:
            runs[-1].append(word)
    return " ".join(max(runs, key=lambda run: min(len(run), 3))[:3])


def _find_words(prompt: str) -> dict[str, str]:
    """What to fill the templates with: the topic, and three words of the prompt that are not in it."""
    keywords = _keywords(prompt)
    matches = (pattern.search(prompt) for pattern in TOPICS)
    topic = next((match[1] for match in matches if match), _longest_phrase(prompt))
    topic = TOPIC_END.split(topic)[0].strip() or "writing"
    a, b, c = itertools.islice(
        itertools.chain((word for word in keywords if word.lower() not in topic.lower()), SPARE_KEYWORDS), 3
    )
    return {"topic": topic, "Topic": _capitalised(topic), "a": a, "A": _capitalised(a), "b": b, "c": c}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
