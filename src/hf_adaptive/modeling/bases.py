"""What the mixins are mixed into, as type checkers see it; at run time nothing.

The classes proper are made from a stock class and mixins, see `architectures.py`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    class ConfigBase(PreTrainedConfig):
        """A stock configuration of an architecture."""

        architecture: Any
        num_hidden_layers: int

    class ModelBase(nn.Module):
        """A stock model of an architecture, with a configuration of this package."""

        architecture: Any
        config: Any
        config_class: Any
        base_model: Any
        base_model_prefix: str

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any: ...

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any: ...

        def _upload_modified_files(self, *args: Any, **kwargs: Any) -> Any: ...

        def _init_weights(self, module: nn.Module) -> None: ...

        def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None: ...

        def initialize_weights(self) -> None: ...

        def load_adapter(self, *args: Any, **kwargs: Any) -> Any: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    ConfigBase = ModelBase = object
