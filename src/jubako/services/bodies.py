"""Bodies of requests: JSON, or forms with uploads. Nothing is fetched, and no file's name is used.

The last ones are bodies as BentoML describes them, flat: its clients take the fields as keyword arguments.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import UnionType
from typing import IO, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

import bentoml
from pydantic import AliasChoices, ValidationError
from pydantic.fields import FieldInfo
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as Body
from starlette.types import Message, Receive

from jubako.clip import ImageToVideo, TextToVideo
from jubako.disk import room_in
from jubako.errors import InvalidRequest, JubakoError, TooLarge, refusal
from jubako.mesh import ImageToMesh, TextToMesh
from jubako.planning import AnyRequest
from jubako.request import MAX_FILE_BYTES, ImageToImage, Inpaint, Request, TextToImage

__all__ = [
    "MAX_BODY_BYTES",
    "EmptyBody",
    "ImageToImageBody",
    "ImageToMeshBody",
    "ImageToVideoBody",
    "InpaintBody",
    "Received",
    "TextToImageBody",
    "TextToMeshBody",
    "TextToVideoBody",
    "read_request",
    "read_request_of",
    "read_upload",
]

# Two files of the largest size in base64, and room for the rest.
MAX_BODY_BYTES = 3 * MAX_FILE_BYTES
# Read in less time than a thread takes to begin.
SMALL_BODY_BYTES = 2**14
# What a form may hold beside one big file.
MAX_TEXT_BYTES = 2**20

FORMS = {"multipart/form-data", "application/x-www-form-urlencoded"}

R = TypeVar("R", bound=Request)
E = TypeVar("E", bound=Request)


async def read_request(body: Body, kind: type[R], *, quoted: bool = False) -> R:
    """The body as a request of this kind; InvalidRequest names the field, TooLarge what is too large.

    A form's text is text for a field of text; elsewhere it may be JSON. ``quoted``: text may be JSON as well,
    in which BentoML's client sends every field.
    """
    limited = Body(body.scope, _limited(body))
    try:
        if _is_form(body):
            fields = _decoded_fields(await _form(limited), kind, quoted)
            return await asyncio.to_thread(kind.model_validate, fields)
        content = await limited.body() or b"{}"
        if len(content) <= SMALL_BODY_BYTES:
            return kind.model_validate_json(content)
        return await asyncio.to_thread(kind.model_validate_json, content)
    except ValidationError as error:
        raise refusal(error.errors(include_input=False, include_url=False)) from error


async def read_request_of(body: Body, envelope: type[E], kind: Callable[[E], type[R]]) -> tuple[E, R]:
    """The body as fields of an envelope, and the rest as a request of the kind that the envelope says."""
    limited = Body(body.scope, _limited(body))
    try:
        if _is_form(body):
            items = await _form(limited)
            own = [item for item in items if item[0] in envelope.model_fields]
            head = envelope.model_validate(_decoded_fields(own, envelope, quoted=False))
            fields = _decoded_fields([item for item in items if item not in own], kind(head), quoted=False)
        else:
            fields = await asyncio.to_thread(_object, await limited.body())
            own_names = envelope.model_fields.keys() & fields.keys()
            head = envelope.model_validate({name: fields.pop(name) for name in own_names})
        return head, await asyncio.to_thread(kind(head).model_validate, fields)
    except ValidationError as error:
        raise refusal(error.errors(include_input=False, include_url=False)) from error


@asynccontextmanager
async def read_upload(body: Body, kind: type[R], limit: int) -> AsyncIterator[tuple[R, IO[bytes]]]:
    """A form's one ``file`` of at most so many bytes, on disk and open until the block ends; the rest as a
    request of this kind. InvalidRequest names the field, TooLarge the limit.
    """
    if _content_type(body) != "multipart/form-data":
        raise InvalidRequest("file: send a form (multipart/form-data) with the file in it", param="file")
    form = await _parsed(Body(body.scope, _limited(body, limit + MAX_TEXT_BYTES)), MAX_TEXT_BYTES)
    try:
        yield _upload(form, kind)
    finally:
        await form.close()


def _upload(form: FormData, kind: type[R]) -> tuple[R, IO[bytes]]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise _twice(name)
        fields[name] = value
    file = fields.pop("file", None)
    if not isinstance(file, UploadFile):
        raise InvalidRequest("file: the form holds no file of this name", param="file")
    try:
        return kind.model_validate(fields), file.file
    except ValidationError as error:
        raise refusal(error.errors(include_input=False, include_url=False)) from error


def _object(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return fields


def _content_type(body: Body) -> str:
    return body.headers.get("content-type", "").split(";")[0].strip().lower()


def _is_form(body: Body) -> bool:
    return _content_type(body) in FORMS


def _limited(body: Body, limit: int = MAX_BODY_BYTES) -> Receive:
    announced = body.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await body.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return receive


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"a body of more than {limit // 2**20} MB is not taken")


async def _form(body: Body) -> list[tuple[str, bytes | str]]:
    form = await _parsed(body, MAX_BODY_BYTES)
    try:
        return [(name, await _content(name, value)) for name, value in form.multi_items()]
    finally:
        await form.close()


async def _parsed(body: Body, max_part_size: int) -> FormData:
    """The form; files in it are on disk, and its caller closes them. DiskFull when there is no room there."""
    try:
        with room_in("TMPDIR"):
            return await body.form(max_files=64, max_fields=256, max_part_size=max_part_size)
    except (MultiPartException, HTTPException, FormParserError) as error:
        reason = getattr(error, "detail", None) or getattr(error, "message", None) or error
        raise InvalidRequest(f"the form can't be read: {reason}") from error


def _decoded_fields(
    items: Iterable[tuple[str, bytes | str]], kind: type[Request], quoted: bool
) -> dict[str, Any]:
    items = list(items)
    given = Counter(name for name, _ in items)
    return _nested(
        (
            f"{name}[]" if _is_item(name, value, kind, given[name]) else name,
            _decoded(name, value, kind, quoted) if isinstance(value, str) else value,
        )
        for name, value in items
    )


def _is_item(name: str, value: bytes | str, kind: type[Request], given: int) -> bool:
    """Whether it is one item of a list's field, which may be given several times, and uploads one by one."""
    field = _field(name, kind)
    return field is not None and _takes_list(field) and (given > 1 or isinstance(value, bytes))


