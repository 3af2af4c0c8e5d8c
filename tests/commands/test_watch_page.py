"""The live page: what it answers, to whom, and that it follows a run without touching it."""

import http.client
import json
import re
import socket
import threading

import pytest
from support.tiny import tiny_config

from fastgrpo.commands import watch as module
from fastgrpo.commands.watch import LivePage, Server, watch
from fastgrpo.config import dump
from fastgrpo.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A run directory without an iteration."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(tiny_config(directory)))
    return directory


def iterate(run, count: int) -> None:
    line = {"reward/mean": 0.5, "time/update": 1.0, "time/total": 1.0, "samples_per_second": 9.0}
    text = "".join(json.dumps({"iteration": i, **line}) + "\n" for i in range(count))
    (run / "metrics.jsonl").write_text(text)


@pytest.fixture
def server(run):
    iterate(run, 3)
    with Server(LivePage(run), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method: str = "GET", path: str = "/", **headers: str):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body.decode()


def test_the_page_is_the_report_and_renews_itself(server):
    answer, body = ask(server)
    assert answer.status == 200
    assert "Live: read at" in body
    assert "Reward in training" in body
    (script,) = re.findall("<script>(.*?)</script>", body, re.DOTALL)
    assert script == module.SCRIPT
    assert answer.headers["Content-Security-Policy"] == module.POLICY
    assert answer.headers["Cache-Control"] == "no-store"
    assert len(body) < 1_000_000
    assert "http-equiv" not in body


def test_nothing_else_is_answered(server):
    whole, _ = ask(server)
    head, nothing = ask(server, "HEAD")
    assert (head.status, nothing) == (200, "")
    assert head.headers["Content-Length"] == whole.headers["Content-Length"]
    for path in ("/config.yaml", "/../config.yaml", "/eval/", "/%2e%2e/config.yaml"):
        assert ask(server, path=path)[0].status == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, method)[0].status == 501
    for name in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
        assert ask(server, Host=name)[0].status == 403
    for name in ("localhost:8008", "127.0.0.1", "[::1]:80"):
        assert ask(server, Host=name)[0].status == 200


def test_it_listens_on_the_loopback_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_silent_client_holds_nobody_up(server, monkeypatch):
    monkeypatch.setattr(module.Handler, "timeout", 0.2)
    with socket.create_connection(server.server_address) as silent:
        assert ask(server)[0].status == 200
        silent.settimeout(5)
        assert silent.recv(1) == b""
    for _ in range(module.MOST_AT_ONCE):
        server.slots.acquire()
    assert ask(server)[0].status == 503


def test_it_is_made_again_after_a_minute_and_not_before(run):
    now = [0.0]
    live = LivePage(run, clock=lambda: now[0])
    assert "Waiting:" in live.read().decode()
    assert "has not finished an iteration yet" in live.read().decode()
    iterate(run, 3)
    now[0] = 59.0
    assert "Waiting:" in live.read().decode()
    now[0] = 60.0
    assert "in 3 iterations" in live.read().decode()
    iterate(run, 7)
    now[0] = 121.0
    assert "in 7 iterations" in live.read().decode()


def test_a_run_that_cannot_be_read_for_a_moment_keeps_its_page(run):
    now = [0.0]
    iterate(run, 3)
    live = LivePage(run, clock=lambda: now[0])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "in 3 iterations" in live.read().decode()
    (run / "summary.json").write_text("{")
    now[0] = 61.0
    text = live.read().decode()
    assert "summary.json: not valid JSON" in text
    assert "in 3 iterations" in text
    (run / "summary.json").unlink()
    # Nothing was written.
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_cannot_be_watched_is_refused_in_a_line(run, tmp_path, server):
    with pytest.raises(UserError, match="not a run directory"):
        watch(tmp_path, 0, print)
    with pytest.raises(UserError, match=r"--port: \d+ cannot be listened on"):
        watch(run, server.server_address[1], print)


def test_ctrl_c_ends_it(run, monkeypatch):
    said = []
    monkeypatch.setattr(Server, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    watch(run, 0, said.append)
    assert re.match(r"http://localhost:\d+/", said[0])
    assert said[-1] == "ended"
