"""The report as a page: its pictures are drawn, it needs nothing else, and a browser shows them."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import published
import pytest
from click.testing import CliRunner

from quantkit.cli import main
from quantkit.publish.parts import part_of

pytest.importorskip("matplotlib", reason="a report's pictures are drawn by matplotlib (the extra `report`)")
ALL = {"errors", "experts", "languages", "scales", "divergence", "sizes", "phases"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = published.run(tmp_path_factory.mktemp("page"))
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{folder / 'report.html'}\n"
    return folder


class Page(HTMLParser):
    """Pictures, addresses and tables of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.addresses += [found[name] for name in ("src", "href", "srcset", "action", "data") if name in found]
        if tag == "img":
            self.pictures.append(found)
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def pixels(path: Path) -> tuple[int, int, dict[tuple[int, int, int], int]]:
    """Width, height, and how many pixels have each colour."""
    from PIL import Image  # which matplotlib brings

    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        return *image.size, {colour: count for count, colour in colours}


def test_every_picture_is_on_the_page_and_beside_it(run):
    page = Page((run / "report.html").read_text())
    assert page.open == []
    assert {path.stem for path in (run / "report").iterdir()} == ALL - {"languages"} | (
        {"languages"} if published.report()["coverage"] else set()
    )
    beside = {path.read_bytes() for path in (run / "report").iterdir()}
    inside = {base64.b64decode(picture["src"].partition("base64,")[2]) for picture in page.pictures}
    assert inside == beside
    for picture in page.pictures:
        assert len(picture["alt"]) > 20, "words for who cannot see it"


def test_the_page_needs_nothing_else(run):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_the_pictures_are_drawn_in_colours_that_all_can_tell_apart(run):
    found = {path.stem: pixels(path) for path in (run / "report").iterdir() if path.stem in ("errors", "experts", "sizes")}
    ours, plain = (tuple(bytes.fromhex(colour)) for colour in ("0072B2", "E69F00"))
    width, height, colours = found["errors"]
    assert width > 1000
    assert height > 500
    assert {ours, plain} <= colours.keys()
    assert len(found["experts"][2]) > 20, "a map of many shades"
    assert {ours, plain} <= found["sizes"][2].keys()


def test_the_figures_stand_in_tables(run):
    text, report = (run / "report.html").read_text(), published.report()
    for name, seconds in report["seconds"].items():
        assert f'<td>{name}</td><td class="n">{seconds:.2f}</td>' in text
    for name, row in report["heldout"]["by_language"].items():
        assert f'<td>{name}</td><td class="n">{row["kl"]:.5f}</td>' in text
    sizes = re.search(r'id="sizes".*?</section>', text, re.DOTALL)[0]
    cells = re.findall(r"<tr><td>[\w ]+</td><td class=\"n\">([\d,]+)</td><td class=\"n\">([\d,]+)</td></tr>", sizes)
    for column, format in enumerate(("compressed-tensors", "gguf")):
        assert sum(int(row[column].replace(",", "")) for row in cells) == report["bytes"][format], "parts and headers are the files"


def test_intervals_of_an_evaluation_are_drawn(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    published.evaluate(folder / "compressed-tensors")
    assert CliRunner().invoke(main, ["report", str(folder)]).exit_code == 0
    text = (folder / "report.html").read_text()
    assert "0.01100 to 0.01300" in text
    assert "compressed-tensors in transformers 5.23.0" in text
    assert (folder / "report" / "divergence.png").read_bytes() != (run / "report" / "divergence.png").read_bytes()


def test_names_on_the_page_are_words(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    report = json.loads((folder / "run.json").read_text())
    report["model"] = "<script>alert(1)</script>"
    (folder / "run.json").write_text(json.dumps(report))
    assert CliRunner().invoke(main, ["report", str(folder / "gguf")]).exit_code == 0, "an artefact leads to its run"
    assert "<script" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("what", ["nothing", "no run"])
def test_no_run_is_one_line(what, tmp_path):
    place = tmp_path / "x"
    if what == "no run":
        place.mkdir()
    result = CliRunner().invoke(main, ["report", str(place)])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.language_model.layers.0.experts.3.gate_proj.weight_packed", "experts"),
        ("model.language_model.layers.0.router.proj.weight", "routers"),
        ("model.layers.0.mlp.gate.weight", "routers"),
        ("model.layers.0.mlp.gate_proj.weight_packed", "MLP"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms and scalars"),
        ("model.embed_tokens.weight", "embeddings and head"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight", "towers"),
        ("blk.0.ffn_gate_up_exps.weight", "experts"),
        ("blk.0.ffn_gate_inp.weight", "routers"),
        ("blk.0.attn_q.weight", "attention"),
        ("blk.0.ffn_down.weight", "MLP"),
        ("blk.0.attn_norm.weight", "norms and scalars"),
        ("token_embd.weight", "embeddings and head"),
    ],
)
def test_parts(name, part):
    assert part_of(name) == part


def test_a_browser_shows_the_pictures(run, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser here ({', '.join(BROWSERS)})")
    shot = tmp_path / "page.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}")
    where = ("--window-size=1060,3000", f"--screenshot={shot}", (run / "report.html").as_uri())
    subprocess.run([browser, *flags, *where], check=True, capture_output=True, timeout=120)
    width, height, seen = pixels(shot)
    assert (width, height) == (1060, 3000)
    assert seen[(0x00, 0x72, 0xB2)] > 2000, "our series and the largest part are on the page"
    assert seen[(0xE6, 0x9F, 0x00)] > 200, "plain rounding's too"
    assert seen[(255, 255, 255)] < 0.97 * 1060 * 3000
