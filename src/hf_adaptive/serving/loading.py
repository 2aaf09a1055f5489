"""A checkpoint as it is served."""

from typing import Any


def load_for_serving(
    path: str, revision: str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """The model of a folder or of the Hub, and its tokenizer.

    Args:
        path (`str`): Folder or Hub name of a classifier with exits or a cascade, with its tokenizer.
        revision (`str`, *optional*): Of a Hub name.
        device (`str`): Where the model is run.
        trust_remote_code (`bool`): Whether Python code that the checkpoint brings may be run; what this package can
            load needs none.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        OSError: There is no such checkpoint, or no tokenizer with it.
        ValueError: No classifier with exits, or exits that were never trained.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import hf_adaptive  # noqa: F401 (registers the architectures)

    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = AutoModelForSequenceClassification.from_pretrained(path, **source)
    if "exit_layers" not in model.config.to_dict():
        raise ValueError(
            f"{path} is a {type(model).__name__}, which has no exits. Serve a checkpoint that was trained with exits, "
            "or a cascade."
        )
    if model._exits_are_untrained:
        raise ValueError(f"the exits of {path} were never trained: their answers mean nothing. Fine-tune it first.")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, **source)
