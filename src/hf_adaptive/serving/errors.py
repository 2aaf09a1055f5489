"""Why a request has no answer."""


class EngineFullError(RuntimeError):
    """As many rows wait as may wait: try again later."""


class EngineClosedError(RuntimeError):
    """The engine takes no more requests, or was closed before this one was answered."""


class EngineBrokenError(RuntimeError):
    """The engine's worker died of an error that was no row's; its cause is chained."""


class DeadlineExceededError(TimeoutError):
    """The answer was not ready when it was wanted."""


class NotANumberError(ArithmeticError):
    """The model answered NaN."""
