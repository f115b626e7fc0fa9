"""The model card of an artefact folder. Every figure comes from the run's own report or from the files beside the card.

The template is `card.md.jinja`; another one may take its place. What people or other cards wrote goes through `plain`, which leaves no
Markdown or HTML of theirs, or through base_card.Body; neither is ever read as a template.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from quantkit.disk import write_whole
from quantkit.errors import PublishError
from quantkit.hf import needed
from quantkit.publish import base_card
from quantkit.publish.artefact import WEIGHTS
from quantkit.publish.evaluation import measured, verdict
from quantkit.publish.gguf_file import GgufFolder
from quantkit.publish.loaders import Verdict, gguf_verdicts, onnx_verdicts, verdicts
from quantkit.publish.manifest import CARD, listed
from quantkit.publish.onnx_folder import OnnxFolder
from quantkit.publish.packed import Packed
from quantkit.publish.parts import contents
from quantkit.report import gigabytes
from quantkit.types import Json, expert_of

LIBRARY = {"compressed-tensors": "transformers", "gguf": "gguf", "onnx": "onnxruntime-genai"}
REASONS = {  # why a part is not quantized
    "towers": "copied bit for bit: the calibration set holds no pictures and no sound",
    "routers": "small, and they decide which experts run",
    "embeddings and head": "looked up by token; a tied head reads the same table",
    "norms and scalars": "small; norms carry the scales that folds moved",
}
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
_ROW = r"<b>{}</b></td>\s*<td[^>]*>([^<]*)</td>"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run cannot know and its publisher does."""

    base_model: str | None = None  # a Hub id, where the run was given a folder
    base_text: str | None = None  # the base model's card, in place of the one beside its weights
    repo_id: str | None = None  # as which commands on the card name it
    contact: str | None = None  # a mail address or a link
    calibration_link: str | None = None
    template: Path | None = None


def write_card(
    folder: Path, about: Json, format: str, files: Json | None = None, evaluations: Sequence[Json] = (), options: Options | None = None
) -> list[str]:
    """README.md of the artefact of one format.

    Args:
        about: the run's report.
        files: sizes and SHA-256 as the manifest lists them; None: they are read.
        evaluations: of these very files, where there are any.

    Returns:
        What the publisher should know: a base card that could not be read, links of it that lead nowhere. One line each.

    Raises:
        PublishError: the template cannot be read or used.
    """
    options = options or Options()
    notes: list[str] = []
    text = _template(options.template).render(**_context(folder, about, format, files or listed(folder), evaluations, options, notes))
    write_whole(folder / CARD, re.sub(r"\n{3,}", "\n\n", text) if options.template is None else text)
    return notes


def stated(card: str) -> tuple[str, str]:
    """The size and the bits per weight that a card tells.

    Raises:
        PublishError: it tells none.
    """
    found = [re.search(_ROW.format(name), card) for name in ("Model Size", "Bits per weight")]
    if not all(found):
        raise PublishError("has no rows Model Size and Bits per weight; make it again with quantkit card")
    size, bits = (match[1].strip() for match in found if match)
    return size, bits


class _Template:
    """One template with what can go wrong in it as one line."""

    def __init__(self, template: jinja2.Template, name: str):
        self._template, self._name = template, name

    def render(self, **context: Any) -> str:
        try:
            return self._template.render(**context)
        except (jinja2.TemplateError, TypeError, ValueError) as problem:
            raise PublishError(f"{self._name}: {' '.join(str(problem).split())}") from None


def _template(path: Path | None) -> _Template:
    loader: jinja2.BaseLoader = jinja2.PackageLoader("quantkit.publish", ".")
    if path is not None:
        loader = jinja2.FileSystemLoader(path.parent)
    environment = SandboxedEnvironment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    name = path.name if path is not None else "card.md.jinja"
    try:
        return _Template(environment.get_template(name), str(path or name))
    except (jinja2.TemplateError, OSError, UnicodeDecodeError) as problem:
        raise PublishError(f"{path}: no template that can be used ({type(problem).__name__}: {' '.join(str(problem).split())})") from None


