"""Base cards as they come: any front matter, any language, and nothing in them that could act on the card that takes them in."""

import re
import time
from html.parser import HTMLParser

import pytest
from huggingface_hub import RepoCard
from markdown_it import MarkdownIt

from quantkit.publish.base_card import Body, front_matter, parse, passed_on


def card(front: str, body: str = "# Words\n") -> str:
    return f"---\n{front}\n---\n{body}"


# --- Front matter -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "front, key, value",
    [
        ("language: no", "language", ["no"]),  # Norwegian, which YAML 1.1 takes for false
        ("language: [en, no, zh]", "language", ["en", "no", "zh"]),
        ("language:\n- en\n- fr", "language", ["en", "fr"]),
        ("license: 'apache-2.0' # ours", "license", "apache-2.0"),
        ("license_link: >-\n  https://a.example/\n", "license_link", "https://a.example/"),
        ("tags: {a: 1}", "tags", None),
        ("tags: [a, 2, b]", "tags", ["a", "b"]),
        ("extra_gated_prompt: |\n  One.\n  Two.\n", "extra_gated_prompt", "One.\nTwo.\n"),
        ("extra_gated_fields: {Name: text, When: 2026-01-31}", "extra_gated_fields", {"Name": "text", "When": "2026-01-31"}),
        ("common: &c [x, y]\ntags: *c", "tags", ["x", "y"]),
        ("gated: true", "gated", True),
        ("license: [mit]", "license", None),
        ("library_name: peft", "library_name", None),
        ("model-index: [{name: x}]", "model-index", None),
    ],
)
def test_what_passes_on(front, key, value):
    assert passed_on(parse(card(front)).meta).get(key) == value


@pytest.mark.parametrize(
    "front, says",
    [
        ("a: [1", "not YAML"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("- just\n- a list", "keys and values"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("a: !!python/name:os.system", "not YAML"),
        ("a: &a [*a]", "holds itself"),
        ("a: " + "[" * 3000, "not YAML"),
        ("words: To use it you are asked\nto agree: first\n: x", "not YAML"),
        ("prompt: a line that goes on\nwithout an indent", "not YAML"),
    ],
)
def test_front_matter_that_cannot_be_read_is_one_line_and_the_body_stays(front, says):
    found = parse(card(front))
    assert says in found.problem
    assert "\n" not in found.problem
    assert (found.meta, found.body) == ({}, "# Words")


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_that_explode_are_refused_before_they_do(merged):
    lines = ["a0: &a0 {k: v}" if merged else "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 30):
        inner = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{inner}]}}" if merged else f"[{inner}]"))
    began = time.process_time()
    assert "10,000" in parse(card("\n".join(lines))).problem
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "text, body",
    [
        ("", ""),
        ("# Just a body", "# Just a body"),
        ("---\n---\nbody", "body"),
        ("---\nlicense: mit\n---", ""),
        ("\ufeff---\r\nlicense: mit\r\n---\r\nbody\r\n", "body"),
        ("---\nno end of it", "---\nno end of it"),
        ("模型介绍\n\n---\n\n许可证", "模型介绍\n\n---\n\n许可证"),
    ],
)
def test_cards_with_and_without_front_matter_or_body(text, body):
    found = parse(text)
    assert (found.body, found.problem) == (body, "")


def test_front_matter_is_dumped_as_data():
    meta = {
        "license": "mit\n---\nlicense: evil",
        "tags": ["a: b", "{{ 7 * 7 }}", "no", "# c", "- d", "---", "é 中"],
        "extra_gated_prompt": "one\n---\n\n# Title\r\n---\r\n<script>x</script>",
    }
    text = front_matter(meta) + "\n# Body\n"
    read = RepoCard(text, ignore_metadata_errors=False)
    assert read.data.to_dict() == meta
    assert read.text.strip() == "# Body"


