"""Normal form of an answer that VQAv2's soft accuracy compares, as in its official evaluation.

The official code has quirks that every published number contains; they are kept: a comma between
digits removes every punctuation mark in place of turning it into a space, and `none` is 0.
"""

import re

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
"""Words with apostrophes; each is found again when one of its apostrophes is missing."""

_WITH_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}

_ARTICLES = ("a", "an", "the")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""Number of periods that are removed: the official code passes re.UNICODE, 32, as the count."""


def normalise_vqa(answer: str) -> str:
    """Return the normal form: no punctuation or articles, numbers as digits, lower case."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    words = _without_punctuation(text).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_WITH_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Remove marks beside a space, turn the others into spaces; remove periods not in a number."""
    removes_all = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_beside_space or removes_all else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)
