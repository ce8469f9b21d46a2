"""Switches under load, through the real daemon and simulated engines over real sockets."""

import asyncio
import json
import os
import signal
from typing import Any

import aiohttp
import pytest

from .client import answer, call, chat, client, ctl, pid_of, requests_of, streamed, until_running
from .harness import Box, SimModel, free_port

pytestmark = pytest.mark.e2e

FAST = ("--sim-tokens-per-s", "2")  # simulated seconds pass faster


def two(box: Box, *, flags: tuple[str, ...] = FAST, router: str = "drain_s: 0.3") -> None:
    box.write(
        SimModel("a", "active", flags=flags),
        SimModel("b", flags=flags),
        head=f"router: {{{router}}}\n",
    )


async def test_a_client_just_names_a_model(box: Box) -> None:
    two(box)
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session:
            assert (await answer(session, "a")).startswith("This is a")
            assert (await answer(session, "b")).startswith("This is b")
            texts = await asyncio.gather(*(answer(session, name) for name in "abababab"))
            assert [text[8] for text in texts] == list("abababab")


async def test_an_answer_outlives_the_drain_and_is_waited_for(box: Box) -> None:
    two(box, router="drain_s: 0.1, on_deadline: wait")
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session, asyncio.TaskGroup() as group:
            alone = await streamed(session, "a", 400)
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 400, begun))
            await begun.wait()
            switch = group.create_task(call(box, "switch", model="b"))
        assert long.result() == alone
        assert switch.result()["state"] == "done"
        assert "frozen" not in box.log()


async def test_an_answer_outlives_the_drain_frozen_and_goes_on(box: Box) -> None:
    two(box, router="drain_s: 0.1, on_deadline: auto")
    with box.daemon() as daemon:
        daemon.ready()
        assert await ctl(box, "prove", "a") == 0
        async with client(box) as session, asyncio.TaskGroup() as group:
            alone = await streamed(session, "a", 1500)
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 1500, begun))
            await begun.wait()
            assert (await call(box, "switch", model="b"))["state"] == "done"
            assert (await requests_of(box, "a"))["frozen"] == 1
            assert (await answer(session, "b")).startswith("This is b")
        assert long.result() == alone


STORES = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}


@pytest.mark.parametrize("deadline", ["wait", "auto"])
async def test_a_response_in_the_background_outlives_a_switch(box: Box, deadline: str) -> None:
    """auto: it is frozen, which was proved, and goes on when its model is back."""
    two(box, router=f"drain_s: 0.1, on_deadline: {deadline}")
    with box.daemon(env=STORES) as daemon:
        daemon.ready()
        assert await ctl(box, "prove", "a") == 0
        body = {"model": "a", "input": "x", "background": True, "max_output_tokens": 1500}
        async with client(box) as session:
            async with session.post("/v1/responses", json=body) as response:
                queued = await response.json()
            assert queued["status"] == "queued"
            assert (await call(box, "switch", model="b"))["state"] == "done"
            frozen = (await requests_of(box, "a"))["frozen"]
            assert frozen == (1 if deadline == "auto" else 0)
            async with asyncio.timeout(20):
                while (told := await kept(session, queued["id"]))["status"] == "queued":
                    pass
            assert (told["status"], told["usage"]["output_tokens"]) == ("incomplete", 1500)
            assert await ctl(box, "stop", "a") == 0
            assert await kept(session, queued["id"]) == told


async def kept(session: aiohttp.ClientSession, ident: str) -> dict[str, Any]:
    async with session.get(f"/v1/responses/{ident}") as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_a_response_in_the_background_is_cancelled_by_now(box: Box) -> None:
    two(box)
    with box.daemon(env=STORES) as daemon:
        daemon.ready()
        body = {"model": "a", "input": "x", "background": True, "max_output_tokens": 4000}
        async with client(box) as session:
            async with session.post("/v1/responses", json=body) as response:
                queued = await response.json()
            assert await ctl(box, "switch", "b", "--now") == 0
            told = await kept(session, queued["id"])
            assert (told["status"], told["output"]) == ("cancelled", [])
            assert "an operator asked for it now" in told["error"]["message"]


async def test_now_cuts_and_says_so(box: Box) -> None:
    two(box)
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session:
            body = chat("a", tokens=4000, stream=True)
            async with session.post("/v1/chat/completions", json=body) as response:
                await response.content.readline()
                assert await ctl(box, "switch", "b", "--now") == 0
                rest = await response.content.read()
            assert b'"error"' in rest
            assert b"[DONE]" not in rest


async def test_a_request_survives_the_death_of_its_engine(box: Box) -> None:
    two(box)
    with box.daemon() as daemon:
        daemon.ready()
        os.kill(pid_of(box, "a"), signal.SIGSTOP)
        async with client(box) as session, asyncio.TaskGroup() as group:
            asked = group.create_task(answer(session, "a"))
            await until_running(box)
            os.kill(pid_of(box, "a"), signal.SIGKILL)
        assert asked.result().startswith("This is a")
        assert "a is starting (try 2)" in box.log()


async def test_a_client_that_leaves_the_queue_wakes_nobody(box: Box) -> None:
    two(box, router="drain_s: 30, patience_s: 0.2, min_residency_s: 0")
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session, asyncio.TaskGroup() as group:
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 1200, begun))
            await begun.wait()
            waiting = group.create_task(answer(session, "b"))
            await asyncio.to_thread(daemon.status_line, "draining")
            waiting.cancel()
            await long
        assert box.model("a")["phase"] == "awake"
        assert "b is waking" not in box.log()


PATIENT = "drain_s: 30, on_deadline: wait, patience_s: 0, min_residency_s: 0"


