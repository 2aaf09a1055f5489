"""The model card: what it says, valid metadata, and that nobody's own card is overwritten."""

import pytest
from huggingface_hub import ModelCard

from hf_adaptive.evaluation import CurvePoint, ExitReport
from hf_adaptive.hub import model_card, write_model_card
from tests import tiny

REPORT = ExitReport(
    exit_layers=tiny.EXIT_LAYERS,
    costs=[0.25, 0.5, 1.0],
    accuracy=[0.71, 0.8, 0.8412],
    metric_name="accuracy",
    curve=[CurvePoint(0.9, 0.4321, 0.8377, [0.5, 0.3, 0.2], seconds=0.5)],
    num_examples=872,
    criterion="confidence",
    full_seconds=1.0,
    timed_examples=512,
    batch_size=32,
    device="cpu",
)


@pytest.fixture(scope="module")
def model():
    model = tiny.model("bert", exit_thresholds=[0.9, None])
    model.config._name_or_path = "google-bert/bert-base-uncased"
    return model


def test_states_origin_exits_numbers_and_how_to_load(model):
    text = str(model_card(model, REPORT, repo_id="me/sst2-exits", dataset_name="stanfordnlp/sst2", language="en"))
    for part in (
        "google-bert/bert-base-uncased",
        "stanfordnlp/sst2",
        "1, 2, 4 of 4",
        "'sweet'",
        "[0.9, None]",
        "| 4 | 1.00 | 0.8412 |",
        "| 0.9 | 0.43 | 0.8377 | 0.500 | 2.00 |",
        'from_pretrained("me/sst2-exits", trust_remote_code=True)',
        "Cost is the fraction of the layers that were run",
        "2306.02307",
    ):
        assert part in text


def test_metadata_is_read_back_by_the_hub_library(model, tmp_path):
    card = model_card(model, REPORT, repo_id="me/sst2-exits", dataset_name="stanfordnlp/sst2", license="apache-2.0")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.datasets == ["stanfordnlp/sst2"]
    assert data.pipeline_tag == "text-classification"
    assert data.library_name == "transformers"
    assert {"early-exit", "sweet"} <= set(data.tags)
    assert sorted(result.metric_value for result in data.eval_results) == REPORT.accuracy


def test_a_folder_is_named_without_its_path(model):
    model.config._name_or_path = "/home/somebody/models/minilm"
    card = model_card(model, REPORT)
    model.config._name_or_path = "google-bert/bert-base-uncased"
    assert "`minilm`" in str(card)
    assert "somebody" not in str(card)
    assert card.data.base_model is None


def test_without_a_report_there_are_no_numbers(model):
    card = model_card(model)
    assert "What each exit is worth" not in str(card)
    assert card.data.eval_results is None


def test_a_card_of_ones_own_is_not_overwritten_unasked(model, tmp_path):
    (tmp_path / "README.md").write_text("My own words.")
    card = model_card(model, REPORT)
    assert not write_model_card(card, tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own words."
    assert write_model_card(card, tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == str(card)


def test_a_card_that_was_written_by_an_earlier_run_is_renewed(model, tmp_path):
    assert write_model_card(model_card(model), tmp_path)
    assert write_model_card(model_card(model, REPORT), tmp_path)
    assert "What each exit is worth" in (tmp_path / "README.md").read_text()
