"""Chat template in use: the tokenizer's own, a Jinja file, or one that travels with the package.

Options are written at the head of the template as assignments, so that one text has all that decides a rendering: it is
what fingerprints cover. A template that reads the clock gets a fixed day, because a store must render the same on every
day and on every rank.
"""

from __future__ import annotations

import json
import logging
import math
import re
import reprlib
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from firp_cli.assets import chat_templates, nearest
from firp_cli.config import TeacherConfig
from firp_cli.errors import TeacherError, first_line
from firp_cli.provenance import fingerprint

LOG = logging.getLogger("firp")
PLAIN = "plain"  # template of a tokenizer that has none
DAY = date(2024, 7, 26)  # the day that Llama 3's templates print where none is given
DATE_OPTION = "date"
DATE_STRING = "date_string"  # variable of Llama 3's templates, in their own form of a date
CLOCK = "strftime_now"
CHANCE = {"random", "lipsum"}  # a filter and a function of Jinja
MARK = "\ufeff"  # byte-order mark, with which editors on Windows begin files
GENERATION_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
RESERVED = (  # names that are no options
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "namespace", "dict", "range", CLOCK),
)
MIDNIGHT = {"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%f": "000000", "%p": "AM", "%Z": "", "%z": ""}


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """Return the template in use, options included; `plain` for a tokenizer without one."""
    return tokenizer.get_chat_template(None, tools) if tokenizer.chat_template else _shipped(PLAIN)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits over vocabulary, merges and normalisation: all that maps text to ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint(tokenizer.get_vocab())
    state = json.loads(backend.to_str())
    # without what the latest call set
    return fingerprint({key: value for key, value in state.items() if key not in ("padding", "truncation")})