async def test_weights_come_back_while_another_still_answers(box: Box) -> None:
    two(box, router=PATIENT)
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session, asyncio.TaskGroup() as group:
            alone = await streamed(session, "a", 1200)
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 1200, begun))
            await begun.wait()
            waiting = group.create_task(answer(session, "b"))
            await asyncio.to_thread(daemon.status_line, "b roused")
            assert not long.done()
        assert long.result() == alone
        assert waiting.result().startswith("This is b")
        assert "after its weights" in box.log()


async def test_weights_that_nobody_wants_any_more_go_again(box: Box) -> None:
    two(box, router=PATIENT)
    with box.daemon("--card-file", str(box.card)) as daemon:
        daemon.ready()
        async with client(box) as session, asyncio.TaskGroup() as group:
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 2400, begun))
            await begun.wait()
            waiting = group.create_task(answer(session, "b"))
            await asyncio.to_thread(daemon.status_line, "b roused")
            waiting.cancel()
            await asyncio.to_thread(daemon.status_line, "a awake, 1 asleep")
            assert not long.done()
            memory = json.loads(box.ctl("--json", "memory", "b").stdout)["models"][0]
            assert memory["holds_gpu_mib"] == {"0": 1024}
            assert (9 * 1024, "measured") in {(f["mib"], f["source"]) for f in memory["figures"]}
        assert "b is falling asleep at level 1 again" in box.log()
        assert (await call(box, "switch", model="b"))["state"] == "done"


async def test_weights_that_a_killed_daemon_left_awake_go_at_its_return(box: Box) -> None:
    two(box, router=PATIENT)
    with box.daemon() as daemon:
        daemon.ready()
        daemon.sweep = False
        async with client(box) as session, asyncio.TaskGroup() as group:
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 2400, begun))
            await begun.wait()
            waiting = group.create_task(answer(session, "b"))
            await asyncio.to_thread(daemon.status_line, "b roused")
            daemon.kill()
            long.cancel()
            waiting.cancel()
    with box.daemon("--card-file", str(box.card)) as daemon:
        daemon.ready()
        assert box.model("b")["phase"] == "asleep"
        memory = json.loads(box.ctl("--json", "memory", "b").stdout)["models"][0]
        assert memory["holds_gpu_mib"] == {"0": 1024}
        assert (await call(box, "switch", model="b"))["state"] == "done"


async def test_the_stop_waits_for_running_answers_and_turns_away_new_ones(box: Box) -> None:
    two(box)
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session, asyncio.TaskGroup() as group:
            begun = asyncio.Event()
            long = group.create_task(streamed(session, "a", 800, begun))
            await begun.wait()
            daemon.process.terminate()
            await asyncio.to_thread(daemon.status_line, "STOPPING=1")
            async with session.post("/v1/chat/completions", json=chat("b")) as refused:
                assert refused.status == 503
                assert "Retry-After" in refused.headers
            assert len(await long) > 800
        assert daemon.process.wait(20) == 0


async def test_http_switch_and_its_refusals(box: Box) -> None:
    box.write(SimModel("a", "active"), SimModel("b"), SimModel("c", "disabled"))
    with box.daemon() as daemon:
        daemon.ready()
        async with client(box) as session:

            async def switch(body: object, query: str = "") -> tuple[int, Any]:
                async with session.post(f"/switch{query}", json=body) as response:
                    return response.status, await response.json()

            assert (await switch({"model_id": "b"}))[0] == 200
            assert box.model("b")["status"] == "active"
            assert (await switch({"model_id": "nobody"}))[0] == 404
            assert (await switch({"model": "b"}))[0] in (400, 422)
            assert (await switch({"model_id": "c"}))[0] == 200
            status, view = await switch({"model_id": "a"}, "?wait=false")
            assert (status, view["state"]) == (202, "running")
            async with session.get("/models") as response:
                assert {m["id"] for m in await response.json()} == {"a", "b", "c"}


async def test_a_model_has_a_door_of_its_own(box: Box) -> None:
    port = free_port()
    b = SimModel("b", extra=f"    host_port: {port}\n    aliases: [bee]\n")
    box.write(SimModel("a", "active"), b)
    with box.daemon() as daemon:
        daemon.ready()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/v1/models") as response:
                assert [m["id"] for m in (await response.json())["data"]] == ["b"]
            nameless = {k: v for k, v in chat("b").items() if k != "model"}
            async with session.post("/v1/chat/completions", json=nameless) as response:
                assert (await response.json())["model"] == "b"
            async with session.post("/v1/chat/completions", json=chat("a")) as response:
                assert response.status == 404
            async with session.post("/switch", json={"model_id": "a"}) as response:
                assert response.status == 404


def test_a_freed_card_stays_empty_over_a_crash_and_is_given_back(box: Box) -> None:
    two(box)
    with box.daemon() as daemon:
        daemon.ready()
        done = box.ctl("free", "--gpu", "0")
        assert "gpu0 is free: 77.8 of 80.0 GB" in done.stdout, done.stderr
        daemon.sweep = False
        daemon.kill()
    with box.daemon() as daemon:
        daemon.ready()
        status = box.status()
        assert status["gpus"][0]["freed_by"]
        assert {model["status"] for model in status["models"]} == {"sleeping"}
        refused = box.ctl("switch", "b")
        assert refused.returncode == 4
        assert "homegptctl reclaim --gpu 0" in refused.stderr
        assert box.ctl("plan", "b").returncode == 4
        assert "a wakes" in box.ctl("reclaim").stdout
        daemon.status_line("a awake")
        assert box.ctl("switch", "b").returncode == 0