def plain(value: Any) -> str:
    """A value as words in Markdown: one line, no HTML, no table cells, no links, no code."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], text)


def _context(folder: Path, about: Json, format: str, files: Json, evaluations: Sequence[Json], options: Options, notes: list[str]) -> Json:
    recipe, calibration = about["recipe"], about["calibration"]
    rows = [row for block in about["blocks"] for row in block["linears"].items()]
    experts = {row["scheme"] for name, row in rows if expert_of(name) is not None}
    cards = _base_cards(about, options, notes)
    base_model = _base_model(about, options, cards)
    languages = [name for name in calibration["by_language_and_domain"] if re.fullmatch(r"[a-z]{2,3}", name)]
    domains = sorted({domain for row in calibration["by_language_and_domain"].values() for domain in row})
    engines = _engines(folder, format)
    serve_name = options.repo_id or f"{about['model']}-{recipe['name']}"
    size = sum(path.stat().st_size for pattern in WEIGHTS[format] for path in folder.glob(pattern))
    return {
        "front_matter": base_card.front_matter(_front_matter(about, format, base_model, languages, cards)),
        "title": options.repo_id.rpartition("/")[2] if options.repo_id else f"{about['model']} {recipe['name']}",
        "header": _header(about, format, size, languages, domains, options),
        "format": format,
        "recipe": recipe,
        "method": _method(recipe, bool(rows), about["summary"]),
        "adapter": about.get("adapter"),
        "contents": [
            {**row, "why": "" if "groups of" in row["stored"] or row["stored"] == "uint8" else REASONS.get(row["part"], "")}
            for row in contents(folder, format)
        ],
        "kept": about.get("kept", {}),
        "errors": _errors(about) if rows else None,
        "calibration": calibration,
        "sources": ", ".join(calibration.get("by_source", {})) or recipe["calibration"]["mix"],
        "domains": domains,
        "fallbacks": "; ".join(f"{len(which)} of {calibration['rows']} samples: {how}" for how, which in calibration["fallbacks"].items()),
        "experts": _experts(about),
        "measured": measured(about, evaluations),
        "evaluated": bool(evaluations),
        "verdict": verdict(evaluations),
        "serve_name": serve_name,
        "gguf": next((path.name for path in folder.glob("*.gguf")), ""),
        "rounded": about.get("gguf"),
        "onnx": about.get("onnx"),
        "needs_conversion": bool(experts) and needed(str(about["model_type"])),
        "model_type": about["model_type"],
        "table": about["family"].partition(" (")[2].removesuffix(")"),
        "snippet": about["family"] == "gemma4"
        and len(experts) == 1
        and " sym " in next(iter(experts))
        and recipe["experts_layout"] != "fused",
        "engines": engines,
        "limits": _limits(about, format, languages, any(row["scheme"].endswith(" signed") for _, row in rows), evaluations),
        "versions": about["versions"],
        "seed": recipe["calibration"]["seed"],
        "date": about.get("date"),
        "weights": {name: row for name, row in files.items() if any(Path(name).match(pattern) for pattern in WEIGHTS[format])},
        "inputs": {name: digest for name, digest in about["inputs"].items() if name.endswith(".safetensors") or "/" in name},
        "base_model": base_model,
        "base": _bodies(cards, base_model, notes),
    }


def _front_matter(about: Json, format: str, base_model: str | None, languages: list[str], cards: Mapping[str, base_card.BaseCard]) -> Json:
    """In the order of the Hub's own examples. The base card's licence and gates hold here too; size and method are ours."""
    base = {key: value for card in reversed(list(cards.values())) for key, value in base_card.passed_on(card.meta).items()}
    tags = [tag for card in cards.values() for tag in base_card.passed_on(card.meta).get("tags", ())]
    recipe, task = about["recipe"], next((str(card.meta["pipeline_tag"]) for card in cards.values() if card.meta.get("pipeline_tag")), "")
    ours = ["quantkit", format, recipe["method"]]
    if about["blocks"] and not _target(recipe) and recipe["weights"].get("grid", "integer") == "integer":
        ours.append(f"{recipe['weights']['bits']}-bit")
    meta: Json = {"language": base.pop("language", None) or languages or None}
    meta |= {key: base.pop(key) for key in ("license", "license_name", "license_link") if key in base}
    meta["library_name"] = LIBRARY[format]
    meta["pipeline_tag"] = task if format == "compressed-tensors" and re.fullmatch(r"[a-z0-9-]+", task) else "text-generation"
    if base_model:
        meta |= {"base_model": base_model, "base_model_relation": "quantized"}
    base.pop("tags", None)
    meta["tags"] = list(dict.fromkeys([*ours, *tags]))
    return {key: value for key, value in {**meta, **base}.items() if value is not None}


def _header(about: Json, format: str, size: int, languages: list[str], domains: list[str], options: Options) -> list[tuple[str, str]]:
    calibration = about["calibration"]
    names = " and ".join(domain.upper() if len(domain) <= 4 else domain.title() for domain in reversed(domains))
    link = html.escape(_address(options.calibration_link) or "#calibration")
    rows = [("Version", version(about))]
    if calibration["tokens"]:
        rows.append(("Calibration", f'<a href="{link}">{html.escape(names) or "its data"}</a>'))
    else:
        rows.append(("Calibration", "none"))
    if languages:
        rows.append(("Languages", " ".join(f"<code>{name.upper()}</code>" for name in languages)))
    rows.append(("Model Size", gigabytes(size)))
    rows.append(("Bits per weight", f"{about['bits_per_weight'][format]:.3f}"))
    if options.contact:
        mail = _MAIL.fullmatch(options.contact)
        address = f"mailto:{options.contact}" if mail else _address(options.contact)
        shown = "Email" if mail else html.escape(options.contact)
        rows.append(("Contact", f'<a href="{html.escape(address)}">{shown}</a>' if address else shown))
    rows.append(("Format", f"{format}, {_scheme(about)}"))
    return rows


def version(about: Json) -> str:
    """YY.MM.DD of the day on which the run was finished."""
    day = about.get("date")
    return day[2:].replace("-", ".") if day else "not dated"


def _address(text: str | None) -> str:
    return text if text and re.fullmatch(r"https?://[^\s\"'<>]+", text) else ""


def _scheme(about: Json) -> str:
    weights = about["recipe"]["weights"]
    if not about["blocks"] or not any(block["linears"] for block in about["blocks"]):
        return "nothing quantized"
    if target := _target(about["recipe"]):
        return f"schemes picked for {target}"
    if weights.get("grid", "integer") != "integer":
        return str(weights["grid"])
    group = "one scale a row" if weights["group"] == "row" else f"groups of {weights['group']}"
    return f"{weights['bits']} bits, {'symmetric' if weights['symmetric'] else 'asymmetric'}, {group}"


def _target(recipe: Json) -> str:
    """What each linear's scheme was picked for; "" where the recipe gives the scheme."""
    if recipe.get("target_size"):
        return f"{recipe['target_size']:,} bytes"
    return f"{recipe['target_bits']} bits a weight" if recipe.get("target_bits") else ""


