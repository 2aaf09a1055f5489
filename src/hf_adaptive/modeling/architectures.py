"""The architectures that can have exits and constant attention: one entry each, from which all classes are made.

The classes are made when they are first asked for (`architectures.BertWithExitsConfig`), so that a checkpoint loaded
with `trust_remote_code=True` imports one architecture's code and not all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, cast

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init

from .attention_layouts import AttentionLayout, FusedProjection, SeparateProjections
from .configuration import ExitsConfigMixin
from .exits import ExitsMixin
from .heads import ExitHead, Head
from .papa import PapaForSequenceClassificationMixin, PapaForTokenClassificationMixin, PapaMaskedLMMixin
from .papa_configuration import PapaConfigMixin

PAPA_TASKS: dict[str, Any] = {
    "ForSequenceClassification": PapaForSequenceClassificationMixin,
    "ForTokenClassification": PapaForTokenClassificationMixin,
    "ForMaskedLM": PapaMaskedLMMixin,
}


# Asked for by name, so that no architecture's code is imported.
_TRANSFORMERS_NAMES = frozenset(dir(transformers))


@dataclass(frozen=True)
class Architecture:
    """What has to be known about a backbone.

    Args:
        name (`str`): Prefix of its class names: `Bert` for `BertConfig`, `BertModel` and
            `BertForSequenceClassification`.
        layers (`str`): Path of the backbone's `nn.ModuleList` of layers.
        head (`Head`): How its own classification head is built.
        attention (`AttentionLayout`, *optional*): How its self-attention is laid out; None: it has no constant heads.
        pooling (`str` or `Callable`): Default of `exit_pooling`, if need be from the configuration.
        final_norm (`str`, *optional*): Path of the normalisation that the backbone applies after the last layer.
        classifier_poolings (`dict[str, str]`): For stock classifiers that pool in several ways: what their
            `classifier_pooling` says for an `exit_pooling`.
        pretrained_pooler (`str`, *optional*): Path in the backbone of a pretrained linear pooler that its stock
            classifier leaves out; an exit's dense layer starts from it.
        shares_layers (`bool`): Whether all layers are one module (ALBERT). With `exit_routing="sweet"` the module
            learns from the first exit only: what it learned from a later one would change the layers before it, too.
            A routing between 0 and 1 is refused for the same reason. (A module that starts later, as ALBERT's second
            group would, learns from the first exit that it is run for.) With constant heads each layer gets a copy of
            the module, because constants differ by depth.
        positions_from_mask (`bool`): Whether the backbone adds learned positions that it counts from the first token
            on, padding or not, although it is padded on the left (GPT-2). They are then counted from the first real
            token on, so that such a row gets the answer that it gets alone.
        probe_has_dropout (`bool`): Whether a PAPA probe's classifier has the dropout of this architecture's head.
        model_arguments (`dict`): Keyword arguments of the backbone's constructor.
        forward_arguments (`dict`): Keyword arguments of the backbone's forward.
        source (`ModuleType`): The module that holds the classes.
    """

    name: str
    layers: str
    head: Head
    attention: AttentionLayout | None = None
    pooling: str | Callable[[Any], str] = "cls"
    final_norm: str | None = None
    classifier_poolings: dict[str, str] = field(default_factory=dict)
    pretrained_pooler: str | None = None
    shares_layers: bool = False
    positions_from_mask: bool = False
    probe_has_dropout: bool = True
    model_arguments: dict[str, Any] = field(default_factory=dict)
    forward_arguments: dict[str, Any] = field(default_factory=dict)
    source: ModuleType = transformers

    def stock(self, suffix: str) -> Any:
        """The stock class of this architecture with this suffix, such as `Config` or `Model`."""
        return getattr(self.source, self.name + suffix)

    @property
    def stock_base(self) -> Any:
        """The class that all models of this architecture come from."""
        # By inheritance, not by name: that of Gemma3TextModel is Gemma3PreTrainedModel.
        return next(base for base in self.stock("Model").__mro__[1:] if issubclass(base, PreTrainedModel))

    @property
    def plain_classifier(self) -> Any:
        """What reads plain checkpoints: the stock classifier, or the bare backbone where there is none."""
        return self.bare if self.head.classifier is None else self.stock("ForSequenceClassification")

    @property
    def bare(self) -> Any:
        """A stock model that has the backbone and nothing else."""
        return _make_bare(self)

    def default_pooling(self, config: Any) -> str:
        """Default of `exit_pooling` for a configuration."""
        return self.pooling if isinstance(self.pooling, str) else self.pooling(config)

    def probe_dropout(self, config: Any) -> float:
        """Dropout before the classifier of a PAPA probe."""
        return self.head.dropout(config) if self.probe_has_dropout else 0.0

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

    @property
    def papa_config_name(self) -> str:
        """Name of the configuration class of PAPA models."""
        return f"Papa{self.name}Config"

    @property
    def papa_names(self) -> dict[str, str]:
        """Names of the PAPA models by their task: those that stock has, if constant heads are supported."""
        if self.attention is None:
            return {}
        known = _TRANSFORMERS_NAMES if self.source is transformers else dir(self.source)
        return {task: f"Papa{self.name}{task}" for task in PAPA_TASKS if self.name + task in known}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that users import."""
        papa = (self.papa_config_name, *self.papa_names.values()) if self.papa_names else ()
        return (self.config_name, self.classifier_name, *papa)


