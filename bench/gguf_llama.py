"""What bench/gguf_files.py asks of llama.cpp, run by a Python that has llama-cpp-python and numpy.

    python bench/gguf_llama.py quantize IN OUT MIXTURE IMPORTANCE.npz
    python bench/gguf_llama.py continue FILE TEXT
    python bench/gguf_llama.py embed FILE TEXT
"""

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def importance_array(file: str) -> Any:
    """llama.cpp's importance matrix of the arrays in an npz, ended by one without a name."""
    arrays = {name: array.astype(np.float32) for name, array in np.load(file).items()}
    items = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for item, (name, array) in zip(items, arrays.items(), strict=False):
        item.name, item.size = name.encode(), array.size
        item.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return items, arrays  # the arrays must outlive the pointers


def quantize(source: str, target: str, mixture: str, importance: str) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture}")
    options.nthread = 1
    items, kept = importance_array(importance)
    options.imatrix = items
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    assert not failed and kept


def continue_(file: str, text: str) -> None:
    model = llama_cpp.Llama(file, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    answer = model.create_completion(text, max_tokens=16, temperature=0.0)
    print(json.dumps(answer["choices"][0]["text"]))


def embed(file: str, text: str) -> None:
    model = llama_cpp.Llama(file, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, embedding=True)
    print(json.dumps(model.embed(text)))


if __name__ == "__main__":
    {"quantize": quantize, "continue": continue_, "embed": embed}[sys.argv[1]](*sys.argv[2:])
