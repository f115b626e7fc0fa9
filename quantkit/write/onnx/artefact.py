"""The folder of one ONNX model: for onnxruntime model.onnx with its data, for onnxruntime-genai the rest beside them."""

import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from quantkit.disk import replacing, write_whole
from quantkit.errors import CheckpointError, WriteError
from quantkit.families.family import TOWERS, matches, outside_block
from quantkit.model.checkpoint import TensorSource
from quantkit.model.config import text_defaults
from quantkit.model.decoder import Decoder, text_shapes
from quantkit.store import Store
from quantkit.types import Json, Plan
from quantkit.write.onnx.genai import genai_config
from quantkit.write.onnx.layout import Layout

GRAPH, DATA = "model.onnx", "model.onnx.data"
CHUNK = 1 << 24  # elements that are looked at in one go
LIBRARIES = ("onnx", "onnx_ir", "onnxscript")
PASSED_ON = (  # what a tokenizer is made of, and what says how to chat and to sample
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "config.json",
)  # fmt: skip


class OnnxFolder:
    """One artefact folder. The weights are written when the last block is solved, one tensor at a time; the graph comes last.

    Args:
        plan: what happens to every tensor.
        config: the checkpoint's config.json.
        accuracy_level: of the multiplies; 0 computes in fp32, 4 rounds activations to 8 bits.
        embeddings: bits of the embedding tables and the head: 16, 8 or 4.
        checkpoint, store, folder: left out where only sizes are asked for.

    Raises:
        WriteError: a scheme or frequencies that the format does not hold, or the onnx packages are not installed.
        CheckpointError: the plan lacks a tensor of the model.
    """

    def __init__(
        self,
        plan: Plan,
        config: Json,
        accuracy_level: int = 0,
        embeddings: int = 16,
        checkpoint: TensorSource | None = None,
        store: Store | None = None,
        folder: Path | None = None,
    ):
        if not all(find_spec(library) for library in LIBRARIES):
            raise WriteError("the format onnx needs the onnx packages: pip install 'quantkit[onnx]'")
        rope = text_defaults(config).get("rope_parameters") or {}
        if "dynamic" in [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, Mapping)]:
            raise WriteError(
                "config.json: rope_parameters dynamic: its frequencies change with the length of the text, which a graph cannot hold; "
                "no onnx folder is written"
            )
        self.plan, self.config, self.accuracy_level, self.folder = plan, config, accuracy_level, folder
        self._checkpoint, self._store = checkpoint, store
        self.layout = Layout(plan, text_shapes(json.dumps(config, sort_keys=True)), embeddings, checkpoint, store)

    @property
    def about(self) -> Json:
        """What a card tells beside the common."""
        towers = any(matches(pattern, outside_block(name)) for name in self.plan.kept for pattern in TOWERS)
        return {"accuracy_level": self.accuracy_level, "embeddings": self.layout.embeddings, "text_only": towers}

    @property
    def bytes(self) -> int:
        """Exact bytes of the data file, which holds all weights; the graph beside it has about 1 kB a multiply."""
        return self.layout.bytes

    def write_ready(self) -> list[Path]:
        """Write the data file if every block is in the store and it is not written yet."""
        assert self._store is not None
        assert self.folder is not None
        path = self.folder / DATA
        if not all(block.index in self._store for block in self.plan.blocks) or (path.exists() and path.stat().st_size == self.bytes):
            return []
        with replacing(path) as temporary, open(temporary, "wb") as file:
            for offset, piece in self.layout.data():
                tensor = piece.read()
                if tensor.dtype != piece.dtype or tuple(tensor.shape) != piece.shape:
                    raise AssertionError(f"{piece.name}: planned {piece.dtype} {piece.shape}, made {tensor.dtype} {tuple(tensor.shape)}")
                if tensor.is_floating_point() and any(bool(part.isnan().any()) for part in tensor.reshape(-1).split(CHUNK)):
                    raise CheckpointError(f"{piece.name}: holds NaN; the checkpoint is damaged")
                file.write(bytes(offset - file.tell()))
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return [path]

    def finish(self) -> None:
        """The graph, the tokenizer's files, genai_config.json. The data file must be written."""
        assert self._checkpoint is not None
        assert self.folder is not None
        import onnx_ir

        from quantkit.write.onnx.expand import Expander
        from quantkit.write.onnx.trace import trace

        decoder = Decoder(self.config)
        model = Expander(trace(decoder, self.layout), self.layout, DATA, self.accuracy_level).run()
        with replacing(self.folder / GRAPH) as temporary:
            onnx_ir.save(model, temporary)
        source = self._checkpoint.folder
        for name in PASSED_ON:
            if (source / name).is_file():
                with replacing(self.folder / name) as temporary:
                    shutil.copyfile(source / name, temporary)
        made = genai_config(self.plan.model_type, self.config, source, len(decoder.cache_shapes), GRAPH)
        write_whole(self.folder / "genai_config.json", json.dumps(made, indent=2, ensure_ascii=False) + "\n")
