"""`AutoModelForSequenceClassificationWithExits`."""

import os
from typing import Any

from transformers import PreTrainedConfig

from .modeling.architectures import ARCHITECTURES, make_class, supported_architecture
from .modeling.loading import check_config, checkpoint_model_type


class AutoModelForSequenceClassificationWithExits:
    """Picks the classifier with exits that fits a checkpoint.

    Example:

        >>> model = AutoModelForSequenceClassificationWithExits.from_pretrained(
        ...     "google-bert/bert-base-uncased", num_labels=2, exit_layers=[1, 4, 6, 12], exit_routing="sweet"
        ... )
    """

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is made with from_pretrained(path, ...) or from_config(config).")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint saved with exits, or gives exits to a plain one of a supported architecture.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub name or folder.
            **kwargs: Configuration fields (`exit_layers`, `exit_routing`, `num_labels`, …) and everything that
                `PreTrainedModel.from_pretrained` takes.

        Raises:
            ValueError: An architecture that is not supported (the message lists those that are), or a bad field.
        """
        model_type = checkpoint_model_type(pretrained_model_name_or_path, **kwargs)
        return _class_for(model_type).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights.

        Args:
            config: A configuration with exits.

        Raises:
            ValueError: An architecture that is not supported, or a configuration without exits.
        """
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config must be a configuration with exits, got a {type(config).__name__}.")
        model_class = _class_for(config.model_type)
        check_config(model_class, config)
        return model_class._from_config(config, **kwargs)


def _class_for(model_type: str | None) -> Any:
    for architecture in ARCHITECTURES.values():
        config_class = make_class(architecture.config_name)
        if model_type == config_class.model_type:
            return make_class(architecture.classifier_name)
    return make_class(supported_architecture(str(model_type)).classifier_name)
