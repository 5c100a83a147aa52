"""A corpus for circuits: Python's documentation, and as many words of short stories with names and years.

As a script: `python deploy/examples/circuits_corpus.py OUT.jsonl [all|others]`. SAEs reconstruct what their corpus
has; Python's documentation hardly has names, of which the task `ioi` is made. In the stories they stand in other
sentences than the task's, in other places and with other things, so no prompt of a task is in the corpus. With `all`
(the default) the names are those of the task and others, with `others` none of them is the task's: what SAEs then
leave of it is said of names that they have not seen.
"""

import argparse
import json

import numpy as np

from saescale.trainers.subjects.texts.text import python_prose
from saescale.trainers.tasks.ioi import NAMES

STORIES, SENTENCES, SEED = 3_000, 5, 0
CHARACTERS = 800_000  # of Python's documentation, about 210,000 tokens of SmolLM2

OTHERS = (
    "Joshua", "Amanda", "Joseph", "Ryan", "Jason", "Justin", "Jonathan", "Nicole", "Anthony", "Eric", "Elizabeth",
    "Adam", "Kyle", "Jeremy", "Benjamin", "Emily", "Aaron", "Rebecca", "Jacob", "Stephen", "Patrick", "Sean",
    "Kelly", "Nathan", "Sara", "Tyler", "Katherine", "Andrea", "Gregory", "Erica", "Kenneth", "Alexander", "Christine",
    "Samuel", "Victoria",
)  # fmt: skip
SAID = (
    "{A} told {B} about the {thing} that lay at the {place}.",
    "At the {place} {B} met {A} again, and {A} showed {B} the {thing}.",
    "{A} wanted the {thing}, so {B} sold it to {A} for a small sum.",
    "{A} was late, and {B} called {A} from the {place}.",
    "Last winter {A} wrote to {B}. A week later {B} answered {A}.",
    "Because {A} had lost the {thing}, {B} lent another one to {A}.",
    "The {thing} belongs to {A}, but {B} keeps it at the {place}.",
    "{A} sat beside {B} and read aloud from the {thing}.",
    "It was {A} who sent the {thing} to {B}, not {C}.",
    "{A}, {B} and {C} shared the {thing} that {C} had found.",
    "Nobody but {A} knew where {B} had left the {thing}.",
    "{B} thanked {A} for the {thing}, and {A} smiled at {B}.",
    "The {event} began in {first} and ended in {last}.",
    "From {first} to {last} there was a {event}, of which {A} had heard from {B}.",
)
PLACES = ("harbour", "farm", "bakery", "hotel", "museum", "bridge", "theatre", "hospital", "river", "church")
THINGS = ("map", "coat", "lamp", "bottle", "painting", "clock", "violin", "photograph", "rope", "newspaper")
EVENTS = ("rebellion", "trial", "festival", "project", "experiment", "truce", "debate", "tour", "plague", "census")


def stories(names: tuple[str, ...], number: int, seed: int) -> list[str]:
    """Five sentences each, of three people who were drawn by lot."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        people = [names[each] for each in draw.permutation(len(names))[:3]]
        lines = []
        for each in draw.permutation(len(SAID))[:SENTENCES]:
            cast = dict(zip("ABC", draw.permutation(people), strict=True))
            first = int(draw.integers(1100, 1799))
            last = int(draw.integers(first + 1, 100 * (first // 100 + 1) + 1))
            place, thing, event = (some[draw.integers(len(some))] for some in (PLACES, THINGS, EVENTS))
            lines.append(SAID[each].format(**cast, place=place, thing=thing, event=event, first=first, last=last))
        found.append(" ".join(lines))
    return found


def corpus(which: str) -> list[str]:
    """Documents in an order drawn by lot."""
    draw = np.random.default_rng(SEED)
    prose, characters = [], 0
    for each in draw.permutation(len(python_prose())):
        prose.append(python_prose()[each])
        characters += len(prose[-1])
        if characters > CHARACTERS:
            break
    names = {"all": NAMES + OTHERS, "others": OTHERS}[which]
    documents = prose + stories(names, STORIES, SEED)
    return [documents[each] for each in draw.permutation(len(documents))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes a corpus for deploy/sweeps/circuits.yaml.")
    parser.add_argument("out", help="the file to write, such as circuits.jsonl")
    parser.add_argument("names", nargs="?", default="all", choices=["all", "others"], help="of the stories")
    given = parser.parse_args()
    with open(given.out, "w", encoding="utf-8") as file:
        for text in corpus(given.names):
            file.write(json.dumps({"text": text}) + "\n")
