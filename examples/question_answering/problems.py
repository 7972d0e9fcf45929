"""Question-answering problems made by rules: short texts about people, and questions that a span of the text answers.

A text tells the same kinds of things about three people, so an answer depends on the person and on what is asked. No
name, city, job, animal or thing occurs both in training problems and in held-out ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

VOCABULARY = {
    "name": (
        "Alice Bruno Carla David Elena Felix Greta Henry Irene Jonas Karin Louis Maria Nadia Oscar Paula Quinn Rosa "
        "Simon Tanja Ursula Victor Wanda Yusuf Zoe Anton Bella Caspar Dora Emil Frieda Gustav Hanna Igor Julia Konrad"
    ).split(),
    "city": (
        "Oslo Lisbon Vienna Prague Dublin Athens Cairo Tokyo Madrid Berlin Paris Rome Boston Chicago Denver Sydney "
        "Delhi Lima Seoul Havana Warsaw Geneva Naples Hamburg Toronto Nairobi Bergen Porto"
    ).split(),
    "job": (
        "baker teacher nurse pilot painter farmer lawyer carpenter gardener dentist journalist plumber singer chemist "
        "butcher tailor"
    ).split(),
    "animal": "cat dog parrot rabbit horse tortoise hamster goat snake donkey turtle pony".split(),
    "thing": "violin bicycle telescope piano camera kayak tractor guitar typewriter scooter sofa tent".split(),
    "year": [str(year) for year in range(1950, 2000)],
    "price": [str(price) for price in range(20, 980, 10)],
}
HELD_OUT_SHARE = 0.25

FACTS = {
    "{name} was born in {city} in {year}.": {
        "Where was {name} born?": "city",
        "In which year was {name} born?": "year",
    },
    "{name} works as a {job}.": {"What is the profession of {name}?": "job"},
    "{name} moved to {city} last spring.": {"Where does {name} live now?": "city"},
    "{name} keeps a {animal} at home.": {"Which animal does {name} have?": "animal"},
    "{name} bought a {thing} for {price} euros.": {
        "What did {name} buy?": "thing",
        "How many euros did {name} spend?": "price",
    },
}
"""Sentence -> its questions -> the word of the sentence that is the answer."""

PEOPLE, FACTS_PER_PERSON = 3, 2


@dataclass(frozen=True)
class Problem:
    """A text, a question about it, and where its answer stands: `context[start : start + len(answer)]`."""

    context: str
    question: str
    answer: str
    start: int


def make_problems(count: int, seed: int, held_out: bool = False) -> list[Problem]:
    """`count` problems, always the same ones for a seed."""
    draw = random.Random(seed)
    return [_make_problem(draw, held_out) for _ in range(count)]


def _make_problem(draw: random.Random, held_out: bool) -> Problem:
    told = []  # (sentence, the words in it)
    for name in draw.sample(_half("name", held_out), PEOPLE):
        for pattern in draw.sample(sorted(FACTS), FACTS_PER_PERSON):
            words = {kind: draw.choice(_half(kind, held_out)) for kind in VOCABULARY} | {"name": name}
            told.append((pattern, words))
    draw.shuffle(told)
    asked = draw.randrange(len(told))
    pattern, words = told[asked]
    question, kind = draw.choice(sorted(FACTS[pattern].items()))
    before = "".join(each.format(**theirs) + " " for each, theirs in told[:asked])
    context = before + " ".join(each.format(**theirs) for each, theirs in told[asked:])
    start = len(before) + len(pattern.partition(f"{{{kind}}}")[0].format(**words))
    return Problem(context, question.format(**words), words[kind], start)


def _half(kind: str, held_out: bool) -> list[str]:
    """The words of a kind that problems of one of the two sets are made of."""
    words = VOCABULARY[kind]
    cut = round(len(words) * HELD_OUT_SHARE)
    return words[:cut] if held_out else words[cut:]
