"""The page, read once, and the policy under which a browser shows it: only its own inline script and style run, and it
talks to this server alone."""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from mixdpo.config import InputError

FILE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Page:
    """The bytes of a page and its Content-Security-Policy."""

    body: bytes
    policy: str


def read_page(path: Path = FILE) -> Page:
    """Reads a page. Raises: InputError if it has carriage returns, OSError."""
    body = path.read_bytes()
    if b"\r" in body:                                                       # a browser reads, and hashes, line feeds
        raise InputError("has carriage returns; save it with line feeds only", file=path)
    return Page(body, policy_of(body.decode("utf-8")))


def policy_of(text: str) -> str:
    """The policy for the inline scripts and styles of a page: the sha256 of each."""
    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}\s*>", text, re.DOTALL | re.IGNORECASE)
        sums = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{each}'" for each in sums) or "'none'"

    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
