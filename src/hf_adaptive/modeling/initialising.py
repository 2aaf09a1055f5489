"""New weights start as stock models' do."""

from torch import nn
from transformers import PreTrainedModel

from .bases import ModelBase
from .constant_heads import initialize_constants


class InitialisesAsStock(ModelBase):
    """Gives every new weight its first value: in a new model, and where a checkpoint lacks it or has another size.

    transformers takes a module of a class from elsewhere for initialised if all its own parameters are, hence also if
    it has none (in case `_init_weights` there would write over what was loaded). Modules that initialise parts of
    theirs, such as GPT-2's blocks or the model itself, would never be asked. Here nothing is written over:
    `transformers.initialization` is used throughout.
    """

    def initialize_weights(self) -> None:
        """Initialises what is not; stock models inside by their own code, which counts as transformers' own there."""
        for module in self.modules():
            if module is not self and isinstance(module, PreTrainedModel):
                module.initialize_weights()
        super().initialize_weights()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            initialize_constants(module)
