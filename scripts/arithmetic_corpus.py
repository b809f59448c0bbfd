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
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_MODULUS = 20
LARGEST_VALUE = 100
OPERATION_WEIGHTS = (0.2, 0.35, 0.3, 0.15)

SHE_NAMES = (
    "Mia Ana Lily Zoe Ruth Nora Ella Ivy Kate Rosa Emma Lucy Maya Sara Jane Tina Olga Hana Leah Amy Beth Clara Dina Eva "
    "Faye Gina Helen Iris June Vera"
).split()
HE_NAMES = (
    "Tom Ben Sam Leo Max Omar Paul Ravi Jack Luis Adam Carl Dan Eric Finn Gus Hugo Ivan Joel Kurt Liam Mark Nick Oscar "
    "Pete Reza Seth Troy Vic Will"
).split()
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
TREATS = "cookie cookies,muffin muffins,bun buns,pie pies,roll rolls,tart tarts,scone scones,cake cakes"
PLANTS = "tulip tulips,rose roses,cabbage cabbages,tree trees,bush bushes,daisy daisies,fern ferns,pumpkin pumpkins"
ANIMALS = "hen hens,duck ducks,goose geese,turkey turkeys"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "the market,the museum,the library,the harbor,the school,the station,the bakery,the zoo".split(",")
THINGS = "a game,a lamp,a coat,a drum,a map,a tent,a clock,a lunch,a bike bell,a gift".split(",")
CONNECTIVES = ("", "then ", "so ", "now ", "next, ", "after that, ")


@dataclass(frozen=True)
class Problem:
    """One word problem: `answer` ends in the line `#### result`; `operations` counts the equations in it."""

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
    """One turn of a story.

    `tellings` pairs a question sentence with its answer line, `asks` are the closing questions possible after it, and
    `group` names the beats that may follow (empty: the story ends here).
    """

    operation: str
    tellings: tuple[tuple[str, str], ...]
    asks: tuple[str, ...]
    group: str = ""


HAVE = ("How many {it} does {p} have now?", "How many {it} are there in the end?", "How many {it} does {he} have?")
LEFT = ("How many {it} does {p} have left?", "How many {it} are left?", "How many {it} remain?")
MONEY_LEFT = ("How much money does {p} have left?", "How many dollars does {he} have left?", "How much money is left?")
MONEY = ("How much money does {p} have now?", "How many dollars does {he} have now?", "How much money is that in all?")
EACH = ("How many {it} are in each {one_box}?", "How many {it} does each {one_box} get?")

