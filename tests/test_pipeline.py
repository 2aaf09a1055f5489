"""The pipeline that answers lists stage by stage says what the stock pipeline says."""

import pytest
from transformers import pipeline

from hf_adaptive import CascadeForSequenceClassification, ExitsTextClassificationPipeline
from tests import tiny


def model_with_exits():
    return tiny.model("bert", exit_thresholds=0.5)


def cascade():
    members = [tiny.plain_model("bert", num_hidden_layers=depth) for depth in (1, 4)]
    return CascadeForSequenceClassification.from_models(members, exit_thresholds=0.5)


@pytest.fixture(params=[model_with_exits, cascade])
def pipelines(request):
    """The stock pipeline and ours."""
    arguments = {"model": request.param(), "tokenizer": tiny.tokenizer()}
    stock = pipeline("text-classification", **arguments)
    return stock, pipeline("text-classification", **arguments, pipeline_class=ExitsTextClassificationPipeline)


def assert_alike(own, expected):
    own, expected = ([one] if isinstance(one, dict) else one for one in (own, expected))
    assert len(own) == len(expected)
    for ours, theirs in zip(own, expected):
        ours, theirs = ([one] if isinstance(one, dict) else one for one in (ours, theirs))
        assert [one["label"] for one in ours] == [one["label"] for one in theirs]
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)


PAIRS = [{"text": text, "text_pair": pair} for text, pair in zip(tiny.sentences(6), tiny.sentences(6, seed=1))]


@pytest.mark.parametrize("arguments", [{}, {"top_k": None}, {"top_k": 2, "batch_size": 4}])
@pytest.mark.parametrize("texts", [tiny.sentences(13), tiny.sentences(1), PAIRS, "good film", PAIRS[0]])
def test_same_answers(pipelines, texts, arguments):
    stock, own = pipelines
    assert_alike(own(texts, **arguments), stock(texts, **arguments))


@pytest.mark.parametrize("texts", [[], ()])
def test_no_texts_have_no_answers(pipelines, texts):
    assert pipelines[1](texts) == []


def test_a_generator_is_answered_as_it_comes(pipelines):
    stock, own = pipelines
    assert_alike(list(own(text for text in tiny.sentences(5))), stock(tiny.sentences(5)))


def test_rows_run_in_full_batches_whatever_the_order_of_the_texts():
    own = pipeline(
        "text-classification",
        model=tiny.model("bert", exit_thresholds=[None, None]),
        tokenizer=tiny.tokenizer(),
        pipeline_class=ExitsTextClassificationPipeline,
    )
    lengths = []
    own.model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    texts = tiny.sentences(16)
    own(texts, batch_size=4)
    assert len(lengths) == 4
    assert lengths == sorted(lengths, reverse=True)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="needs a model with exits or a cascade, got a BertForSequenceClassification"):
        pipeline(
            "text-classification",
            model=tiny.plain_model("bert"),
            tokenizer=tiny.tokenizer(),
            pipeline_class=ExitsTextClassificationPipeline,
        )