def _method(recipe: Json, quantized: bool, summary: Json) -> str:
    if not quantized:
        return "Nothing was quantized: the weights are those of the original."
    if recipe["method"] == "rtn":
        return "Weights were rounded to the nearest code, group by group, without data."
    search = recipe["search"]
    steps = ["activation-aware scales folded into the layers before (AWQ)"] if search["folds"] else []
    steps += ["clipped ranges"]
    steps += ["rounding that makes good its own errors through the Gram of the inputs"] if search["compensate"] else []
    steps += [f"{search['sweeps']} sweeps of coordinate descent"] if search["sweeps"] else []
    if search["stages"]:
        steps.append("stage by stage, each on inputs that carry the rounding before it")
    made = f"One decoder block at a time: {', '.join(steps)}."
    if target := _target(recipe):
        made = f"Schemes were picked for {target}, each by what it changes in its block's output, in place of one for all. {made}"
    worse, linears = summary["worse_than_rounded"], summary["linears"]
    told = f"{worse} of {linears:,} linears ended" if worse else "no linear ended"
    undone = summary.get("folds_undone", 0)
    proven = "folds are proven on the block itself"
    proven += f", and those of {undone} block{'s' if undone > 1 else ''} were undone, which computed otherwise" if undone else ""
    return f"{made} {proven.capitalize()}; {told} with a larger output error than plain rounding."