BEATS: dict[str, tuple[Beat, ...]] = {
    "things": (
        Beat(
            "-",
            (
                ("{He} gives {k} of them to {q}.", "after giving {k} to {q}, {p} has {eq} {it} left."),
                ("{He} loses {k} of them.", "losing {k} leaves {p} with {eq} {it}."),
                ("{q} borrows {k} {it} from {him}.", "without the {k} that {q} borrows there are {eq} {it}."),
                ("{He} throws {k} old ones away.", "throwing away {k} old ones leaves {eq} {it}."),
            ),
            LEFT,
            "things",
        ),
        Beat(
            "+",
            (
                ("{He} finds {k} more {it}.", "with the {k} {he} finds, {p} has {eq} {it}."),
                ("{q} brings {him} {k} more.", "{q} brings {k}, which makes {eq} {it}."),
                ("{He} buys {k} more.", "buying {k} more gives {p} {eq} {it}."),
                ("On {day} {he} gets {k} more {it}.", "on {day} the total becomes {eq} {it}."),
            ),
            HAVE,
            "things",
        ),
        Beat(
            "/",
            (
                ("{He} puts them equally into {k} {box}.", "each {one_box} gets {eq} {it}."),
                ("{He} packs them in {k} equal {box}.", "{k} equal {box} hold {eq} {it} each."),
            ),
            EACH,
        ),
        Beat(
            "*",
            (
                ("{q} has {k} times as many {it} as {p} now.", "{q} has {k} times as many, or {eq} {it}."),
                ("{q} owns {k} times that number of {it}.", "{k} times that number is {eq} {it}."),
            ),
            ("How many {it} does {q} have?",),
            "pair",
        ),
        Beat(
            "*",
            (
                ("{He} sells all of them for {k} dollars each.", "selling them brings {p} {eq} dollars."),
                ("Each of them is sold for {k} dollars.", "at {k} dollars each they earn {eq} dollars."),
            ),
            ("How much money does {p} get?", "How many dollars does {he} make?"),
            "money",
        ),
    ),
    "pair": (
        Beat(
            "sum",
            (
                ("They put their {it} together.", "together they have {eq} {it}."),
                ("{p} and {q} count all their {it}.", "counting both, there are {eq} {it}."),
            ),
            ("How many {it} do they have together?", "How many {it} do {p} and {q} have in total?"),
            "joint",
        ),
        Beat(
            "gap",
            (("They compare their {it}.", "the difference between them is {eq} {it}."),),
            ("How many more {it} does {q} have than {p}?",),
        ),
        Beat(
            "-",
            (("Then {q} gives {k} away.", "{q} gives {k} away and keeps {eq} {it}."),),
            ("How many {it} does {q} have left?",),
        ),
    ),
    "joint": (
        Beat(
            "/",
            (
                ("They share them equally among {k} friends.", "each of the {k} friends gets {eq} {it}."),
                ("They fill {k} {box} equally.", "one {one_box} holds {eq} {it}."),
            ),
            ("How many {it} go to each one?",),
        ),
        Beat(
            "-",
            (("They give {k} of them to {place}.", "after the gift to {place} they keep {eq} {it}."),),
            ("How many {it} do they keep?", "How many {it} do they have left?"),
            "joint",
        ),
    ),
    "money": (
        Beat(
            "-",
            (
                ("{He} spends {k} dollars on {thing}.", "after paying for {thing}, {p} has {eq} dollars."),
                ("{He} gives {k} dollars to {q}.", "giving {k} dollars to {q} leaves {eq} dollars."),
                ("{Thing} costs {him} {k} dollars.", "{thing} takes {k} dollars, so {eq} dollars are left."),
            ),
            MONEY_LEFT,
            "money",
        ),
        Beat(
            "+",
            (
                ("{His} aunt gives {him} {k} dollars.", "with the gift of {his} aunt {he} has {eq} dollars."),
                ("{He} finds {k} dollars in {his} coat.", "the coat adds {k} dollars, making {eq} dollars."),
                ("On {day} {he} earns {k} dollars more.", "by {day} {p} has {eq} dollars."),
            ),
            MONEY,
            "money",
        ),
        Beat(
            "/",
            (
                ("{He} shares the money equally among {k} children.", "every child receives {eq} dollars."),
                ("{He} uses all of it for {k} equal gifts.", "a gift costs {eq} dollars."),
            ),
            ("How many dollars is each share?", "How many dollars is that for each?"),
        ),
        Beat(
            "from",
            (
                ("{He} wants {thing} that costs {c} dollars.", "for {thing} {he} still needs {eq} dollars."),
                ("{His} goal is {c} dollars.", "to reach the goal {p} needs {eq} dollars."),
            ),
            ("How many more dollars does {he} need?", "How much money is missing?"),
        ),
    ),
    "cost": (
        Beat(
            "pay",
            (
                ("{He} pays with {c} dollars.", "the change is {eq} dollars."),
                ("{He} hands over {c} dollars.", "{p} gets back {eq} dollars."),
            ),
            ("How much change does {p} get?", "How many dollars does {he} get back?"),
        ),
        Beat(
            "+",
            (
                ("{He} also buys {thing} for {k} dollars.", "adding {thing}, the cost is {eq} dollars."),
                ("Shipping costs {k} dollars more.", "with shipping it costs {eq} dollars."),
            ),
            ("How many dollars does {p} spend?", "What is the total cost in dollars?"),
            "cost",
        ),
        Beat(
            "-",
            (("A coupon takes {k} dollars off.", "the coupon lowers the price to {eq} dollars."),),
            ("How many dollars does {p} pay?",),
            "cost",
        ),
        Beat(
            "/",
            (("{k} friends split the cost equally.", "each of the {k} friends pays {eq} dollars."),),
            ("How many dollars does each friend pay?",),
        ),
    ),
    "pages": (
        Beat(
            "+",
            (
                ("On {day} {he} reads {k} more pages.", "with {day} that makes {eq} pages."),
                ("{He} reads {k} pages more at night.", "adding the night, {p} has read {eq} pages."),
            ),
            ("How many pages does {p} read?", "How many pages is that in all?"),
            "pages",
        ),
        Beat(
            "from",
            (
                ("The book has {c} pages.", "the book still has {eq} pages to go."),
                ("{He} has to read {c} pages for school.", "for school {he} must read {eq} pages more."),
            ),
            ("How many pages are left to read?", "How many more pages must {he} read?"),
            "rest",
        ),
    ),
    "rest": (
        Beat(
            "/",
            (("{He} reads the rest in {k} equal days.", "that is {eq} pages on each day."),),
            ("How many pages does {he} read on each of those days?",),
        ),
    ),
    "distance": (
        Beat(
            "+",
            (
                ("On {day} {he} goes {k} km more.", "{day} brings it to {eq} km."),
                ("Then {he} takes a bus for {k} km.", "with the bus {p} travels {eq} km."),
            ),
            ("How many km does {p} travel in all?", "How far does {he} go in km?"),
            "distance",
        ),
        Beat(
            "from",
            (
                ("The whole trip is {c} km.", "the trip has {eq} km left."),
                ("{q} lives {c} km away.", "to reach {q}, {p} needs {eq} km more."),
            ),
            ("How many km are left?", "How many more km must {he} go?"),
        ),
        Beat(
            "*",
            (("{q} goes {k} times as far.", "{q} goes {k} times as far, which is {eq} km."),),
            ("How many km does {q} go?",),
        ),
    ),
    "people": (
        Beat(
            "+",
            (
                ("At the next stop {k} people join.", "when {k} join there are {eq} people."),
                ("Then {k} more people come.", "{k} more come, which makes {eq} people."),
            ),
            ("How many people are there now?", "How many people is that?"),
            "people",
        ),
        Beat(
            "-",
            (
                ("Later {k} people leave.", "{k} leave and {eq} people stay."),
                ("At {place} {k} of them go home.", "from {place} on there are {eq} people."),
            ),
            ("How many people are still there?", "How many people are left?"),
            "people",
        ),
        Beat(
            "/",
            (
                ("They form {k} equal teams.", "each team has {eq} people."),
                ("They sit down at {k} tables equally.", "one table seats {eq} people."),
            ),
            ("How many people are in each group?",),
        ),
    ),
    "minutes": (
        Beat(
            "+",
            (
                ("{He} also practices {k} minutes on {day}.", "including {day}, it is {eq} minutes."),
                ("{He} rests for {k} minutes.", "with the rest it takes {eq} minutes."),
            ),
            ("How many minutes is that in all?", "How many minutes does {p} need?"),
            "minutes",
        ),
        Beat(
            "from",
            (("{He} has {c} minutes.", "out of {c} minutes {p} keeps {eq} minutes."),),
            ("How many minutes does {he} have left?",),
        ),
    ),
}


