"""Who is let in, and what is out of reach."""

import asyncio
import base64
import io
import json
import socket

import httpx
import pytest
from conftest import HERE, Running
from starlette.datastructures import Headers

from latentgen.errors import InvalidRequest
from latentgen.server.app import create_app
from latentgen.server.guard import Guard, check_exposure
from latentgen.server.service import Service
from latentgen.server.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_let_in_only_with_a_token(host):
    with pytest.raises(InvalidRequest, match="--token"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, token="x"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_this_machine_needs_none(host):
    check_exposure(Settings(host=host))


def test_only_who_has_the_token_is_answered(tmp_path, tiny):
    server = Running(tmp_path / "home", tiny, "--token", "sesame\n").start().wait("")
    basic = base64.b64encode(b"anybody:sesame").decode()
    accented = base64.b64encode("josé:sesame".encode()).decode()
    wrong = base64.b64encode(b"sesame:open").decode()
    try:
        for path in ("/jobs", "/v1/models", "/sdapi/v1/progress", "/", "/metrics", "/images"):
            for given, status in (
                ("Bearer sesame", 200),
                (f"Basic {basic}", 200),
                (f"Basic {accented}", 200),
                (f"Basic {wrong}", 401),
                ("Bearer sesam", 401),
                ("Bearer", 401),
                ("Basic %%%", 401),
                ("sesame", 401),
            ):
                answer = server.http.get(path, headers={"Authorization": given})
                assert (path, given, answer.status_code) == (path, given, status)
            refused = server.http.get(path)
            assert refused.status_code == 401
            assert "Basic" in refused.headers["WWW-Authenticate"]
        assert server.http.get("/health").status_code == 200
        theirs = server.http.get("/sdapi/v1/progress").json()
        assert theirs["detail"].startswith("send the token")
        told = server.http.get("/metrics", headers={"Authorization": "Bearer sesame"}).text
        assert 'status="401"' in told
        assert "127.0.0.1 was refused" in server.log.read_text()
        told = server.http.get("/openapi.json", headers={"Authorization": "Bearer sesame"}).json()
        assert told["components"]["securitySchemes"].keys() == {"HTTPBearer", "HTTPBasic"}
        assert told["paths"]["/jobs"]["post"]["security"]
        assert "security" not in told["paths"]["/health"]["get"]
    finally:
        server.process.kill()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("token", ["sésame", "voilà"])  # the last byte of one is a space, too
def test_a_token_may_have_accents(encoding, token):
    guard = Guard(None, Settings(token=token))
    for given, is_right in ((token, True), ("sesame", False)):
        header = (b"authorization", f"Bearer {given}".encode(encoding))
        assert guard._has_token(Headers(raw=[header])) == is_right


def test_other_names_and_other_sites_get_nothing(server):
    port = server.port
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        (f"evil.example:{port}", 403),
        ("127.0.0.1.evil.example", 403),
        ("8.8.8.8", 403),
        ("[::1", 403),
    ):
        assert server.http.get("/jobs", headers={"Host": host}).status_code == status, host
    for origin, status in (
        (server.url, 200),
        ("http://evil.example", 403),
        ("null", 403),
        (f"http://localhost:{port}", 403),
        ("https://127.0.0.1:1", 403),
    ):
        answer = server.http.get("/jobs", headers={"Origin": origin})
        assert answer.status_code == status, origin
        assert "access-control-allow-origin" not in answer.headers


STEPS = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "....//", "%252e%252e%252f", "..;/",
         "..%00/", "%c0%ae%c0%ae/", "./../"]  # fmt: skip
TARGETS = ["secret.txt", "%73ecret.txt", "jobs.sqlite", "etc/passwd"]
PLACES = ["/images/", "/images/2026-01-01/", "/jobs/", "/v1/models/", "/gradio_api/file={home}/",
          "/gradio_api/file=outputs/", "/"]  # fmt: skip


def test_no_path_leads_out(server):
    (server.home / "secret.txt").write_text("nobody reads this")
    raw = [
        place.format(home=server.home) + step * depth + target
        for place in PLACES
        for step in STEPS
        for depth, target in zip((1, 2, 1, 9), TARGETS, strict=True)
    ]
    raw += [f"/images/{step}" for step in STEPS]
    raw += [f"/gradio_api/file={file}" for file in ("/etc/passwd", f"{server.home}/secret.txt")]
    assert len(raw) > 300
    for path in raw:
        with socket.create_connection((HERE, server.port), 10) as line:  # httpx would tidy it up
            line.sendall(f"GET {path} HTTP/1.0\r\nHost: {HERE}\r\n\r\n".encode())
            answer = b""
            while piece := line.recv(65536):
                answer += piece
        assert int(answer.split(b" ", 2)[1]) in (303, 307, 400, 403, 404), path
        assert b"nobody reads this" not in answer, path
        assert b"root:" not in answer, path
        assert b"SQLite format" not in answer, path


