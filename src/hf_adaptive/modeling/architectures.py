"""The architectures that can have exits: one entry each, from which configuration and model classes are made.

The classes are made when they are first asked for (`architectures.BertWithExitsConfig`), so that a checkpoint loaded
with `trust_remote_code=True` imports one architecture's code and not all of them.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration import ExitsConfigMixin
from .exits import ExitsMixin
from .heads import Head


@dataclass(frozen=True)
class Architecture:
    """What has to be known about a backbone.

    Args:
        name (`str`): Prefix of its class names: `Bert` for `BertConfig`, `BertModel`, `BertPreTrainedModel` and
            `BertForSequenceClassification`.
        layers (`str`): Path of the backbone's `nn.ModuleList` of layers.
        head (`Head`): How its own classification head is built.
        pooling (`str`): Default of `exit_pooling`.
        final_norm (`str`, *optional*): Path of the normalisation that the backbone applies after the last layer.
        pretrained_pooler (`str`, *optional*): Path in the backbone of a pretrained linear pooler that its stock
            classifier leaves out; an exit's dense layer starts from it.
        shares_layers (`bool`): Whether all layers are one module (ALBERT).
        model_arguments (`dict`): Keyword arguments of the backbone's constructor.
        forward_arguments (`dict`): Keyword arguments of the backbone's forward.
        source (`ModuleType`): The module that holds the classes.
    """

    name: str
    layers: str
    head: Head
    pooling: str = "cls"
    final_norm: str | None = None
    pretrained_pooler: str | None = None
    shares_layers: bool = False
    model_arguments: dict[str, Any] = field(default_factory=dict)
    forward_arguments: dict[str, Any] = field(default_factory=dict)
    source: ModuleType = transformers

    def stock(self, suffix: str) -> type:
        """The stock class of this architecture with this suffix, such as `Config` or `Model`."""
        return getattr(self.source, self.name + suffix)

    @property
    def model_type(self) -> str:
        """`model_type` of the stock configuration."""
        return self.stock("Config").model_type

    @property
    def config_name(self) -> str:
        """Name of the configuration class with exits."""
        return f"{self.name}WithExitsConfig"

    @property
    def backbone_name(self) -> str:
        """Name of the backbone class that `AutoModel` loads from a checkpoint with exits."""
        return f"{self.name}WithExitsModel"

    @property
    def classifier_name(self) -> str:
        """Name of the classifier class with exits."""
        return f"{self.name}ForSequenceClassificationWithExits"


def _classifier_dropout(config: Any) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _deberta_dropout(config: Any) -> float:
    # A field of checkpoints that the configuration class does not declare; the stock classifier reads it this way.
    dropout = getattr(config, "cls_dropout", None)
    return config.hidden_dropout_prob if dropout is None else dropout


_BERT_HEAD = Head("classifier", dense="bert.pooler.dense", dropout=_classifier_dropout)
_ROBERTA_HEAD = Head(
    "classifier.out_proj", dense="classifier.dense", input_dropout=_classifier_dropout, dropout=_classifier_dropout
)
_MPNET_HEAD = Head(
    "classifier.out_proj",
    dense="classifier.dense",
    input_dropout=lambda config: config.hidden_dropout_prob,
    dropout=lambda config: config.hidden_dropout_prob,
)
_DEBERTA_HEAD = Head(
    "classifier",
    dense="pooler.dense",
    activation="pooler_hidden_act",
    input_dropout=lambda config: config.pooler_dropout,
    dropout=_deberta_dropout,
)
_NO_POOLER = {"add_pooling_layer": False}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("Bert", "encoder.layer", _BERT_HEAD, model_arguments=_NO_POOLER),
    "deberta": Architecture("Deberta", "encoder.layer", _DEBERTA_HEAD),
    "mpnet": Architecture(
        "MPNet", "encoder.layer", _MPNET_HEAD, pretrained_pooler="pooler.dense", model_arguments=_NO_POOLER
    ),
    "roberta": Architecture(
        "Roberta", "encoder.layer", _ROBERTA_HEAD, pretrained_pooler="pooler.dense", model_arguments=_NO_POOLER
    ),
}


def register_architecture(architecture: Architecture) -> None:
    """Makes an architecture's classes and registers them with `AutoConfig`, `AutoModel` and
    `AutoModelForSequenceClassification`.

    A backbone from outside `transformers` is registered by its user in the program that uses it; its checkpoints need
    that program, because its code does not travel with them.
    """
    ARCHITECTURES[architecture.model_type] = architecture
    config_class = make_class(architecture.config_name)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, make_class(architecture.backbone_name), exist_ok=True)
    classifier_class = make_class(architecture.classifier_name)
    AutoModelForSequenceClassification.register(config_class, classifier_class, exist_ok=True)


def supported_architecture(model_type: str) -> Architecture:
    """The entry for a stock `model_type`.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r} cannot have exits; supported are {', '.join(sorted(ARCHITECTURES))}. "
            "A backbone with a plain list of layers can be added with hf_adaptive.register_architecture(...)."
        )
    return ARCHITECTURES[model_type]


def make_class(name: str) -> type:
    """The configuration, backbone or classifier class of this name, made when it is first asked for.

    Raises:
        AttributeError: No architecture has a class of this name.
    """
    for architecture in ARCHITECTURES.values():
        makers = {
            architecture.config_name: _make_config,
            architecture.backbone_name: _make_backbone,
            architecture.classifier_name: _make_classifier,
        }
        if name in makers:
            return globals().setdefault(name, makers[name](architecture))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __getattr__(name: str) -> type:
    return make_class(name)


def _make(name: str, bases: tuple[type, ...], travels_as: str, architecture: Architecture, **attributes: Any) -> type:
    # Code of a backbone that transformers does not have cannot travel with the checkpoint.
    auto_class = travels_as if architecture.source is transformers else None
    attributes = {"architecture": architecture, "__module__": __name__, "_auto_class": auto_class, **attributes}
    return type(name, bases, attributes)


def _make_config(architecture: Architecture) -> type:
    bases = (ExitsConfigMixin, architecture.stock("Config"))
    model_type = f"{architecture.model_type}-with-exits"
    doc = f"Configuration of a {architecture.name} classifier with exits. {ExitsConfigMixin.__doc__}"
    return _make(architecture.config_name, bases, "AutoConfig", architecture, model_type=model_type, __doc__=doc)


def _make_backbone(architecture: Architecture) -> type:
    stock = architecture.stock("Model")

    def initialise(self, config):
        stock.__init__(self, config, **architecture.model_arguments)

    return _make(
        architecture.backbone_name,
        (stock,),
        "AutoModel",
        architecture,
        __init__=initialise,
        __doc__=f"The backbone of a {architecture.name} classifier with exits, without them.",
        config_class=make_class(architecture.config_name),
    )


def _make_classifier(architecture: Architecture) -> type:
    return _make(
        architecture.classifier_name,
        (ExitsMixin, architecture.stock("PreTrainedModel")),
        "AutoModelForSequenceClassification",
        architecture,
        __doc__=f"{architecture.name} with a classifier after each of `config.exit_layers`. {ExitsMixin.__doc__}",
        base_model_prefix=architecture.stock("ForSequenceClassification").base_model_prefix,
        config_class=make_class(architecture.config_name),
    )
