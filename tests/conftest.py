"""One core, fixed seeds, and warnings that are given once per test rather than once per run."""

import gc

import hypothesis
import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests import tiny

# Begun first, because each is done by one of the workers: a long one that begins last leaves the others waiting.
LONGEST = (
    "test_architectures_loading",
    "test_constant_heads_in_models",
    "test_exit_study",
    "test_onnx_export",
    "test_compare_deployments",
    "test_two_processes",
    "test_architectures",
    "test_documents",
    "test_branches",
    "test_papa",
    "test_risk_control",
    "test_cascade",
    "test_push_to_hub",
    "test_benchmarks",
    "test_early_exit",
    "test_examples",
    "test_study",
    "test_export",
    "test_notebooks",
    "test_push",
    "test_remote_code",
)

VERBOSITY = transformers_logging.get_verbosity()

torch.set_num_threads(1)
# A slow machine is no failure, and the same examples every time; `--hypothesis-profile explore` looks for others.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    """Longest files first; the order within a file stays."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage():
    """Each `Trainer.train` collects garbage, and takes longest to look through what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _what_is_said_is_left_as_it_was():
    """A script in this process silences transformers; whoever calls it without `run_here` is told here."""
    yield
    left = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(VERBOSITY)
    assert left == VERBOSITY, "transformers says less, or more, than before this test: call scripts by `run_here`"


@pytest.fixture
def warnings_given(caplog):
    """Texts of the warnings so far; a warning of an earlier test is given again."""
    logger = transformers_logging.get_logger("transformers")
    type(logger).warning_once.cache_clear()
    was_propagating = logger.propagate
    logger.propagate = True
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.propagate = was_propagating


@pytest.fixture(params=tiny.ARCHITECTURES)
def name(request):
    """Every architecture of the tiny models in turn."""
    return request.param
