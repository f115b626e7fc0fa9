"""A compressed-tensors folder read as a stranger: what its files hold, beside what its config.json says they hold.

Nothing of the writer is used, so a slip of the writer's shows here; weights are decoded by compressed-tensors itself, as engines do.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import PublishError
from quantkit.publish.artefact import read_json
from quantkit.types import Json, expert_of

PER_LINEAR = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
FUSED = ("_packed", "_scale", "_zero_point")  # experts that stayed one tensor; without a shape
TOWER = re.compile(r"\b(vision|audio|image)_?(tower|model|encoder|embedder)?\b|\bembed_(vision|audio)\b|multi_modal_projector")
LAYER = re.compile(r"\blayers\.(\d+)\.")
PART = 1 << 24  # elements that are looked at together


@dataclass(frozen=True, slots=True)
class Stored:
    """One packed matrix, or all experts' together where they stay fused."""

    name: str
    experts: int  # 1 for a matrix of its own
    shape: tuple[int, int]  # (out, in)
    bits: int
    group: int  # columns that share a scale; 0 = the whole row
    symmetric: bool
    fused: bool

    @property
    def kind(self) -> str:
        """Its name without numbers and prefix: experts.*.gate_proj, self_attn.q_proj."""
        return re.sub(r"\b\d+\b", "*", LAYER.split(self.name)[-1])

    @property
    def place(self) -> tuple[int, str]:
        """The block and the name inside it."""
        match = LAYER.search(self.name)
        return (int(match[1]), self.name[match.end() :]) if match else (-1, self.name)

    @property
    def of_expert(self) -> bool:
        return expert_of(self.name) is not None or self.fused


