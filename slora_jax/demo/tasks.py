# SPDX-License-Identifier: Apache-2.0
"""The demo's text transformations, and the texts that its weights were trained and tested on.

The base model copies its prompt; each adapter applies one `Task` to it instead. The training
scripts, the demo and the tests all take their answers from `Task.transform`.

Distributions:

* The base copies `sample_text` with its defaults: 1 to 40 characters, 60 % plain lower-case words,
  the rest mixed case, digits, punctuation, random printable ASCII and some non-ASCII characters.
* The adapters transform `sample_words`, plain lower-case words separated by single spaces. They
  are trained on 1 to 24 characters and tested on 4 to 20 (`held_out_prompts`).

Training and held-out texts never coincide, however short: `is_held_out` assigns every possible
text to one side by its checksum, and the two kinds of sampler reject the other side's texts.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
PUNCTUATION = ".,!?;:'-()"
NON_ASCII = "àáâäçèéêëíñóôöøúüßœλπжяあ中日€→✓😀🎉🚀"

HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Task:
    """A text transformation that a person can check by eye.

    Attributes:
        name: identifier; equals the name of the adapter's directory.
        description: one line for the demo's listings.
        transform: maps the prompt to the expected answer.
    """

    name: str
    description: str
    transform: Callable[[str], str]


def _translation(source: str, target: str) -> Callable[[str], str]:
    table = str.maketrans(source, target)
    return lambda text: text.translate(table)


def _rotate_alphabet(shift: int) -> Callable[[str], str]:
    lower = "abcdefghijklmnopqrstuvwxyz"
    rotated = lower[shift:] + lower[:shift]
    return _translation(lower + lower.upper(), rotated + rotated.upper())


def _for_each_word(transform: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: " ".join(transform(word) for word in text.split(" "))


COPY = Task("copy", "repeats the prompt (the base model, no adapter)", str)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("upper", "writes the prompt in capitals", str.upper),
        Task("rot13", "rotates every letter by 13 places", _rotate_alphabet(13)),
        Task("leet", "replaces a, e, i, o, s, t by digits", _translation("aeiost", "431057")),
        Task(
            "no_vowels",
            "drops the vowels",
            lambda text: "".join(c for c in text if c not in VOWELS),
        ),
        Task("title", "capitalises each word", _for_each_word(str.capitalize)),
        Task("snake_case", "joins the words with underscores", _translation(" ", "_")),
        Task("stars", "masks each vowel with a star", _translation(VOWELS, "*" * len(VOWELS))),
        Task(
            "reverse_words", "reverses the letters of each word", _for_each_word(lambda w: w[::-1])
        ),
        Task("exclaim", "adds an exclamation mark", lambda text: text + "!"),
        Task("double", "writes every character twice", lambda text: "".join(c + c for c in text)),
        Task(
            "initials",
            "keeps the first letter of each word",
            lambda text: "".join(word[:1] for word in text.split(" ")),
        ),
    )
}


def is_held_out(text: str) -> bool:
    """Whether `text` belongs to the held-out side of the split, decided by its checksum."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def _sample_word(rng: random.Random) -> str:
    """A pronounceable word of one to three syllables."""
    syllables = []
    for _ in range(rng.randint(1, 3)):
        onset = rng.choice(CONSONANTS) if rng.random() < 0.85 else ""
        coda = rng.choice(CONSONANTS) if rng.random() < 0.3 else ""
        syllables.append(onset + rng.choice(VOWELS) + coda)
    return "".join(syllables)


def sample_words(rng: random.Random, min_length: int = 1, max_length: int = 24) -> str:
    """Lower-case words separated by single spaces, `min_length` to `max_length` characters."""
    length = rng.randint(min_length, max_length)
    text = _sample_word(rng)
    while len(text) < length:
        text += " " + _sample_word(rng)
    text = text[:length]
    # A cut just after a space would leave it dangling; a letter keeps the length.
    return text if text[-1] != " " else text[:-1] + rng.choice(VOWELS)


def _random_case(rng: random.Random, text: str) -> str:
    return "".join(c.upper() if rng.random() < 0.5 else c for c in text)


def _replace_some(rng: random.Random, text: str, alphabet: str, fraction: float) -> str:
    return "".join(rng.choice(alphabet) if rng.random() < fraction else c for c in text)


def _printable_ascii(rng: random.Random, length: int) -> str:
    return "".join(chr(rng.randint(32, 126)) for _ in range(length))


def sample_text(
    rng: random.Random, min_length: int = 1, max_length: int = 40, plain_fraction: float = 0.6
) -> str:
    """A text for the base model to copy, `min_length` to `max_length` UTF-8 bytes.

    Args:
        rng: source of randomness.
        min_length: fewest bytes.
        max_length: most bytes.
        plain_fraction: share of texts left as plain lower-case words.
    """
    text = sample_words(rng, min_length, max_length)
    if rng.random() < plain_fraction:
        return text
    style = rng.randrange(7)
    if style == 0:
        return text.upper()
    if style == 1:
        return text.title()
    if style == 2:
        return _random_case(rng, text)
    if style == 3:
        return _replace_some(rng, text, "0123456789", rng.random())
    if style == 4:
        return _replace_some(rng, text.capitalize(), PUNCTUATION, 0.2)
    if style == 5:
        return _printable_ascii(rng, len(text))
    # Up to four bytes each: a quarter of the length stays within the limit.
    return _replace_some(rng, text[: max(1, max_length // 4)], NON_ASCII, 0.4)


def training_text(rng: random.Random, sample: Callable[[random.Random], str]) -> str:
    """Draws from `sample` until the text is on the training side of the split."""
    while is_held_out(text := sample(rng)):
        pass
    return text


def held_out_texts(seed: int, n: int, sample: Callable[[random.Random], str]) -> list[str]:
    """`n` distinct texts from `sample` that no training run has seen."""
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < n:
        text = sample(rng)
        if is_held_out(text):
            texts[text] = None
    return list(texts)


def held_out_prompts(seed: int, n: int) -> list[str]:
    """`n` distinct held-out prompts of 4 to 20 characters, right for every task."""
    return held_out_texts(seed, n, lambda rng: sample_words(rng, 4, 20))
