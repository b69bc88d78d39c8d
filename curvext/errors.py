"""What curvext raises and warns with."""


class CurvatureError(RuntimeError):
    """Curvature was asked for that cannot be given correctly; the message says what to do."""


class SampledOperationWarning(UserWarning):
    """An operation without a rule is too large to enumerate; its curvature is a random, unbiased estimate."""
