"""What clients send is limited: in size, in time, in tangle, and all of it together."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import HTTPException

from latentgen.server import bodies, page
from latentgen.server.bodies import Bodies
from latentgen.server.run import Patient
from latentgen.server.settings import Settings

LARGE = "/jobs"


async def echo(scope, receive, send):
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(app, pieces, path=LARGE, kind="application/json", length=None, last=True):
    """Send pieces of a body; a number is a pause, and no `last` one keeps the rest to itself.
    Returns the status and the body of the answer."""
    headers = [(b"content-type", kind.encode())]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    left, told = list(pieces), []

    async def receive():
        if not left:
            await asyncio.sleep(60)
        piece = left.pop(0)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(left) or not last}

    async def send(message):
        told.append(message)

    async def run():
        await app(scope, receive, send)
        if not told:
            return None
        return told[0]["status"], told[1]["body"], dict(told[0]["headers"])

    return run()


@pytest.fixture
def app():
    return Bodies(echo, Settings(max_body=4 * 2**20), seconds=0.2)


def status(app, *arguments, **options):
    answer = asyncio.run(ask(app, *arguments, **options))
    return answer and answer[0]


def test_what_is_sent_arrives(app):
    answer = asyncio.run(ask(app, [b"x" * 2**20, b"y", b""]))
    assert answer[:2] == (200, b"1048577")
    assert asyncio.run(ask(app, [b""], kind=""))[1] == b"0"


def test_only_pictures_may_be_large(app):
    assert status(app, [b"x" * 2**20] * 4) == 200
    assert status(app, [b"x" * 2**20] * 5) == 413
    assert status(app, [], length=5 * 2**20, last=False) == 413
    for path in ("/v1/images/generations", "/sdapi/v1/options", "/gradio_api/queue/join"):
        assert status(app, [b"x" * 2**20], path=path) == 200
        assert status(app, [b"x" * 2**20, b"x"], path=path) == 413


def test_a_text_of_a_million_values_is_not_parsed(app):
    """6 million empty lists in 18 MiB stopped everybody for nine seconds once."""
    for piece in (b"[],", b"[[]]", b"{},", b'"":1,', b"a=&"):
        pieces = [b'{"prompt":"a","x":[', piece * 10**5, piece * 10**5, b"1]}"]
        assert status(app, pieces) == 413, piece
    assert status(app, [b"[]," * 10**6], kind="multipart/form-data; boundary=x") == 200
    assert status(app, [json.dumps({"prompt": "a, " * 6000}).encode()]) == 200


def test_who_sends_slowly_is_told_so(app):
    assert status(app, [b"{"], last=False) == 408
    assert status(app, [b"{", None]) is None


def test_all_together_hold_no_more_than_a_few_bodies(app):
    async def run():
        slow = [ask(app, [b"x" * 2**20] * 3, last=False) for _ in range(7)]
        tasks = [asyncio.create_task(one) for one in slow]
        await asyncio.sleep(0.05)
        refused = [task.result() for task in tasks if task.done()]
        short = await ask(app, [b"{}"])
        await asyncio.gather(*tasks)
        return refused, short, await ask(app, [b"x" * 2**17])

    refused, short, after = asyncio.run(run())
    assert refused
    assert {(status, headers[b"retry-after"]) for status, _, headers in refused} == {(503, b"5")}
    assert (short[0], after[0]) == (200, 200)
    assert app._left == bodies.TOGETHER * 4 * 2**20


def test_a_connection_without_a_request_is_closed():
    async def read(port, *pieces):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.1)
        return await asyncio.wait_for(reader.read(), 20)

    async def run():
        config = uvicorn.Config(
            echo, port=0, http=Patient, timeout_keep_alive=1, log_config=None, lifespan="off"
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        told = await asyncio.gather(
            read(port), read(port, b"GET", b" / HT"), read(port, whole, whole[:9]),
            read(port, whole[:9], whole[9:], whole),
        )  # fmt: skip
        server.should_exit = True
        await task
        return [answer.count(b"200 OK") for answer in told]

    assert asyncio.run(run()) == [0, 0, 1, 2]


def test_a_function_that_the_page_has_not_is_not_found():
    blocks, body = SimpleNamespace(fns={}), SimpleNamespace(fn_index=999, session_hash=None)
    with pytest.raises(HTTPException):
        page.a_function(blocks, None, body)
