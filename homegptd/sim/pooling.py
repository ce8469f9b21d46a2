"""Endpoints of models that do not generate: embeddings, scores, rerank."""

from __future__ import annotations

import base64
import struct
import time

from aiohttp import web

from homegptd.sim import shapes
from homegptd.sim.intake import Intake, new_id, texts
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import pieces, score, vector


class Pooling:
    """Handlers for one engine of kind `embed` or `score`."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.name = intake.options.names[0]

    def routes(self) -> list[web.RouteDef]:
        if self.intake.options.kind == "embed":
            return [
                web.post("/v1/embeddings", self.embeddings),
                web.post("/pooling", self.pooling),
            ]
        return [
            web.post("/score", self.scores),
            web.post("/v1/score", self.scores),
            *(web.post(f"{prefix}/rerank", self.rerank) for prefix in ("", "/v1", "/v2")),
        ]

    async def pooling(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        inputs = texts(body, "input")
        with self.intake.counted():
            sound = [await self.intake.compute(text) for text in inputs]
        data: list[Body] = [
            {"index": i, "object": "pooling", "data": vector(self.name, text, valid=ok)}
            for i, (text, ok) in enumerate(zip(inputs, sound, strict=True))
        ]
        return shapes.reply(self._list("pool", body, data, inputs))

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        inputs, size = texts(body, "input"), body.get("dimensions") or 64
        with self.intake.counted():
            sound = [await self.intake.compute(text) for text in inputs]
        vectors = [
            vector(self.name, text, size, valid=ok) for text, ok in zip(inputs, sound, strict=True)
        ]
        data = [
            {"index": i, "object": "embedding", "embedding": _encoded(v, body)}
            for i, v in enumerate(vectors)
        ]
        return shapes.reply(self._list("embd", body, data, inputs))

    async def scores(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        first = texts(body, "text_1" if "text_1" in body else "queries")
        second = texts(body, "text_2" if "text_2" in body else "documents")
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise Refused(400, "Input lengths must be either 1:1, 1:N or N:N")
        with self.intake.counted():
            rated = [await self._rate(a, b) for a, b in zip(first, second, strict=True)]
        data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(rated)]
        return shapes.reply(self._list("score", body, data, [*first, *second]))

    async def rerank(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        query, documents = texts(body, "query")[0], texts(body, "documents")
        with self.intake.counted():
            rated = [(await self._rate(query, d), i, d) for i, d in enumerate(documents)]
        rated.sort(key=lambda row: (-row[0], row[1]))
        results = [
            {"index": i, "document": {"text": d, "multi_modal": None}, "relevance_score": s}
            for s, i, d in rated[: body.get("top_n") or len(rated)]
        ]
        count = sum(len(pieces(text)) for text in (query, *documents))
        return shapes.reply(
            {
                "id": new_id("rerank"),
                "model": self.intake.model(body),
                "usage": {"prompt_tokens": count, "total_tokens": count},
                "results": results,
            }
        )

    async def _rate(self, first: str, second: str) -> float:
        return score(first, second, valid=await self.intake.compute(f"{first} {second}"))

    def _list(self, kind: str, body: Body, data: list[Body], read: list[str]) -> Body:
        return {
            "id": new_id(kind),
            "object": "list",
            "created": int(time.time()),
            "model": self.intake.model(body),
            "data": data,
            "usage": shapes.usage(sum(len(pieces(text)) for text in read), 0),
        }


def _encoded(values: list[float], body: Body) -> list[float] | str:
    if body.get("encoding_format") == "base64":
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return values