def _classifier_dropout(config: Any) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _deberta_dropout(config: Any) -> float:
    # A field of checkpoints that the configuration class does not declare; the stock classifier reads it this way.
    dropout = getattr(config, "cls_dropout", None)
    return config.hidden_dropout_prob if dropout is None else dropout


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
_BERT_POOLER_HEADS = {
    prefix: Head("classifier", dense=f"{prefix}.pooler.dense", dropout=_classifier_dropout)
    for prefix in ("bert", "ernie", "nomic_bert")
}
_ALBERT_HEAD = Head("classifier", dense="albert.pooler", dropout=lambda config: config.classifier_dropout_prob)
_DISTILBERT_HEAD = Head(
    "classifier", dense="pre_classifier", activation="relu", dropout=lambda config: config.seq_classif_dropout
)
_ELECTRA_HEAD = replace(_ROBERTA_HEAD, activation="gelu")


def _initialise_modernbert_head(head: ExitHead, config: Any) -> None:
    # ModernBertPreTrainedModel._init_weights: it knows the stock head's own classes only.
    cutoff = 3 if config.initializer_cutoff_factor is None else config.initializer_cutoff_factor
    deviation_inside = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for part, deviation in ((head.dense, deviation_inside), (head.classifier, config.hidden_size**-0.5)):
        weight = cast(nn.Linear, part).weight
        init.trunc_normal_(weight, std=deviation, a=-cutoff * deviation, b=cutoff * deviation)


_MODERNBERT_HEAD = Head(
    "classifier",
    dense="head.dense",
    dense_bias=lambda config: config.classifier_bias,
    activation="classifier_activation",
    norm="head.norm",
    build_norm=lambda config: nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias),
    dropout=lambda config: config.classifier_dropout,
    initialise=_initialise_modernbert_head,
)
_EUROBERT_HEAD = Head("classifier", dense="dense", activation="gelu")
_DECODER_HEAD = Head("score", classifier_bias=lambda config: False)


def _eurobert_pooling(config: Any) -> str:
    return {"bos": "cls"}.get(config.classifier_pooling, config.classifier_pooling)


