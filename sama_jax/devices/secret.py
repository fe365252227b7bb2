"""Keeps the secret by which the processes of a run know each other. Standard library only.

It is never sent: each side proves that it has it by a digest of the secret and of random bytes
that the other side chose.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from sama_jax.errors import UsageError
from sama_jax.untrusted import read_bytes

VARIABLE = "SAMA_JAX_SECRET"
"""Environment variable that holds the secret itself."""
DEFAULT = "~/.config/sama-jax/secret"
"""Where a user's secret is otherwise: processes on one host, or with a home on a shared disk, find
the same file."""
LEAST_BYTES = 16
"""Shorter ones could be guessed."""


def find_secret(file: Path | None, env: Mapping[str, str]) -> bytes:
    """Returns the secret: of `file`, else of the environment, else of the user's own file.

    A file that does not exist is made, for the user alone.

    Raises:
      UsageError: it is short, cannot be read or made, or others may read it.
    """
    if file is None and VARIABLE in env:
        return _long_enough(env[VARIABLE].encode("utf-8", "surrogateescape"), VARIABLE)
    path = Path(os.path.expanduser(DEFAULT)) if file is None else file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(made, "w") as new:
                new.write(secrets.token_hex(32) + "\n")
        for _ in range(20):  # another process may have made it, and not written it yet
            content = read_bytes(path, 4096).strip()
            if content:
                break
            time.sleep(0.1)
        if path.stat().st_mode & 0o077:
            raise ValueError("others may read it: chmod 600")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: cannot serve as the secret of the processes ({reason}); give all of them "
            f"the same --secret-file, or the same text in {VARIABLE}"
        ) from None
    return _long_enough(content, str(path))


def _long_enough(secret: bytes, where: str) -> bytes:
    if len(secret) < LEAST_BYTES:
        raise UsageError(f"{where}: expected at least {LEAST_BYTES} bytes, found {len(secret)}")
    return secret


def proof(secret: bytes, *said: object) -> str:
    """Returns the digest that only who has the secret can make of what was said."""
    return hmac.new(secret, repr(said).encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def proves(given: str, expected: str) -> bool:
    """Tells whether a proof is the expected one, in a time that does not depend on it."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())
