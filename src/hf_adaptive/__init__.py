"""Early exits and constant attention for the text classifiers of `transformers`."""

from typing import Any

from .deployment import OnnxClassifierWithExits, OnnxOutput
from .version import __version__

__all__ = ["OnnxClassifierWithExits", "OnnxOutput", "__version__"]
_without_torch = list(__all__)

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    # A machine that only runs exported classifiers: everything else says what it needs when it is asked for.
    _missing: str | None = str(error)
else:
    _missing = None
    from .with_torch import *  # noqa: F403
    from .with_torch import CLASSES
    from .with_torch import __all__ as _with_torch

    __all__ += [*_with_torch, *CLASSES]


def __getattr__(name: str) -> Any:
    """The classes of every architecture, made when they are first asked for; or why they cannot be had."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _missing is not None:
        raise ImportError(
            f"hf_adaptive.{name} needs torch and transformers ({_missing}): pip install torch transformers. Without "
            f"them there are {', '.join(_without_torch)}."
        )
    from .modeling.architectures import make_class

    return make_class(name)
