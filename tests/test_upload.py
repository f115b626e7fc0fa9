"""Publishing, against a Hub on the loopback address that breaks off in the middle when it is told to."""

import json
from pathlib import Path

import huggingface_hub
import published
import pytest
from click.testing import CliRunner, Result
from stub_hub import TOKEN, Hub, Server

from quantkit import release
from quantkit.cli import main
from quantkit.errors import PublishError
from quantkit.publish.artefact import open_artefact
from quantkit.publish.manifest import write_manifest


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stub speaks LFS
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    return published.run(tmp_path) / "compressed-tensors"


def publish(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["publish", *map(str, arguments)])


def put(folder: Path, hub: Hub, **options: object) -> list[str]:
    return list(release.publish(folder, "someone/tiny", endpoint=hub.url, token=TOKEN, **options))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_goes_in_one_commit(hub, folder):
    result = publish(folder, "--repo-id", "someone/tiny", "--private", "--collection", "Tiny ones")
    assert result.exit_code == 0, result.stderr
    assert hub.repos["someone/tiny"]["main"] == files(folder)
    assert hub.private["someone/tiny"] in (True, "private")
    (commit,) = hub.commits
    manifest = json.loads((folder / "quantkit.json").read_text())
    day = manifest["date"][2:].replace("-", ".")
    assert commit["summary"] == f"tiny-moe: quick as compressed-tensors, version {day}"
    assert hub.collections == {"someone/tiny-ones-0123456789abcdef": ["someone/tiny"]}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    first, *rest = result.stdout.splitlines()
    assert first == f"compressed-tensors: {size / 1e6:.2f} MB ({size:,} bytes), {manifest['bits_per_weight']:.3f} bits per weight"
    assert rest[0].startswith(f"the same recipe as gguf: {manifest['sizes']['gguf']['bytes'] / 1e6:.2f} MB")
    assert rest[-1].startswith(f"{hub.url}/someone/tiny/commit/")
    assert f"Bearer {TOKEN}" in hub.tokens


def test_an_upload_that_breaks_off_leaves_the_repository_as_it_was_and_goes_on(hub, folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    hub.break_on = 2
    broken = publish(folder, "--repo-id", "someone/tiny")
    assert broken.exit_code == 1
    assert len(broken.stderr.splitlines()) == 4, "three files that it began with, and the error in one line"
    assert "the same command goes on" in broken.stderr
    assert (hub.commits, hub.repos["someone/tiny"]["main"]) == ([], {})
    assert len(hub.sent) == 2
    hub.break_on = -1
    assert publish(folder, "--repo-id", "someone/tiny").exit_code == 0
    assert len(hub.sent) == len(set(hub.sent)) == len(shards), "what was there is not sent again"
    assert hub.repos["someone/tiny"]["main"] == files(folder)
    assert len(hub.commits) == 1


def test_a_new_version_takes_the_old_ones_files_away_and_leaves_those_of_others(hub, folder):
    put(folder, hub)
    hub.repos["someone/tiny"]["main"]["banner.png"] = b"of the owner"
    gone = sorted(folder.glob("*.json"))[1]
    assert gone.name != "quantkit.json"
    run = published.report()
    gone.unlink()
    write_manifest(folder, run, "compressed-tensors")
    put(folder, hub, force=True)  # a config that is missing is no good folder
    assert hub.commits[-1]["removed"] == [gone.name]
    assert hub.repos["someone/tiny"]["main"] == {**files(folder), "banner.png": b"of the owner"}


def test_a_branch(hub, folder):
    put(folder, hub, revision="v2")
    assert hub.repos["someone/tiny"] == {"main": {}, "v2": files(folder)}


@pytest.mark.parametrize(
    "status, says", [(401, "log in"), (403, "write access"), (429, "answers 429"), (500, "answers 500"), (413, "answers 413")]
)
def test_a_hub_that_says_no_is_one_line_without_the_token(status, says, hub, folder):
    hub.refuse = status
    result = publish(folder, "--repo-id", "someone/tiny")
    assert result.exit_code == 1
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "NeverToBeShown" not in result.stdout + result.stderr


def test_nobody_is_there(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(PublishError, match="broke off"):
        list(release.publish(folder, "someone/tiny", endpoint="http://127.0.0.1:1", token=TOKEN))


def test_a_dry_run_asks_nobody(hub, folder):
    result = publish(folder, "--repo-id", "someone/tiny", "--dry-run")
    assert result.exit_code == 0
    for path in folder.iterdir():
        assert f"{path.name:44} {path.stat().st_size:>16,} bytes" in result.stdout
    assert "nothing was sent" in result.stdout
    assert hub.asked == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "a b/c", "../x", ""])
def test_a_name_that_is_none(name, hub, folder):
    for dry in ((), ("--dry-run",)):
        result = publish(folder, "--repo-id", name, *dry)
        assert result.exit_code == 1
        assert "owner/name" in result.stderr
    assert hub.asked == []


def test_hidden_and_unlisted_files_never_go(hub, folder):
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}")
    put(folder, hub)
    assert ".env" not in hub.repos["someone/tiny"]["main"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PublishError, match=r"notes\.txt: not listed"):
        put(folder, hub)
    put(folder, hub, force=True)
    assert "notes.txt" not in hub.repos["someone/tiny"]["main"]


def test_a_damaged_folder_is_refused_unless_forced(hub, folder):
    (folder / "config.json").write_text("{}")
    assert publish(folder, "--repo-id", "someone/tiny").exit_code == 1
    assert hub.asked == []
    dry = publish(folder, "--repo-id", "someone/tiny", "--dry-run")
    assert "refused: files: config.json" in dry.stdout
    assert publish(folder, "--repo-id", "someone/tiny", "--force").exit_code == 0


def test_a_folder_without_card_is_refused_even_then(hub, folder):
    (folder / "README.md").unlink()
    for force in ([], ["--force"]):
        result = publish(folder, "--repo-id", "someone/tiny", *force)
        assert (result.exit_code, hub.asked) == (1, [])
        assert "README.md: missing; quantkit card" in result.stderr


@pytest.mark.parametrize("verdict, goes", [("PASS", True), ("FAIL", False), ("INCONCLUSIVE", False)])
def test_the_gate(verdict, goes, hub, folder):
    published.evaluate(folder, verdict)
    result = publish(folder, "--repo-id", "someone/tiny")
    assert (result.exit_code == 0) == goes
    assert goes or f"gate: {verdict}" in result.stderr
    assert bool(hub.commits) == goes
    assert publish(folder, "--repo-id", "someone/tiny", "--force").exit_code == 0


def test_a_gate_that_failed_beside_another_model_failed(hub, folder):
    published.evaluate(folder, "FAIL", digests={"artefact": open_artefact(folder).digest, "weights": {"model.safetensors": "sha256:0"}})
    assert publish(folder, "--repo-id", "someone/tiny").exit_code == 1
    assert hub.commits == []


def test_a_run_of_two_formats_asks_which(hub, tmp_path):
    result = publish(published.run(tmp_path), "--repo-id", "someone/tiny")
    assert result.exit_code == 1
    assert "give one of them" in result.stderr


def test_a_gguf(hub, tmp_path):
    folder = published.run(tmp_path) / "gguf"
    put(folder, hub)
    assert hub.repos["someone/tiny"]["main"] == files(folder)
