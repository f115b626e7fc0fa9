"""Table of what quantkit depends on and under which licence, as the installed packages say: the body of docs/licences.md.

python scripts/licences.py > docs/licences.md
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# Licences of dependencies

quantkit is Apache-2.0. It copies no code of these packages; pip installs them under licences of their own, which are told here as the
packages' metadata tell them (`python scripts/licences.py`). Packages that those need in turn are not listed.

| package | needed for | licence |
|---|---|---|
"""
# where the metadata hold a whole text, or nothing
KNOWN = {
    "torch": "BSD-3-Clause",
    "beartype": "MIT",
    "onnxruntime-genai": "MIT",
    "llama-cpp-python": "MIT",
    "vllm": "Apache-2.0",
    "lm-eval": "MIT",
    "pyarrow": "Apache-2.0",
    "datasets": "Apache-2.0",
}


def wanted() -> dict[str, str]:
    """Package -> what it is needed for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = {}
    for purpose, packages in {"every run": project["dependencies"], **project["optional-dependencies"]}.items():
        for package in packages:
            name = re.match(r"[\w.-]+", package)
            if name and name[0] != "quantkit":
                found.setdefault(name[0], []).append(purpose if purpose == "every run" else f"`[{purpose}]`")
    return {name: ", ".join(dict.fromkeys(purposes)) for name, purposes in found.items()}


def licence(name: str) -> str | None:
    """In one line, as the package says it; None where it is not installed."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return KNOWN.get(name)
    said = about.get("License-Expression") or about.get("License") or ""
    if said and "\n" not in said and len(said) <= 60:
        return said
    classified = [value.rpartition(" :: ")[2] for value in about.get_all("Classifier") or [] if value.startswith("License ::")]
    return ", ".join(classified) or KNOWN.get(name)


def main() -> None:
    print(HEAD, end="")
    for name, purposes in sorted(wanted().items()):
        print(f"| {name} | {purposes} | {licence(name) or 'not installed here'} |")


if __name__ == "__main__":
    main()
