"""The chat page at `/`: one file that loads nothing, sent with rules by which nothing runs but its own script."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse, Response

HTML = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# `require-trusted-types-for` makes a browser refuse to parse any text as HTML, whatever the script does.
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash('script')}",
        f"style-src {_hash('style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page() -> Response:
    """The page as a response."""
    return HTMLResponse(HTML, headers=HEADERS)
