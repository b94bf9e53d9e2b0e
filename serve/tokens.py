"""Bearer tokens and whose they are, from a file that may change while the server runs.

    # tenant and token, one pair a line; a tenant may have several, so that one can follow the other
    search      7Gv0WJ0nqUeR4m1Ck2bX
    assistant   mM3bB1dR0yq8cE5sT9wL

Only digests are kept, so no token can show in a log, a traceback or a dump of the server's objects.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.errors import InvalidConfig
from serve.last_good import LastGood

CHECK_SECONDS = 1.0
"""Between two looks at the file: how long a token that was taken out of it is still good for."""
MIN_TOKEN_CHARS = 16
"""Shorter ones could be guessed."""
MAX_TOKEN_CHARS = 4096
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""Of RFC 6750, section 2.1."""


@dataclass(frozen=True, slots=True)
class Known:
    """One token's owner and its sha256."""

    tenant: str
    digest: bytes


class Tokens:
    """The tokens of a file, read again when it changes; one that cannot be read leaves the last ones in force."""

    def __init__(self, path: str | Path, check_seconds: float = CHECK_SECONDS):
        """Raises InvalidConfig."""
        file = Path(path)
        self._known = LastGood("tokens", (file,), lambda: read_tokens(file), check_seconds)

    def tenant_of(self, token: str) -> str | None:
        """Whose token it is; None if nobody's. Takes as long for a wrong one, whatever is wrong with it."""
        digest = digest_of(token)
        tenant = None
        for one in self._known.get():
            if hmac.compare_digest(one.digest, digest):
                tenant = one.tenant
        return tenant


def digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def read_tokens(path: Path) -> tuple[Known, ...]:
    """Raises InvalidConfig, which names the line and never its token."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidConfig("token_file", f"cannot read {path}: {reason}") from None
    known: dict[bytes, Known] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            one = _known(words, f"{path}, line {number}")
            if known.setdefault(one.digest, one).tenant != one.tenant:
                raise InvalidConfig("token_file", f"{path}, line {number}: another tenant has the same token; make a "
                                    "new one")
    if not known:
        raise InvalidConfig("token_file", f"{path} holds no tokens; write one line for each: TENANT TOKEN")
    return tuple(known.values())


def _known(words: list[str], where: str) -> Known:
    if len(words) != 2:
        raise InvalidConfig("token_file", f"{where}: has {len(words)} words; write TENANT TOKEN")
    tenant, token = words
    if not TENANT.fullmatch(tenant):
        raise InvalidConfig("token_file", f"{where}: the tenant must be 1 to 64 letters, digits or . _ @ - and begin "
                            "with a letter or digit")
    if not MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS or not TOKEN.fullmatch(token):
        raise InvalidConfig("token_file", f"{where}: the token has {len(token)} characters; it must have "
                            f"{MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS}, letters, digits or - . _ ~ + / and = at the end; "
                            "make one with: openssl rand -hex 32")
    return Known(tenant, digest_of(token))