def _errors(about: Json) -> Json:
    total = about["summary"]
    kind = "output" if about["calibration"]["tokens"] else "weight"
    return {"of": kind, "linears": total["linears"], "ours": total["mean_error"], "plain": total["mean_error_rounded"]}


def _experts(about: Json) -> Json | None:
    layers = [block["experts"] for block in about["blocks"] if block["experts"]]
    if not layers:
        return None
    fewest, of_even = min((min(tokens), min(tokens) * len(tokens) / max(sum(tokens), 1)) for tokens in layers)
    return {
        "layers": len(layers),
        "count": sum(map(len, layers)),
        "fewest": fewest,
        "of_even": of_even,
        "unfed": sum(tokens.count(0) for tokens in layers),
    }


def _engines(folder: Path, format: str) -> list[Verdict]:
    try:
        if format == "compressed-tensors":
            return verdicts(Packed(folder))
        if format == "gguf":
            file = GgufFolder(folder)
            return gguf_verdicts(file.architecture, file.types)
        if format == "onnx":
            return onnx_verdicts(OnnxFolder(folder))
    except PublishError:  # verify tells what is wrong with the files
        pass
    return []


def _limits(about: Json, format: str, languages: list[str], signed: bool, evaluations: Sequence[Json]) -> list[str]:
    found = ["What holds for the original holds here: its licence, its biases, its knowledge."]
    if about["calibration"]["tokens"]:
        where = ", ".join(name.upper() for name in languages) or "the calibration set's language"
        found.append(f"Calibrated on text in {where}; other languages and long contexts were not measured.")
    if not any(one.get("items") for one in evaluations):
        found.append("The figures above compare next-token distributions; answers to tasks were not compared.")
    if signed and format == "compressed-tensors":
        found.append(
            "Scales are signed: where a group's extreme is positive its scale is negative, so that all codes are used. One opt-in path of "
            "vLLM is known to misread that: int8 activations for Marlin (`VLLM_MARLIN_INPUT_DTYPE=int8`). Leave it off for this model."
        )
    if format != "compressed-tensors":
        found.append("The language model alone: towers for pictures or sound are not in this file.")
    return found


# --- The base model's card -----------------------------------------------------------------------------------------------------------


def _base_cards(about: Json, options: Options, notes: list[str]) -> dict[str, base_card.BaseCard]:
    """The cards that came with the weights, the base model's first."""
    texts = {
        "base model": options.base_text if options.base_text is not None else about.get("base_card"),
        "adapter": about.get("adapter_card"),
    }
    cards = {what: base_card.parse(text) for what, text in texts.items() if text}
    notes += [f"card of the {what}: {card.problem}; taken without it" for what, card in cards.items() if card.problem]
    return cards


def _base_model(about: Json, options: Options, cards: Mapping[str, base_card.BaseCard]) -> str | None:
    """Its Hub id: given, the run's, or the one that an adapter's card names."""
    told = cards["adapter"].meta.get("base_model") if "adapter" in cards else None
    for one in (options.base_model, about["base_model"], told[0] if isinstance(told, list) and told else told):
        if isinstance(one, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", one):
            return one
    return None


def _bodies(cards: Mapping[str, base_card.BaseCard], base_model: str | None, notes: list[str]) -> list[Json]:
    parts = []
    for what, card in cards.items():
        if not card.body:
            continue
        body = base_card.Body(base_model or "" if what == "base model" else "")
        parts.append({"words": f"From here on the card of the {what}, as its authors wrote it.", "body": body.render(card.body)})
        if body.left:
            notes.append(f"card of the {what}: {body.left} relative links lead nowhere; give its Hub id (--base-model)")
    return parts
