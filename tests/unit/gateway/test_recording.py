"""The endpoints that record traces: who may, what is checked, and how the file comes."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from moeless.core.errors import EngineStoppedError, RecordingError, RequestError
from moeless.core.recording import RecordedFile, RecordingOptions, RecordingStatus
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import ScriptedEngine, gateway_for

pytestmark = pytest.mark.anyio

URL = "/v1/traces/recording"
ALLOWED = GatewayConfig(allow_recording=True)
ENDPOINTS = [("POST", ""), ("GET", ""), ("POST", "/stop"), ("DELETE", ""), ("GET", "/file")]
CONTENT = bytes(range(256)) * 40


class ScriptedRecordings:
    """A RecordingClient with a file of CONTENT, which fails with `error` from byte `fails_at` on."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.error: Exception | None = None
        self.fails_at = 0

    async def _answer(self, *call: object) -> RecordingStatus:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        return RecordingStatus(state="recording", num_tokens=7, max_tokens=100, hidden_layers=(1,))

    async def start(self, options: RecordingOptions) -> RecordingStatus:
        return await self._answer("start", options)

    async def status(self) -> RecordingStatus:
        return await self._answer("status")

    async def stop(self) -> RecordingStatus:
        return await self._answer("stop")

    async def discard(self) -> RecordingStatus:
        return await self._answer("discard")

    async def finish(self) -> RecordedFile:
        if self.fails_at == 0:
            await self._answer("finish")
        return RecordedFile(file_id="f", num_bytes=len(CONTENT))

    async def read(self, file_id: str, offset: int) -> bytes:
        assert file_id == "f"
        if self.error is not None and offset >= self.fails_at:
            raise self.error
        return CONTENT[offset : offset + 1000]


@pytest.fixture
def recordings(engine: ScriptedEngine) -> ScriptedRecordings:
    engine.recordings = ScriptedRecordings()
    return engine.recordings


def error_of(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    return found


async def test_each_endpoint_is_a_call_of_the_engine(engine: ScriptedEngine, recordings: ScriptedRecordings) -> None:
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        body = {"max_tokens": 100, "hidden_layers": [1, 0], "token_ids": True}
        answers = [
            await gateway.http.post(URL, json=body),
            await gateway.http.get(URL),
            await gateway.http.post(f"{URL}/stop"),
            await gateway.http.delete(URL),
        ]
    asked = RecordingOptions(max_tokens=100, hidden_layers=(1, 0), token_ids=True)
    assert recordings.calls == [("start", asked), ("status",), ("stop",), ("discard",)]
    for answer in answers:
        assert answer.status_code == 200
        status = msgspec.convert(answer.json() | {"object": None}, RecordingStatus)
        assert (status.state, status.num_tokens, status.hidden_layers) == ("recording", 7, (1,))
        assert answer.json()["object"] == "trace.recording"


async def test_token_ids_are_not_recorded_unless_asked_for(
    engine: ScriptedEngine, recordings: ScriptedRecordings
) -> None:
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        await gateway.http.post(URL, json={})
    assert recordings.calls == [("start", RecordingOptions())]
    assert not RecordingOptions().token_ids


async def test_the_file_comes_whole_with_its_length(engine: ScriptedEngine, recordings: ScriptedRecordings) -> None:
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        response = await gateway.http.get(f"{URL}/file")
    assert response.content == CONTENT
    assert response.headers["content-length"] == str(len(CONTENT))
    assert "routing.safetensors" in response.headers["content-disposition"]


async def test_a_file_that_breaks_off_is_seen_to_be_cut(engine: ScriptedEngine, recordings: ScriptedRecordings) -> None:
    recordings.error, recordings.fails_at = EngineStoppedError("gone"), 3000
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        with pytest.raises(httpx.RemoteProtocolError):
            await gateway.http.get(f"{URL}/file")


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_where_recording_is_not_allowed_every_endpoint_says_so(
    method: str, path: str, engine: ScriptedEngine, recordings: ScriptedRecordings
) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.request(method, URL + path, json={})
    assert response.status_code == 403
    assert error_of(response)["code"] == "recording_not_allowed"
    assert "--allow-recording" in error_of(response)["message"]
    assert recordings.calls == []


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_the_key_is_asked_for(
    method: str, path: str, engine: ScriptedEngine, recordings: ScriptedRecordings
) -> None:
    config = GatewayConfig(allow_recording=True, api_keys=("secret",))
    async with gateway_for(create_app(engine, config), api_key="wrong") as gateway:
        response = await gateway.http.request(method, URL + path, json={})
    assert response.status_code == 401
    assert recordings.calls == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"hidden_layers": [-1]}, "hidden_layers[0]"),
        ({"hidden_layers": 3}, "hidden_layers"),
        ({"hidden_layers": [0] * 1001}, "hidden_layers"),
        ({"token_ids": 1}, "token_ids"),
        ({"path": "/etc/passwd"}, "path"),
    ],
)
async def test_a_body_that_breaks_a_rule_is_refused_by_field(
    body: dict[str, object], param: str, engine: ScriptedEngine, recordings: ScriptedRecordings
) -> None:
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        response = await gateway.http.post(URL, json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert recordings.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RecordingError("stop it first", code="recording_running"), 409),
        (RequestError("hidden_layers must be from 0 to 1, got 9", param="hidden_layers"), 400),
        (EngineStoppedError("gone"), 503),
    ],
)
async def test_the_engines_refusals_are_told_in_the_usual_shape(
    error: Exception, status: int, engine: ScriptedEngine, recordings: ScriptedRecordings
) -> None:
    recordings.error = error
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        for method, path in [("POST", ""), ("GET", "/file")]:
            response = await gateway.http.request(method, URL + path, json={})
            assert response.status_code == status
            assert error_of(response)["message"] == str(error)


async def test_the_openapi_document_describes_the_body(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, ALLOWED)) as gateway:
        document = (await gateway.http.get("/openapi.json")).json()
    assert {"max_tokens", "hidden_layers", "token_ids"} == set(
        document["components"]["schemas"]["RecordingRequest"]["properties"]
    )
