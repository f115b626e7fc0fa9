"""Does a folder hold what it says? Every file, tensor and figure that can be checked without running the model, one line each.

files      the manifest's sizes and SHA-256; nothing that it does not list, no code, no pickle, no access token
tensors    shapes that fit one another, the index and config.json; numbers that are numbers
card       the size and bits per weight that it tells
base       a sample of linears decoded and held against the original weights, where those are at hand
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from quantkit.errors import PublishError
from quantkit.publish.artefact import TOKEN, Artefact
from quantkit.publish.card import stated
from quantkit.publish.gguf_file import GgufFolder
from quantkit.publish.loaders import Verdict, gguf_verdicts, onnx_verdicts, verdicts
from quantkit.publish.manifest import CARD, NAME, sha256
from quantkit.publish.onnx_folder import OnnxFolder
from quantkit.publish.packed import Packed, distance, rounded, spread
from quantkit.report import gigabytes
from quantkit.types import Json

Weights = Mapping[str, Callable[[], Tensor]]
# Never beside published weights: what runs when it is opened.
UNSAFE = (".py", ".pyc", ".so", ".sh", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".h5", ".msgpack")
TEXTS = (".json", ".md", ".txt", ".jinja", ".html")
FAR = 0.05  # of a weight's square sum: 4 bits leave about a hundredth unexplained, other weights nearly all
NEAR = 0.25  # of a reported error, which is taken on some rows of the matrix
SAMPLE = 24  # linears that are held against the base


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome: "ok", "off" or "skipped", and what it saw."""

    check: str
    state: str
    text: str


@dataclass(frozen=True, slots=True)
class Verified:
    findings: tuple[Finding, ...]
    engines: tuple[Verdict, ...]

    @property
    def good(self) -> bool:
        return all(finding.state != "off" for finding in self.findings)

    def lines(self) -> Iterator[str]:
        for finding in self.findings:
            yield f"{finding.state:8} {finding.check:8} {finding.text}"
        for verdict in self.engines:
            yield f"{verdict.loads:8} {verdict.engine}: {verdict.why}"

    def as_json(self) -> Json:
        return {"good": self.good, "findings": [asdict(one) for one in self.findings], "engines": [asdict(one) for one in self.engines]}


def verify(artefact: Artefact, base: Weights | None = None, inputs: Mapping[str, str] | None = None, sample: int = SAMPLE) -> Verified:
    """Check one artefact's folder.

    Args:
        base: the original weight (out, in) of each linear by the name that the artefact gives it; None: not at hand.
        inputs: digests of the original's files, to be held against those that were quantized.
        sample: linears that are held against it.
    """
    findings = [*_files(artefact), *_card(artefact), *_same_base(artefact, inputs)]
    engines: list[Verdict] = []
    try:
        if artefact.format == "compressed-tensors":
            packed = Packed(artefact.folder)
            findings += _collected("tensors", f"{len(packed.places):,} tensors fit config.json and the index", packed.problems())
            findings += _collected("numbers", "no NaN, no infinity, no scale of zero", packed.not_numbers())
            findings += _base(artefact, packed, base, sample)
            engines = verdicts(packed)
        elif artefact.format == "gguf":
            file = GgufFolder(artefact.folder)
            findings += _collected("tensors", f"{len(file.reader.tensors):,} tensors fit the file's keys", file.problems())
            findings += _collected("numbers", "no NaN and no infinity once decoded", file.not_numbers())
            findings.append(
                Finding("base", "skipped", "a GGUF's linears are not held against the base; the compressed-tensors folder's are")
            )
            engines = gguf_verdicts(file.architecture, file.types)
        elif artefact.format == "onnx":
            graph = OnnxFolder(artefact.folder)
            findings += _collected("tensors", f"{len(graph.tensors):,} tensors lie where the graph says", graph.problems())
            if findings[-1].state == "ok":  # what lies beyond its file cannot be read
                findings += _collected("numbers", "no NaN", graph.not_numbers())
            findings.append(Finding("base", "skipped", "an ONNX graph's linears are not held against the base"))
            engines = onnx_verdicts(graph)
    except PublishError as problem:
        findings.append(Finding("tensors", "off", str(problem)))
    return Verified(tuple(findings), tuple(engines))


def _collected(check: str, good: str, problems: Iterator[str]) -> list[Finding]:
    return [Finding(check, "off", line) for line in problems] or [Finding(check, "ok", good)]


def _files(artefact: Artefact) -> list[Finding]:
    listed: Json = artefact.manifest["files"]
    return _collected("files", f"{len(listed)} files with the SHA-256 of {NAME}", _file_problems(artefact, listed))


