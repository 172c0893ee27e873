"""Keys of a deployment: a CA of its own, the SuperLink's certificate, and a key for each site's SuperNode."""

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedrank.config import ConfigError
from fedrank.store import CLIENT, write

HERE = ("localhost", "127.0.0.1")  # the server's own machine is always named
CA_DAYS, SERVER_DAYS = 3650, 365
EARLY = timedelta(hours=1)  # by which the sites' clocks may be behind
DNS = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
TAKEN = ("ca", "server")  # these files are others


def make(folder: Path, hosts: Sequence[str], sites: Sequence[str], renew: bool = False) -> list[Path]:
    """Make what is not there yet, and say which files were written; a key that is there stays as it is.

    hosts: the names and addresses at which sites reach the SuperLink. renew: a new certificate, for the old one's hosts
    where none are given.
    """
    for name in sites:
        check_site(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    written = []
    ca_file, server_file = folder / "ca.crt", folder / "server.crt"
    if not server_file.exists() and not hosts:
        raise ConfigError("--host: the name or address at which sites reach the server, for its certificate")
    named = [_host(host) for host in dict.fromkeys([*hosts, *HERE])]
    ca_key, made = _key(folder / "ca.key")
    written += made
    if not ca_file.exists():
        write(ca_file, _pem(_ca(ca_key)))
        written.append(ca_file)
    ca = _certificate(ca_file)
    if ca.public_key() != ca_key.public_key():
        raise ConfigError(f"{ca_file} is not of {folder / 'ca.key'}; put back the one that is, or take another folder")
    if ca.not_valid_after_utc < _now() + timedelta(days=1):
        raise ConfigError(f"{ca_file} expires on {ca.not_valid_after_utc:%Y-%m-%d}; make a new CA in another folder")
    server_key, made = _key(folder / "server.key")
    written += made
    if server_file.exists():
        old = _certificate(server_file)
        (before,) = (e.value for e in old.extensions if isinstance(e.value, x509.SubjectAlternativeName))
        if hosts and set(named) != set(before) and not renew:
            told = ", ".join(str(name.value) for name in before)
            raise ConfigError(f"--host: {server_file} is for {told}; --renew makes one for other hosts")
        named = named if hosts else list(before)
    if renew or not server_file.exists():
        write(server_file, _pem(_server(ca, ca_key, server_key, named)))
        written.append(server_file)
    for name in sites:
        key, made = _key(folder / f"{name}.key", serialization.PrivateFormat.OpenSSH)
        public, line = folder / f"{name}.pub", _public(key)
        if not public.exists():
            write(public, line)
            made.append(public)
        elif public.read_bytes().split()[:2] != line.split()[:2]:
            raise ConfigError(f"{public} is not of {name}.key; put back the one that is, or take both away")
        written += made
    return written


def private(path: Path, data: bytes) -> None:
    """A new file that at no moment another user can read; FileExistsError where there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_site(name: str) -> None:
    """ConfigError where a site cannot be called so."""
    if not CLIENT.fullmatch(name) or name in TAKEN:
        raise ConfigError(
            f"--site {name}: a client's id is letters, digits, '_', '-' or '.', at most 128, and neither of {', '.join(TAKEN)}"
        )


def check_host(host: str) -> None:
    """ConfigError where it is neither an address nor a name."""
    _host(host)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not DNS.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
        raise ConfigError(f"--host {host}: neither a name, such as fed.example.org, nor an address, such as 10.0.0.1")
    return x509.DNSName(host)


def _key(
    path: Path, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8
) -> tuple[EllipticCurvePrivateKey, list[Path]]:
    """The key in this file, made where there is none; and what was written."""
    if not path.exists():
        key = generate_private_key(SECP384R1())
        private(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return key, [path]
    data = path.read_bytes()
    load = serialization.load_ssh_private_key if b"OPENSSH" in data[:64] else serialization.load_pem_private_key
    try:
        found = load(data, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no private key that can be read: {error}") from None
    if not isinstance(found, EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: a {type(found).__name__}; what is used here is EC P-384")
    return found, []


def _public(key: EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: no certificate that can be read: {error}") from None


def _ca(key: EllipticCurvePrivateKey) -> x509.Certificate:
    name = _name("fedrank CA")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # certificates and revocations
    return (
        _begun(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def _server(
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    key: EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
) -> x509.Certificate:
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # signatures
    days = min(SERVER_DAYS, (ca.not_valid_after_utc - _now()).days)
    return (
        _begun(_name("fedrank SuperLink"), ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _begun(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - EARLY)
        .not_valid_after(_now() + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _now() -> datetime:
    return datetime.now(UTC)
