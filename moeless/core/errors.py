"""Every error that moeless raises on purpose, as one tree.

Messages name the field, the rule and the value that broke it. The command line prints a MoelessError as one
line and exits with its `exit_code`; the gateway turns it into an OpenAI-shaped body with its `http_status`.
"""


class MoelessError(Exception):
    """Base of every deliberate error."""

    exit_code = 1
    http_status = 500


class ConfigError(MoelessError, ValueError):
    """A setting or an argument breaks a rule."""

    exit_code = 2
    http_status = 400


class CheckpointError(MoelessError, ValueError):
    """A checkpoint cannot be packed: not MoE, no safetensors, remote code, a tensor missing."""

    exit_code = 2


class UnsupportedFamilyError(CheckpointError):
    """The model's family does not use transformers' experts interface, or in a way we do not know."""


class PackageError(MoelessError):
    """A packed model is incomplete or damaged; the message names the file or function."""

    exit_code = 2


class ChecksumError(PackageError):
    """The bytes of a package are not those its manifest promises."""


class DispatchError(MoelessError):
    """Base of what can go wrong between engine and workers."""

    http_status = 503


class TransportError(DispatchError):
    """A worker could not be reached, hung up or answered nonsense. Another instance may be tried."""


class WorkerTimeoutError(TransportError):
    """A worker did not answer within its deadline."""


class WorkerStartingError(TransportError):
    """A worker that starts, or hangs, has not answered yet. Others compute until it has."""


class HandshakeError(TransportError):
    """The peer did not prove the run secret, or speaks another version of the protocol."""


class FunctionUnavailableError(DispatchError):
    """No instance could compute an expert function, the engine's own copy included. Names the function."""


class RequestError(MoelessError, ValueError):
    """A client's request breaks a rule. `param` is the offending field of the body, or None."""

    http_status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class RecordingError(RequestError):
    """The engine's recording is not in the state that the request needs: none, still running, or empty."""

    http_status = 409


class ContextLengthError(RequestError):
    """Prompt and completion together exceed the model's context."""


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""

    http_status = 404


class QueueFullError(MoelessError):
    """The engine's waiting queue is full; the client may come back after `retry_after_s` seconds."""

    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LogitsError(MoelessError):
    """The model's output for one sequence cannot be sampled or scored: NaN or infinite."""


class EngineStoppedError(MoelessError):
    """The engine is shutting down or died; nothing more will come."""

    http_status = 503
