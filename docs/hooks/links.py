"""Links of the documentation that lead out of docs/: to the repository, if what they name is there."""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.links")
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    root = Path(config.config_file_path).parent

    def in_repository(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        target = root / path
        if not target.exists():
            log.warning("%s links to %s, which is not there", page.file.src_path, path)
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{path}{anchor})"

    return OUTSIDE.sub(in_repository, markdown)
