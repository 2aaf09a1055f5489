"""The fields that PAPA models add to a configuration, and their checks."""

from dataclasses import dataclass, fields
from typing import Any

from .checks import check_choice
from .configuration import ExtendsStockConfig
from .head_choice import check_constant_heads
from .saving import ReadsWhole

TRAINABLE_PARTS = ("probe", "constants", "all")


@dataclass(kw_only=True)
class PapaConfigMixin(ReadsWhole, ExtendsStockConfig):
    """Configuration of a PAPA model: the base architecture's fields and the following.

    Args:
        constant_heads (`list`, *optional*): `[layer, head]` pairs, counted from 0, whose attention is constant.
        constant_length (`int`, *optional*): Size of the constant matrices, and the longest input, in tokens. The
            sequence classifiers need it even without constant heads: their pooler has one weight for each position.
        trainable_part (`str`): What the classifiers train: `"probe"`, the pooler or token head and the classifier,
            everything else being frozen as in the paper; `"constants"`, the probe and the constants; `"all"`. Masked
            language models have no probe and train everything.

    Raises:
        ValueError: For any value that cannot be used; it names the value, what is allowed, and the fix.
    """

    constant_heads: list[Any] | None = None
    constant_length: int | None = None
    trainable_part: str = "probe"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_constant_heads(self)
        check_choice("trainable_part", self.trainable_part, TRAINABLE_PARTS)

    @classmethod
    def added_fields(cls) -> tuple[str, ...]:
        """Names of the fields that this configuration adds to the plain one."""
        return tuple(field.name for field in fields(PapaConfigMixin))
