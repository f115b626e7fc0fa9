"""Engines: what serves an artefact, asked for its log-probabilities and its greedy answers.

transformers      compressed-tensors and unquantized folders; fp32 on a CPU, so that what differs is the weights
vllm              the same folders, as vLLM computes them
llama.cpp         GGUF, through llama-cpp-python
onnxruntime       ONNX folders (model.onnx with past_key_values.N.key|value)
dequantized       GGUF whose weights are decoded and run in transformers: the weights alone, no engine's arithmetic
"""

from importlib import import_module
from pathlib import Path

from quantkit.errors import EvaluationError
from quantkit.evaluate.engines.engine import Engine

MODULES = {  # engine -> its module, the library it needs, the extra that brings it
    "transformers": ("in_transformers", "transformers", ""),
    "vllm": ("in_vllm", "vllm", "vllm"),
    "llama.cpp": ("in_llama_cpp", "llama_cpp", "llama"),
    "onnxruntime": ("in_onnxruntime", "onnxruntime", "onnxruntime"),
    "dequantized": ("dequantized", "gguf", "gguf"),
}
NAMES = ("auto", *MODULES)


def find_artefact(path: Path) -> Path:
    """What is to be opened: the folder itself, or the one artefact in a run's folder; a GGUF file itself, or a folder's only one.

    Raises:
        EvaluationError: nothing there, or more than one.
    """
    if not path.exists():
        raise EvaluationError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".gguf":
            raise EvaluationError(f"{path}: give the artefact's folder, or a .gguf file")
        return path
    if (path / "config.json").is_file() or (path / "model.onnx").is_file():
        return path
    inside = [folder for folder in sorted(path.iterdir()) if folder.name in ("compressed-tensors", "gguf", "onnx") and folder.is_dir()]
    if len(inside) > 1:
        raise EvaluationError(f"{path}: holds {', '.join(folder.name for folder in inside)}; name one of them, such as {inside[0]}")
    if inside:
        return find_artefact(inside[0])
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        what = "neither config.json nor model.onnx nor a .gguf file" if not files else f"{len(files)} .gguf files, give one of them"
        raise EvaluationError(f"{path}: holds {what}")
    return files[0]


def choose(artefact: Path, name: str = "auto") -> str:
    """The engine for what an artefact holds.

    Raises:
        EvaluationError: an engine that does not read such files.
    """
    kind = "gguf" if artefact.suffix == ".gguf" else "onnx" if (artefact / "model.onnx").is_file() else "folder"
    readers = {"gguf": ("llama.cpp", "dequantized"), "onnx": ("onnxruntime",), "folder": ("transformers", "vllm")}[kind]
    if name == "auto":
        return readers[0]
    if name not in readers:
        raise EvaluationError(f"{artefact}: {name} does not read it; it is for {' or '.join(readers)}")
    return name


def open_engine(name: str, artefact: Path, like: Path, threads: int | None = None) -> Engine:
    """An engine with the artefact in it.

    Args:
        artefact: as `find_artefact` gives it.
        like: the baseline's folder: tokenizer, end-of-text ids, and for `dequantized` the architecture.

    Raises:
        EvaluationError: the library is not installed, or the engine cannot open the files.
    """
    module, library, extra = MODULES[name]
    try:
        import_module(library)
    except ImportError as problem:
        hint = f"pip install 'quantkit[{extra}]'" if extra else "pip install quantkit"
        raise EvaluationError(f"the engine {name} needs {library}, which cannot be imported ({str(problem)[:80]}); {hint}") from None
    opened: Engine = import_module(f"quantkit.evaluate.engines.{module}").open_artefact(artefact, like, threads)
    return opened
