"""Quotas hold, the same recipe gives the same token ids everywhere, and the report says what was fed."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

import quantkit
from quantkit.calibrate.batches import make_batches
from quantkit.calibrate.draw import Row, digest, draw, fill, make_row, manifest, report
from quantkit.calibrate.render import SPEAKERS, load_tokenizer
from quantkit.calibrate.samples import Sample, in_seeds_order
from quantkit.errors import CalibrationError
from quantkit.recipe import Calibration, Mix, MixSource, load_mix, load_recipe, reference_model

PINNED = [7, 6, 4, 8, 3, 2, 9, 11, 10, 1, 5, 0]
WORDS = ["river", "model", "weight", "column", "answer", "number", "apples", "counts", "grid", "block", "round", "scale"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return load_tokenizer(folder)


def write(path: Path, count: int, seed: int = 0, longest: int = 120, **labels: str) -> Path:
    """Conversations of random words, `longest` at most."""
    some = random.Random(seed)
    talk = lambda: " ".join(some.choice(WORDS) for _ in range(some.randint(5, longest)))  # noqa: E731
    lines = [
        {"id": f"{path.stem}-{n}", "messages": [{"role": "user", "content": talk()}, {"role": "assistant", "content": talk()}], **labels}
        for n in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def mix_of(*paths: Path, **fields) -> Mix:
    sources = [path if isinstance(path, MixSource) else MixSource(path=str(path)) for path in paths]
    return Mix(description="x", sources=sources, **fields)


def by_cell(rows: list[Row]) -> Counter:
    counts: Counter = Counter()
    for row in rows:
        counts[row.labels["language"], row.labels["domain"]] += len(row.ids)
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for language in ("en", "zh", "nl"):
        for domain in ("stem", "agentic"):
            write(folder / f"{language}-{domain}.jsonl", 60, hash_of(language + domain), language=language, domain=domain)
    return folder


def hash_of(text: str) -> int:
    return sum(ord(letter) * 7**place for place, letter in enumerate(text))


# --- Quotas -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [3_000, 12_000, 40_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_cell_gets_its_share(budget, seed, folder, tokenizer):
    shares = {"en": 3.0, "zh": 1.0, "nl": 2.0}
    mix = mix_of(folder, languages=shares, domains={"stem": 3, "agentic": 1})
    drawn = draw(mix, Calibration(tokens=budget, seed=seed), tokenizer)
    counts = by_cell(drawn.rows)
    for language, share in shares.items():
        for domain, part in (("stem", 0.75), ("agentic", 0.25)):
            assert counts[language, domain] == pytest.approx(budget * share / 6 * part, rel=0.05)
    assert counts.total() == pytest.approx(budget, rel=0.02)
    assert drawn.limited_by is None
    assert sum(row.cut for row in drawn.rows) <= 6, "at most one sample of a cell is cut"


def test_a_poor_cell_lowers_the_budget_for_all(folder, tokenizer, tmp_path):
    poor = write(tmp_path / "fr.jsonl", 3, language="fr", domain="stem")
    mix = mix_of(folder, poor, languages={"en": 1, "fr": 1}, domains={"stem": 1})
    for asked in (50_000, None):
        drawn = draw(mix, Calibration(tokens=asked), tokenizer)
        counts = by_cell(drawn.rows)
        assert drawn.limited_by == "fr / stem"
        assert counts["en", "stem"] == pytest.approx(counts["fr", "stem"], rel=0.05)
        assert sum(row.labels["language"] == "fr" for row in drawn.rows) == 3, "all that there are"


def test_a_share_that_nothing_fills_is_refused(folder, tokenizer):
    with pytest.raises(CalibrationError, match=r"nothing of ko / stem, which has a share of the mix"):
        draw(mix_of(folder, languages={"en": 1, "ko": 1}, domains={"stem": 1}), Calibration(tokens=500), tokenizer)


def test_without_shares_everything_comes_as_it_is(folder, tokenizer):
    everything = draw(mix_of(folder), Calibration(), tokenizer)
    assert len(everything.rows) == 360
    assert not any(row.cut for row in everything.rows)
    some = draw(mix_of(folder), Calibration(tokens=9000), tokenizer)
    assert sum(len(row.ids) for row in some.rows) == pytest.approx(9000, rel=0.02)
    assert len(by_cell(some.rows)) == 6, "the seed's order mixes them"


def test_weights_divide_a_cell_among_its_sources(tmp_path, tokenizer):
    a, b = (write(tmp_path / f"{name}.jsonl", 100, seed, language="en", domain="stem") for seed, name in enumerate("ab"))
    sources = MixSource(path=str(a), weight=3), MixSource(path=str(b), weight=1)
    drawn = draw(mix_of(*sources, languages={"en": 1}), Calibration(tokens=16_000), tokenizer)
    counts = Counter()
    for row in drawn.rows:
        counts[row.source] += len(row.ids)
    assert counts["a.jsonl"] / counts["b.jsonl"] == pytest.approx(3, rel=0.15)


def test_a_source_that_runs_dry_is_filled_from_the_others(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", 2), write(tmp_path / "b.jsonl", 100, 1)
    drawn = draw(mix_of(a, b), Calibration(tokens=6000), tokenizer)
    assert sum(len(row.ids) for row in drawn.rows) == pytest.approx(6000, rel=0.02)
    assert sum(row.source == "a.jsonl" for row in drawn.rows) == 2


def test_the_same_words_are_fed_once(tmp_path, tokenizer):
    lines = [json.dumps({"text": text, "id": str(n)}) for n, text in enumerate(["one and two", "one and two", "three and four"])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len(draw(mix_of(tmp_path / "a.jsonl"), Calibration(), tokenizer).rows) == 2


@pytest.mark.parametrize("seed", range(20))
def test_filling_takes_whole_samples_while_they_fit(seed):
    some = random.Random(seed)
    lengths = [some.randint(2, 900) for _ in range(200)]
    quota = some.randint(100, sum(lengths))
    taken = fill(lengths, quota)
    assert sum(tokens for _, tokens in taken) == pytest.approx(quota, rel=0.02)
    assert sum(tokens < lengths[index] for index, tokens in taken) <= 1
    assert len({index for index, _ in taken}) == len(taken)


def test_filling_with_all_that_there_is():
    assert fill([5, 6, 7], 18) == [(0, 5), (1, 6), (2, 7)]
    assert fill([], 10) == []
    assert fill([500], 100) == [(0, 100)]


# --- The shipped mixes ------------------------------------------------------------------------------------------------------------


def test_the_default_mix_is_even(tokenizer):
    drawn = draw(load_mix("stem-agentic"), Calibration(), tokenizer)
    counts = by_cell(drawn.rows)
    assert len(counts) == 20
    assert max(counts.values()) < 1.05 * min(counts.values())


def test_the_smoke_mix_is_small_and_has_everything(tokenizer):
    drawn = draw(load_mix("smoke"), Calibration(mix="smoke"), tokenizer)
    counts = by_cell(drawn.rows)
    assert len(counts) == 20
    assert counts.total() == pytest.approx(4096, rel=0.02)


def test_wikitext_is_streamed_from_the_hub_and_joined():
    (source,) = load_mix("wikitext-like").sources
    assert source.hub
    assert source.join
    assert source.domain == "text"


# --- The same everywhere ----------------------------------------------------------------------------------------------------------


def test_an_order_that_is_pinned():
    """Hashes alone decide: these very ids on every machine and in every version."""
    samples = [Sample(str(n), "en", "stem", (), text=f"text {n}") for n in range(12)]
    order = [int(sample.id) for sample in in_seeds_order(samples, 0)]
    assert order == PINNED
    assert [int(sample.id) for sample in in_seeds_order(reversed(samples), 0)] == PINNED
    assert [int(sample.id) for sample in in_seeds_order(samples, 1)] != PINNED


def test_the_shipped_sets_tokens_are_these_on_every_machine():
    """Taken on one machine, asked of every other that runs the tests: who changes a sample or a quota changes this line."""
    settings = load_recipe("awq-w4").calibration
    drawn = draw(load_mix(settings.mix), settings, load_tokenizer(reference_model()))
    assert digest(drawn.rows) == "526955f90a4b16fe1f13f5d418f2e6308eabb4d06382a300d53773b954b756bb"


def test_a_digest_that_is_pinned():
    rows = [Row([1, 2, 262_143], b"\4\4\4", {}, ""), Row([5], b"\4", {}, "")]
    assert digest(rows) == "246824257aa4283b1c1b4fa54700d2774bd696c1fe6dbd9491f053fda736e7d3"
    assert digest(rows[::-1]) != digest(rows)
    assert digest([Row([1, 2], b"", {}, ""), Row([3], b"", {}, "")]) != digest([Row([1], b"", {}, ""), Row([2, 3], b"", {}, "")])


SCRIPT = """
import sys
from quantkit.calibrate.draw import digest, draw
from quantkit.calibrate.render import load_tokenizer
from quantkit.recipe import Calibration, Mix, MixSource
from pathlib import Path
mix = Mix(description="x", sources=[MixSource(path=sys.argv[1])], languages={"en": 1, "zh": 2}, domains={"stem": 1, "agentic": 1})
drawn = draw(mix, Calibration(tokens=5000, seed=7), load_tokenizer(Path(sys.argv[2])))
print(digest(drawn.rows), [row.labels["id"] for row in drawn.rows])
"""


def test_another_machine_draws_the_same_tokens(folder, tokenizer, tmp_path):
    """Another place, other file times and creation order, another hash seed, another locale."""
    there = tmp_path / "elsewhere"
    there.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):
        (there / path.name).write_bytes(path.read_bytes())
    tiny.save_tokenizer(tmp_path / "tokenizer")
    said = []
    for place, seed, locale in ((folder, "1", "C"), (there, "2", "tr_TR.UTF-8")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONPATH": str(Path(quantkit.__file__).parents[1])}
        command = [sys.executable, "-c", SCRIPT, str(place), str(tmp_path / "tokenizer")]
        said.append(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert said[0] == said[1]
    assert len(said[0]) > 200


def test_a_seed_is_another_choice(folder, tokenizer):
    ids = [{row.labels["id"] for row in draw(mix_of(folder), Calibration(tokens=4000, seed=seed), tokenizer).rows} for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


# --- What is said of it -----------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_there(folder, tokenizer):
    drawn = draw(mix_of(folder, languages={"en": 1, "nl": 1}), Calibration(tokens=3000), tokenizer)
    said = report(drawn, tokenizer)
    assert said["tokens"] == sum(len(row.ids) for row in drawn.rows) == sum(said["by_role"].values()) == sum(said["by_source"].values())
    assert said["by_language_and_domain"] == {
        language: {domain: by_cell(drawn.rows)[language, domain] for domain in ("agentic", "stem")} for language in ("en", "nl")
    }
    assert set(said["by_role"]) == {"user", "assistant"}
    assert said["special_tokens"]["<bos>"] == said["rows"] == len(drawn.rows)
    assert said["special_tokens"]["<|turn>"] >= said["rows"]
    assert said["digest"] == digest(drawn.rows)
    listed = manifest(drawn.rows)
    assert [one["tokens"] for one in listed] == [len(row.ids) for row in drawn.rows]
    assert len({one["sha256"] for one in listed}) == len(listed)
    assert {one["source"] for one in listed} <= {path.name for path in folder.iterdir()} | {folder.name}, "no folders of this machine"


# --- The reserve ------------------------------------------------------------------------------------------------------------------


def test_the_reserve_goes_on_where_the_set_ends(folder, tokenizer):
    mix = mix_of(folder, languages={"en": 1, "zh": 1, "nl": 1}, domains={"stem": 1, "agentic": 1})
    drawn = draw(mix, Calibration(tokens=6000), tokenizer)
    reserve = list(drawn.reserve)
    fed = {row.labels["id"] for row in drawn.rows if not row.cut}
    assert not fed & {row.labels["id"] for row in reserve}
    assert len(fed) + len(reserve) + sum(row.cut for row in drawn.rows) == 360
    assert len({(row.labels["language"], row.labels["domain"]) for row in reserve[:6]}) == 6, "in turn"


# --- Batches ----------------------------------------------------------------------------------------------------------------------


def test_packed_rows_are_full_and_of_one_kind(folder, tokenizer):
    drawn = draw(mix_of(folder), Calibration(tokens=9000), tokenizer)
    batches = make_batches(drawn.rows, 512, fill_to=128)
    rows = [(batch.ids[n][batch.real[n]].tolist(), labels) for batch in batches for n, labels in enumerate(batch.labels)]
    assert sum(len(ids) < 128 for ids, _ in rows) <= 6, "one for each language and domain"
    fed, packed = by_cell(drawn.rows), Counter()
    for ids, labels in rows:
        packed[labels["language"], labels["domain"]] += len(ids)
    assert all(fed[cell] - packed[cell] in (0, 1) for cell in fed), "a last token alone teaches nothing"
    one = [token for row in drawn.rows if row.labels["language"] == "en" and row.labels["domain"] == "stem" for token in row.ids]
    assert any(ids == one[:128] for ids, _ in rows)


def test_prompts_can_be_left_out_of_the_statistics(tokenizer):
    talk = (
        {"role": "system", "content": "you count"},
        {"role": "user", "content": "one and two"},
        {"role": "assistant", "content": "three apples"},
        {"role": "user", "content": "and one more"},
        {"role": "assistant", "content": "four apples"},
    )
    row = make_row(Sample("a", "en", "stem", talk), tokenizer, 500)
    (batch,) = make_batches([row, make_row(Sample("b", "en", "stem", (), text="apples " * 3), tokenizer, 500)], 4096, ignore_prompts=True)
    kept = [tokenizer.decode(batch.ids[n][batch.counted[n]]) for n in range(2)]
    assert kept[0] == "<|turn>model\nthree apples<turn|>\n<|turn>model\nfour apples<turn|>\n"
    assert kept[1] == "<bos>" + "apples " * 3, "text is nobody's prompt"
    (plain,) = make_batches([row], 4096)
    assert torch.equal(plain.counted, plain.real)
    assert {SPEAKERS[index] for index in row.speakers} == {"system", "user", "assistant"}


def test_a_set_of_prompts_alone_is_refused(tokenizer):
    talk = ({"role": "user", "content": "one and two " * 20}, {"role": "assistant", "content": "three"})
    row = make_row(Sample("a", "en", "stem", talk), tokenizer, 30)
    assert make_batches([row], 64)
    with pytest.raises(CalibrationError, match="nothing to count; give a longer sequence_length"):
        make_batches([row], 64, ignore_prompts=True)
