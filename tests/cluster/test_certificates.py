"""The certificates of a cluster's nodes: who is let in by them, in a TLS handshake as Ray's nodes make it."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.certificates import NodeFiles, make_authority, make_node
from mm_core.errors import ConfigError

if TYPE_CHECKING:
    from conftest import RunningHead


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""With which a client of HTTP/2 begins: this, and settings that change nothing (RFC 9113, 3.4)."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    make_authority(folder)
    return folder


def context(files: NodeFiles, purpose: ssl.Purpose) -> ssl.SSLContext:
    """Either side shows its certificate and asks for the other's."""
    found = ssl.create_default_context(purpose, cafile=str(files.authority))
    found.load_cert_chain(str(files.certificate), str(files.key))
    found.verify_mode = ssl.CERT_REQUIRED
    return found


def handshake(server: NodeFiles, client: NodeFiles, name: str) -> None:
    """
    Raises:
        ssl.SSLError: one side refuses the other.
    """
    ours, theirs = socket.socketpair()
    failures: list[ssl.SSLError] = []

    def answer() -> None:
        try:
            with context(server, ssl.Purpose.CLIENT_AUTH).wrap_socket(theirs, server_side=True) as answered:
                answered.sendall(b"x")
        except ssl.SSLError as error:
            failures.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with context(client, ssl.Purpose.SERVER_AUTH).wrap_socket(ours, server_hostname=name) as asking:
            asking.recv(1)
    finally:
        ours.close()
        thread.join(10)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "10.1.2.3", "mm-head-svc.mm.svc.cluster.local", "fd00::7"])
def test_nodes_of_one_authority_trust_each_other_by_all_of_their_names(authority: Path, tmp_path: Path, name: str) -> None:
    server = make_node(authority, tmp_path / "a", ["10.1.2.3", "*.mm.svc.cluster.local", "fd00::7"])
    handshake(server, make_node(authority, tmp_path / "b"), name)


def test_a_node_is_trusted_by_the_address_that_ray_takes_for_it(authority: Path, tmp_path: Path) -> None:
    from ray.util import get_node_ip_address

    handshake(make_node(authority, tmp_path / "a"), make_node(authority, tmp_path / "b"), get_node_ip_address())


def test_a_node_under_another_name_is_refused(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"10\.9\.9\.9"):
        handshake(make_node(authority, tmp_path / "a"), make_node(authority, tmp_path / "b"), "10.9.9.9")


def test_a_node_of_another_authority_is_refused(authority: Path, tmp_path: Path) -> None:
    make_authority(tmp_path / "other")
    refused(authority, make_node(tmp_path / "other", tmp_path / "a"), tmp_path / "b")


def test_a_head_of_ray_answers_nodes_of_its_authority_alone(running_head: RunningHead, tmp_path: Path) -> None:
    """The real one: its first bytes are HTTP/2's settings, to whom it lets in."""
    own = NodeFiles(*(Path(running_head.environment[f"RAY_TLS_{name}"]) for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")))
    make_authority(tmp_path / "other")
    stranger = make_node(tmp_path / "other", tmp_path / "a")
    nameless = ssl.create_default_context(cafile=str(own.authority))

    assert _answer(running_head, context(own, ssl.Purpose.SERVER_AUTH))[3:4] == b"\x04"
    assert _answer(running_head, context(NodeFiles(stranger.certificate, stranger.key, own.authority), ssl.Purpose.SERVER_AUTH)) == b""
    assert _answer(running_head, nameless) == b""
    assert _answer(running_head, None) == b""


def _answer(head: RunningHead, how: ssl.SSLContext | None) -> bytes:
    """Of the head's GCS to the start of a call; nothing where it hangs up."""
    with socket.create_connection(("127.0.0.1", int(head.gcs_port)), timeout=10) as plain, suppress(ssl.SSLError, ConnectionError):
        if how is None:
            plain.sendall(_PREFACE)
            return plain.recv(64)
        how.set_alpn_protocols(["h2"])
        with how.wrap_socket(plain, server_hostname="127.0.0.1") as asking:
            asking.sendall(_PREFACE)
            return asking.recv(64)
    return b""


def test_a_node_cannot_sign_others(authority: Path, tmp_path: Path) -> None:
    node = make_node(authority, tmp_path / "node")
    (tmp_path / "false").mkdir()
    (tmp_path / "false" / "ca.crt").write_bytes(node.certificate.read_bytes() + node.authority.read_bytes())
    (tmp_path / "false" / "ca.key").write_bytes(node.key.read_bytes())
    refused(authority, make_node(tmp_path / "false", tmp_path / "child"), tmp_path / "b")


def refused(authority: Path, shown: NodeFiles, folder: Path) -> None:
    """By a node of the authority, whatever the other trusts itself."""
    pretender = NodeFiles(shown.certificate, shown.key, authority / "ca.crt")
    with pytest.raises(ssl.SSLError):
        handshake(make_node(authority, folder), pretender, "localhost")


def test_keys_are_their_owners_alone(authority: Path, tmp_path: Path) -> None:
    node = make_node(authority, tmp_path / "node")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (authority / "ca.key", node.key)] == [0o600, 0o600]


def test_files_that_a_node_reads_stay_whole_while_they_are_replaced(
    authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(authority, tmp_path)
    files = (node.certificate, node.key, node.authority)
    before = [file.read_bytes() for file in files]
    with node.certificate.open("rb") as certificate, node.key.open("rb") as key, node.authority.open("rb") as signer:
        make_node(authority, tmp_path)
        assert [file.read() for file in (certificate, key, signer)] == before
    assert sorted(tmp_path.iterdir()) == sorted(files)
    handshake(node, node, "localhost")

    now = [file.read_bytes() for file in files]
    assert now[:2] != before[:2]
    monkeypatch.delattr("os.replace")  # as a process that is killed before
    with pytest.raises(AttributeError):
        make_node(authority, tmp_path)
    assert [file.read_bytes() for file in files] == now


def test_an_authority_is_not_replaced_and_must_be_there(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.key exists"):
        make_authority(authority)
    with pytest.raises(ConfigError, match="mm tls authority"):
        make_node(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="neither an address nor a DNS name"):
        make_node(authority, tmp_path / "out", ["a b"])