_BERT_ATTENTION = AttentionLayout("attention.self", SeparateProjections("query", "key", "value"))
_DEBERTA_ATTENTION = AttentionLayout(
    "attention.self",
    FusedProjection(
        "in_proj", is_by_head=True, value_bias="v_bias", more=("q_bias", "v_bias", "pos_proj", "pos_q_proj")
    ),
    has_interface=False,
    has_additive_mask=False,
)
_DEBERTA_V2_ATTENTION = AttentionLayout(
    "attention.self",
    SeparateProjections("query_proj", "key_proj", "value_proj", ("pos_query_proj",), ("pos_key_proj",)),
    has_interface=False,
    has_additive_mask=False,
)
_DISTILBERT_ATTENTION = AttentionLayout(
    "attention", SeparateProjections("q_lin", "k_lin", "v_lin"), output=("out_lin",)
)
_ALBERT_ATTENTION = AttentionLayout(
    "albert_layers.0.attention",
    SeparateProjections("query", "key", "value"),
    output=("dense", "output_dropout"),
    residual_norm="LayerNorm",
    dropout="attention_dropout",
)
_MPNET_ATTENTION = AttentionLayout(
    "attention.attn",
    SeparateProjections("q", "k", "v"),
    output=("o",),
    has_interface=False,
    has_position_bias=True,
)
_MODERNBERT_ATTENTION = AttentionLayout(
    "attn",
    FusedProjection("Wqkv", is_by_head=False),
    output=("Wo", "out_drop"),
    dropout="attention_dropout",
    window="sliding_window",
    rotary="rotary_emb",
)
_ROTARY_ATTENTION = AttentionLayout(
    "self_attn",
    SeparateProjections("q_proj", "k_proj", "v_proj"),
    output=("o_proj",),
    dropout="attention_dropout",
    rotary="rotary_emb",
)
_CAUSAL_ATTENTION = replace(_ROTARY_ATTENTION, is_causal=True)
_WINDOWED_ATTENTION = replace(_CAUSAL_ATTENTION, window="sliding_window")

_NO_POOLER = {"add_pooling_layer": False}
# An exit needs no keys and values of earlier calls.
_NO_CACHE = {"use_cache": False}
_DECODER: dict[str, Any] = {
    "layers": "layers",
    "head": _DECODER_HEAD,
    "pooling": "last",
    "final_norm": "norm",
    "forward_arguments": _NO_CACHE,
}
_CAUSAL = {**_DECODER, "attention": _CAUSAL_ATTENTION}
_WINDOWED = {**_DECODER, "attention": _WINDOWED_ATTENTION}
_ROBERTA: dict[str, Any] = {
    "layers": "encoder.layer",
    "head": _ROBERTA_HEAD,
    "attention": _BERT_ATTENTION,
    "probe_has_dropout": False,
    "pretrained_pooler": "pooler.dense",
    "model_arguments": _NO_POOLER,
}