def _file_problems(artefact: Artefact, listed: Json) -> Iterator[str]:
    files = [path for path in sorted(artefact.folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    there = {path.relative_to(artefact.folder).as_posix(): path for path in files}
    for name, told in listed.items():
        path = artefact.folder / name
        if not path.is_file():
            yield f"{name}: listed in {NAME}, and not there"
        elif path.stat().st_size != told["bytes"]:
            yield f"{name}: {path.stat().st_size:,} bytes, {NAME} says {told['bytes']:,}"
        elif sha256(path) != told["sha256"]:
            yield f"{name}: another SHA-256 than {NAME} says; the file was changed or damaged"
    for name, path in there.items():
        if path.suffix in UNSAFE:
            yield f"{name}: code or a pickle; nothing that runs when it is opened is published"
        elif name not in listed and name != NAME:
            yield f"{name}: not listed in {NAME}; remove it, or make the card again, which lists it"
        if path.suffix in TEXTS and TOKEN.search(path.read_text(encoding="utf-8", errors="replace")):
            yield f"{name}: holds what looks like an access token (hf_…); remove it, and revoke the token"
    told_bytes = (artefact.run or {}).get("bytes", {}).get(artefact.format)
    if told_bytes is not None and told_bytes != artefact.bytes:
        yield f"weight files: {artefact.bytes:,} bytes, the run's report says {told_bytes:,}"


def _card(artefact: Artefact) -> list[Finding]:
    path = artefact.folder / CARD
    if not path.is_file():
        return [Finding("card", "off", f"{CARD}: missing; quantkit card {artefact.folder} makes one")]
    try:
        size, bits = stated(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return [Finding("card", "off", f"{CARD}: not UTF-8; the file was damaged")]
    except PublishError as problem:
        return [Finding("card", "off", f"{CARD}: {problem}")]
    wanted = (gigabytes(artefact.bytes), f"{artefact.manifest['bits_per_weight']:.3f}")
    for what, found, right in zip(("size", "bits per weight"), (size, bits), wanted, strict=True):
        if found != right:
            return [Finding("card", "off", f"{CARD}: says {what} {found}, the weight files give {right}")]
    return [Finding("card", "ok", f"{size}, {bits} bits per weight")]


def _same_base(artefact: Artefact, inputs: Mapping[str, str] | None) -> list[Finding]:
    told = artefact.manifest.get("inputs", {})
    other = [name for name, digest in (inputs or {}).items() if told.get(name) != digest]
    return [Finding("base", "off", f"{other[0]}: not the file that was quantized (another digest)")] if other else []


def _base(artefact: Artefact, packed: Packed, base: Weights | None, sample: int) -> list[Finding]:
    if base is None:
        return [Finding("base", "skipped", "the original weights are not at hand (--base-model)")]
    decodable = [one for one in packed.stored if not one.fused]
    if not decodable:
        return [Finding("base", "skipped", "no linear that can be decoded by itself")]
    ours, plain, exact = [], [], 0
    reported = _reported_errors(artefact)
    for one in spread(decodable, sample):
        if one.name not in base:
            return [Finding("base", "off", f"{one.name}: not a linear of the base model")]
        weight, decoded = base[one.name]().float(), packed.decode(one)
        if weight.shape != decoded.shape:
            return [Finding("base", "off", f"{one.name}: {tuple(decoded.shape)}, in the base model {tuple(weight.shape)}")]
        ours.append(distance(weight, decoded))
        plain.append(distance(weight, rounded(weight, one.bits, one.group)))
        if ours[-1] > FAR:
            return [Finding("base", "off", f"{one.name}: {ours[-1]:.0%} of the weight is not explained by its codes; another base model?")]
        told = reported.get(one.place)
        if told is not None:
            found = float((weight - decoded).square().sum() / weight.square().sum().clamp_min(1e-30))
            if abs(found - told) > NEAR * max(told, 1e-9):
                return [Finding("base", "off", f"{one.name}: relative error {found:.4e}, the report says {told:.4e}")]
            exact += 1
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    text = f"{len(ours)} linears decoded: {mean(ours):.2%} of the weights unexplained (plain rounding {mean(plain):.2%}), folds divided out"
    return [Finding("base", "ok", text + (f"; {exact} errors near the report's" if exact else ""))]


def _reported_errors(artefact: Artefact) -> dict[tuple[int, str], float]:
    """(block, local name) -> the report's error, where that is one of weights alone (plain rounding); else nothing to hold against."""
    run = artefact.run
    if run is None or run["recipe"]["method"] != "rtn":
        return {}
    return {(block["block"], local): row["error"] for block in run["blocks"] for local, row in block["linears"].items()}
