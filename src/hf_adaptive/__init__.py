"""Early exits and constant attention for the text classifiers of `transformers`."""

from .auto import AutoModelForSequenceClassificationWithExits
from .evaluation import ExitReport, evaluate_exits
from .modeling.architectures import ARCHITECTURES, Architecture, make_class, register_architecture
from .modeling.heads import Head
from .modeling.outputs import SequenceClassifierWithExitsOutput
from .training import ExitsTrainer
from .version import __version__

for _architecture in list(ARCHITECTURES.values()):
    register_architecture(_architecture)


def __getattr__(name: str) -> type:
    """`BertForSequenceClassificationWithExits`, `BertWithExitsConfig`, … for every architecture."""
    return make_class(name)


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AutoModelForSequenceClassificationWithExits",
    "ExitReport",
    "ExitsTrainer",
    "Head",
    "SequenceClassifierWithExitsOutput",
    "__version__",
    "evaluate_exits",
    "register_architecture",
    *(
        name
        for architecture in ARCHITECTURES.values()
        for name in (architecture.config_name, architecture.classifier_name)
    ),
]
