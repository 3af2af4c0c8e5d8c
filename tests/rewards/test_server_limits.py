"""What strangers cannot do to a reward server: hold its connections, fill its memory; TLS of a private authority."""

import json
import resource
import shutil
import socket
import subprocess
import time

import httpx
import pytest
import torch
from safetensors.torch import save
from support.serving import TOKEN, serving

from fastgrpo.config import RewardSpec
from fastgrpo.config.sections import validate_settings
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.base import ask
from fastgrpo.rewards.served.connections import allow_connections, server_options
from fastgrpo.rewards.served.service import Serve, ServiceConfig, check_certificate, create_app
from fastgrpo.rewards.served.wire import MAX_VALUES, WireError, decode_request, encode_request

SAMPLES, PROMPTS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), [Prompt("a")] * 2
HALF = b"POST /v1/score/mean HTTP/1.1\r\nHost: x\r\nX-"


class Mean:
    def score(self, samples, prompts, fps):
        return samples.flatten(1).mean(1)


def app(**serve):
    config = validate_settings(ServiceConfig, {"serve": serve, "rewards": [{"name": "shapes"}]})
    return create_app(config, TOKEN, {"mean": Mean()})


def half_open(url):
    """A connection that sends half of a request's headers."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    connection.sendall(HALF)
    return connection


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setenv("FASTGRPO_REWARD_TOKEN", TOKEN)

    def make(url, **options):
        options = {"url": url, "reward": "mean", "retries": 0, "timeout": 10.0, **options}
        return load_reward(RewardSpec(name="remote", options=options))

    return make


def test_half_sent_headers_have_seconds_and_then_a_408(remote):
    with serving(app(), **server_options(64, 0.3)) as url:
        connection = half_open(url)
        begin = time.monotonic()
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert connection.recv(100) == b""
        assert 0.2 < time.monotonic() - begin < 5
        # A connection that stays open has as long for each of its requests, and no less for the time in between.
        with httpx.Client(base_url=url, trust_env=False) as client:
            for _ in range(3):
                assert client.get("/health").status_code == 200
                time.sleep(0.25)
        # A head that trickles is as late as one that stops.
        connection = half_open(url)
        connection.settimeout(0.1)
        said, begin = b"", time.monotonic()
        while not said and time.monotonic() - begin < 5:
            try:
                connection.sendall(b"a")
                said = connection.recv(100)
            except TimeoutError:
                continue
        assert said.startswith(b"HTTP/1.1 408 ")


def is_closed(connection):
    """Whether the server has closed it, in order or with a reset: which of them it is, is the kernel's affair."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_four_hundred_of_them_close_it_for_nobody(remote):
    with serving(app(), **server_options(32, 60.0)) as url:
        held = [half_open(url) for _ in range(400)]
        scores = ask(remote(url), SAMPLES, PROMPTS, None)
        assert scores.values.tolist() == pytest.approx(SAMPLES.flatten(1).mean(1).tolist())
        # The latest have their places still: those before them gave way.
        held[-1].settimeout(0.2)
        with pytest.raises(TimeoutError):
            held[-1].recv(1)
        held[0].settimeout(5)
        assert is_closed(held[0])
        for connection in held:
            connection.close()


def test_the_limit_of_open_files_is_raised_or_kept_to():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert allow_connections(64) == 64
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64 + 256
        assert allow_connections(10**9) == min(10**9, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 256))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def body_of(text: bytes, **more):
    return save({"request": torch.frombuffer(bytearray(text), dtype=torch.uint8), "samples": SAMPLES, **more})


@pytest.mark.parametrize("piece", [b"[]", b"{}", b"0", b'{"a":0}'])
def test_a_request_of_millions_of_values_is_refused_before_it_is_parsed(piece):
    many = b",".join([piece] * 3_000_000)
    head = json.dumps({"version": 1, "encoding": "raw", "shape": [2, 3, 8, 8], "fps": None}).encode()
    body = body_of(head[:-1] + b', "prompts": [{"text": "a", "metadata": {"x": [' + many + b"]}}]}")
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(WireError, match="above") as caught:
        decode_request(body, 2**28)
    assert caught.value.status == 413
    assert time.perf_counter() - begin < 2
    # Kilobytes: two copies of the text at most.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 * len(body) / 1024 + 10_000


def test_a_header_of_thousands_of_tensors_is_refused_before_it_is_parsed():
    body = body_of(b"{}", **{f"t{i}": torch.zeros(1) for i in range(1000)})
    with pytest.raises(WireError, match="a safetensors header above"):
        decode_request(body, 2**28)


def test_requests_as_large_as_people_send_are_read():
    prompts = [Prompt(f"a long prompt, with commas, number {i}" * 20, metadata={"n": i}) for i in range(1000)]
    asked = decode_request(encode_request(torch.zeros(1000, 3, 8, 8), prompts, None, "uint8"), 2**28)
    assert len(asked.prompts) == 1000 < MAX_VALUES


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A private authority, and the certificate of 127.0.0.1 that it signed: (ca.pem, server.pem, server.key)."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl, which makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    # Python 3.13 asks certificates for all that the standard does: a key's use, and who signed it.
    names = "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n"
    (folder / "names").write_text(names)
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority "
        "-addext keyUsage=critical,keyCertSign",
        "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 2 -extfile names",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_a_private_authority_is_named_by_its_file(authority, remote):
    files = {"ssl_certfile": authority / "server.pem", "ssl_keyfile": authority / "server.key"}
    with serving(app(), **server_options(64, 10.0), **files) as url:
        assert url.startswith("https")
        assert ask(remote(url, ca_file=str(authority / "ca.pem")), SAMPLES, PROMPTS, None).valid.all()
        with pytest.raises(RuntimeError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(remote(url), SAMPLES, PROMPTS, None)


def test_files_that_are_no_certificates_are_named(authority, remote, tmp_path):
    (tmp_path / "no.pem").write_text("nothing")
    for path in (tmp_path / "no.pem", tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match=rf"ca_file '\S*{path.name}' cannot be used"):
            remote("https://127.0.0.1:1", ca_file=str(path))
        with pytest.raises(ConfigError, match=rf"serve.tls_certificate: \S*{path.name} cannot be used"):
            check_certificate(Serve(tls_certificate=str(path)))
    with pytest.raises(ConfigError, match=r"server.pem and \S*ca.key cannot be used"):
        check_certificate(Serve(tls_certificate=str(authority / "server.pem"), tls_key=str(authority / "ca.key")))
    with pytest.raises(ConfigError, match="without tls_certificate"):
        check_certificate(Serve(tls_key="x"))
    check_certificate(Serve(tls_certificate=str(authority / "server.pem"), tls_key=str(authority / "server.key")))
