"""Names that other people chose, put into a card so that they cannot be anything but names there."""

import json
import re

# What Markdown and HTML read as more than a character: code, emphasis, links, tags, entities, headings, formulas. An
# underscore within a word is one, and so is what begins no link.
_MARKUP = re.compile(r"[\\`*\[\]<>~&$#!]|(?<!\w)_|_(?!\w)|:(?=//)")


def one_line(name: str) -> str:
    """The name without line breaks and other characters that cannot be seen (text that turns its direction, …)."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def as_text(name: str) -> str:
    """The name in a sentence, a heading or a cell of a table; there `|` is escaped by the table itself."""
    return _MARKUP.sub(r"\\\g<0>", one_line(name))


def as_code(name: str) -> str:
    """The name as code in a sentence, between more backticks than it has in a row itself."""
    text = one_line(name)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def as_literal(name: str) -> str:
    """The name as a string in a Python program."""
    return json.dumps(one_line(name), ensure_ascii=False)