def template_fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits over the chat template in use."""
    return fingerprint(template_of(tokenizer))


def at_fixed_time(template: str) -> str:
    """Return the template with a clock that always shows `DAY` at midnight, if it reads the clock."""
    return _before(_clock(DAY), template) if reads_clock(template) else template


def reads_clock(template: str) -> bool:
    """Return True for a template that calls `strftime_now`, and does not define it."""
    return CLOCK in template and not re.search(rf"macro\s+{CLOCK}\b", template)


def set_chat_template(
    tokenizer: Any, config: TeacherConfig, name: str, found: tuple[str, str] | None = None
) -> dict[str, str]:
    """Give the tokenizer the configured template and options; return a record for manifests and reports.

    The record has the template's `source` (`tokenizer`, `plain`, `vicuna` or a file's name), its `fingerprint`, and
    the `date` that it prints, if it prints any. `found`: source and text of the configured template, where it was read
    before.

    Raises TeacherError for a template that does not exist, is not valid Jinja or does not render the same each time,
    and for an option that it does not read.
    """
    source, chosen = "tokenizer", _own_template(tokenizer.chat_template, name)
    if config.chat_template is not None:
        source, chosen = found or find_template(config.chat_template)
    elif not chosen:
        source = PLAIN
        note_once(
            f"{name} has no chat template: plain text is used, questions and answers on lines of their own; "
            "teacher.chat_template (--chat-template) takes a Jinja file or a shipped name such as vicuna"
        )
    if config.template_options:
        chosen = _with_options(chosen or _shipped(PLAIN), config.template_options)
    if chosen != tokenizer.chat_template:
        tokenizer.chat_template = chosen
    try:
        template = template_of(tokenizer)
    except ValueError:  # the library's error names its own arguments
        names = ", ".join(sorted(tokenizer.chat_template))
        raise TeacherError(
            f"{name} has several chat templates ({names}), none of them named default: teacher.chat_template takes one"
        ) from None
    for text in chosen.values() if isinstance(chosen, dict) else (template,):
        _check_constant(text, f"of {name}" if source == "tokenizer" else source)
    record = {"source": source, "fingerprint": fingerprint(template)}
    if CLOCK in template or DATE_STRING in _variables(template, f"of {name}"):
        record["date"] = str(config.template_options.get(DATE_OPTION, config.template_options.get(DATE_STRING, DAY)))
    if reads_clock(template) and DATE_STRING not in config.template_options:
        note_once(
            f"the chat template of {name} prints the date: it is always {DAY}, so that every rendering is the same; "
            "teacher.template_options={date: YYYY-MM-DD} sets another day"
        )
    return record


def _own_template(template: Any, name: str) -> str | dict[str, str] | None:
    """Return a tokenizer's own template, or several by name, without byte-order marks, which would be part of every
    prompt. Raises TeacherError where it is no text.
    """
    if template is None:
        return None
    texts = template if isinstance(template, dict) else {"": template}
    for text in texts.values():
        if not isinstance(text, str):
            raise TeacherError(
                f"the chat template of {name} is no text but {reprlib.repr(text)}: correct chat_template in its "
                "tokenizer_config.json, or give another as teacher.chat_template (--chat-template)"
            )
    made = {key: text.removeprefix(MARK) for key, text in texts.items()}
    return made if isinstance(template, dict) else made[""]


def old_template(folder: str) -> str | None:
    """Return the template of a folder's chat_template.json, where processors keep theirs: tokenizers do not read it.
    None without such a file. Raises TeacherError where it is damaged.
    """
    path = Path(folder) / "chat_template.json"
    if not path.is_file():
        return None
    try:
        text = json.loads(path.read_text(encoding="utf-8-sig"))["chat_template"]
        if isinstance(text, str):
            return text
        fault = f"`chat_template` is no text but {reprlib.repr(text)}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        fault = first_line(error)
    raise TeacherError(f"{path} cannot be read ({fault}): correct it, or give teacher.chat_template (--chat-template)")


def _check_constant(template: str, source: str) -> None:
    """Raise TeacherError for a template whose rendering depends on chance: its prompts would differ each time."""
    tree = _parsed(template, source)
    filters = [node for node in tree.find_all(jinja2.nodes.Filter) if _filter_name(node) in CHANCE]
    names = [node for node in tree.find_all(jinja2.nodes.Name) if node.name in CHANCE & _variables(template, source)]
    if found := filters or names:
        raise TeacherError(
            f"the chat template {source} uses `{_filter_name(found[0])}` (line {found[0].lineno}), so it renders the "
            "same messages differently each time: take that out, or give another as teacher.chat_template "
            "(--chat-template)"
        )


def _filter_name(node: Any) -> str:
    """Return the name of a filter, of the filter that `map` applies, or of a variable."""
    applied = node.args[0] if isinstance(node, jinja2.nodes.Filter) and node.name == "map" and node.args else None
    return str(applied.value if isinstance(applied, jinja2.nodes.Const) else node.name)


def find_template(name: str) -> tuple[str, str]:
    """Return a template's source and text, given a Jinja file, its text, or a shipped name. Raises TeacherError."""
    path = Path(name)
    if "{{" in name or "{%" in name:
        source, text = "text", name
    elif name in chat_templates() and not path.is_file():
        return name, _shipped(name)
    else:
        try:
            source, text = f"file {path.name}", path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # ValueError: no UTF-8 text, a NUL in the name
            hint = nearest(name, chat_templates())
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise TeacherError(f"teacher.chat_template {name!r} cannot be read: {reason}{hint}") from None
    if not text.strip():
        raise TeacherError(f"teacher.chat_template {name!r} is empty")
    _variables(text, source)
    return source, text


@cache
def _shipped(name: str) -> str:
    return chat_templates()[name].read_text(encoding="utf-8")


