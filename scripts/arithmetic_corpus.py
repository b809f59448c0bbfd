"""Grade-school word problems with worked answers, written by a small story grammar.

A story is an opening followed by up to three beats. Every beat says one sentence of the question, applies one operation
to the running value and says one line of the answer, so the question and its solution cannot disagree. A sentence and
its answer line are written as a pair, and the word that joins answer lines belongs to the person in the story: the
wording of an answer can therefore be inferred from its question, yet varies from story to story.

The text is made by this file alone; no problem is taken from a published dataset.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GRAMMAR_FILE = Path(__file__).resolve().parents[1] / "data" / "datasets" / "arithmetic" / "grammar.txt"
HELD_OUT_MODULUS = 20
LARGEST_VALUE = 100
OPERATION_WEIGHTS = (0.2, 0.35, 0.3, 0.15)

SHE_NAMES = (
    "Mia,Ana,Lily,Zoe,Ruth,Nora,Ella,Ivy,Kate,Rosa,Emma,Lucy,Maya,Sara,Jane,Tina,Olga,Hana,Leah,Amy,Beth,Clara,Dina,"
    "Eva,Faye,Gina,Helen,Iris,June,Vera"
)
HE_NAMES = (
    "Tom,Ben,Sam,Leo,Max,Omar,Paul,Ravi,Jack,Luis,Adam,Carl,Dan,Eric,Finn,Gus,Hugo,Ivan,Joel,Kurt,Liam,Mark,Nick,"
    "Oscar,Pete,Reza,Seth,Troy,Vic,Will"
)
ITEMS = (
    "apple apples,pear pears,plum plums,lemon lemons,peach peaches,melon melons,carrot carrots,potato potatoes,"
    "onion onions,tomato tomatoes,egg eggs,nut nuts,candy candies,mint mints,marble marbles,sticker stickers,"
    "stamp stamps,coin coins,shell shells,stone stones,button buttons,bead beads,card cards,pencil pencils,pen pens,"
    "crayon crayons,marker markers,brush brushes,eraser erasers,ruler rulers,notebook notebooks,book books,"
    "comic comics,magazine magazines,puzzle puzzles,toy toys,doll dolls,robot robots,kite kites,ball balls,"
    "balloon balloons,ribbon ribbons,candle candles,cup cups,plate plates,spoon spoons,bowl bowls,towel towels,"
    "sock socks,hat hats,scarf scarves,glove gloves,badge badges,ticket tickets,flag flags,key keys,magnet magnets,"
    "postcard postcards,photo photos,feather feathers,leaf leaves"
)
CONTAINERS = "bag bags,box boxes,basket baskets,jar jars,crate crates,pack packs,tin tins,bucket buckets"
NOUNS = {
    "ITEMS": ITEMS,
    "TREATS": "cookie cookies,muffin muffins,bun buns,pie pies,roll rolls,tart tarts,scone scones,cake cakes",
    "PLANTS": "tulip tulips,rose roses,cabbage cabbages,tree trees,bush bushes,daisy daisies,fern ferns",
    "EGGS": "egg eggs",
}
ANIMALS = "hen hens,duck ducks,goose geese,turkey turkeys"
DAYS = "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday"
PLACES = "the market,the museum,the library,the harbor,the school,the station,the bakery,the zoo"
THINGS = "a game,a lamp,a coat,a drum,a map,a tent,a clock,a lunch,a bike bell,a gift"
CONNECTIVES = ("", "then ", "so ", "now ", "next, ", "after that, ")


@dataclass(frozen=True)
class Problem:
    """One word problem: `answer` ends in the line `#### result`; `operations` counts its equations."""

    question: str
    answer: str
    result: int
    operations: int
    shape: str

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the test split and must never be trained on."""
        return is_held_out(self.question)


@dataclass(frozen=True)
class Beat:
    """One turn of a story, read from the grammar file.

    `tellings` pairs a question sentence with its answer line, `asks` pairs the closing questions possible after it with
    their closing lines, and `group` names the beats that may follow (`end`: none).
    """

    operation: str
    tellings: tuple[tuple[str, str], ...]
    asks: tuple[tuple[str, str], ...]
    group: str


