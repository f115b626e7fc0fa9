"""One .gguf file, as llama.cpp and what is built on it load it (format: docs/gguf.md of github.com/ggml-org/ggml).

artefact    the folder, and the file: all tensor infos first, then one tensor at a time
layout      plan + family table -> the file's tensors, their types and where their bytes come from
metadata    keys: the architecture's from the family's table, the general ones from here
tokenizer   tokenizer.json -> tokens, types, merges or scores, pre-tokenizer
"""

FORMAT = "gguf"