def _with_options(template: str | dict[str, str], options: dict[str, Any]) -> str | dict[str, str]:
    """Return the template, or each of several named ones, with the options that it reads assigned at its head.

    Raises TeacherError for an option that none of them reads.
    """
    texts = template if isinstance(template, dict) else {"": template}
    heads = {name: _assignments(text, options) for name, text in texts.items()}
    for option in options:
        if option in RESERVED or not any(option in head for head in heads.values()):
            others = sorted(set().union(*(_variables(text, "template") for text in texts.values())) - set(RESERVED))
            raise TeacherError(
                f"teacher.template_options: the chat template does not read {option!r}"
                + (nearest(option, others) if others else "; it has no options")
                + "\n{} in place of them leaves all options out, also those that a predictor remembers"
            )
    made = {name: _before("".join(heads[name].values()), text) for name, text in texts.items()}
    return made if isinstance(template, dict) else made[""]


def _assignments(template: str, options: dict[str, Any]) -> dict[str, str]:
    """Return statements that assign the options that a template reads, by option."""
    known = _variables(template, "template")
    made: dict[str, str] = {}
    for name, value in options.items():
        if name == DATE_OPTION:
            day = _day(value)
            text = _clock(day) if CLOCK in template else ""
            text += f'{{% set date_string = "{day:%d %b %Y}" %}}' if "date_string" in known else ""
            made |= {name: text} if text else {}
        if name in known:
            made[name] = made.get(name, "") + f"{{% set {name} = {_literal(value)} %}}"
    return made


def _before(head: str, template: str) -> str:
    """Return the template with statements before it. They stand on a line of their own, which transformers' Jinja drops
    (`trim_blocks`): blanks at the template's start keep their meaning.
    """
    return f"{head}\n{template}" if head else template


def _variables(template: str, source: str) -> set[str]:
    """Return the names that a template reads. Raises TeacherError where it is not valid Jinja."""
    return jinja2.meta.find_undeclared_variables(_parsed(template, source))


def _parsed(template: str, source: str) -> jinja2.nodes.Template:
    """Return the syntax tree of a template. Raises TeacherError where it is not valid Jinja."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    environment.globals.pop("lipsum")  # it counts as a name that is read
    try:
        return environment.parse(GENERATION_MARKS.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        fault = f"line {error.lineno}: {error.message}"
    except (RecursionError, ValueError) as error:  # nested too deeply; a NUL character
        fault = first_line(error)
    raise TeacherError(f"the chat template {source} is not valid Jinja: {fault}")


def _literal(value: Any) -> str:
    """Return a JSON value as a Jinja literal. Raises TeacherError for other values."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    raise TeacherError(f"teacher.template_options: {value!r} is not text, a number, a truth value, a list or a mapping")


def _day(value: Any) -> date:
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        raise TeacherError(f"teacher.template_options.date: {value!r} is not a date of the form YYYY-MM-DD") from None


def _clock(day: date) -> str:
    """Return a macro `strftime_now` in Jinja that formats midnight of a day: templates accept no Python function."""
    codes = ("%Y", "%y", "%m", "%d", "%b", "%h", "%B", "%a", "%A", "%j", "%u", "%w", "%U", "%W", "%V", "%G")
    values = {code: day.strftime(code) for code in codes} | MIDNIGHT
    values |= {"%-d": str(day.day), "%e": f"{day.day:2d}", "%-m": str(day.month), "%-j": day.strftime("%j").lstrip("0")}
    values |= {"%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0"}
    whole = {"%c": "%a %b %e %H:%M:%S %Y", "%x": "%m/%d/%y", "%X": "%H:%M:%S", "%D": "%m/%d/%y", "%F": "%Y-%m-%d"}
    whole |= {"%T": "%H:%M:%S", "%R": "%H:%M", "%r": "%I:%M:%S %p"}
    values["%%"] = "%"
    replaced = "".join(f"|replace({code!r}, {value!r})" for code, value in (whole | values).items())
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"


@cache
def note_once(line: str) -> None:
    """Log a line, once in a process: a command may load the same teacher more than once."""
    LOG.info(line)
