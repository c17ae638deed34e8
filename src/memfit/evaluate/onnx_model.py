"""A model's ONNX file run by ONNX Runtime alone: no torch, numbers in numpy.

B batch, T new tokens, P past tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
State = dict[str, Array]
"""Keys and values so far, by the names of the inputs that they go to."""


class OnnxModel:
    """An open file.

    Args:
        file: model.onnx.
        threads: of one operator; they sleep where they wait.
    """

    def __init__(self, file: Path, *, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item.shape for item in self._session.get_inputs()}
        self.outputs = [item.name for item in self._session.get_outputs()]

    @property
    def keeps_past(self) -> bool:
        """Whether it is a decoder."""
        return any(name.startswith("past_key_values.") for name in self.inputs)

    def run(self, ids_BT: Array, past: State | None = None, mask_BPT: Array | None = None) -> tuple[Array, State]:
        """Logits (or last hidden states) of new tokens, and the state with them in it.

        Args:
            ids_BT: int64.
            past: what an earlier call gave; None: nothing came before.
            mask_BPT: int64, 0 for tokens, old or new, that are not to be seen; default: all are.
        """
        batch, new = ids_BT.shape
        names = [name for name in self.inputs if name.startswith("past_key_values.")]
        if past is None:
            sizes = {name: (batch, self.inputs[name][1], 0, self.inputs[name][3]) for name in names}
            past = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
        before = past[names[0]].shape[2] if names else 0
        mask = np.ones((batch, before + new), np.int64) if mask_BPT is None else mask_BPT
        # A token's place is how many before it are seen, so that padding on the left moves nothing.
        places = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, before:]
        given: dict[str, Array] = {
            "input_ids": ids_BT, "attention_mask": mask, "position_ids": places,
            "token_type_ids": np.zeros_like(ids_BT),
        }  # fmt: skip
        answers = self._session.run(None, {name: given[name] for name in self.inputs if name in given} | past)
        state = dict(zip(self.outputs[1:], answers[1:], strict=True))
        return answers[0], {name: state[name.replace("past_key_values", "present")] for name in names}
