"""The base model's card: front matter that any YAML may hold, and a body whose text goes on below ours.

Nothing in it is trusted. Front matter is read as plain data, and only fields that we know pass on, dumped anew; of the body's HTML only
harmless tags and attributes pass, addresses only where they lead to http, https or mail. What a reader is shown as code stays as it is.
"""

import html
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import yaml
from markdown_it import MarkdownIt

from quantkit.types import Json

LONGEST = 1 << 19  # characters of a card; what comes behind is left out
NODES = 10_000  # of front matter, aliases written out
_FENCED = re.compile(r"\A\s*---[ \t]*\n(?P<yaml>(?:.*?\n)?)---[ \t]*(?:\n|\Z)", re.DOTALL)
HUB = "https://huggingface.co"

_WORD = re.compile(r"\w+")
TAGS = frozenset(
    _WORD.findall(
        "a abbr audio b blockquote br center cite code col colgroup dd del details dfn div dl dt em figcaption figure "
        "font h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p picture pre q s samp small source span strong sub summary "
        "sup table tbody td tfoot th thead tr tt u ul var video wbr"
    )
)
ATTRIBUTES = frozenset(
    _WORD.findall(
        "align alt border cellpadding cellspacing class color colspan controls dir height href id lang name open poster rel rowspan size "
        "src start style target title type valign width"
    )
)
_STYLE = re.compile(r"[\w\s:;.,#%-]*")
_UNWANTED_STYLE = re.compile(r"position|expression|behavior|binding|url", re.IGNORECASE)
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]*)((?:\s+[^\s\"'<>/=]+(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'=<>`]+))?)*)\s*(/?)>")
_ATTRIBUTE = re.compile(r"([^\s\"'<>/=]+)(?:\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s\"'=<>`]+))?")
_AUTOLINK = re.compile(r"<((?:https?://|mailto:)[^\s<>]*|[\w.!#$%&'*+/=?^`{|}~-]+@[\w.-]+)>")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"((?:!\[[^\[\]]*)?\]\(\s*<?)([^)\s>]+)")  # a picture from its mark on, of a link the end
# in quotes and lists too, and its address may stand on the next line
_DEFINITION = re.compile(r"^([ \t>*+\d.)-]{0,64}\[(?:\\.|[^\[\]\\]){1,999}\]:[\s>]*<?)([^\s>]+)", re.MULTILINE)
_PICTURE = re.compile(r"\.(png|jpe?g|gif|svg|webp|mp4|webm)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BaseCard:
    """What a README.md says, apart."""

    meta: Json = field(default_factory=dict)
    body: str = ""
    problem: str = ""  # why its front matter was left out, in one line


def parse(text: str) -> BaseCard:
    """A card's front matter and body. Front matter that cannot be read is left out, and `problem` says why."""
    text = text[:LONGEST].lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    match = _FENCED.match(text)
    if match is None:
        return BaseCard(body=text.strip())
    body = text[match.end() :].strip()
    try:
        return BaseCard(_mapping(match["yaml"]), body)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        said = "nested too deeply" if isinstance(problem, RecursionError) else " ".join(str(problem).split())[:160]
        return BaseCard(body=body, problem=f"its front matter is not YAML that can be read ({said})")


class _CardLoader(yaml.SafeLoader):
    """Safe YAML, in which `no` is Norwegian and 2026-01-31 a word, as the Hub reads it (YAML 1.2), and keys do not stand twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's way)
        first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
        doubled = {key for key in keys if keys.count(key) > 1}
        if doubled:
            raise yaml.YAMLError(f"the key {sorted(doubled)[0]!r} stands twice")
        return super().construct_mapping(node, deep)


_CardLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _mapping(text: str) -> Json:
    loader = _CardLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if _written_out(node, {}) > NODES:  # before anything is built of it: merge keys would write aliases out
            raise yaml.YAMLError("aliases that stand for more than 10,000 values")
        value = loader.construct_document(node)
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise yaml.YAMLError("keys and values are expected")
    return {str(key): _plain(inner) for key, inner in value.items()}


def _written_out(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes below this one, with every alias written out; one that holds itself never ends."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise yaml.YAMLError("an alias that holds itself")
        return count
    known[id(node)] = None
    inner: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    count = 1 + sum(_written_out(part, known) for part in inner)
    known[id(node)] = count
    return count


def _plain(value: Any) -> Any:
    """As JSON knows it: YAML's dates as they are written, its sets as lists, its binary left out."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, (str, int, float)) or value is None else None


# --- Front matter --------------------------------------------------------------------------------------------------------------------


def passed_on(meta: Json) -> Json:
    """The fields of a base card that hold for its quantization too: licence, languages, tags, gated access. Others are its own."""
    kept: Json = {}
    for key, value in meta.items():
        gated = key.startswith("extra_gated_") or key == "gated"
        if key in ("license", "license_name", "license_link") and isinstance(value, str) and value.strip():
            kept[key] = value.strip()
        elif key in ("language", "tags", "datasets") and (names := _names(value)):
            kept[key] = names
        elif gated and isinstance(value, (str, bool, dict, list)):
            kept[key] = value
    return kept


def _names(value: Any) -> list[str]:
    """A name or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [one.strip() for one in values if isinstance(one, str) and one.strip() and "\n" not in one]


class _CardDumper(yaml.SafeDumper):
    """Texts of several lines go in double quotes on one, so that no line of theirs can look like ours."""


def _text(dumper: Any, value: str) -> yaml.Node:
    style = '"' if "\n" in value or "\r" in value else None
    node: yaml.Node = dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)
    return node


_CardDumper.add_representer(str, _text)
_CardDumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign,assignment]


def front_matter(meta: Json) -> str:
    """YAML between its fences; its values are what `meta` holds, whatever stands in them."""
    return f"---\n{yaml.dump(meta, Dumper=_CardDumper, allow_unicode=True, sort_keys=False, width=1 << 20)}---\n"


# --- Body ----------------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Body:
    """A card's body, made fit to stand below another: harmless, and with links that lead where they led."""

    home: str = ""  # the base model's id, where relative links lead; "" = not known
    left: int = 0  # relative links that stayed as they are

    def render(self, text: str) -> str:
        """The body's Markdown. Code blocks pass untouched; a line that is none is rewritten, so that what is no code cannot pass for it."""
        lines = text.split("\n")
        parts = []
        for start, end, kind in _regions(text, len(lines)):
            part = "\n".join(lines[start:end])
            if kind == "table":  # cells are apart before any code in them is
                part = "".join(cell if cell == "|" else self._inline(cell, True) for cell in re.split(r"((?<!\\)\|)", part))
            elif kind != "code":
                part = self._inline(part, kind == "text")
            parts.append(part)
        return "\n".join(parts)

    def _inline(self, text: str, code: bool) -> str:
        """Text and HTML in the order in which Markdown finds them: an escape, a code span, a tag, whichever comes first."""
        done: list[str] = []
        plain: list[str] = []
        at, last_comment = 0, text.rfind("-->")

        def flush() -> None:
            done.append(self._addresses("".join(plain)))
            plain.clear()

        while at < len(text):
            char = text[at]
            if char == "\\" and code and text[at + 1 : at + 2] not in ("", "<"):
                plain.append(text[at : at + 2])
                at += 2
            elif char == "`" and code:
                ticks = _ticks(text, at)
                close = re.compile(r"(?<!`)" + "`" * ticks + r"(?!`)").search(text, at + ticks)
                end = close.end() if close else at + ticks
                flush()
                done.append(text[at:end])
                at = end
            elif char == "<":
                if at < last_comment and (match := _COMMENT.match(text, at)):
                    at = match.end()
                elif match := _AUTOLINK.match(text, at):
                    plain.append(match[0])
                    at = match.end()
                elif (match := _TAG.match(text, at)) and match[2].lower() in TAGS:
                    flush()
                    done.append(self._tag(match))
                    at = match.end()
                else:  # a word in brackets, or what could become a tag with what follows
                    plain.append("&lt;" if re.match(r"<[A-Za-z/!?]", text[at : at + 2]) else "<")
                    at += 1
            else:
                plain.append(char)
                at += 1
        flush()
        return "".join(done)

    def _tag(self, match: re.Match[str]) -> str:
        close, name, told, empty = match.groups()
        kept = []
        for attribute in _ATTRIBUTE.finditer(told):
            key, value = attribute[1].lower(), (attribute[2] or "").strip("\"'")
            if key not in ATTRIBUTES or (key == "style" and not _harmless(value)):
                continue
            if key in ("href", "src", "poster"):
                value = self._address(value, picture=key != "href")
            kept.append(f' {key}="{value.replace(chr(34), "&quot;")}"' if attribute[2] is not None else f" {key}")
        return f"<{close}{name.lower()}{''.join(kept)}{' /' if empty else ''}>"

    def _addresses(self, text: str) -> str:
        text = _LINK.sub(lambda m: m[1] + self._address(m[2], picture=m[1].startswith("!")), text)
        return _DEFINITION.sub(lambda m: m[1] + self._address(m[2], picture=bool(_PICTURE.search(m[2]))), text)

    def _address(self, address: str, picture: bool) -> str:
        """Where a link or a picture of the base card leads, from anywhere; "#" for what no card needs (javascript:, data: pages)."""
        seen = re.sub(r"[\s\x00-\x20]", "", html.unescape(address))
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", seen)
        if scheme is not None:
            allowed = scheme[1].lower() in ("http", "https", "mailto") or (
                picture and re.match(r"data:image/(png|jpeg|gif|webp)[;,]", seen)
            )
            return address if allowed else "#"
        if not seen or seen.startswith(("#", "//")):
            return address
        if seen.startswith("/"):
            return HUB + seen
        if not self.home:
            self.left += 1
            return address
        path, mark, fragment = seen.partition("#")
        path = posixpath.normpath(path)
        if path.startswith(".."):
            return f"{HUB}/{self.home}"
        return f"{HUB}/{self.home}/{'resolve' if picture else 'blob'}/main/{path}{mark}{fragment}"


def _ticks(text: str, at: int) -> int:
    end = at
    while end < len(text) and text[end] == "`":
        end += 1
    return end - at


def _harmless(style: str) -> bool:
    return _STYLE.fullmatch(style) is not None and not _UNWANTED_STYLE.search(style)


def _regions(text: str, count: int) -> Iterator[tuple[int, int, str]]:
    """The body's lines in order, as Markdown reads them: "code", "text" (code spans count), "table", "html" (nothing is code)."""
    kinds = [("html", -1)] * count  # what no token covers: blank lines, definitions
    table = 0
    for number, token in enumerate(MarkdownIt("commonmark").enable("table").parse(text)):
        if token.type in ("table_open", "table_close"):
            table += 1 if token.type == "table_open" else -1
        kind = {"fence": "code", "code_block": "code", "html_block": "html", "inline": "table" if table else "text"}.get(token.type)
        if kind and token.map:
            for line in range(token.map[0], min(token.map[1], count)):
                kinds[line] = (kind, line if kind == "table" else number)
    start = 0
    for line in range(1, count + 1):
        if line == count or kinds[line] != kinds[start]:
            yield start, line, kinds[start][0]
            start = line
