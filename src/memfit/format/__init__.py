"""What goes to disk: safetensors, the output directory, its configuration and the files beside them."""

from memfit.format.companions import save_companions
from memfit.format.config import model_config, module_patterns, quantization_config
from memfit.format.directory import OutputDirectory
from memfit.format.packed import packed_buffers, packed_specs, stored_as
from memfit.format.safetensors import Shard, TensorSpec, Writer

__all__ = [
    "OutputDirectory",
    "Shard",
    "TensorSpec",
    "Writer",
    "model_config",
    "module_patterns",
    "packed_buffers",
    "packed_specs",
    "quantization_config",
    "save_companions",
    "stored_as",
]
