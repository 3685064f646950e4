"""Proof of the shared key, and the secrets derived from it.

Both sides prove that they hold the key by HMAC-SHA-256 over the transcript: the two first
messages as they crossed the wire, so that nonces, node ids, versions and fields of later
versions are all covered, and with TLS the certificates that either side sees, so that nobody
can sit between two TLS connections. The role is in the MAC, so neither side's proof can be
played back as the other's. From there on every control message carries a seal: what is
changed, dropped, repeated or reordered on the way ends the link. Every data connection proves a
secret derived for it alone.

The key authenticates. It does not encrypt: without TLS, whoever can read the network can read
the cache, and whoever can change packets can change blocks and their checksums.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from sagellm.core.protocols import AuthenticationError, ConfigError, IntegrityError

__all__ = [
    "MIN_KEY_BYTES",
    "SEAL_BYTES",
    "Seal",
    "as_key",
    "data_token",
    "frame_key",
    "new_nonce",
    "proof",
    "read_key_file",
    "session_key",
    "token_id",
    "token_proof",
    "transcript",
    "verify",
]

MIN_KEY_BYTES = 16
SEAL_BYTES = 16
_INITIATOR, _ACCEPTOR = b"initiator", b"acceptor"


def as_key(key: bytes | str) -> bytes:
    """The key as bytes.

    Raises:
        ConfigError: It is too short to be a secret.

    """
    raw = key.encode() if isinstance(key, str) else bytes(key)
    if len(raw) < MIN_KEY_BYTES:
        raise ConfigError(f"the key has {len(raw)} bytes; at least {MIN_KEY_BYTES} are needed")
    return raw


def read_key_file(path: str | os.PathLike[str]) -> bytes:
    """The key in a file that only its owner can read.

    Raises:
        ConfigError: No such file, others may read it, or the key is too short.

    """
    try:
        with Path(path).open("rb") as f:
            mode = os.fstat(f.fileno()).st_mode
            raw = f.read(4096)
    except OSError as e:
        raise ConfigError(f"key file {os.fspath(path)}: {e.strerror or e}") from e
    if not stat.S_ISREG(mode):
        raise ConfigError(f"key file {os.fspath(path)} is not a regular file")
    if mode & 0o077:
        raise ConfigError(
            f"key file {os.fspath(path)} has mode {stat.S_IMODE(mode):04o}: others can read it; "
            "`chmod 600` it"
        )
    return as_key(raw.strip())


def new_nonce() -> bytes:
    """Random bytes that make a handshake unlike any other."""
    return secrets.token_bytes(32)


def transcript(hello: bytes, challenge: bytes, binding: bytes = b"") -> bytes:
    """Digest of the two first messages as they crossed the wire, and of what carries them.

    Args:
        hello: First message of the calling side.
        challenge: First message of the called side.
        binding: Digests of both certificates with TLS; empty without.

    """
    digest = hashlib.sha256()
    for part in (hello, challenge, binding):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def proof(key: bytes, transcript_digest: bytes, *, initiator: bool) -> bytes:
    """The MAC by which one side shows that it has the key."""
    role = _INITIATOR if initiator else _ACCEPTOR
    return hmac.digest(key, b"sagellm-kv proof " + role + transcript_digest, "sha256")


def verify(key: bytes, transcript_digest: bytes, mac: bytes, *, initiator: bool) -> None:
    """Check the other side's MAC, in constant time.

    Raises:
        AuthenticationError: It was not made with this key.

    """
    if not hmac.compare_digest(proof(key, transcript_digest, initiator=initiator), mac):
        side = "the caller" if initiator else "the peer"
        raise AuthenticationError(f"{side} does not have this channel's key")


def session_key(key: bytes, transcript_digest: bytes) -> bytes:
    """A secret of this link alone."""
    return hmac.digest(key, b"sagellm-kv session " + transcript_digest, "sha256")


def data_token(session: bytes, number: int) -> bytes:
    """The one-time secret of the link's data connection of that number; never crosses the wire."""
    return hmac.digest(session, b"data %d" % number, "sha256")


def frame_key(session: bytes, *, initiator: bool) -> bytes:
    """What seals the headers of the data frames that one side of the link sends."""
    role = _INITIATOR if initiator else _ACCEPTOR
    return hmac.digest(session, b"frames " + role, "sha256")


def token_id(token: bytes) -> bytes:
    """What names a token in the open, 16 bytes."""
    return hmac.digest(token, b"id", "sha256")[:16]


def token_proof(token: bytes, *, initiator: bool, binding: bytes = b"") -> bytes:
    """What shows that one holds the token, over this TLS connection if there is one; 32 bytes."""
    role = _INITIATOR if initiator else _ACCEPTOR
    return hmac.digest(token, role + binding, "sha256")


class Seal:
    """Numbers and authenticates the messages of one direction; for one thread.

    Args:
        session: Secret of the link.
        initiator: Whether these are the messages of the side that opened it.

    """

    def __init__(self, session: bytes, *, initiator: bool) -> None:
        role = _INITIATOR if initiator else _ACCEPTOR
        self._key = hmac.digest(session, b"control " + role, "sha256")
        self._count = 0

    def close(self, body: bytes) -> bytes:
        """The body with its seal behind it."""
        return body + self._next(body)

    def open(self, sealed: bytes) -> bytes:
        """The body in a sealed message.

        Raises:
            IntegrityError: It was changed, or is not the next that was sent.

        """
        body, seal = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
        if not hmac.compare_digest(self._next(body), seal):
            raise IntegrityError(
                "a control message was changed, dropped, repeated or reordered on the way"
            )
        return body

    def _next(self, body: bytes) -> bytes:
        number = self._count.to_bytes(8, "big")
        self._count += 1
        return hmac.digest(self._key, number + body, "sha256")[:SEAL_BYTES]