@dataclass(frozen=True)
class Shape:
    """How a kind of story starts; `nouns` is the list that its things are taken from."""

    name: str
    opening: Beat
    nouns: str


@cache
def grammar() -> tuple[tuple[Shape, ...], dict[str, tuple[Beat, ...]]]:
    """Parse the grammar file into the shapes of stories and the beats of every group.

    A heading is `ask NAME`, `beat GROUP OPERATION ASK NEXT_GROUP` or `open SHAPE OPERATION ASK NEXT_GROUP NOUNS`; the
    indented lines below it are pairs `question text | answer text`. In braces stand the people (`p`, `q`, and `he`,
    `him`, `his` for `p`), the things (`it`, singular `one`), the numbers of an opening (`a`, `b`) or a beat (`k`), the
    equation (`eq`) and the final value (`v`). An operation `a` states a number only; `from` and `pay` subtract the
    running value from a new number; `sum` and `gap` combine it with the value before it.
    """
    asks: dict[str, tuple[tuple[str, str], ...]] = {}
    beats: dict[str, tuple[Beat, ...]] = {}
    shapes: list[Shape] = []
    text = re.sub(r"^#.*\n", "", GRAMMAR_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in re.split(r"\n+(?=\S)", text.strip()):
        heading, *lines = block.split("\n")
        kind, name, *rest = heading.split()
        pairs = tuple((said.strip(), line.strip()) for said, line in (pair.split("|") for pair in lines))
        if kind == "ask":
            asks[name] = pairs
            continue
        beat = Beat(rest[0], pairs, asks[rest[1]], rest[2])
        if kind == "beat":
            beats[name] = (*beats.get(name, ()), beat)
        else:
            shapes.append(Shape(name, beat, NOUNS[rest[3]]))
    return tuple(shapes), beats


def is_held_out(question: str) -> bool:
    """Return whether a question falls into the test split (one in twenty, by the hash of its text)."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest(), "big") % HELD_OUT_MODULUS == 0


def _product_is_learnable(left: int, right: int) -> bool:
    return left * right <= LARGEST_VALUE and ((left <= 10 and right <= 10) or right == 2)


def _operand(operation: str, value: int, previous: int | None, last: str, rng: random.Random) -> int | None:
    """Draw the number that `operation` applies to the running `value`, or None when there is no suitable one."""
    choices: list[int] = []
    if operation == "*":
        choices = [factor for factor in range(2, 11) if _product_is_learnable(value, factor)]
    elif operation == "+":
        choices = list(range(2, min(30, 90 - value) + 1))
    elif operation == "-":
        choices = list(range(2, min(30, value - 2) + 1))
    elif operation == "/":
        choices = [divisor for divisor in range(2, 11) if value % divisor == 0 and 2 <= value // divisor <= 10]
    elif operation == "from":
        choices = list(range(value + 2, min(LARGEST_VALUE, value + 40) + 1))
    elif operation == "pay":
        choices = [note for note in range(10, LARGEST_VALUE + 1, 10) if 2 <= note - value <= 40]
    elif previous is not None and (
        (operation == "sum" and previous + value <= LARGEST_VALUE)
        or (operation == "gap" and value - previous >= 2 and last in ("*", "a*b"))
    ):
        choices = [previous]
    return rng.choice(choices) if choices else None


def _apply(operation: str, value: int, operand: int) -> tuple[int, str]:
    """Return the new running value and the equation that gives it."""
    if operation in ("from", "pay"):
        return operand - value, f"{operand} - {value} = {operand - value}"
    sign = {"sum": "+", "gap": "-"}.get(operation, operation)
    new = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[sign]
    return new, f"{value} {sign} {operand} = {new}"


def _opening_numbers(operation: str, rng: random.Random) -> tuple[int, int]:
    """Draw the two numbers that an opening states; the second is unused by the opening `a`."""
    if operation == "a*b":
        return rng.randint(2, 10), rng.randint(2, 10)
    if operation == "a+b":
        return rng.randint(4, 40), rng.randint(3, 30)
    if operation == "a-b":
        first = rng.randint(8, 60)
        return first, rng.randint(3, min(30, first - 3))
    if operation == "a/b":
        share, count = rng.randint(2, 10), rng.randint(2, 10)
        return share * count, count
    return rng.randint(5, 60), 0


def _noun(nouns: str, rng: random.Random) -> tuple[str, str]:
    one, many = rng.choice(nouns.split(",")).split(" ")
    return one, many


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


class _Story:
    """A story being told: its vocabulary, the running value and the lines written so far."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self.rng = rng
        women, men = SHE_NAMES.split(","), HE_NAMES.split(",")
        person, other = rng.sample(women + men, 2)
        he, him, his = ("he", "him", "his") if person in men else ("she", "her", "her")
        one, many = _noun(shape.nouns, rng)
        one_box, box = _noun(CONTAINERS, rng)
        self.words = {"p": person, "q": other, "he": he, "He": _sentence(he), "him": him, "his": his}
        self.words |= {"His": _sentence(his), "one": one, "it": many, "one_box": one_box, "box": box}
        self.words |= {"animals": _noun(ANIMALS, rng)[1]}
        self.connective = CONNECTIVES[(women + men).index(person) % len(CONNECTIVES)]
        self.question: list[str] = []
        self.lines: list[str] = []
        self.used: set[str] = set()

    def tell(self, telling: tuple[str, str], numbers: dict[str, int], equation: str) -> None:
        """Add a sentence to the question and, if the telling has one, a line to the answer."""
        thing = self.rng.choice(THINGS.split(","))
        scene = {"day": self.rng.choice(DAYS.split(",")), "place": self.rng.choice(PLACES.split(",")), "thing": thing}
        words = self.words | scene | {"Thing": _sentence(thing), "eq": equation}
        said, line = (text.format(**words, **numbers) for text in telling)
        self.used.add(telling[0])
        self.question.append(_sentence(said))
        if line:
            self.lines.append(_sentence(f"{self.connective if self.lines else ''}{line}"))

    def open(self, opening: Beat) -> None:
        """Tell the opening and set the running value."""
        first, second = _opening_numbers(opening.operation, self.rng)
        self.value, self.previous, self.last = first, None, opening.operation
        equation = ""
        if opening.operation != "a":
            self.previous = first
            self.value, equation = _apply(opening.operation[1], first, second)
        self.tell(self.rng.choice(opening.tellings), {"a": first, "b": second}, equation)
        self.asks, self.group = opening.asks, opening.group

    def advance(self, final: bool) -> bool:
        """Tell one further beat, one that ends the story only as a `final` beat or for want of others.

        Returns False when no beat of the group fits the running value.
        """
        beats = list(grammar()[1].get(self.group, ()))
        self.rng.shuffle(beats)
        beats.sort(key=lambda beat: not final and beat.group == "end")
        for beat in beats:
            operand = _operand(beat.operation, self.value, self.previous, self.last, self.rng)
            tellings = [telling for telling in beat.tellings if telling[0] not in self.used]
            if operand is None or not tellings:
                continue
            self.previous, self.last = self.value, beat.operation
            self.value, equation = _apply(beat.operation, self.value, operand)
            self.tell(self.rng.choice(tellings), {"k": operand}, equation)
            self.asks, self.group = beat.asks, beat.group
            return True
        return False


def _write(shape: Shape, operations: int, rng: random.Random) -> Problem:
    story = _Story(shape, rng)
    story.open(shape.opening)
    while len(story.lines) < operations and story.advance(final=len(story.lines) == operations - 1):
        pass
    steps = len(story.lines)
    ask, closing = (text.format(**story.words, v=story.value) for text in rng.choice(story.asks))
    question = " ".join([*story.question, ask])
    answer = "\n".join([*story.lines, _sentence(closing), f"#### {story.value}"])
    return Problem(question, answer, story.value, steps, shape.name)


def generate(seed: int) -> Iterator[Problem]:
    """Yield an endless stream of problems of both splits; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        operations = rng.choices(range(1, len(OPERATION_WEIGHTS) + 1), OPERATION_WEIGHTS)[0]
        problem = _write(rng.choice(grammar()[0]), operations, rng)
        if problem.operations:
            yield problem
