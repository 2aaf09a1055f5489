"""The model card: what it says, valid metadata, and that nobody's own card is overwritten."""

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard
from transformers import SchedulerType

import hf_adaptive
from hf_adaptive.evaluation import CurvePoint, ExitReport, PlainModel
from hf_adaptive.hub import model_card, write_model_card
from tests import tiny

REPORT = ExitReport(
    exit_layers=tiny.EXIT_LAYERS,
    costs=[0.25, 0.5, 1.0],
    accuracy=[0.71, 0.8, 0.8412],
    metric_name="accuracy",
    curve=[
        CurvePoint(0.5, 0.25, 0.71, [1.0, 0.0, 0.0], seconds=0.25),
        CurvePoint(0.95, 0.6, 0.8401, [0.2, 0.3, 0.5]),
    ],
    num_examples=872,
    criterion="confidence",
    full_seconds=1.0,
    timed_examples=512,
    batch_size=32,
    device="cpu",
    chosen=CurvePoint([0.9, 0.9], 0.4321, 0.8377, [0.5, 0.3, 0.2], seconds=0.5),
)


@pytest.fixture
def model():
    model = tiny.model("bert", exit_thresholds=[0.9, 0.9], exit_temperatures=[1.5, 1.0, 1.0])
    model.config._name_or_path = "google-bert/bert-base-uncased"
    return model


def saved_and_loaded(card, folder):
    """The card's metadata as the Hub's library reads it."""
    card.save(folder / "README.md")
    return ModelCard.load(folder / "README.md").data


def snippets(card):
    """The Python code in a card."""
    return re.findall(r"```python\n(.*?)```", str(card), re.DOTALL)


def test_states_origin_exits_numbers_and_how_to_load(model):
    text = str(model_card(model, REPORT, repo_id="me/sst2-exits", dataset_name="stanfordnlp/sst2", language="en"))
    for part in (
        "[google-bert/bert-base-uncased](https://huggingface.co/google-bert/bert-base-uncased)",
        "[stanfordnlp/sst2](https://huggingface.co/datasets/stanfordnlp/sst2)",
        "| 1, 2, 4 of 4 |",
        "`sweet`",
        "`cls`",
        "| layers run | cost | accuracy | threshold | temperature |",
        "| 1 | 0.25 | 0.7100 | 0.9 | 1.5 |",
        "| 4 | 1.00 | 0.8412 | – | 1 |",
        "| 0.5 | 0.25 | 0.7100 | 4.00 | 100 / 0 / 0 |",
        "| 0.95 | 0.60 | 0.8401 | – | 20 / 30 / 50 |",
        "which took 1 seconds",
        "![accuracy over cost and over measured speed](exits.png)",
        'from_pretrained("me/sst2-exits", trust_remote_code=True)',
        "is the fraction of the layers that are run",
        "2306.02307",
    ):
        assert part in text
    assert "2211.03495" not in text


def test_the_stored_operating_point_stands_out(model, tmp_path):
    card = model_card(model, REPORT)
    assert "| **chosen** | **0.43** | **0.8377** | **2.00** | **50 / 30 / 20** |" in str(card)
    names = {result.metric_name: result.metric_value for result in saved_and_loaded(card, tmp_path).eval_results}
    assert names["accuracy with the stored thresholds (cost 0.43)"] == 0.8377
    model.config.exit_thresholds = [0.9, None]
    assert "**chosen**" not in str(model_card(model, REPORT))


def test_at_most_a_dozen_rows_of_thresholds_spread_by_cost(model):
    points = [CurvePoint(step / 100, 0.25 + 0.7 * step / 100, 0.8, [0.5, 0.3, 0.2]) for step in range(100)]
    text = str(model_card(model, dataclasses.replace(REPORT, curve=points)))
    rows = re.findall(r"^\| .* \| (?:\*\*)?(0\.\d\d)(?:\*\*)? \| .* / .* / .* \|$", text, re.MULTILINE)
    assert len(rows) == 12
    assert rows == sorted(rows)
    assert rows[0] == "0.25"
    assert rows[-1] == "0.94"


