"""What writing an ONNX folder costs at the 26B-A4B's real width: peak memory, which must not grow with depth, and seconds of the graph.

    python benchmarks/onnx_wide.py [--layers 2 6] [--graph 30] [--folder DIR]

Each depth in a process of its own, its peak from the operating system's account. Nothing is solved: weights and integers are made up
when their turn comes, of the real shapes, so all that is measured is the writer. `--graph` traces a depth without writing its data. Exit
code 1 where the peak grows by more than 10 %, or a graph takes ten minutes of the processor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GROWTH, LIMIT = 1.1, 600
VOCABULARY = 262144


def child(folder: Path, layers: int, data: bool) -> None:
    import torch
    import transformers
    from wide import config as wide_config

    from quantkit.model.blocks import published_entries
    from quantkit.plan import make_plan
    from quantkit.recipe import load_recipe
    from quantkit.write.onnx.artefact import OnnxFolder

    transformers.utils.logging.set_verbosity_error()
    config = wide_config(layers, VOCABULARY)
    entries = published_entries(config)
    plan = make_plan(load_recipe("rtn-w4"), config, entries)
    linears = {(block.index, linear.local): linear for block in plan.blocks for linear in block.linears}

    class Made:
        """Checkpoint and store at once: every byte is set, so that it takes memory while it is held."""

        def __init__(self):
            self.folder, self.config, self.entries = folder, config, entries

        def view(self, name: str) -> torch.Tensor:
            return torch.full(entries[name].shape, 0.5, dtype=entries[name].dtype)

        def read(self, index: int, key: str) -> torch.Tensor:
            local, _, part = key.rpartition("/")
            out, columns = linears[index, local].shape
            if part == "packed":
                return torch.full((out, columns // 8), 0x12345678, dtype=torch.int32)
            return torch.full((out, columns // 32), 0.01, dtype=torch.bfloat16)

        def folded(self, index: int) -> set[str]:
            return set()

        def __contains__(self, index: int) -> bool:
            return True

    made = Made()
    writer = OnnxFolder(plan, config, checkpoint=made, store=made, folder=folder)  # type: ignore[arg-type]
    began = time.perf_counter(), time.process_time()
    if data:
        writer.write_ready()
    between = time.perf_counter(), time.process_time()
    writer.finish()
    ended = time.perf_counter(), time.process_time()
    told = {
        "data_bytes": writer.bytes,
        "graph_bytes": (folder / "model.onnx").stat().st_size,
        "data_seconds": [round(b - a, 1) for a, b in zip(began, between, strict=True)],
        "graph_seconds": [round(b - a, 1) for a, b in zip(between, ended, strict=True)],
    }
    (folder / "told.json").write_text(json.dumps(told))


def measure(root: Path | None, layers: int, data: bool) -> tuple[int, dict]:
    with tempfile.TemporaryDirectory(dir=root) as name:
        command = [sys.executable, __file__, "--child", name, str(layers), str(int(data))]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{layers} layers: ended with {process.returncode}")
        return usage.ru_maxrss * 1024, json.loads((Path(name) / "told.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 6])
    parser.add_argument("--graph", type=int, nargs="*", default=[30])
    parser.add_argument("--folder", type=Path, help="where the folders lie while they are needed (5 GB for 6 layers)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, layers, data = arguments.child
        child(Path(folder), int(layers), data == "1")
        return
    peaks, slow = [], False
    for layers in [*arguments.layers, *arguments.graph]:
        data = layers in arguments.layers
        peak, told = measure(arguments.folder, layers, data)
        graph = "{} s ({} s of processor)".format(*told["graph_seconds"])
        line = f"{layers} layers: peak {peak / 2**30:.2f} GiB; graph {told['graph_bytes'] / 1e6:.1f} MB in {graph}"
        if data:
            peaks.append(peak)
            line += f"; data {told['data_bytes'] / 1e9:.2f} GB in {told['data_seconds'][0]} s"
        slow |= told["graph_seconds"][1] >= LIMIT
        print(line, flush=True)
    growth = peaks[-1] / peaks[0] if peaks else 1.0
    print(f"peak with {arguments.layers[-1:]} layers over {arguments.layers[:1]}: {growth:.3f} (limit {GROWTH})")
    sys.exit(int(growth > GROWTH or slow))


if __name__ == "__main__":
    main()
