"""The model card of an artefact folder. Every figure comes from the run's own report."""

from pathlib import Path

import jinja2

from quantkit.types import Json


def write_card(folder: Path, about: Json, format: str) -> None:
    """README.md of the artefact of one format, from the run's report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.publish", "."), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    recipe = about["recipe"]
    weights = recipe["weights"]
    rows = [row for block in about["blocks"] for row in block["linears"].items()]
    schemes = {row["scheme"] for name, row in rows if "experts." in name}
    environment.filters["size"] = _size
    text = environment.get_template("card.md.jinja").render(
        title=f"{about['model']} {recipe['name']}",
        base_model=about["base_model"],
        quantized=bool(rows),
        scheme=f"{weights['bits']} bits, {'symmetric' if weights['symmetric'] else 'asymmetric'}, group {weights['group']}",
        format=format,
        bytes=about["bytes"][format],
        bits_per_weight=about["bits_per_weight"][format],
        gguf=next((path.name for path in folder.glob("*.gguf")), ""),
        rounded=about.get("gguf"),
        onnx=about["onnx"] if format == "onnx" else None,
        parameters=about["parameters"],
        recipe=recipe["name"],
        recipe_description=recipe["description"],
        calibration=about["calibration"],
        heldout=about["heldout"],
        serve_name=f"{about['model']}-{recipe['name']}",
        needs_conversion=about["family"] == "gemma4" and bool(schemes),
        snippet=len(schemes) == 1 and " sym " in next(iter(schemes)),
        signed=any(row["scheme"].endswith(" signed") for _, row in rows),
        fused=recipe["experts_layout"] == "fused",
        versions=about["versions"],
        seed=recipe["calibration"]["seed"],
    )
    temporary = folder / ".README.md.part"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "README.md")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
