"""What can go wrong, as types. Core code raises these; only services speak HTTP.

JubakoError
├── InvalidRequest     400  a field is wrong; names it and the valid choices
├── NoKey              401  an API key is missing, unknown or expired
├── Forbidden          403  the key, the address or the page that it comes from may not do this
├── LicenceNotAccepted 403  the model's licence is to be accepted, which nobody has done here
├── UnknownModel       404  no such model in the catalog
├── UnknownJob         404  no such job, or its time to be kept is over
├── UnknownAdapter     404  no adapter of that name is here
├── JobNotDone         409  the job has no result yet, or never will
├── JobEnded           409  the job is done already: there is nothing to cancel
├── KeyReused          409  the idempotency key belongs to another request
├── ResultGone         410  the result was removed to make room, or is damaged
├── TooLarge           413  a file or the whole body is larger than what is taken
├── WrongMediaType     415  the body is of a kind that is not read
├── ContentRefused     422  the safety checker flagged what was drawn
├── Overloaded         429  it would wait longer than it may
├── Cancelled          499  the client went away or cancelled
├── GenerationFailed   500  the engine failed on this job
├── NotFinite          500  the model's numbers are none: there is no picture to show
├── UnusableWeights    503  what is on disk can't be made into the model
├── ModelNotOnDisk     503  the catalog knows the model, its weights are not here
├── OutOfMemory        503  the memory does not hold this job alone, or its model
├── WeightsUnavailable 503  the weight set or precision that is set for the model can't be served here
├── FamilyUnavailable  503  the family's service is loading, down or unreachable
├── ShuttingDown       503  the server stops; it, or another one, may be asked again
├── JobsUnavailable    503  the database of the durable jobs is damaged
├── TimedOut           504  the deadline passed before the picture was done
└── DiskFull           507  a disk of the server has no room for what it must keep
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

__all__ = [
    "Cancelled",
    "ContentRefused",
    "DiskFull",
    "FamilyUnavailable",
    "Forbidden",
    "GenerationFailed",
    "InvalidRequest",
    "JobEnded",
    "JobNotDone",
    "JobsUnavailable",
    "JubakoError",
    "KeyReused",
    "LicenceNotAccepted",
    "ModelNotOnDisk",
    "NoKey",
    "NotFinite",
    "OutOfMemory",
    "Overloaded",
    "ResultGone",
    "ShuttingDown",
    "TimedOut",
    "TooLarge",
    "UnknownAdapter",
    "UnknownJob",
    "UnknownModel",
    "UnusableWeights",
    "WeightsUnavailable",
    "WrongMediaType",
    "from_body",
    "nearest",
    "refusal",
]


class JubakoError(Exception):
    """A failure with the status, type and code that clients see. Its text is written for them."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retry_after: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's error shape, the only one that any route answers with."""
        # A client's own words in it may be no text that can be sent.
        message, param = (
            text and text.encode(errors="replace").decode() for text in (self.message, self.param)
        )
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}


class InvalidRequest(JubakoError):
    """The request can't be served as it is; ``param`` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class NoKey(JubakoError):
    """No API key came with the request, or one that is not known or has expired."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(JubakoError):
    """Whoever asks may not do this, or not from where it asks."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class LicenceNotAccepted(JubakoError):
    """The model's licence is one that whoever serves it has to accept, and has not."""

    status = 403
    type = "permission_error"
    code = "licence_not_accepted"


class UnknownModel(JubakoError):
    """The model's name is not in the catalog."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownJob(JubakoError):
    """There is no such job (any more)."""

    status = 404
    type = "invalid_request_error"
    code = "job_not_found"


class UnknownAdapter(JubakoError):
    """There is no adapter of that name here."""

    status = 404
    type = "invalid_request_error"
    code = "adapter_not_found"


class JobNotDone(JubakoError):
    """The job has no result: it is not done yet, has failed or was cancelled."""

    status = 409
    type = "invalid_request_error"
    code = "job_not_done"


class JobEnded(JubakoError):
    """The job has ended already, so that it can't be cancelled."""

    status = 409
    type = "invalid_request_error"
    code = "job_ended"


