"""A folder that onnxruntime runs and onnxruntime-genai opens (docs/onnx.md).

artefact    the folder: data, graph, genai_config.json, tokenizer files
layout      plan + the text model's names -> the initialisers, their places in model.onnx.data and where their bytes come from
trace       the model class on hollow weights -> a graph in which every multiply with a weight is a placeholder
expand      placeholders -> MatMulNBits, grouped experts, initialisers that point into model.onnx.data
genai       genai_config.json
"""

FORMAT = "onnx"
