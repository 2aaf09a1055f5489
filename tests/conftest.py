"""One core, fixed seeds, and warnings that are given once per test rather than once per run."""

import hypothesis
import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests import tiny

torch.set_num_threads(1)
# A slow machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
