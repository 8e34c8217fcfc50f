"""The page at `/` without a browser (tests/browser has one): its parts fit together, nothing else may run in it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import httpx2
import pytest
from serving import Running


class Parts(HTMLParser):
    """Elements of a page, and what is open at its end."""

    VOID = frozenset({"meta", "input", "br", "img", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(scope="module")
def told(running: Running) -> httpx2.Response:
    return httpx2.get(running.url)


@pytest.fixture(scope="module")
def parts(told: httpx2.Response) -> Parts:
    return Parts(told.text)


def test_elements_are_closed_and_named_once(parts: Parts) -> None:
    assert parts.open == []
    names = [attributes["id"] for _, attributes in parts.found if "id" in attributes]
    assert len(names) == len(set(names))


def test_everything_that_is_filled_in_has_a_label(parts: Parts) -> None:
    labels = {attributes["for"] for attributes in parts.of("label")}
    assert {attributes["id"] for attributes in parts.of("input", "textarea", "select")} == labels
    known = {attributes.get("id") for _, attributes in parts.found}
    for _, attributes in parts.found:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference, "saved") in known
    assert parts.of("html")[0]["lang"] == "en"
    assert any("aria-live" in attributes for attributes in parts.of("div"))


def test_the_script_asks_for_elements_that_there_are(told: httpx2.Response, parts: Parts) -> None:
    known = {attributes.get("id") for _, attributes in parts.found}
    assert set(re.findall(r'\$\("(\w+)"\)', told.text)) <= known


def test_nothing_but_its_own_script_runs(told: httpx2.Response, parts: Parts) -> None:
    policy = told.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", told.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for _, attributes in parts.found:
        assert not any(name.startswith("on") or name in ("style", "src", "href") for name in attributes)
    assert "innerHTML" not in told.text  # answers and file names are text


def test_it_fetches_from_its_own_server_alone(told: httpx2.Response) -> None:
    assert set(re.findall(r'fetch\("([^"]+)"', told.text)) == {"v1/models", "v1/chat/completions"}
    assert "http" not in re.sub(r"<script>.*", "", told.text, flags=re.DOTALL).replace("httpx2", "")