def test_the_promise_stands_in_the_card_until_thresholds_change(model):
    record = {
        "wish": {"name": "max_accuracy_drop", "bound": 0.005},
        "guarantee": {"confidence": 0.95, "p_value": 0.04, "test": "exact unconditional", "num_testing": 2000},
        "measured": {"mean_cost": 0.41, "disagreement": 0.032, "accuracy_drop": 0.001, "exit_shares": [0.5, 0.3, 0.2]},
        "num_examples": 3000,
        "thresholds": model.config.exit_thresholds,
        "temperatures": model.config.exit_temperatures,
        "profile": None,
    }
    model.config.exit_calibration = record
    text = str(model_card(model))
    for part in (
        "at most 0.5 points of accuracy lost",
        "confidence **0.95**",
        "on 2000 of 3000",
        "3.2% other answers",
    ):
        assert part in text
    model.config.exit_calibration = {**record, "wish": {"name": "max_accuracy_drop", "bound": 0.01}}
    assert "at most 1 point of accuracy lost" in str(model_card(model))
    model.config.exit_calibration = {**record, "guarantee": None}
    assert "without a promise about new data" in str(model_card(model))
    model.config.exit_thresholds = [0.8, 0.8]
    assert "The promise" not in str(model_card(model))


def test_says_how_it_was_made_and_offers_texts_to_try(model, tmp_path):
    training = {"learning_rate": 2e-4, "lr_scheduler_type": SchedulerType.LINEAR}
    card = model_card(model, training=training, widget=["A masterpiece.", "Far too: long"])
    assert "| learning_rate | 0.0002 |" in str(card)
    assert "| lr_scheduler_type | linear |" in str(card)
    assert f"| hf_adaptive | {hf_adaptive.__version__} |" in str(card)
    assert saved_and_loaded(card, tmp_path).widget == [{"text": "A masterpiece."}, {"text": "Far too: long"}]


def test_the_plain_model_stands_beside_it(model):
    report = dataclasses.replace(REPORT, plain=PlainModel(0.8531, seconds=0.8))
    assert "A plain model without exits has accuracy 0.8531 and was 1.25 times as fast." in str(
        model_card(model, report)
    )


def test_metadata_is_read_back_by_the_hub_library(model, tmp_path):
    card = model_card(model, REPORT, repo_id="me/sst2-exits", dataset_name="stanfordnlp/sst2", license="apache-2.0")
    data = saved_and_loaded(card, tmp_path)
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.datasets == ["stanfordnlp/sst2"]
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-classification"
    assert data.library_name == "transformers"
    assert data.model_name == "sst2-exits"
    assert data.tags == ["early-exit", "hf_adaptive", "sweet"]
    assert [result.metric_value for result in data.eval_results] == [*REPORT.accuracy, 0.8377]
    assert {(result.dataset_type, result.metric_type) for result in data.eval_results} == {
        ("stanfordnlp/sst2", "accuracy")
    }


def test_a_score_that_is_no_number_is_left_out_of_the_metadata(model, tmp_path):
    report = dataclasses.replace(REPORT, accuracy=[float("nan"), 0.8, 0.9])
    card = model_card(model, report)
    assert len(saved_and_loaded(card, tmp_path).eval_results) == 3
    assert "| 1 | 0.25 | nan |" in str(card)


