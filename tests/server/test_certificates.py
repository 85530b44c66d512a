"""The server with a certificate: what its clients have to trust, and certificates that it cannot start with."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from tests.helpers.server.processes import command, grpc_address, server
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS
from tpeft_deploy import Bundle, Client, Runtime
from tpeft_deploy.errors import ServerError, Unavailable
from tpeft_deploy.runtime.server.certificates import Certificates
from tpeft_deploy.runtime.server.main import serve
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.runtime.server.settings import read


def test_clients_that_trust_the_certificate_and_no_others(
    conv_bundle: Bundle, certificate: Path, tmp_path: Path
) -> None:
    cert = certificate / "cert.pem"
    files = ["--tls-cert", cert, "--tls-key", certificate / "key.pem"]
    ports = ["--port", 0, "--grpc-port", 0, "--no-auth", "--threads", 1]
    with server(conv_bundle.path, "--state", tmp_path / "state", *ports, *files) as (process, url):
        assert url.startswith("https://127.0.0.1:")
        with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
            expected = runtime.run({"pixels": PIXELS}, task="plain")["logits"]
        with Client(url, verify=str(cert)) as client:
            np.testing.assert_allclose(
                client.infer({"pixels": PIXELS}, "plain")["logits"], expected, rtol=1e-5, atol=1e-6
            )
        trusting = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{url}/v2/health/ready", verify=trusting, timeout=100).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/v2/health/ready", timeout=100)
        with Client(url) as client, pytest.raises(Unavailable, match="certificate"):
            client.infer({"pixels": PIXELS}, "plain")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http{url.removeprefix('https')}/v2/health/ready", timeout=100)

        address = grpc_address(process)
        path = f"/{SERVICE}/ServerReady"
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(cert.read_bytes())) as channel:
            assert pb.ServerReadyResponse.FromString(channel.unary_unary(path)(b"", timeout=100)).ready
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(path)(b"", timeout=100)


def renewed(certificate: Path, folder: Path) -> bytes:
    """Another certificate for the same names, in the place of the one in a folder."""
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*request.split(), *names], cwd=folder, check=True, capture_output=True, timeout=120)
    found = (folder / "cert.pem").read_bytes()
    assert found != (certificate / "cert.pem").read_bytes()
    return found


def is_live(url: str, address: str, cert: bytes, folder: Path) -> tuple[bool, bool]:
    """Whether a new client that trusts a certificate is answered, over HTTP and over gRPC."""
    (folder / "trusted.pem").write_bytes(cert)
    trusting = ssl.create_default_context(cafile=str(folder / "trusted.pem"))
    try:
        http = httpx.get(f"{url}/v2/health/live", verify=trusting, timeout=100).is_success
    except httpx.ConnectError:
        http = False
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(cert), options) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=100)
        except grpc.RpcError:
            return http, False
    return http, True


def test_another_certificate_is_shown_without_a_restart(conv_bundle: Bundle, certificate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    shutil.copytree(certificate, folder)
    first = (folder / "cert.pem").read_bytes()
    files = ["--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem", "--log-level", "info"]
    ports = ["--port", 0, "--grpc-port", 0, "--no-auth", "--threads", 1]
    with server(conv_bundle.path, "--state", tmp_path / "state", *ports, *files) as (process, url):
        address = grpc_address(process)
        assert process.stderr is not None
        old = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate / "cert.pem")), timeout=100)
        with old:
            assert old.get(f"{url}/v2/health/live").is_success
            assert is_live(url, address, first, tmp_path) == (True, True)
            (folder / "key.pem").write_text("no key")
            process.send_signal(signal.SIGHUP)
            assert any("the present certificate stays" in line for line in process.stderr)
            assert is_live(url, address, first, tmp_path) == (True, True)
            second = renewed(certificate, folder)
            process.send_signal(signal.SIGHUP)
            assert any("new connections get the certificate" in line for line in process.stderr)
            wait_until(lambda: is_live(url, address, second, tmp_path) == (True, True), "the other certificate")
            assert is_live(url, address, first, tmp_path) == (False, False)
            assert old.get(f"{url}/v2/health/live").is_success


def test_files_are_read_again_when_they_change(certificate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    shutil.copytree(certificate, folder)
    own = Certificates(folder / "cert.pem", folder / "key.pem")
    shown = own.pem
    assert not own.renew()
    for spoil, _ in SPOILT.values():
        copy = tmp_path / "spoilt"
        shutil.copytree(certificate, copy)
        spoilt = Certificates(copy / "cert.pem", copy / "key.pem")
        spoil(copy)
        assert not spoilt.renew()
        assert spoilt.pem == shown
        shutil.rmtree(copy)
        shutil.copytree(certificate, copy)
        assert spoilt.renew()
        shutil.rmtree(copy)
    context = own.context
    renewed(certificate, folder)
    assert own.renew()
    assert own.pem != shown
    assert own.context is not context
    assert not own.renew()


def other_key(folder: Path) -> None:
    run(folder, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out key.pem")


def encrypted(folder: Path) -> None:
    run(folder, "openssl pkey -aes256 -passout pass:secret -in key.pem -out locked.pem")
    (folder / "locked.pem").replace(folder / "key.pem")


def swapped(folder: Path) -> None:
    (folder / "cert.pem").replace(folder / "spare.pem")
    (folder / "key.pem").replace(folder / "cert.pem")
    (folder / "spare.pem").replace(folder / "key.pem")


def a_directory(folder: Path) -> None:
    (folder / "key.pem").unlink()
    (folder / "key.pem").mkdir()


def run(folder: Path, line: str) -> None:
    subprocess.run(line.split(), cwd=folder, check=True, capture_output=True, timeout=120)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no certificate": (lambda folder: (folder / "cert.pem").unlink(), "cert.pem.*No such file"),
    "no key": (lambda folder: (folder / "key.pem").unlink(), "key.pem.*No such file"),
    "unreadable key": (a_directory, "key.pem.*directory"),
    "empty certificate": (lambda folder: (folder / "cert.pem").write_text(""), "cert.pem"),
    "no PEM": (lambda folder: (folder / "key.pem").write_text("secret"), "key.pem"),
    "another's key": (other_key, "key.pem.*mismatch"),
    "encrypted key": (encrypted, "key.pem.*encrypted"),
    "swapped": (swapped, "cert.pem"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_certificate_that_cannot_be_used_is_told_in_one_line(certificate: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tls"
    shutil.copytree(certificate, folder)
    spoil, message = SPOILT[name]
    spoil(folder)
    flags = {"state": tmp_path / "state", "tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}
    with pytest.raises(ServerError, match=message) as caught:
        serve(tmp_path / "no bundle", read(None, flags), print)  # refused before anything else is looked at
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "state").exists()


def test_a_certificate_without_its_key_ends_the_command_with_1(
    conv_bundle: Bundle, certificate: Path, tmp_path: Path
) -> None:
    (tmp_path / "key.pem").write_text("no key")
    for key, words in (([], "tls_cert and tls_key"), (["--tls-key", tmp_path / "key.pem"], "key.pem")):
        files = ["--tls-cert", certificate / "cert.pem", *key]
        refused = command("serve", conv_bundle.path, "--state", tmp_path / "state", "--port", 0, *files)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert words in refused.stderr