class KeyReused(JubakoError):
    """The idempotency key came with another request before."""

    status = 409
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class ResultGone(JubakoError):
    """A file of the job was removed, by age or to make room, or was damaged on the disk."""

    status = 410
    type = "invalid_request_error"
    code = "result_expired"


class TooLarge(JubakoError):
    """A file or the whole body has more bytes than are taken."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class WrongMediaType(JubakoError):
    """The body's media type is not read here."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class ContentRefused(JubakoError):
    """The safety checker flagged what was drawn, and that is not given out here."""

    status = 422
    type = "invalid_request_error"
    code = "content_refused"


class Overloaded(JubakoError):
    """It would wait longer than it may; ``retry_after`` are the seconds after which it would not."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    retry_after = 1

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class Cancelled(JubakoError):
    """The job was cancelled before it was done."""

    status = 499
    type = "cancelled"
    code = "cancelled"


class GenerationFailed(JubakoError):
    """The engine failed while it worked on this job."""

    code = "generation_failed"


class NotFinite(JubakoError):
    """The model's numbers are none (NaN or infinite), so that there is no picture to show."""

    code = "not_finite"


class UnusableWeights(JubakoError):
    """Files on disk can't be made into the model; the text names the file or the folder, and why."""

    code = "unusable_weights"
    status = 503


class ModelNotOnDisk(JubakoError):
    """The model's weights have not been fetched."""

    status = 503
    code = "model_not_on_disk"


class OutOfMemory(JubakoError):
    """The memory does not hold this job alone, or its model; the text says what takes less."""

    status = 503
    code = "out_of_memory"


class WeightsUnavailable(JubakoError):
    """The weight set or the precision that is set for the model can't be served here; the text says why."""

    status = 503
    code = "weights_unavailable"


class FamilyUnavailable(JubakoError):
    """The service of the model's family does not answer now."""

    status = 503
    code = "family_unavailable"
    retry_after = 5


class ShuttingDown(JubakoError):
    """The server was told to stop: nothing new is taken, or there was no time left for this."""

    status = 503
    code = "shutting_down"
    retry_after = 5


class JobsUnavailable(JubakoError):
    """The database of the durable jobs can't be read; the text says what to do."""

    code = "jobs_unavailable"
    status = 503


class TimedOut(JubakoError):
    """The deadline passed before the picture was done; the job was cancelled."""

    status = 504
    code = "timeout"


class DiskFull(JubakoError):
    """What must be kept finds no room; the text names the setting of the folder on that disk."""

    code = "disk_full"
    status = 507


_BY_CODE = {error.code: error for error in JubakoError.__subclasses__()}


def from_body(body: Mapping[str, Any]) -> JubakoError:
    """The error that :meth:`JubakoError.body` described, on the other side of a process boundary."""
    error = body["error"]
    return _BY_CODE.get(error["code"], JubakoError)(error["message"], param=error["param"])


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` when one of the known names is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def refusal(details: Sequence[Mapping[str, Any]]) -> InvalidRequest | TooLarge:
    """The first of pydantic's error details as an error of ours that names its field."""
    detail = details[0]
    where, *path = detail["loc"] or ("",)
    if where in {"query", "header", "path", "cookie"}:
        field = str(path[0])
    else:
        field = ".".join(str(part) for part in detail["loc"] if part != "body")
    kind, message = detail["type"], str(detail["msg"])
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {message}")
    if not field:
        return InvalidRequest("the body must be a JSON object, sent with Content-Type: application/json")
    if kind in {"unknown_field", "given_twice"}:
        return InvalidRequest(message, param=field)
    if kind == "too_large":
        return TooLarge(f"{field}: {message}", param=field)
    return InvalidRequest(f"{field}: {message}", param=field)