def test_paths_are_shown_without_their_folders(model):
    model.config._name_or_path = "/home/mallory/models/minilm"
    card = model_card(model, REPORT, dataset_name="/home/mallory/reviews.csv")
    assert "`minilm`" in str(card)
    assert "`reviews.csv`" in str(card)
    assert "mallory" not in str(card)
    assert card.data.base_model is None
    assert card.data.datasets is None


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(model, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "encoder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_card(model, base_model="outputs/encoder").data.base_model is None


@pytest.mark.parametrize(("repo_id", "is_folder"), [("quickstart", True), ("/data/sst2", True), ("me/sst2", False)])
def test_code_that_names_a_folder_says_so(model, repo_id, is_folder):
    code = snippets(model_card(model, repo_id=repo_id))[0]
    assert (f'# "{repo_id}" is the folder that this card lies in' in code) == is_folder


def test_a_model_is_not_its_own_base(model):
    model.config._name_or_path = "me/sst2-exits"
    card = model_card(model, repo_id="me/sst2-exits")
    assert card.data.base_model is None
    assert "Fine-tuned from" not in str(card)
    named = model_card(model, repo_id="me/sst2-exits", base_model="google-bert/bert-base-uncased")
    assert named.data.base_model == "google-bert/bert-base-uncased"


def test_without_a_report_there_are_no_numbers(model):
    card = model_card(model)
    assert "| layers run | cost | threshold | temperature |" in str(card)
    assert "Speed and accuracy" not in str(card)
    assert card.data.eval_results is None


def test_without_measured_time_or_plot_there_are_no_columns_for_them(model):
    untimed = dataclasses.replace(
        REPORT,
        full_seconds=None,
        curve=[dataclasses.replace(point, seconds=None) for point in REPORT.curve],
    )
    text = str(model_card(model, untimed, plot_file=None))
    assert "| 0.5 | 0.25 | 0.7100 | 100 / 0 / 0 |" in text
    assert "times as fast" not in text
    assert "![" not in text


def test_says_on_which_side_of_the_threshold_rows_leave():
    text = str(model_card(tiny.model("bert", exit_criterion="entropy", exit_thresholds=0.2)))
    assert "whose entropy is at most the threshold" in text
    assert "exit_thresholds=[0.2, 0.2]" in text


def test_thresholds_are_rounded_for_people():
    text = str(model_card(tiny.model("bert", exit_thresholds=[2 / 3, None])))
    assert "exit_thresholds=[0.6667, None]" in text


def test_labels_do_not_break_the_table(model):
    model.config.id2label = {0: "a|b", 1: "two\nlines", 2: "c"}
    assert r"| classes | a\|b, two lines, c |" in str(model_card(model))


def test_a_report_of_other_exits_is_refused(model):
    with pytest.raises(ValueError, match=r"after layers \[1, 4\], but this model has them after \[1, 2, 4\]"):
        model_card(model, dataclasses.replace(REPORT, exit_layers=[1, 4]))


def test_what_the_card_says_to_run_runs(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    names: dict = {}
    for code in snippets(model_card(model, REPORT, repo_id=str(tmp_path))):
        exec(code, names)
    assert names["outputs"].exit_index.shape == (2,)
    assert names["model"].config.exit_thresholds == [0.9, 0.9]
    assert type(names["model"]) is type(model)


def test_a_card_of_ones_own_is_not_overwritten_unasked(model, tmp_path, warnings_given):
    (tmp_path / "README.md").write_text("My own words.")
    card = model_card(model, REPORT)
    assert not write_model_card(card, tmp_path)
    assert "README.md is left as it is" in warnings_given()[-1]
    assert (tmp_path / "README.md").read_text() == "My own words."
    assert write_model_card(card, tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == str(card)


def test_a_card_that_was_written_by_an_earlier_run_is_renewed(model, tmp_path):
    assert write_model_card(model_card(model), tmp_path)
    assert write_model_card(model_card(model, REPORT), tmp_path)
    assert "Speed and accuracy" in (tmp_path / "README.md").read_text()


def test_windows_line_endings_and_a_pass_through_the_hub_library_are_no_edit(model, tmp_path):
    text = str(ModelCard(str(model_card(model, REPORT))))
    (tmp_path / "README.md").write_bytes(text.replace("\n", "\r\n").encode())
    assert write_model_card(model_card(model), tmp_path)


@pytest.mark.parametrize(("old", "new"), [("# this-model", "# My model"), ("accuracy", "Accuracy"), ("0.71", "0.72")])
def test_a_card_that_was_edited_since_is_left_alone(model, tmp_path, old, new):
    edited = str(model_card(model, REPORT)).replace(old, new)
    (tmp_path / "README.md").write_text(edited)
    assert not write_model_card(model_card(model), tmp_path)
    assert (tmp_path / "README.md").read_text() == edited


def test_a_card_that_the_user_completed_before_writing_counts_as_edited(model, tmp_path):
    card = model_card(model)
    card.data.license = "mit"
    assert write_model_card(card, tmp_path)
    assert not write_model_card(model_card(model), tmp_path)


def test_a_failed_write_leaves_the_old_card(model, tmp_path):
    assert write_model_card(model_card(model), tmp_path)
    before = (tmp_path / "README.md").read_text()
    card = model_card(model, REPORT)
    card.text = "\ud800"  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_model_card(card, tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
