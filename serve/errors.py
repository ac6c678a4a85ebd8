"""What can go wrong while serving, beside what `tuner/errors.py` lists.

TunerError
└── ServeError     a bundle that cannot be served, or a port that is taken
    └── EngineError    the engine did not start, died, or does not answer as the bundle was trained to
"""

from tuner.errors import TunerError


class ServeError(TunerError):
    """What was asked for cannot be served."""


class EngineError(ServeError):
    """The engine failed; the message ends with the last error lines that it wrote."""
