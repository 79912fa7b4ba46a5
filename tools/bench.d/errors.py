"""Why something could not run."""


class BenchError(Exception):
    """Ends a unit, and makes the exit status 1."""


class Interrupted(BaseException):
    """A person or the system ends the whole run; what was begun is undone."""