@dataclass(frozen=True)
class Shape:
    """How a kind of story starts; `nouns` is the list that its things are taken from."""

    name: str
    opening: Beat
    nouns: str = ITEMS


def _shape(name: str, operation: str, group: str, asks: tuple[str, ...], *tellings: str, nouns: str = ITEMS) -> Shape:
    pairs = tuple((telling.split(" => ")[0], telling.split(" => ")[1]) for telling in tellings)
    return Shape(name, Beat(operation, pairs, asks, group), nouns)


SHAPES = (
    _shape(
        "bags",
        "a*b",
        "things",
        HAVE,
        "{p} buys {a} {box} with {b} {it} in each. => the {box} hold {eq} {it}.",
        "{p} has {a} {box}, and each {one_box} has {b} {it}. => {a} {box} of {b} make {eq} {it}.",
        "There are {b} {it} in every {one_box}, and {p} takes {a} {box}. => {p} takes {eq} {it}.",
    ),
    _shape(
        "collection",
        "a",
        "things",
        HAVE,
        "{p} has {a} {it}. => ",
        "{p} owns a set of {a} {it}. => ",
        "There are {a} {it} in the room of {p}. => ",
    ),
    _shape(
        "sharing",
        "a/b",
        "things",
        ("How many {it} does {p} get?", "How many {it} does each child get?"),
        "{p} and some friends, {b} children in all, share {a} {it} equally. => each child gets {eq} {it}.",
        "{a} {it} are dealt equally to {b} children, and {p} is one of them. => {p} is dealt {eq} {it}.",
    ),
    _shape(
        "pages",
        "a*b",
        "pages",
        ("How many pages does {p} read?", "How many pages is that in all?"),
        "{p} reads {a} pages a day for {b} days. => in {b} days {p} reads {eq} pages.",
        "For {b} days {p} reads {a} pages every evening. => the evenings add up to {eq} pages.",
    ),
    _shape(
        "baking",
        "a*b",
        "things",
        ("How many {it} does {p} bake?", "How many {it} are baked?"),
        "{p} bakes {a} trays of {b} {it}. => {p} bakes {eq} {it}.",
        "In the bakery of {p}, {a} trays hold {b} {it} each. => the trays hold {eq} {it}.",
        nouns=TREATS,
    ),
    _shape(
        "price",
        "a*b",
        "cost",
        ("How many dollars does {p} spend?", "What is the total cost in dollars?"),
        "{p} buys {a} {it} for {b} dollars each. => the {it} cost {eq} dollars.",
        "At {place} one {one} costs {b} dollars, and {p} orders {a} {it}. => {a} {it} cost {eq} dollars.",
    ),
    _shape(
        "compare",
        "a+b",
        "pair",
        ("How many {it} does {q} have?",),
        "{p} has {a} {it}, and {q} has {b} more than {p}. => {q} has {eq} {it}.",
        "{p} owns {a} {it}. {q} owns {b} more. => {q} owns {eq} {it}.",
    ),
    _shape(
        "fewer",
        "a-b",
        "pair",
        ("How many {it} does {q} have?",),
        "{p} has {a} {it}, and {q} has {b} fewer than {p}. => {q} has {b} fewer, that is {eq} {it}.",
        "{p} collects {a} {it}. {q} collects {b} fewer. => {q} collects {eq} {it}.",
    ),
    _shape(
        "times",
        "a*b",
        "pair",
        ("How many {it} does {q} have?",),
        "{p} has {a} {it}, and {q} has {b} times as many. => {q} has {eq} {it}.",
        "{p} picks {a} {it}. {q} picks {b} times as many. => {q} picks {eq} {it}.",
    ),
    _shape(
        "distance",
        "a*b",
        "distance",
        ("How many km does {p} travel in all?", "How far does {he} go in km?"),
        "{p} walks {a} km a day for {b} days. => walking for {b} days makes {eq} km.",
        "{p} rides {a} km each hour for {b} hours. => {p} rides {eq} km.",
    ),
    _shape(
        "garden",
        "a*b",
        "things",
        ("How many {it} does {p} have?", "How many {it} are in the garden?"),
        "{p} plants {a} rows of {b} {it}. => the rows have {eq} {it}.",
        "The garden of {p} has {a} rows with {b} {it} in each row. => the garden has {eq} {it}.",
        nouns=PLANTS,
    ),
    _shape(
        "class",
        "a+b",
        "people",
        ("How many children are there?", "How many children is that?"),
        "In the class of {p} there are {a} girls and {b} boys. => the class has {eq} children.",
        "{p} teaches {a} boys and {b} girls. => {p} teaches {eq} children.",
    ),
    _shape(
        "bus",
        "a",
        "people",
        ("How many people are there now?",),
        "{p} drives a bus with {a} people. => ",
        "{a} people are at the party of {p}. => ",
    ),
    _shape(
        "savings",
        "a*b",
        "money",
        MONEY,
        "{p} saves {a} dollars a week for {b} weeks. => in {b} weeks {p} saves {eq} dollars.",
        "Every week {p} puts {a} dollars into a jar, for {b} weeks. => the jar has {eq} dollars.",
    ),
    _shape(
        "earning",
        "a*b",
        "money",
        MONEY,
        "{p} earns {a} dollars an hour and works {b} hours. => {b} hours of work pay {eq} dollars.",
        "{p} works {b} hours at {place} for {a} dollars an hour. => at {place} {p} earns {eq} dollars.",
    ),
    _shape("pocket", "a", "money", MONEY, "{p} has {a} dollars. => ", "There are {a} dollars in the purse of {p}. => "),
    _shape(
        "practice",
        "a*b",
        "minutes",
        ("How many minutes is that in all?", "How many minutes does {p} need?"),
        "{p} plays {a} songs of {b} minutes each. => the songs last {eq} minutes.",
        "{p} runs {a} laps, and each lap takes {b} minutes. => {a} laps take {eq} minutes.",
    ),
    _shape(
        "farm",
        "a*b",
        "things",
        ("How many eggs does {p} have?", "How many eggs are there?"),
        "{p} has {a} {animals} that lay {b} eggs each. => the {animals} lay {eq} eggs.",
        "On the farm of {p} each of {a} {animals} lays {b} eggs. => all {a} {animals} lay {eq} eggs.",
        nouns="egg eggs",
    ),
)


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
    elif operation == "sum" and previous is not None and previous + value <= LARGEST_VALUE:
        choices = [previous]
    elif operation == "gap" and previous is not None and last in ("*", "a*b") and value - previous >= 2:
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
        people = [(name, 0) for name in SHE_NAMES] + [(name, 1) for name in HE_NAMES]
        (person, is_he), (other, _) = rng.sample(people, 2)
        he, him, his = (("she", "her", "her"), ("he", "him", "his"))[is_he]
        one, many = _noun(shape.nouns, rng)
        one_box, box = _noun(CONTAINERS, rng)
        self.words = {"p": person, "q": other, "he": he, "He": _sentence(he), "him": him, "his": his}
        self.words |= {"His": _sentence(his), "one": one, "it": many, "one_box": one_box, "box": box}
        self.words |= {"animals": _noun(ANIMALS, rng)[1]}
        self.connective = CONNECTIVES[(SHE_NAMES + HE_NAMES).index(person) % len(CONNECTIVES)]
        self.question: list[str] = []
        self.lines: list[str] = []
        self.used: set[str] = set()

    def tell(self, telling: tuple[str, str], numbers: dict[str, int], equation: str) -> None:
        """Add a sentence to the question and, if the telling has one, a line to the answer."""
        thing = self.rng.choice(THINGS)
        scene = {"day": self.rng.choice(DAYS), "place": self.rng.choice(PLACES), "thing": thing}
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

    def advance(self) -> bool:
        """Tell one further beat; return False when no beat of the group fits the running value."""
        beats = list(BEATS.get(self.group, ()))
        self.rng.shuffle(beats)
        for beat in beats:
            operand = _operand(beat.operation, self.value, self.previous, self.last, self.rng)
            tellings = [telling for telling in beat.tellings if telling[0] not in self.used]
            if operand is None or not tellings:
                continue
            self.previous, self.last = self.value, beat.operation
            self.value, equation = _apply(beat.operation, self.value, operand)
            self.tell(self.rng.choice(tellings), {"k": operand, "c": operand}, equation)
            self.asks, self.group = beat.asks, beat.group
            return True
        return False


def _write(shape: Shape, operations: int, rng: random.Random) -> Problem:
    story = _Story(shape, rng)
    story.open(shape.opening)
    while len(story.lines) < operations and story.advance():
        pass
    question = " ".join([*story.question, rng.choice(story.asks).format(**story.words)])
    answer = "\n".join([*story.lines, f"#### {story.value}"])
    return Problem(question, answer, story.value, len(story.lines), shape.name)


def generate(seed: int) -> Iterator[Problem]:
    """Yield an endless stream of problems of both splits; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        operations = rng.choices(range(1, len(OPERATION_WEIGHTS) + 1), OPERATION_WEIGHTS)[0]
        problem = _write(rng.choice(SHAPES), operations, rng)
        if problem.operations:
            yield problem