class Packed:
    """Headers of all weight files, and tensors one at a time.

    Raises:
        PublishError: config.json cannot be read, or a weight file is not safetensors or cut short.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors calls them: BF16, I32
        self.doubled: list[str] = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        if name in self.places:
                            self.doubled.append(name)
                        part = file.get_slice(name)
                        self.places[name], self.shapes[name] = path, tuple(part.get_shape())
                        self.dtypes[name] = part.get_dtype()
            except (SafetensorError, OSError) as problem:
                raise PublishError(f"{path.name}: not a whole safetensors file ({str(problem)[:100]})") from None

    def read(self, name: str) -> Tensor:
        with safe_open(self.places[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Every tensor's bytes, from headers alone."""
        return ((name, math.prod(shape) * _bits(self.dtypes[name]) // 8) for name, shape in self.shapes.items())

    @property
    def text_config(self) -> Json:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def quantization(self) -> Json:
        found = self.config.get("quantization_config")
        if not isinstance(found, dict):
            return {}
        try:
            for group in found.get("config_groups", {}).values():
                weights = group["weights"]
                bits, width, _ = weights["num_bits"], weights.get("group_size"), weights["symmetric"]
                if not (isinstance(bits, int) and bits > 0 and isinstance(width or 0, int)):
                    raise ValueError(f"num_bits {bits!r}, group_size {width!r}")
                [_fits(pattern, "") for pattern in group["targets"]]
            [_fits(pattern, "") for pattern in found.get("ignore", ())]
        except (AttributeError, KeyError, TypeError, ValueError, re.error) as problem:
            raise PublishError(f"config.json: quantization_config cannot be read ({type(problem).__name__}: {problem})") from None
        return found

    def scheme(self, module: str) -> Json | None:
        """What config.json says of one module: a group of quantization_config, or None (kept), as vLLM and transformers match it."""
        if any(_fits(pattern, module) for pattern in self.quantization.get("ignore", ())):
            return None
        groups = list(self.quantization.get("config_groups", {}).values())
        by_name = [g for g in groups if any((t.startswith("re:") and _fits(t, module)) or t == module for t in g["targets"])]
        return (by_name or [g for g in groups if "Linear" in g["targets"]] or [None])[0]

    @cached_property
    def stored(self) -> list[Stored]:
        """Every packed matrix, by what its own tensors say. Those that do not fit together are left to `problems`."""
        return [one for one in (self._stored(name) for name in self.places if name.endswith("_packed")) if isinstance(one, Stored)]

    def problems(self) -> Iterator[str]:
        """What does not fit: shapes with one another, with config.json, with the index. One line each."""
        yield from (f"{name}: stands in two weight files" for name in self.doubled)
        yield from self._index_problems()
        for name in self.places:
            if name.endswith("_packed"):
                found = self._stored(name)
                if isinstance(found, str):
                    yield found
            elif name.endswith(".weight") and len(self.shapes[name]) == 2 and LAYER.search(name):
                scheme = self.scheme(name.removesuffix(".weight"))
                if scheme is not None:
                    bits = scheme["weights"]["num_bits"]
                    yield f"{name}: lies unpacked, and config.json says {bits} bits; engines would not find its codes"
        yield from self._config_problems()

    def _stored(self, packed: str) -> Stored | str:
        fused = not packed.endswith(".weight_packed")
        stem = packed.removesuffix("_packed" if fused else ".weight_packed")
        part = {key: f"{stem}{key}" for key in (FUSED if fused else PER_LINEAR)}
        scale, zero = part["_scale" if fused else ".weight_scale"], part["_zero_point" if fused else ".weight_zero_point"]
        scheme = self.scheme(f"{stem.rpartition('.')[0]}.0.gate_proj" if fused else stem)
        if scheme is None:
            return f"{stem}: packed, and config.json leaves it out (ignore); engines would not decode it"
        weights = scheme["weights"]
        bits, group, symmetric = weights["num_bits"], weights.get("group_size") or 0, bool(weights["symmetric"])
        if scale not in self.shapes:
            return f"{scale}: missing"
        if symmetric == (zero in self.shapes):
            return f"{zero}: {'present, and config.json says symmetric' if symmetric else 'missing, and config.json says asymmetric'}"
        if len(self.shapes[packed]) != (3 if fused else 2) or not all(self.shapes[packed]) or not all(self.shapes[scale] or (0,)):
            return f"{packed}: shape {self.shapes[packed]}, its scales {self.shapes[scale]}; no packed matrix"
        *experts, out, words = self.shapes[packed]
        groups = self.shapes[scale][-1]
        if fused:
            columns = groups * group if group else words * 32 // bits
        else:
            told = part[".weight_shape"]
            if told not in self.shapes:
                return f"{told}: missing"
            if self.shapes[told] != (2,):
                return f"{told}: shape {self.shapes[told]}; rows and columns are expected"
            out_told, columns = (int(n) for n in self.read(told))
            if columns < 1:
                return f"{told}: {columns} columns"
            if out_told != out:
                return f"{packed}: {out} rows, its weight_shape says {out_told}"
        expected = {packed: -(-columns * bits // 32), scale: columns // (group or columns)}
        for name, last in expected.items():
            if self.shapes[name] != (*experts, out, last):
                given, wanted = " x ".join(map(str, self.shapes[name])), " x ".join(map(str, (*experts, out, last)))
                return f"{name}: shape {given}, a {out} x {columns} matrix in {bits} bits, group {group or 'row'}, needs {wanted}"
        if group and columns % group:
            return f"{packed}: {columns} columns are no whole groups of {group}"
        if not symmetric and self.shapes[zero] != (*experts, -(-out * bits // 32), expected[scale]):
            return f"{zero}: shape {self.shapes[zero]} does not fit {out} rows of {expected[scale]} groups"
        return Stored(stem, experts[0] if experts else 1, (out, columns), bits, group, symmetric, fused)

    def _index_problems(self) -> Iterator[str]:
        path = self.folder / "model.safetensors.index.json"
        shards = {place.name for place in self.places.values()}
        if not path.is_file():
            if len(shards) > 1:
                yield f"{path.name}: missing, and there are {len(shards)} weight files"
            return
        named = read_json(path).get("weight_map", {})
        if not isinstance(named, dict):
            yield f"{path.name}: its weight_map is no table"
            return
        for name in sorted(named.keys() ^ self.places.keys())[:1]:
            where = "which no weight file holds" if name in named else "is not in it"
            yield f"{path.name}: {name} {where}"
        for name in [n for n, place in self.places.items() if n in named and named[n] != place.name][:1]:
            yield f"{path.name}: {name} is said to lie in {named[name]}, it lies in {self.places[name].name}"

    def _config_problems(self) -> Iterator[str]:
        config = self.text_config
        text = [name for name in self.places if not TOWER.search(name)]
        depth = len({int(match[1]) for name in text if (match := LAYER.search(name))})
        if isinstance(config.get("num_hidden_layers"), int) and config["num_hidden_layers"] != depth:
            yield f"config.json: num_hidden_layers {config['num_hidden_layers']}, the files hold {depth} layers"
        if not self.quantization.get("config_groups") and any(name.endswith("_packed") for name in text):
            yield "config.json: no quantization_config, and the files hold packed weights"
        embedding = next((name for name in text if name.endswith("embed_tokens.weight")), None)
        if embedding is not None:
            wanted = (config.get("vocab_size"), config.get("hidden_size"))
            if all(isinstance(n, int) for n in wanted) and self.shapes[embedding] != wanted:
                rows, width = self.shapes[embedding]
                yield f"config.json: vocabulary {wanted[0]}, width {wanted[1]}; {embedding} is {rows} x {width}"
        tied = self.config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        if tied is False and not any("lm_head" in name for name in text):
            yield "config.json: tie_word_embeddings is false, and the files hold no lm_head"

    def not_numbers(self) -> Iterator[str]:
        """Tensors that hold NaN, weights and scales that hold infinity, scales of zero. Reads every float once."""
        for name in self.places:
            tensor = self.read(name)
            if not tensor.is_floating_point():
                continue
            strict = name.endswith(("weight", "_scale"))  # infinity is legal in the bounds of clipped towers
            for part in tensor.reshape(-1).split(PART):
                if bool(part.isnan().any()) or (strict and bool(part.isinf().any())):
                    yield f"{name}: holds {'NaN' if bool(part.isnan().any()) else 'infinity'}"
                    break
                if name.endswith("_scale") and bool((part == 0).any()):
                    yield f"{name}: a scale of 0, which makes its group nothing"
                    break

    def signed(self) -> bool:
        """Whether a symmetric scale is negative; looks at one matrix of each kind."""
        seen: dict[str, Stored] = {}
        for one in self.stored:
            seen.setdefault(one.kind, one)
        return any(bool((self.read(f"{one.name}{'' if one.fused else '.weight'}_scale") < 0).any()) for one in seen.values())

    def decode(self, one: Stored) -> Tensor:
        """A packed matrix (out, in) in fp32, by compressed-tensors' own decoder."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        if one.fused:
            raise PublishError(f"{one.name}: fused experts are not decoded here")
        keys = [key for key in PER_LINEAR if f"{one.name}{key}" in self.places]
        state = {key.removeprefix("."): self.read(f"{one.name}{key}") for key in keys}
        scheme = QuantizationScheme.model_validate(self.scheme(one.name))
        decoded: Tensor = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
        return decoded.float()


def _fits(pattern: str, module: str) -> bool:
    """A target or an ignored name, as compressed-tensors means it: the module's whole name, or an expression after `re:`."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return module == pattern or module.rpartition(".")[2] == pattern


def _bits(dtype: str) -> int:
    """Of an element, from safetensors' name: BF16, I32, F8_E4M3, BOOL."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def distance(weight: Tensor, decoded: Tensor, rounds: int = 12) -> float:
    """Share of a weight's square sum that its decoded codes do not explain, whatever folds did to its rows and columns.

    A fold multiplies columns or rows; the scales that fit best are found in turn (alternating least squares) and divided out.
    Shapes (out, in), fp32.
    """
    rows, columns = torch.ones(len(weight), 1), torch.ones(1, weight.shape[1])
    for _ in range(rounds):
        scaled = decoded * columns
        rows = (weight * scaled).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp_min(1e-30)
        scaled = decoded * rows
        columns = (weight * scaled).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True).clamp_min(1e-30)
    return float((weight - decoded * rows * columns).square().sum() / weight.square().sum().clamp_min(1e-30))


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Plain symmetric rounding, the extremes of a group half a step beyond the highest code: what a distance is held against."""
    grouped = weight.view(len(weight), -1, group or weight.shape[1])
    scale = (grouped.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).clamp_min(1e-30)
    return ((grouped / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view(weight.shape)


def spread(linears: list[Stored], count: int) -> list[Stored]:
    """A sample: of every kind in turn, from all depths."""
    by_kind: dict[str, list[Stored]] = {}
    for one in linears:
        by_kind.setdefault(one.kind, []).append(one)
    each = max(1, -(-count // max(len(by_kind), 1)))
    taken = [(group, min(each, len(group))) for group in by_kind.values()]
    return [group[number * len(group) // many] for group, many in taken for number in range(many)]