# --- Body -------------------------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags and attributes as a browser would find them, code and preformatted text included as text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def seen(markdown: str) -> Seen:
    return Seen(MarkdownIt("commonmark", {"html": True}).enable("table").render(Body("o/n").render(markdown)))


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        "text <script src=//x.example></script>",
        "<SCRIPT\n>alert(1)</SCRIPT>",
        "<scr<script>ipt>alert(1)</script>",
        "`code` <script>x</script> `",
        "` <script>x</script>",
        "\\` <script>x</script> `",
        "\\\\`<b>`<script>x</script>`</b>",
        "| a `| <script>x</script> | b` |\n|---|---|---|\n| ` | <script>x</script> | ` |",
        "<div>\n```\n<script>x</script>\n```\n</div>",
        "- ```\n  code\n\n<script>x</script>\n\n  ```",
        "> ```\n<script>x</script>",
        "<!-- --><script>x</script><!-- -->",
        "<!-->\n<script>x</script>\n-->",
        "<a title=\"`\"><script>x</script>`",
        "<img src=x onerror=alert(1)>",
        '<img src="x" ONLOAD = "alert(1)">',
        "<svg/onload=alert(1)>",
        "<iframe src=https://x.example></iframe><object data=x></object><embed src=x><form action=x><input></form>",
        "<style>body{display:none}</style><link rel=stylesheet href=x><base href=x><meta http-equiv=refresh content=0>",
        "<math><mtext><style><img title=\"</style><img src=x onerror=alert(1)>\">",
        "[x](javascript:alert(1))",
        "[x](java&#115;cript:alert(1))",
        "[x]( <javascript:alert(1)>)",
        "[x](JaVaScRiPt:alert(1))",
        "[x][y]\n\n[y]: javascript:alert(1)",
        "![x](data:text/html;base64,PHNjcmlwdD4=)",
        '<a href=" java\tscript:alert(1)">x</a>',
        '<a href="data:text/html,x">x</a>',
        '<p style="position:fixed;background:url(https://x.example)">x</p>',
        "<textarea><script>x</script></textarea>",
        "<plaintext><xmp><noscript><title>",
    ],
)  # fmt: skip
def test_nothing_of_a_body_acts(evil):
    found = seen(evil)
    allowed = set(re.findall(r"\w+", "p div a b code pre table thead tbody tr th td ul li blockquote img em br hr"))
    assert set(found.tags) <= allowed, found.tags
    for name, value in found.attributes:
        assert not name.startswith("on"), (name, value)
        assert name not in ("href", "src") or value.startswith(("https://", "http://", "#", "mailto:")) or value == "", (name, value)
        assert "position" not in value
        assert "url(" not in value


def test_code_is_shown_as_it_is():
    markdown = "Use `<start_of_turn>` so:\n\n```html\n<script>let a = `x`;</script>\n```\n\n    <iframe>\n\nand ``a ` <b>``.\n"
    assert Body("o/n").render(markdown) == markdown


def test_words_in_brackets_are_words():
    assert Body().render("a <image_soft_token> and 3 < 4 <= 5") == "a &lt;image_soft_token> and 3 < 4 <= 5"


def test_harmless_html_stays():
    markdown = '<div align="center">\n<img src="https://a.example/b.png" width="40%" alt="a">\n</div>\n\n<details><summary>More</summary>'
    assert Body("o/n").render(markdown) == markdown


@pytest.mark.parametrize(
    "markdown, leads",
    [
        ("![b](img/b.png)", "https://huggingface.co/o/n/resolve/main/img/b.png"),
        ("![b](./img/b.png)", "https://huggingface.co/o/n/resolve/main/img/b.png"),
        ('![b](b.png "title")', "https://huggingface.co/o/n/resolve/main/b.png"),
        ("[![b](https://a.example/b.svg)](LICENSE)", "https://huggingface.co/o/n/blob/main/LICENSE"),
        ("[x](docs/a.md#part)", "https://huggingface.co/o/n/blob/main/docs/a.md#part"),
        ("[x](/datasets/a/b)", "https://huggingface.co/datasets/a/b"),
        ("[x](#usage)", "#usage"),
        ("[x](mailto:a@b.example)", "mailto:a@b.example"),
        ("[x][r]\n\n[r]: docs/x.md", "https://huggingface.co/o/n/blob/main/docs/x.md"),
        ("![x][r]\n\n[r]: x.webp", "https://huggingface.co/o/n/resolve/main/x.webp"),
        ("<img src=img/x.png>", "https://huggingface.co/o/n/resolve/main/img/x.png"),
        ("<a href='x.pdf'>x</a>", "https://huggingface.co/o/n/blob/main/x.pdf"),
        ("[x](../../other)", "https://huggingface.co/o/n"),
    ],
)
def test_links_lead_where_they_led(markdown, leads):
    assert leads in [value for name, value in seen(markdown).attributes if name in ("href", "src")]


def test_links_without_a_home_are_left_and_counted():
    body = Body()
    assert body.render("![b](b.png) [x](y.md) [z](https://a.example)") == "![b](b.png) [x](y.md) [z](https://a.example)"
    assert body.left == 2


@pytest.mark.parametrize("part", ["`" * 3, "<", "<!--", "<a ", "[", "](", "|", "> ", "- ", "``x` "])
def test_a_long_body_takes_no_time(part):
    began = time.process_time()
    Body("o/n").render(part * 3000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "definition",
    ["[y]:\njavascript:alert(1)", "> [y]: javascript:alert(1)", "> [y]:\n> javascript:alert(1)",
     "- [y]: javascript:alert(1)", "[y\\]]: javascript:alert(1)"],
)  # fmt: skip
def test_definitions_lead_nowhere_wherever_they_stand(definition):
    label = "y\\]" if "y\\]" in definition else "y"
    reader = MarkdownIt("commonmark")
    reader.validateLink = lambda address: True  # type: ignore[method-assign]
    page = reader.render(Body("a/b").render(f"{definition}\n\n[x][{label}]"))
    assert "javascript" not in page
    assert "https://huggingface.co/a/b/blob/main/x.md" in Body("a/b").render(definition.replace("javascript:alert(1)", "x.md"))
