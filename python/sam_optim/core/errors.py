"""Errors of the optimizer layer."""


class InvalidSettingError(ValueError, AssertionError):
    """A setting outside its range. Both kinds, because SAM classes in use raise either."""


class StepOrderError(RuntimeError):
    """The calls of a step came in an order that makes no sense; the weights are as they were before the step."""
