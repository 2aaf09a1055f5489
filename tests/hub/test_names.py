"""Whatever a name contains, it stays a name: the card around it is read as with any other."""

import ast
import dataclasses

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive.hub import model_card
from hf_adaptive.hub.names import as_code, as_literal, as_text, one_line
from tests import tiny
from tests.hub.test_model_card import REPORT

markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is in the extra 'test'")
MARKDOWN = markdown_it.MarkdownIt("commonmark").enable("table")

PIECES = [
    *(
        "\n",
        "\r\n",
        "\u2028",
        "\n\n# Heading\n",
        "\n```\n",
        "\n---\n",
        "---",
        "| a | b |",
        "|",
        "\\",
        "\\|",
        "`",
        "``",
    ),
    *(
        "**",
        "_",
        "_a_",
        "*a*",
        "[a](http://x.y)",
        "![a](x)",
        "<script>",
        "<!--",
        "-->",
        "</code>",
        "&lt;",
        "<http://x.y>",
    ),
    *(
        "http://x.y",
        "$$",
        "~~",
        "{{ seal }}",
        "{% raw %}",
        '"',
        "'",
        "): import os #",
        "\u202e",
        "\x00",
        " ",
        "1. ",
        "- ",
    ),
]
NAMES = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6).map(lambda pieces: f"a{''.join(pieces)}z")


def structure(text):
    """What is read, without the texts themselves."""
    tokens = MARKDOWN.parse(text)
    return [_shape(token) for token in tokens]


def _shape(token):
    inside = [_shape(child) for child in token.children or () if child.type != "text"]
    return token.type, token.tag, [(key, value) for key, value in token.attrs.items() if key == "href"], inside


MODEL = tiny.model("bert", exit_thresholds=[0.9, 0.9])


def card(name):
    MODEL.config.id2label = {0: name, 1: "b", 2: "c"}
    report = dataclasses.replace(REPORT, metric_name=name, device=name)
    return model_card(
        MODEL, report, repo_id=name, base_model=f"x{name}/y/z", dataset_name=f"{name}x", training={name: name}
    )


def body(text):
    return text.split("\n---\n", 1)[1]


PLAIN = structure(body(str(card("plain"))))


@settings(max_examples=30)
@given(NAMES)
def test_card_is_read_the_same(name):
    text = str(card(name))
    assert structure(body(text)) == PLAIN
    code = [token.content for token in MARKDOWN.parse(body(text)) if token.type == "fence" and token.info == "python"]
    assert len(code) > 3
    for snippet in code:
        ast.parse(snippet)
    data = ModelCard(text).data
    assert data.metrics == [one_line(name)]
    assert "\n" not in data.model_name


@given(NAMES)
def test_name_is_shown_as_it_is(name):
    (paragraph,) = [token for token in MARKDOWN.parse(f"a {as_text(name)} b") if token.type == "inline"]
    assert [child.type for child in paragraph.children] == ["text"]
    assert paragraph.children[0].content == f"a {one_line(name)} b"
    (paragraph,) = [token for token in MARKDOWN.parse(f"a {as_code(name)} b") if token.type == "inline"]
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content.strip() == one_line(name)
    assert ast.literal_eval(as_literal(name)) == one_line(name)


def test_ordinary_names_are_left_alone():
    for name in ("LABEL_0", "sst2-exits", "google-bert/bert-base-uncased", "f1 (macro)", "très bien", "Matthews' r"):
        assert as_text(name) == one_line(name) == name
