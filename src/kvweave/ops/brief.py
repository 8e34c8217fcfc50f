"""How a value that is refused looks in the one line that refuses it."""

from typing import Any


def brief(value: Any, longest: int = 60) -> str:
    """`repr(value)` in one line of at most `longest` characters; its type where it has no repr."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of thousands of digits, a list nested too deeply, somebody's own class
        return f"<{type(value).__name__}>"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