def test_no_name_leads_out(server):
    (server.home.parent / "loot.safetensors").write_bytes(b"")
    for name in ("../loot", "../loot.safetensors", "..\\loot", "/etc/passwd", "loras/../../loot",
                 f"{server.home}/../loot", "~/loot", "%2e%2e/loot", "\x00", ".", ".."):  # fmt: skip
        for path, asked in (
            ("/jobs", {"model": name}),
            ("/jobs", {"loras": [{"name": name}]}),
            ("/jobs", {"prompt": f"a <lora:{name}:1>"}),
            ("/jobs", {"scheduler": name}),
            ("/v1/images/generations", {"model": name}),
            ("/v1/images/generations", {"loras": [{"name": name}]}),
            ("/sdapi/v1/txt2img", {"prompt": f"a <lora:{name}:1>", "width": 32, "height": 32}),
            ("/sdapi/v1/txt2img", {"override_settings": {"sd_model_checkpoint": name}}),
        ):
            answer = server.http.post(path, json={"prompt": "a cat", **asked})
            assert answer.status_code in (400, 404), (path, asked, answer.text)
            assert str(server.home) not in answer.text.replace(json.dumps(name)[1:-1], "")


def test_no_url_is_fetched(server, picture):
    """Sixty-four ways to write one, in every field that takes a picture, and who listens there."""
    with socket.socket() as listener:
        listener.bind((HERE, 0))
        listener.listen(64)
        port = listener.getsockname()[1]
        schemes = ["http://", "https://", "HTTP://", "ftp://", "file://", "//", "http:/",
                   "http:\\\\", " http://", "\thttp://", "url:http://", "gopher://", "ws://",
                   "data:http://", "data:image/png;base64,http://", "s3://"]  # fmt: skip
        hosts = ["127.0.0.1", "localhost", "user:pass@127.0.0.1", "[::ffff:127.0.0.1]"]
        urls = [f"{scheme}{host}:{port}/x.png" for scheme in schemes for host in hosts]
        assert len(urls) == 64
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        good = base64.b64encode(stream.getvalue()).decode()
        for url in urls:
            for path, asked in (
                ("/jobs", {"image": url}),
                ("/jobs", {"image": good, "mask_image": url}),
                ("/sdapi/v1/img2img", {"init_images": [url]}),
                ("/sdapi/v1/img2img", {"init_images": [good], "mask": url}),
                ("/sdapi/v1/png-info", {"image": url}),
            ):
                answer = server.http.post(path, json={"prompt": "a cat", **asked})
                assert answer.status_code == 400, (path, url, answer.text)
        answer = server.http.post("/v1/images/edits", data={"prompt": "a", "image": urls[0]})
        assert answer.status_code == 400
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_bodies_are_limited(server):
    answer = server.http.post("/jobs", content=b"x" * (65 * 2**20))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    answer = server.http.post("/sdapi/v1/options", content=b"x" * 2**21)
    assert (answer.status_code, answer.json()["error"]) == (413, "HTTPException")
    assert server.http.post("/jobs", json={"prompt": "a" * 30_000}).status_code == 400
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": 1}', b"[" * 10_000):
        answer = server.http.post(
            "/jobs", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["message"]
        assert not (answer.json()["error"]["param"] or "").isdecimal()


def test_half_a_surrogate_pair_is_refused_and_not_broken(server):
    for path, body in (
        ("/jobs", r'{"prompt": "\ud800"}'),
        ("/jobs", r'{"prompt": "a", "\ud800": 1}'),
        ("/v1/images/generations", r'{"prompt": "a", "\ud800": 1}'),
        ("/sdapi/v1/txt2img", r'{"prompt": "a", "\ud800": 1}'),
        ("/sdapi/v1/txt2img", r'{"prompt": "a", "override_settings": {"\ud800": 1}}'),
        ("/sdapi/v1/options", r'{"\ud800": 1}'),
    ):
        answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, body)


def test_what_breaks_is_counted_and_logged_without_what_was_sent(tmp_path, monkeypatch, caplog):
    async def run(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get("/sdapi/v1/progress"), await http.get("/v1/models")

    def fail(_settings):
        raise RuntimeError(" ".join(["a", "secret", "thing"]))  # not so in the source lines

    app = create_app(Settings(data_dir=tmp_path))
    monkeypatch.setattr(Settings, "models", fail)
    app.state.service = Service(Settings(data_dir=tmp_path))
    answers = asyncio.run(run(app))
    assert [answer.status_code for answer in answers] == [200, 500]
    assert "log tells" in answers[1].json()["error"]["message"]
    assert "RuntimeError" in caplog.text
    assert "a secret thing" not in caplog.text


def test_no_stray_gets_the_answer_of_the_page(server):
    for method, path, status, allow in (
        ("GET", "/v1/images/generations", 405, "POST"),
        ("PUT", "/jobs", 405, "GET, POST, HEAD"),
        ("FOO", "/sdapi/v1/txt2img", 405, "POST"),
        ("DELETE", "/health", 405, "GET, HEAD"),
        ("OPTIONS", f"/jobs/{'a' * 36}", 405, "DELETE, GET, HEAD"),
        ("POST", "/v1/chat/completions", 404, None),
        ("GET", "/sdapi/v1/nothing", 404, None),
        ("GET", "/jobs/x/y", 404, None),
        ("GET", "/jobs/", 404, None),
        ("GET", "/images/x", 404, None),
        ("HEAD", "/health", 200, None),
        ("HEAD", "/images", 200, None),
    ):
        answer = server.http.request(method, path)
        assert (path, answer.status_code) == (path, status)
        assert answer.headers.get("Allow") == allow
        if status >= 400:
            key = "detail" if path.startswith("/sdapi") else "error"
            assert answer.json()[key] not in ("Not Found", "Method Not Allowed")
    server.ended(server.submit())
    (url, *_) = server.http.get("/images").json()["images"]
    head = server.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) == len(server.http.get(url).content)


def test_clients_that_send_rubbish_or_leave_harm_nobody(server):
    lines = []
    for k in range(200):
        line = socket.create_connection((HERE, server.port), 10)
        line.sendall(
            [b"GET / HT", b"\x16\x03\x01\x02" * 50, b"POST /jobs HTTP/1.1\r\nHost: x\r\n"][k % 3]
        )
        lines.append(line)
    for line in lines[::2]:
        line.close()
    assert server.http.get("/health").json()["status"] == "ok"
    for line in lines:
        line.close()
    assert server.ended(server.submit())["status"] == "done"


def test_a_second_server_does_not_use_the_same_folder(server, tiny):
    second = Running(server.home, tiny)
    second.log = server.home.parent / "second.log"
    assert second.start().process.wait(60) == 2
    assert "another server uses it" in second.log.read_text()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--device", "abacus"], "device='abacus': cuda, mps or cpu"),
        (["--dtype", "float12"], "dtype='float12': float32, float16 or bfloat16"),
        (["--attention", "divided"], "attention='divided': one of"),
    ],
)
def test_a_server_that_could_draw_nothing_does_not_stay(tiny, tmp_path, flags, told):
    server = Running(tmp_path / "home", tiny, *flags).start()
    try:
        assert server.process.wait(120) == 2
    finally:
        server.process.kill()
    assert told in server.log.read_text().splitlines()[-1]