async def _content(name: str, value: UploadFile | str) -> bytes | str:
    if isinstance(value, str):
        return value
    if (value.size or 0) > MAX_FILE_BYTES:
        field = name.removesuffix("[]")
        raise TooLarge(f"{field}: a file of more than {MAX_FILE_BYTES // 2**20} MB is not taken", param=field)
    return await value.read()


def _decoded(name: str, text: str, kind: type[Request], quoted: bool) -> Any:
    field = _field(name, kind)
    if field is None:
        return text
    is_text = _takes_text(field)
    if not quoted and (is_text or not text.lstrip().startswith(("{", "["))):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if is_text and not isinstance(value, str) and (value is not None or field.is_required()):
        return text
    return value


def _field(name: str, kind: type[Request]) -> FieldInfo | None:
    for known, field in kind.model_fields.items():
        alias = field.validation_alias
        if name == known or (isinstance(alias, AliasChoices) and name in alias.choices):
            return field
    return None


def _takes_text(field: FieldInfo) -> bool:
    return any(member in {str, bytes} or get_origin(member) is Literal for member in _members(field))


def _takes_list(field: FieldInfo) -> bool:
    return any(get_origin(member) is tuple for member in _members(field))


def _members(field: FieldInfo) -> list[Any]:
    """The types that a field takes."""
    kind = field.annotation
    members = get_args(kind) if get_origin(kind) in {Union, UnionType} else (kind,)
    # A union's member may be annotated, as a picture's bytes are.
    return [get_args(member)[0] if hasattr(member, "__metadata__") else member for member in members]


def _nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """``a[b]`` as an object's field, ``a[]`` as one more item of a list."""
    tree: dict[str, Any] = {}
    for name, value in items:
        if not re.fullmatch(r"[^\[\]]+(\[[^\[\]]+\])*(\[\])?", name):
            raise InvalidRequest(f"the form's field {name!r} has no name that is understood", param=name)
        *parents, last = re.findall(r"[^\[\]]+|\[\]", name)
        if last == "[]":
            *parents, last = parents
            values = _child(tree, parents, name).setdefault(last, [])
            if not isinstance(values, list):
                raise _twice(name)
            values.append(value)
            continue
        child = _child(tree, parents, name)
        if last in child:
            raise _twice(name)
        child[last] = value
    return tree


def _child(tree: dict[str, Any], parents: list[str], name: str) -> dict[str, Any]:
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise _twice(name)
    return tree


def _twice(name: str) -> InvalidRequest:
    field = name.split("[", maxsplit=1)[0]
    return InvalidRequest(f"{field}: given twice", param=field)


Received = AnyRequest | JubakoError
"""What a method is called with: the request, or why there is none."""


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a method, where BentoML looks for them."""

    request: Received
    model_fields: ClassVar[tuple[str, ...]] = ("request",)


class _FlatBody(bentoml.IODescriptor):
    """Reads the body with our reader: BentoML's own fetches addresses, and keeps files under their names."""

    request: ClassVar[type[Request]]
    pictures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Say in BentoML's documentation of the API which fields are files."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.multipart_fields = list(cls.pictures)

    @classmethod
    async def from_http_request(cls, request: Body, serde: Any) -> Any:  # noqa: ARG003 # BentoML's signature
        """The method's arguments. An error is one too: BentoML would answer 500 to what is raised here."""
        try:
            asked = await read_request(request, cls.request, quoted=True)
            return _Arguments(cast("AnyRequest", asked))
        except JubakoError as error:
            return _Arguments(error)

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The schema that BentoML's clients go by; ``file`` makes them send an upload."""
        schema: dict[str, Any] = super().model_json_schema(*args, **kwargs)
        if kwargs.get("mode") != "serialization":
            for name in cls.pictures:
                schema["properties"][name] |= {"type": "file", "format": "binary"}
        return schema


class EmptyBody(Request, _FlatBody):
    """No fields."""

    request: ClassVar = Request


class TextToImageBody(TextToImage, _FlatBody):
    """A prompt's fields."""

    request: ClassVar = TextToImage


class ImageToImageBody(ImageToImage, _FlatBody):
    """A prompt's fields and a picture."""

    request: ClassVar = ImageToImage
    pictures: ClassVar = ("image",)


class InpaintBody(Inpaint, _FlatBody):
    """A prompt's fields, a picture and a mask."""

    request: ClassVar = Inpaint
    pictures: ClassVar = ("image", "mask")


class ImageToVideoBody(ImageToVideo, _FlatBody):
    """A clip's fields and a picture."""

    request: ClassVar = ImageToVideo
    pictures: ClassVar = ("image",)


class TextToVideoBody(TextToVideo, _FlatBody):
    """A clip's fields and a prompt."""

    request: ClassVar = TextToVideo


class ImageToMeshBody(ImageToMesh, _FlatBody):
    """An object's fields and a picture."""

    request: ClassVar = ImageToMesh
    pictures: ClassVar = ("image",)


class TextToMeshBody(TextToMesh, _FlatBody):
    """An object's fields and a prompt."""

    request: ClassVar = TextToMesh
