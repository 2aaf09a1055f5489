"""The model beneath what `Trainer` and PEFT put around it."""

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import is_peft_available


def without_adapter(model: Any) -> Any:
    """The model itself, where this is a `PeftModel` around it: an adapter's layers are in the model."""
    if isinstance(model, PreTrainedModel) or not is_peft_available():
        return model
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model
