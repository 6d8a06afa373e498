"""Certificates for TLS between Ray's nodes (`RAY_USE_TLS=1`): an authority of your own, and one certificate a node, signed by it.

Ray's nodes check each other by name and address, so a certificate carries all of its node's. Whoever has the authority's key can
join: keep it where only nodes that start can read it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mm_core.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY_DAYS = 3650
_CERTIFICATE, _KEY = "ca.crt", "ca.key"
_CLOCKS_APART = timedelta(minutes=5)
"""By so much a node's clock may be behind."""


@dataclass(frozen=True)
class NodeFiles:
    """What a node's `ray start` reads, by the variables it reads them from."""

    certificate: Path
    key: Path
    authority: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(self.certificate),
            "RAY_TLS_SERVER_KEY": str(self.key),
            "RAY_TLS_CA_CERT": str(self.authority),
        }


def make_authority(folder: Path) -> None:
    """Write `ca.crt` and `ca.key` into `folder`.

    Raises:
        ConfigError: there is an authority already: nodes with a new one could not talk to those with the old one.
    """
    from cryptography import x509

    if (folder / _KEY).exists():
        raise ConfigError(f"{folder / _KEY} exists: remove it first if no node uses it any more, or give another folder")
    key = _new_key()
    name = _name("mm Ray authority")
    authority = (
        _builder(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_uses(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write(folder, _CERTIFICATE, _KEY, _signed(authority, key), key)


def make_node(authority: Path, out: Path, names: Sequence[str] = (), *, days: int = 365) -> NodeFiles:
    """Write this machine's `tls.crt` and `tls.key` into `out`, and `ca.crt` beside them.

    Args:
        authority: the folder that `make_authority` wrote.
        names: DNS names (`*.` in front stands for one label) and addresses, besides this machine's own and `localhost`.

    Raises:
        ConfigError: there is no authority in the folder, or a name is neither.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    out = out.absolute()
    signer, signer_key = _read_authority(authority)
    key = _new_key()
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])  # nodes are each other's clients
    node = (
        _builder(_name(socket.gethostname()), signer.subject, key, days)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in (*names, *_own_names())]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_uses(signs=False), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), critical=False)
    )
    _write(out, "tls.crt", "tls.key", _signed(node, signer_key), key)
    _replace({out / _CERTIFICATE: ((authority / _CERTIFICATE).read_bytes(), 0o644)})
    return NodeFiles(out / "tls.crt", out / "tls.key", out / _CERTIFICATE)


def _own_names() -> list[str]:
    """The machine's name, and the addresses of its interfaces: Ray takes one of these for the node's."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    addresses = {each.address for found in psutil.net_if_addrs().values() for each in found if each.family in families}
    return ["localhost", socket.gethostname()[:64], *sorted({"127.0.0.1"} | addresses)]


def _alternative(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
        pass
    if not name or not all(label == "*" or label.replace("-", "a").replace("_", "a").isalnum() for label in name.split(".")):
        raise ConfigError(f"{name!r} is neither an address nor a DNS name")
    return x509.DNSName(name)


def _read_authority(folder: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate((folder / _CERTIFICATE).read_bytes())
        key = load_pem_private_key((folder / _KEY).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"no authority in {folder} ({type(error).__name__}): make one with `mm tls authority {folder}`") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / _KEY} is no elliptic-curve key: make an authority with `mm tls authority`")
    return certificate, key


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _name(text: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + timedelta(days=days))
    )


def _uses(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


def _write(folder: Path, certificate_name: str, key_name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    folder.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _replace({folder / key_name: (private, 0o600), folder / certificate_name: (certificate.public_bytes(Encoding.PEM), 0o644)})


def _replace(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write files of these contents and modes beside their places, then move them there: a node may be reading what was there before.
    A key is its owner's alone from its first byte on."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    for path, (content, mode) in files.items():
        beside[path].unlink(missing_ok=True)
        with os.fdopen(os.open(beside[path], os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    for path, new in beside.items():
        os.replace(new, path)
