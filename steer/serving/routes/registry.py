"""`/v1/steer/artifacts` and `/v1/steer/rewards`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from steer.core import InputError, SteerError
from steer.serving.artifact_store import Entry, UnknownArtifactError, check_name
from steer.serving.errors import Refused
from steer.serving.gate import Gone, while_wanted
from steer.serving.guard import json_body
from steer.serving.protocol import (
    Artifact,
    ArtifactList,
    Deleted,
    ErrorAnswer,
    RegisterRequest,
    RegisterReward,
    Reward,
    RewardList,
)
from steer.serving.reward_store import UnknownRewardError

if TYPE_CHECKING:
    from steer.serving.server import Server

__all__ = ["router"]


T = TypeVar("T")


_DENIED: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorAnswer, "description": "The API key is wrong or missing."},
    403: {"model": ErrorAnswer, "description": "A server without a key was asked from elsewhere."},
    500: {"model": ErrorAnswer, "description": "The server's mistake."},
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "No such artifact or reward."}}
_REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "No artifact of this model, no reward, or a name that cannot be."},
    413: {"model": ErrorAnswer, "description": "The file is too large, or there is no room for another."},
    415: {"model": ErrorAnswer, "description": "The content type is not one of these."},
    429: {"model": ErrorAnswer, "description": "Too many requests."},
    503: {"model": ErrorAnswer, "description": "The server is shutting down."},
}
_NAME = {"type": "string", "description": "Letters, digits, dot, dash, underscore; at most 128.", "maxLength": 128}
_FILE = {"type": "string", "format": "binary"}
_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": "name",
            "in": "query",
            "required": False,
            "schema": _NAME,
            "description": "The artifact's name where the body is its bytes.",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": _FILE, "name": _NAME}, "required": ["file"]}
            },
            "application/octet-stream": {"schema": _FILE},
            "application/json": {"schema": {"$ref": "#/components/schemas/RegisterRequest"}},
        },
    },
}


def router(server: Server) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(prefix="/v1/steer", tags=["steer"])
    store = server.store

    @routes.get("/artifacts", response_model=ArtifactList, responses=_DENIED)
    async def artifacts() -> ArtifactList:
        """Registered vectors, controllers and value heads."""
        entries = await asyncio.to_thread(store.entries)
        return ArtifactList(data=[_shown(entry) for entry in sorted(entries, key=lambda e: e.name)])

    @routes.post(
        "/artifacts", response_model=Artifact, status_code=201, responses={**_DENIED, **_REFUSED}, openapi_extra=_BODY
    )
    async def register(request: Request) -> Artifact:
        """Register an artifact: its bytes, a form with `file` and `name`, or the name of a file in the folder."""
        since = server.gate.enter()
        try:
            return _shown(await _registered(server, request))
        except (Gone, ClientDisconnect):
            raise Refused(499, "the client has left") from None
        finally:
            server.gate.leave(since)

    @routes.get("/artifacts/{name}", response_model=Artifact, responses={**_DENIED, **_MISSING})
    async def artifact(name: str) -> Artifact:
        """One artifact."""
        try:
            return _shown(await asyncio.to_thread(store.get, name))
        except UnknownArtifactError as error:
            raise Refused(404, str(error), "name", "artifact_not_found") from None

    @routes.delete("/artifacts/{name}", response_model=Deleted, responses={**_DENIED, **_MISSING})
    async def delete(name: str) -> Deleted:
        """Forget an artifact, in all servers of the folder; the file of one that was sent is deleted. Requests that use
        it run to their end.
        """
        try:
            await _in_turn(server, store.remove, name)
        except UnknownArtifactError as error:
            raise Refused(404, str(error), "name", "artifact_not_found") from None
        return Deleted(id=name)

    _add_rewards(routes, server)
    return routes


def _add_rewards(routes: APIRouter, server: Server) -> None:
    known = server.tasks.rewards

    @routes.get("/rewards", response_model=RewardList, responses=_DENIED)
    async def rewards() -> RewardList:
        """Rewards that requests may name; they join by `+ - * / ( )`."""
        registered, usages = await asyncio.to_thread(lambda: (known.registered(), known.usages()))
        own = {entry.name for entry in registered if not entry.fixed}
        return RewardList(data=[Reward(id=n, usage=u, fixed=n not in own) for n, u in usages.items()])

    @routes.post(
        "/rewards",
        response_model=Reward,
        status_code=201,
        responses={**_DENIED, **_REFUSED},
        dependencies=[Depends(json_body)],
    )
    async def register_reward(body: RegisterReward) -> Reward:
        """Give a reward a name: an expression of others, a reward model in the folder of artifacts, or a registered
        artifact of kind reward.
        """
        since = server.gate.enter()
        try:
            entry = await _in_turn(
                server, known.add, body.name, body.reward, body.folder, body.label, body.file, body.options
            )
        finally:
            server.gate.leave(since)
        return Reward(id=entry.name, usage=entry.usage, fixed=False)

    @routes.delete("/rewards/{name}", response_model=Deleted, responses={**_DENIED, **_MISSING, 400: _REFUSED[400]})
    async def delete_reward(name: str) -> Deleted:
        """Forget a registered reward. Requests that use it run to their end."""
        try:
            await _in_turn(server, known.remove, name)
        except UnknownRewardError as error:
            raise Refused(404, str(error), "name", "reward_not_found") from None
        return Deleted(id=name, object="steer.reward")


def _shown(entry: Entry) -> Artifact:
    card = entry.card
    return Artifact(
        id=entry.name,
        kind=card.kind,
        bytes=entry.size,
        sha256=entry.digest,
        created=entry.created,
        fixed=entry.fixed,
        layers=card.layers,
        settings=card.settings,
        model=card.model,
    )


async def _registered(server: Server, request: Request) -> Entry:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await _named(server, request)
    if kind == "multipart/form-data":
        return await _sent_form(server, request)
    if kind == "application/octet-stream":
        name = request.query_params.get("name", "")
        check_name(name)
        return await _stored(server, request, name, request.stream())
    raise HTTPException(415, "Content-Type: application/json, multipart/form-data or application/octet-stream")


async def _named(server: Server, request: Request) -> Entry:
    """Register a file that lies in the folder."""
    try:
        asked = RegisterRequest.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(".".join(map(str, first["loc"])) or "body", first.get("input"), first["msg"]) from None
    return await _in_turn(server, server.store.adopt, asked.file, asked.name)


async def _sent_form(server: Server, request: Request) -> Entry:
    try:
        form = await request.form(max_files=1, max_fields=4)
    except HTTPException:
        raise
    except Exception as error:
        raise InputError("body", f"a form that cannot be read ({error})", "multipart with file and name") from error
    try:
        file, name = form.get("file"), form.get("name")
        if not isinstance(file, UploadFile):
            raise InputError("file", None, "the artifact's file")
        name = name if isinstance(name, str) and name else Path(file.filename or "").stem
        check_name(name)
        return await _stored(server, request, name, _pieces(file))
    finally:
        await form.close()


async def _pieces(file: UploadFile) -> Any:
    while piece := await file.read(1 << 20):
        yield piece


async def _stored(server: Server, request: Request, name: str, pieces: Any) -> Entry:
    """Write what comes beside the registered files, and register it once it is complete and while its client waits."""
    path, waiting = server.store.incoming(), True
    try:
        await _write(path, pieces)
        adding = _in_turn(server, server.store.add, name, path, lambda: waiting)
        return await while_wanted(adding, request.receive)
    finally:
        waiting = False
        with suppress(OSError):
            path.unlink(missing_ok=True)


async def _write(path: Path, pieces: Any) -> None:
    try:
        with path.open("wb") as out:
            async for piece in pieces:
                await asyncio.to_thread(out.write, piece)
    except OSError as error:
        raise SteerError(f"the folder of artifacts cannot be written ({error.strerror or error})") from error


async def _in_turn(server: Server, work: Callable[..., T], *given: Any) -> T:
    """Work in the thread for files; it is dropped where its client has gone before its turn."""
    return await asyncio.get_running_loop().run_in_executor(server.files, work, *given)
