"""One rival's run in its own environment, kept in a folder and taken from there when the same is asked again.

    from run import run                             # with benchmarks/rivals on sys.path; standard library only
    weights, result = run(Path(".venv-rivals/bin/python"), model, ids, cache, method="awq+gptq", bits=4, symmetric=True)

    python benchmarks/rivals/run.py .venv-rivals/bin/python MODEL IDS.safetensors CACHE --method awq --bits 4 --symmetric

The same means: the same bytes of the model, the tokens and the rival's script, the same options and the same packages.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = "import importlib.metadata as m; print(sorted({(d.name, d.version) for d in m.distributions()}))"


def run(
    python: Path,
    model: Path,
    ids: Path,
    cache: Path,
    *options: str,
    rival: str = "llm_compressor",
    method: str | None = None,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    threads: int = 1,
) -> tuple[Path, dict[str, Any]]:
    """The dense weights of a rival's result, and its result.json.

    Args:
        python: the interpreter of the rival's environment.
        model: a checkpoint folder.
        ids: safetensors with `ids` (rows, tokens) int64, no padding.
        cache: a folder for results; what is there already is not run again.
        options: further words of the rival's command line.
        rival: the script beside this one, by its stem.
        method: one of the script's methods; left out, its first.
        threads: of one process; result["cpu_seconds"] is processor time, whatever the threads.

    Raises:
        RuntimeError: the rival failed; in one line, with the place of its log.
    """
    words = [f"--bits={bits}", f"--group={group}", *(["--symmetric"] if symmetric else []), *([f"--method={method}"] if method else [])]
    words += options
    python, model, ids, cache = python.absolute(), model.resolve(), ids.resolve(), cache.resolve()  # a venv's interpreter is a link
    folder = cache / _key(python, model, ids, HERE / f"{rival}.py", words)
    if not (folder / "result.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quiet | {"OMP_NUM_THREADS": str(threads)}
        command = [str(python), str(HERE / f"{rival}.py"), str(model), str(ids), str(folder), *words]
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder, check=False)
        if done.returncode or not (folder / "result.json").is_file():
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"{rival} {' '.join(words)}: exit code {done.returncode}, {lines[-1][:300]} (log: {folder / 'log.txt'})")
    return folder / "weights.safetensors", json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _key(python: Path, model: Path, ids: Path, script: Path, words: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(words).encode())
    digest.update(subprocess.run([str(python), "-c", PACKAGES], capture_output=True, check=True).stdout)
    for path in (script, HERE / "common.py", ids, *sorted(model.glob("*.json")), *sorted(model.glob("*.safetensors"))):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{script.stem}-{digest.hexdigest()[:16]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("python", "model", "ids", "cache"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rival", default="llm_compressor", choices=("llm_compressor", "autoround"))
    parser.add_argument("--method")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    arguments, options = parser.parse_known_args()
    weights, result = run(
        arguments.python,
        arguments.model,
        arguments.ids,
        arguments.cache,
        *options,
        rival=arguments.rival,
        method=arguments.method,
        bits=arguments.bits,
        group=arguments.group,
        symmetric=arguments.symmetric,
    )
    print(json.dumps({"weights": str(weights), **result}, indent=1))


if __name__ == "__main__":
    main()