ARCHITECTURES: dict[str, Architecture] = {
    "albert": Architecture(
        "Albert",
        "encoder.albert_layer_groups",
        _ALBERT_HEAD,
        _ALBERT_ATTENTION,
        shares_layers=True,
        model_arguments=_NO_POOLER,
    ),
    "bert": Architecture(
        "Bert", "encoder.layer", _BERT_POOLER_HEADS["bert"], _BERT_ATTENTION, model_arguments=_NO_POOLER
    ),
    "camembert": Architecture("Camembert", **_ROBERTA),
    "deberta": Architecture("Deberta", "encoder.layer", _DEBERTA_HEAD, _DEBERTA_ATTENTION),
    "deberta-v2": Architecture("DebertaV2", "encoder.layer", _DEBERTA_HEAD, _DEBERTA_V2_ATTENTION),
    "distilbert": Architecture("DistilBert", "transformer.layer", _DISTILBERT_HEAD, _DISTILBERT_ATTENTION),
    "electra": Architecture("Electra", "encoder.layer", _ELECTRA_HEAD, _BERT_ATTENTION),
    "ernie": Architecture(
        "Ernie", "encoder.layer", _BERT_POOLER_HEADS["ernie"], _BERT_ATTENTION, model_arguments=_NO_POOLER
    ),
    "eurobert": Architecture(
        "EuroBert",
        "layers",
        _EUROBERT_HEAD,
        _ROTARY_ATTENTION,
        pooling=_eurobert_pooling,
        final_norm="norm",
        classifier_poolings={"cls": "bos", "mean": "mean", "late": "late"},
    ),
    "gemma": Architecture("Gemma", **_CAUSAL),
    "gemma2": Architecture("Gemma2", **_WINDOWED),
    "gemma3_text": Architecture("Gemma3Text", **_WINDOWED),
    "gpt2": Architecture("GPT2", positions_from_mask=True, **{**_DECODER, "layers": "h", "final_norm": "ln_f"}),
    "llama": Architecture("Llama", **_CAUSAL),
    "mistral": Architecture(
        "Mistral", **{**_DECODER, "attention": replace(_CAUSAL_ATTENTION, window="config.sliding_window")}
    ),
    "modernbert": Architecture(
        "ModernBert",
        "layers",
        _MODERNBERT_HEAD,
        _MODERNBERT_ATTENTION,
        pooling=lambda config: config.classifier_pooling,
        final_norm="final_norm",
        classifier_poolings={"cls": "cls", "mean": "mean"},
    ),
    "mpnet": Architecture(
        "MPNet",
        "encoder.layer",
        _MPNET_HEAD,
        _MPNET_ATTENTION,
        pretrained_pooler="pooler.dense",
        model_arguments=_NO_POOLER,
    ),
    "nomic_bert": Architecture("NomicBert", "layers", _BERT_POOLER_HEADS["nomic_bert"], _ROTARY_ATTENTION),
    "qwen2": Architecture("Qwen2", **_WINDOWED),
    "qwen3": Architecture("Qwen3", **_WINDOWED),
    "roberta": Architecture("Roberta", **_ROBERTA),
    "xlm-roberta": Architecture("XLMRoberta", **_ROBERTA),
}


def register_architecture(architecture: Architecture) -> None:
    """Makes an architecture's classes and registers them with `AutoConfig`, `AutoModel` and
    `AutoModelForSequenceClassification`.

    A backbone from outside `transformers` is registered by its user in the program that uses it; its checkpoints need
    that program, because its code does not travel with them.

    Args:
        architecture (`Architecture`): Its `source` holds the configuration, the backbone, whose output has a
            `last_hidden_state`, and the stock classifier if there is one; the stock configuration itself is registered
            with `AutoConfig`, as for any model.

    Example:

        >>> AutoConfig.register("mixer", MixerConfig)
        >>> head = Head("out")  # in MixerForSequenceClassification: self.out = nn.Linear(hidden_size, num_labels)
        >>> register_architecture(Architecture("Mixer", layers="blocks", head=head, source=sys.modules[__name__]))

    Raises:
        ValueError: The stock classes have no `base_model_prefix`.
    """
    if not isinstance(architecture, Architecture):
        raise ValueError(f"architecture must be an Architecture, got a {type(architecture).__name__}.")
    if not architecture.stock_base.base_model_prefix:
        raise ValueError(
            f"{architecture.stock_base.__name__}.base_model_prefix is empty; set it to the name of the attribute that "
            f"holds the {architecture.name}Model in a classifier."
        )
    ARCHITECTURES[architecture.model_type] = architecture
    for name in _makers(architecture):
        # A second registration (of a class defined again in a notebook) goes before the first.
        globals().pop(name, None)
    config_class = make_class(architecture.config_name)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, make_class(architecture.backbone_name), exist_ok=True)
    classifier_class = make_class(architecture.classifier_name)
    AutoModelForSequenceClassification.register(config_class, classifier_class, exist_ok=True)
    if architecture.papa_names:
        _register_papa(architecture)


def _register_papa(architecture: Architecture) -> None:
    config_class = make_class(architecture.papa_config_name)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for task, name in architecture.papa_names.items():
        getattr(transformers, f"AutoModel{task}").register(config_class, make_class(name), exist_ok=True)


