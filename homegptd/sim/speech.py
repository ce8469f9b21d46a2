"""A model that hears: transcriptions, translations, and the realtime websocket.

What is heard is the prompt: the sound's bytes as a text of a few words.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import time
from typing import Any

from aiohttp import WSMsgType, web
from aiohttp.web_request import FileField

from homegptd.sim import shapes
from homegptd.sim.inference import Ask, Inference
from homegptd.sim.intake import missing, new_id
from homegptd.sim.shapes import Body, Refused

_WORDS = 12
"""Tokens of a transcription."""
_BYTES_PER_S = 32_000  # PCM16 at 16 kHz


class Speech:
    """Handlers for one engine."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.intake = inference.intake

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/audio/transcriptions", self.transcribe),
            web.post("/v1/audio/translations", self.transcribe),
            web.get("/v1/realtime", self.realtime, allow_head=False),
            web.post("/tokenize", self.inference.tokenize),
            web.post("/detokenize", self.inference.detokenize),
        ]

    def hear(self, body: Body, sound: bytes) -> Ask:
        return self.inference.ask(body, hashlib.sha256(sound).hexdigest(), _WORDS, chat=False)

    async def transcribe(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "multipart/form-data":
            raise Refused(400, missing("file", None), "file")
        form = await request.post()
        fields: Body = {}
        for name, value in form.items():
            fields[name] = value  # of equal names the last counts, as for Starlette
        upload = fields.get("file")
        if not isinstance(upload, FileField):
            raise Refused(400, missing("file", upload), "file")
        body = {name: value for name, value in fields.items() if isinstance(value, str)}
        self.intake.admit(body)
        sound = upload.file.read()
        ask = self.hear(body, sound)
        with self.intake.counted():
            if body.get("stream", "").lower() in ("1", "true"):
                return await self._stream(request, ask)
            await self.inference.answer(ask)
        usage = {"type": "duration", "seconds": -(-len(sound) // _BYTES_PER_S)}
        return shapes.reply({"text": ask.text, "usage": usage})

    async def _stream(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        head = {"id": new_id("trsc"), "object": "transcription.chunk", "created": int(time.time())}
        async for delta in self.inference.tokens(ask):
            finish = ask.finish if ask.ended else None
            choice = {"delta": {"content": delta}, "finish_reason": finish}
            chunk = {**head, "model": ask.model, "choices": [choice]}
            await answer.write(shapes.event(chunk))
        await answer.write(shapes.DONE)
        await answer.write_eof()
        return answer

    # -- realtime ------------------------------------------------------------------------------

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=16 << 20)
        await socket.prepare(request)
        async with asyncio.TaskGroup() as group:
            session = _Session(self, socket, group)
            await session.say("session.created", id=new_id("sess"), created=int(time.time()))
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await session.take(message.data)
            session.end()
        return socket


class _Session:
    """One connection: sound comes in, and each commit begins an utterance."""

    def __init__(
        self, speech: Speech, socket: web.WebSocketResponse, group: asyncio.TaskGroup
    ) -> None:
        self.speech, self.socket, self.group = speech, socket, group
        self.sound = b""
        self.valid = False
        self.utterance: asyncio.Task[None] | None = None

    async def say(self, kind: str, **more: Any) -> None:
        with contextlib.suppress(ConnectionError):
            await self.socket.send_str(shapes.dumps({"type": kind, **more}))

    async def take(self, text: str) -> None:
        try:
            event = json.loads(text)
        except ValueError:
            await self.say("error", error="Invalid JSON", code="invalid_json")
            return
        match event.get("type"):
            case "session.update":
                await self._update(event.get("model"))
            case "input_audio_buffer.append":
                try:
                    self.sound += base64.b64decode(event["audio"], validate=True)
                except (KeyError, binascii.Error):
                    await self.say("error", error="Invalid audio data", code="invalid_audio")
            case "input_audio_buffer.commit" if not self.valid:
                told = (
                    "Model not validated. Make sure to validate the model by sending a "
                    "session.update event."
                )
                await self.say("error", error=told, code="model_not_validated")
            case "input_audio_buffer.commit" if not event.get("final"):
                self.utterance = self.group.create_task(self._transcribe(), name="sim utterance")
            case "input_audio_buffer.commit":
                pass  # the sound is there in one piece already
            case kind:
                await self.say("error", error=f"Unknown event type: {kind}", code="unknown_event")

    async def _update(self, model: str | None) -> None:
        if model is None:
            await self.say("error", error="Missing required field: model", code="invalid_event")
            return
        try:
            self.speech.intake.model({"model": model})
        except Refused as why:
            await self.say("error", error=str(why), code="model_not_found")
            return
        self.valid = True

    async def _transcribe(self) -> None:
        ask, self.sound = self.speech.hear({}, self.sound), b""
        try:
            async for delta in self.speech.inference.tokens(ask):
                await self.say("transcription.delta", delta=delta)
        except Refused as why:
            await self.say("error", error=str(why), code="processing_error")
            return
        usage = shapes.usage(1, len(ask.said))
        await self.say("transcription.done", text=ask.text, usage=usage)

    def end(self) -> None:
        if self.utterance is not None:
            self.utterance.cancel()