def test_an_address_that_is_taken_and_a_damaged_database_are_told_in_one_line(
    server, tiny, tmp_path
):
    second = Running(tmp_path / "home", tiny)
    second.home.mkdir()
    (second.home / "jobs.sqlite").write_bytes(b"nothing of the kind" * 100)
    assert second.start().process.wait(60) == 2
    (line,) = second.log.read_text().splitlines()
    assert "jobs.sqlite': cannot be read" in line
    (second.home / "jobs.sqlite").unlink()
    second.log.unlink()
    second._command[second._command.index("--port") + 1] = str(server.port)
    assert second.start().process.wait(60) == 2
    (line,) = second.log.read_text().splitlines()
    assert "nothing can listen there (Address already in use)" in line


def test_the_log_is_json_and_says_no_prompts(server):
    server.ended(server.submit(prompt="a secret thing"))
    lines = server.log.read_text().splitlines()[1:]
    assert any("accepted" in json.loads(line)["message"] for line in lines)
    assert "secret thing" not in server.log.read_text()


def test_the_openapi_document_names_every_field(server):
    told = server.http.get("/openapi.json").json()
    assert "/jobs/{id}/events" in told["paths"]
    assert "mask_image" in told["components"]["schemas"]["Drawing"]["properties"]
    assert "Refusal" in told["components"]["schemas"]
    for path, endpoints in told["paths"].items():
        for endpoint in endpoints.values():
            assert list(endpoint["responses"]["4XX"]["content"]) == ["application/json"], path
    with httpx.Client() as http:
        assert http.get(f"{server.url}/docs").status_code in (200, 404)
