"""docs/licences.md lists what pyproject.toml asks for, under the licences that the packages tell."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = ("Apache", "BSD", "MIT", "MPL", "Python Software Foundation")  # spellings change from version to version


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("licences", ROOT / "scripts" / "licences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[str, str]]:
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs" / "licences.md").read_text().splitlines() if line.startswith("| ")]
    return {name: (purpose, licence) for name, purpose, licence in rows[1:]}


def test_every_dependency_is_listed_and_nothing_else(script, table):
    assert {name: purpose for name, (purpose, _) in table.items()} == script.wanted()


def test_licences_are_those_that_installed_packages_tell(script, table):
    checked = 0
    for name, (_, licence) in table.items():
        assert any(family in licence for family in FAMILIES), f"{name}: {licence}"
        told = script.licence(name)
        if told is not None:
            assert {f for f in FAMILIES if f in re.sub("Apache Software", "Apache", licence)} & {f for f in FAMILIES if f in told}, name
            checked += 1
    assert checked >= 14