def supported_architecture(model_type: str) -> Architecture:
    """The entry for a stock `model_type`.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if model_type not in ARCHITECTURES:
        is_encoder_decoder = model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type].is_encoder_decoder
        way_out = (
            "It is an encoder–decoder, whose answer comes after two stacks of layers: fine-tune one of the others."
            if is_encoder_decoder
            else "A backbone with a plain list of layers can be added with hf_adaptive.register_architecture(...)."
        )
        raise ValueError(
            f"model_type={model_type!r} cannot have exits; supported are {', '.join(sorted(ARCHITECTURES))}. {way_out}"
        )
    return ARCHITECTURES[model_type]


def papa_class(model_type: str, task: str) -> Any:
    """The PAPA model of a stock `model_type` for a task, such as `ForSequenceClassification`.

    Raises:
        ValueError: There is none; the message lists the architectures that have one.
    """
    names = {own: architecture.papa_names for own, architecture in ARCHITECTURES.items()}
    if task not in names.get(model_type, {}):
        able = sorted(own for own, tasks in names.items() if task in tasks)
        raise ValueError(f"model_type={model_type!r} has no PAPA model {task}; supported are {', '.join(able)}.")
    return make_class(names[model_type][task])


def make_class(name: str) -> Any:
    """The configuration, backbone or classifier class of this name, made when it is first asked for.

    Raises:
        AttributeError: No architecture has a class of this name.
    """
    if name in globals():
        return globals()[name]
    for architecture in ARCHITECTURES.values():
        makers = _makers(architecture)
        if name in makers:
            # Several threads may ask at once: the first class made is the one.
            return globals().setdefault(name, makers[name](architecture))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _makers(architecture: Architecture) -> dict[str, Callable[[Architecture], type]]:
    """What makes the classes of an architecture, by their names."""
    makers: dict[str, Callable[[Architecture], type]] = {
        architecture.config_name: _make_config,
        architecture.backbone_name: _make_backbone,
        architecture.classifier_name: _make_classifier,
    }
    if architecture.papa_names:
        makers[architecture.papa_config_name] = _make_papa_config
    return {**makers, **{name: partial(_make_papa_model, task) for task, name in architecture.papa_names.items()}}


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

    def initialise(self: Any, config: Any) -> None:
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
        (ExitsMixin, architecture.stock_base),
        "AutoModelForSequenceClassification",
        architecture,
        __doc__=f"{architecture.name} with a classifier after each of `config.exit_layers`. {ExitsMixin.__doc__}",
        config_class=make_class(architecture.config_name),
    )


def _make_papa_config(architecture: Architecture) -> type:
    return _make(
        architecture.papa_config_name,
        (PapaConfigMixin, architecture.stock("Config")),
        "AutoConfig",
        architecture,
        model_type=f"papa-{architecture.model_type}",
        __doc__=f"Configuration of a {architecture.name} with constant attention. {PapaConfigMixin.__doc__}",
    )


def _make_papa_model(task: str, architecture: Architecture) -> type:
    mixin = PAPA_TASKS[task]
    base = architecture.stock(task) if mixin is PapaMaskedLMMixin else architecture.stock_base
    return _make(
        architecture.papa_names[task],
        (mixin, base),
        f"AutoModel{task}",
        architecture,
        __doc__=f"{architecture.name}: {mixin.__doc__}",
        config_class=make_class(architecture.papa_config_name),
    )


def _make_bare(architecture: Architecture) -> type:
    """A stock model that has a backbone and nothing else."""
    base = architecture.stock_base

    def initialise(self: Any, config: Any) -> None:
        base.__init__(self, config)
        setattr(self, self.base_model_prefix, architecture.stock("Model")(config, **architecture.model_arguments))
        self.post_init()

    attributes = {"__init__": initialise, "__module__": __name__, "config_class": architecture.stock("Config")}
    return type(f"Bare{architecture.name}Model", (base,), attributes)
