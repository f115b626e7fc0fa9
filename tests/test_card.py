"""The card: every figure the run's or the files' own, the base card's words below, and nothing that anybody wrote acts on it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cards
import published
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import RepoCard
from markdown_it import MarkdownIt

from quantkit.cli import main
from quantkit.errors import PublishError
from quantkit.publish.artefact import open_artefact
from quantkit.publish.card import plain, stated, write_card
from quantkit.release import verify


def card(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["card", *map(str, arguments)])


def written(folder: Path) -> str:
    return (folder / "README.md").read_text()


def made(folder: Path, **changes: Any) -> str:
    """The card of a report with other words in it."""
    about = {**published.report(), **changes}
    write_card(folder, about, "compressed-tensors")
    return written(folder)


def meta_of(text: str) -> dict[str, Any]:
    return dict(RepoCard(text, ignore_metadata_errors=False).data.to_dict())


def rows_of(text: str) -> dict[str, str]:
    """The header table."""
    return dict(re.findall(r"<b>([^<]+)</b></td>\s*<td[^>]*>(.*?)</td>", text))


@pytest.fixture
def folder(tmp_path) -> Path:
    return published.run(tmp_path) / "compressed-tensors"


# --- What stands on it ------------------------------------------------------------------------------------------------------------


def test_the_front_matter(folder):
    assert card(folder, "--base-model", "someone/tiny-moe").exit_code == 0
    assert meta_of(written(folder)) == {
        "language": ["en", "no"],
        "license": "apache-2.0",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "someone/tiny-moe",
        "base_model_relation": "quantized",
        "tags": ["quantkit", "compressed-tensors", "awq", "4-bit", "tiny", "test"],
        "extra_gated_prompt": "You agree to nothing.",
    }
    assert meta_of(written(folder.parent / "gguf"))["library_name"] == "gguf"
    assert meta_of(written(folder.parent / "gguf"))["pipeline_tag"] == "text-generation", "the file holds no tower"


def test_the_header_table(folder):
    assert card(folder, "--contact", "me@a.example", "--calibration-link", "https://a.example/set").exit_code == 0
    run, rows = published.report(), rows_of(written(folder))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert list(rows) == ["Version", "Calibration", "Languages", "Model Size", "Bits per weight", "Contact", "Format"]
    assert rows["Version"] == run["date"][2:].replace("-", ".")
    assert re.fullmatch(r"\d\d\.\d\d\.\d\d", rows["Version"])
    assert rows["Calibration"] == '<a href="https://a.example/set">STEM and Agentic</a>'
    languages = run["calibration"]["by_language_and_domain"]
    assert len(languages) == 10
    assert rows["Languages"] == " ".join(f"<code>{name.upper()}</code>" for name in languages)
    assert rows["Model Size"] == f"{size / 1e6:.2f} MB"
    assert rows["Bits per weight"] == f"{size * 8 / run['parameters']:.3f}"
    assert rows["Contact"] == '<a href="mailto:me@a.example">Email</a>'
    assert rows["Format"] == "compressed-tensors, 4 bits, symmetric, groups of 32"
    assert stated(written(folder)) == (rows["Model Size"], rows["Bits per weight"])


def test_the_figures_are_the_run_s(folder):
    run, text = published.report(), written(folder)
    held = run["heldout"]
    assert f"| all | {held['kl']:.5f} | {held['same_top']:.4f} | {held['perplexity_base']:.4f} | {held['perplexity']:.4f} |" in text
    for name, row in held["by_language"].items():
        assert f"| {name} | {row['kl']:.5f} |" in text
    for language, row in run["calibration"]["by_language_and_domain"].items():
        assert f"| {language} | {row.get('agentic', 0):,} | {row.get('stem', 0):,} | {sum(row.values()):,} |" in text
    assert f"{run['summary']['mean_error']:.3e}; plain rounding {run['summary']['mean_error_rounded']:.3e}" in text
    assert f"the least fed saw {run['summary']['fewest_expert_tokens']:,} tokens" in text
    assert run["calibration"]["digest"] in text
    manifest = json.loads((folder / "quantkit.json").read_text())
    for path in folder.glob("*.safetensors"):
        assert f"| `{path.name}` | {path.stat().st_size:,} | `{manifest['files'][path.name]['sha256']}` |" in text
    assert f"seed {run['recipe']['calibration']['seed']}; {run['date']}." in text
    assert "| experts | 4 bits in groups of 32, signed scales |" in text
    assert "The files themselves were not evaluated in an engine" in text


def test_the_parts_add_up_to_the_tensors(folder):
    told = [int(n.replace(",", "")) for n in re.findall(r"^\| [\w ]+ \| [^|]+ \| ([\d,]+) \| [^|]*\|$", written(folder), re.MULTILINE)]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.85 * size < sum(told) < size, "all but the files' headers"


def test_the_base_card_goes_on_below_with_links_that_lead(folder):
    assert card(folder, "--base-model", "someone/tiny-moe").stderr == ""
    ours, _, theirs = written(folder).partition("\n---\n\nFrom here on the card of the base model")
    assert "# A tiny base" in theirs
    assert "![banner](https://huggingface.co/someone/tiny-moe/resolve/main/img/banner.png)" in theirs
    assert "[its paper](https://huggingface.co/someone/tiny-moe/blob/main/docs/paper.md)" in theirs
    assert "tiny base" not in ours


def test_links_that_lead_nowhere_are_told(folder):
    result = card(folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder / 'README.md'}\n")
    assert result.stderr == "quantkit: card of the base model: 2 relative links lead nowhere; give its Hub id (--base-model)\n"


def test_a_new_card_is_still_verified(folder):
    before = json.loads((folder / "quantkit.json").read_text())
    assert card(folder.parent, "--contact", "https://a.example/me").exit_code == 0
    assert all(found.good for _, found in verify(folder.parent))
    after = json.loads((folder / "quantkit.json").read_text())
    assert {k for k in before["files"] if before["files"][k] != after["files"][k]} == {"README.md"}
    (folder / "config.json").write_text("{}")
    assert card(folder).exit_code == 0
    ((_, found),) = verify(folder)
    assert any("config.json: 2 bytes" in one.text for one in found.findings), "a new card makes no damage good"


def test_the_repository_s_name_on_the_commands(folder):
    assert card(folder, "--repo-id", "someone/tiny-awq").exit_code == 0
    assert "vllm serve someone/tiny-awq\n" in written(folder)
    assert "\n# tiny-awq\n" in written(folder)


def test_an_evaluation_is_told(folder):
    published.evaluate(folder)
    assert card(folder).exit_code == 0
    text = written(folder)
    assert "These files in transformers 5.23.0 beside the original in transformers, suite quick: 9 documents, 1,234 tokens" in text
    assert "| en | 0.01200 | 0.01100 to 0.01300 | 0.2000 | 0.9500 | 30.5000 | 30.7500 |" in text
    assert "| fr | 0.02000 | not known | 0.4000 |" in text
    assert "| choice | 40 | 50.00% | 47.50% | 2 | 1 | 0.87 |" in text
    assert "Gate: **PASS (gate default)**." in text
    assert "not evaluated in an engine" not in text


def test_an_evaluation_of_other_files_is_not(folder):
    published.evaluate(folder, digests={"artefact": "0" * 40})
    published.evaluate(folder.parent / "gguf", name="eval-gguf.json")
    assert card(folder.parent).exit_code == 0
    assert "not evaluated in an engine" in written(folder)
    assert "suite quick" in written(folder.parent / "gguf")


@pytest.mark.parametrize("weights", [None, {}, {"model.safetensors": "sha256:0"}])
def test_an_evaluation_beside_another_model_is_none_beside_the_original(weights, folder):
    """Beside itself any artefact is perfect."""
    published.evaluate(folder, digests={"artefact": open_artefact(folder).digest, "weights": weights})
    assert card(folder).exit_code == 0
    assert "not evaluated in an engine" in written(folder)
    assert "Gate:" not in written(folder)


# --- Base cards as they come ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, problem, contains",
    [
        ("# 模型\n\n许可证: Apache 2.0", "", "许可证: Apache 2.0"),
        ("---\nlanguage: zh\nlicense: mit\n---\n", "", "license: mit"),
        ("---\nbroken: [\n---\n# Words", "front matter is not YAML", "# Words"),
        ("", "", "How it was made"),
    ],
    ids=["Chinese, no front matter", "no body", "broken", "empty"],
)
def test_any_base_card(base, problem, contains, folder, tmp_path):
    path = tmp_path / "base.md"
    path.write_text(base)
    result = card(folder, "--base-card", path)
    assert result.exit_code == 0
    assert contains in written(folder)
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == bool(problem)
    assert meta_of(written(folder))["library_name"] == "transformers"


def test_an_adapter_s_card_is_taken_in_too(folder):
    lora = "---\nbase_model: someone/tiny-moe\nlibrary_name: peft\ntags: [lora]\nlicense: mit\n---\n# My LoRA\n"
    text = made(folder, adapter_card=lora, adapter={"rank": 4})
    meta = meta_of(text)
    assert (meta["base_model"], meta["library_name"], meta["license"]) == ("someone/tiny-moe", "transformers", "apache-2.0")
    assert meta["tags"][-3:] == ["tiny", "test", "lora"]
    assert text.index("# A tiny base") < text.index("card of the adapter") < text.index("# My LoRA")
    assert "A LoRA adapter was merged" in text


@pytest.mark.parametrize("kind", cards.MET)
def test_base_cards_as_they_are_met(kind, folder, tmp_path):
    base = cards.MET[kind]
    (tmp_path / "base.md").write_text(base)
    result = card(folder, "--base-card", tmp_path / "base.md", "--base-model", "river/heron-9b-it")
    assert result.exit_code == 0, result.stderr
    assert ("front matter is not YAML" in result.stderr) == (base is cards.UNINDENTED)
    text = written(folder)
    meta = meta_of(text)
    assert (meta["base_model"], meta["base_model_relation"]) == ("river/heron-9b-it", "quantized"), "ours, whatever the base card says"
    assert meta.get("license") == ("apache-2.0" if base is cards.QUANTIZED else None), "what cannot be read is not guessed"
    body = RepoCard(text, ignore_metadata_errors=False).text
    words = [line.strip() for line in base.splitlines() if line.strip()]
    assert words[-1] in body, "down to its last line"
    tags = _Tags(body).found
    assert "script" not in {tag for tag, _ in tags}
    assert all((attrs.get(key) or "https:").startswith(("https:", "mailto:", "#")) for _, attrs in tags for key in ("href", "src"))
    if base is cards.QUANTIZED:
        assert ("img", "https://river.example/heron/banner.png") in [(tag, attrs.get("src")) for tag, attrs in tags]
        assert 'prompt = "{{ bird }} <bos> {% if wet %}" + "<script>"' in body, "code stays as it is"
    for token in ("<channel|>", "<image_soft_token>"):
        if token in base:
            assert token in MarkdownIt("commonmark", {"html": True}).render(body).replace("&lt;", "<").replace("&gt;", ">")


# --- Nothing acts -----------------------------------------------------------------------------------------------------------------

EVIL = "x`|\n---\nlicense: evil\n---\n<script>alert(1)</script>[a](javascript:1){{ 7*7 }}{% raw %}"


class _Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("where", ["model", "description", "language", "source", "front matter", "body", "fallback"])
def test_what_others_wrote_stays_words(where, folder):
    run = published.report()
    changes: dict[str, Any] = {
        "model": {"model": EVIL},
        "description": {"recipe": {**run["recipe"], "description": EVIL}},
        "language": {"calibration": {**run["calibration"], "by_language_and_domain": {EVIL: {EVIL: 3}}}},
        "source": {"calibration": {**run["calibration"], "by_source": {EVIL: 3}}},
        "fallback": {"calibration": {**run["calibration"], "fallbacks": {EVIL: ["a"]}}},
        "front matter": {"base_card": f"---\n{json.dumps({'tags': [EVIL, 'ok'], 'license': EVIL, 'extra_gated_prompt': EVIL})}\n---\nx"},
        "body": {"base_card": EVIL},
    }[where]
    text = made(folder, **changes)
    meta = meta_of(text)
    assert meta.get("license") in ("apache-2.0", None, EVIL.strip())
    assert "license: evil" not in text.partition("\n---\n")[0].splitlines()
    body = RepoCard(text, ignore_metadata_errors=False).text
    tags = _Tags(body).found
    assert "script" not in {tag for tag, _ in tags}
    assert not any("javascript:" in str(value) for _, attributes in tags for value in attributes.values())
    assert "49" not in re.findall(r"\{\{.*?\}\}|\b49\b", body), "no template code was run"


def test_plain_leaves_nothing_of_markdown():
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(f"a {plain('*b* _c_ `d` [e](f) <g> | h')} i")
    assert page == "<p>a *b* _c_ `d` [e](f) &lt;g&gt; | h i</p>\n"
    assert plain("self_attn.q_proj") == "self_attn.q_proj"


# --- Templates --------------------------------------------------------------------------------------------------------------------


def test_another_template(folder, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ front_matter }}\n{% for name, value in header %}{{ name }}: {{ value }}\n{% endfor %}")
    assert card(folder, "--template", template).exit_code == 0
    assert "Model Size: " in written(folder)


@pytest.mark.parametrize("text", ["{{ nothing_of_that_name }}", "{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", None])
def test_a_template_that_cannot_be_used_is_one_line(text, folder, tmp_path):
    template = tmp_path / "mine.jinja"
    if text is not None:
        template.write_text(text)
    before = written(folder)
    result = card(folder, "--template", template)
    assert (result.exit_code, len(result.stderr.splitlines()), result.stdout) == (1, 1, "")
    assert written(folder) == before


def test_a_folder_without_its_run(folder, tmp_path):
    alone = folder.rename(tmp_path / "alone")
    result = card(alone)
    assert result.exit_code == 1
    assert "keep the two together" in result.stderr
    with pytest.raises(PublishError, match="Model Size"):
        stated("# no card of ours")
