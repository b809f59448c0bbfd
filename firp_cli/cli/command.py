"""Class of every command: old names of options, options that are given twice, and values that no command can use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from firp_cli.cli.terminal import interruption, say
from firp_cli.config import LARGEST_TEMPERATURE
from firp_cli.errors import UsageError

OLD_OPTIONS = {"--layers": "--backend", "--sittings": "--timing-rounds"}  # old name: new name; until version 0.2
LISTS = {"--batch-sizes", "--dataset", "--layers", "--methods"}  # several values with commas; given twice, both count
LISTS_OF_BENCH = {"--batch-size", "--max-new-tokens", "--temperature", "--tree"}
OVERRIDDEN = {"arguments", "recipe"}  # arguments that take key=value
MAY_BE_EMPTY = {"--prompt"}
TEXTS = {"--prompt", "--stop", "--system", "--chat-template", "--template-options"}  # of any length; others: names
LONGEST = 255  # bytes of a file's name
MOST = {"--seed": 2**63 - 1, "--temperature": LARGEST_TEMPERATURE}  # largest number of an option
MOST_OF_OTHERS = 2**31 - 1
NOT_FINITE = {"nan", "inf", "infinity"}
SHOWN = 60  # characters of a refused argument


class Command(TyperCommand):
    """Command whose options mean one thing.

    The values of an option that is given twice are joined where it takes several, and refused elsewhere. Empty values,
    text that is not UTF-8, and numbers that are not finite or too large are refused. Old names of options are accepted,
    and the new ones named on stderr.

    Ctrl-C, SIGTERM and a closed terminal end it with a line and the exit code of an interruption.

    Raises UsageError.
    """

    def invoke(self, ctx: Any) -> Any:
        with interruption("firp: interrupted"):
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            _check_text(argument)
        rest = super().parse_args(ctx, [self._current(argument) for argument in args])
        for parameter in self.params:
            value = ctx.params.get(str(parameter.name))
            _check_number(parameter, value)
            if isinstance(value, Path) and value.parts[:1] == ("~",):  # a shell leaves it in --output=~/x
                ctx.params[str(parameter.name)] = value.expanduser()
        return rest

    def make_parser(self, ctx: Any) -> Any:
        """Return click's parser, which keeps every value of an option here instead of the last one."""
        parser = super().make_parser(ctx)
        options: list[Any] = [
            item for item in self.get_params(ctx) if item.param_type_name == "option" and not item.multiple
        ]
        for item in options:
            if item.is_flag:
                parser.add_option(item, item.opts, item.name, action="append_const", const=True)
                if item.secondary_opts:
                    parser.add_option(item, item.secondary_opts, item.name, action="append_const", const=False)
            else:
                parser.add_option(item, item.opts, item.name, action="append", nargs=item.nargs)
        parse = parser.parse_args

        def parse_once(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            parameters = self.get_params(ctx)
            for parameter in parameters:
                _check_filled(parameter, values.get(parameter.name))
            if not OVERRIDDEN & {parameter.name for parameter in parameters}:
                named = [values.get(item.name) for item in parameters if item.param_type_name == "argument"]
                _check_words(_typed_name(ctx), [*named, *rest])
            for item in options:
                if item.name in values:
                    several = LISTS | LISTS_OF_BENCH if ctx.info_name == "bench" else LISTS
                    values[item.name] = _one_value(item, values[item.name], several)
            return values, rest, order

        parser.parse_args = parse_once  # type: ignore[method-assign]
        return parser

    def _current(self, argument: str) -> str:
        old, sign, value = argument.partition("=")
        new = OLD_OPTIONS.get(old)
        if new is None or any(old in parameter.opts for parameter in self.params):
            return argument
        if new not in {name for parameter in self.params for name in parameter.opts}:
            return argument
        say(f"firp: {old} is now called {new}; the old name will be removed in the next version")
        return new + sign + value


def _one_value(item: Any, given: list[Any], several: set[str]) -> Any:
    """Return the value of an option from all those that were given."""
    name = _name(item)
    if item.is_flag:
        if len(set(given)) > 1:
            raise UsageError(f"{name} and {item.secondary_opts[0]} contradict each other: leave one out")
        return given[0]
    if len(given) == 1:
        return given[0]
    if name in several:
        return ",".join(given)
    raise UsageError(f"{name} is given {len(given)} times, as {' and as '.join(map(str, given))}: give it once")


def _check_text(argument: str) -> None:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        shown = ascii(argument[:SHOWN])
        raise UsageError(f"the argument {shown} is not UTF-8 text: convert it, or write prompts into a file") from None
    if "\0" in argument:
        raise UsageError(f"the argument {argument[:SHOWN]!a} contains a NUL character")


def _check_words(command: str, given: list[Any]) -> None:
    """Refuse `key=value` where a command reads no recipe. Folders may have such names."""
    words = [word for item in given for word in (item if isinstance(item, (list, tuple)) else [item])]
    for word in words:
        if isinstance(word, str) and "=" in word and not Path(word).exists():
            raise UsageError(
                f"{word[:SHOWN]!r} does not exist, and `firp {command}` takes no key=value overrides of a recipe: "
                f"`firp {command} --help` lists its options"
            )


def _typed_name(ctx: Any) -> str:
    """Return a command's name after `firp`, with that of its group."""
    group = _typed_name(ctx.parent) if ctx.parent is not None and ctx.parent.parent is not None else ""
    return f"{group} {ctx.info_name}".strip()


def _check_filled(parameter: Any, value: Any) -> None:
    """Refuse empty text, which would name the working directory, match everywhere, or choose nothing, and names that no
    file system has.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    if "" in values and not MAY_BE_EMPTY & set(parameter.opts):
        raise UsageError(f"{_name(parameter)} is empty: give a value, or leave it out")
    if TEXTS & set(parameter.opts):
        return
    for name in values:
        if not isinstance(name, str):
            continue
        if name.strip().lower().lstrip("+-") in NOT_FINITE and isinstance(parameter.default, float):
            raise _not_finite(parameter, name)
        if "=" not in name and not name.isdigit() and max(map(len, name.encode().split(b"/"))) > LONGEST:
            raise UsageError(f"{_name(parameter)} {name[:SHOWN]!r}...: a name has at most {LONGEST} bytes")


def _not_finite(parameter: Any, value: object) -> UsageError:
    return UsageError(f"{_name(parameter)} {value}: give a finite number")


def _check_number(parameter: Any, value: Any) -> None:
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise _not_finite(parameter, number)
        most = MOST.get(_name(parameter), MOST_OF_OTHERS)
        if isinstance(number, (int, float)) and abs(number) > most:
            raise UsageError(f"{_name(parameter)} {str(number)[:SHOWN]} is out of range: at most {most:,}")


def _name(parameter: Any) -> str:
    """Return the name of a parameter as a user types it."""
    return str(parameter.opts[-1] if parameter.param_type_name == "option" else parameter.metavar or parameter.name)
