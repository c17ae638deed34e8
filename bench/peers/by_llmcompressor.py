"""llm-compressor: `oneshot` with its modifiers, asymmetric.

rtn: scales by the least and the largest weight (`memoryless_minmax`), no text. mse: scales that a search finds
(`memoryless_mse`), no text. gptq: `GPTQModifier` as it comes (static activation order, damping 0.01). gptq-mse: with
scales as mse finds them. GPTQ takes linear layers alone: a table of words is rounded to nearest beside it.
"""

import sys

import torch
from _peer import Watch, by_group, case_of, linears, load_model, packed_nbytes, tables, windows, write
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

ALGORITHMS = ("rtn", "mse", "gptq", "gptq-mse")


def main() -> None:
    case = case_of(ALGORITHMS)
    watch = Watch()
    model = load_model(case)
    lines, words = linears(model, case), tables(model, case)
    nbytes = packed_nbytes(model, [*lines, *words], by_group(case.group, zero_bits=case.bits), case.bits)
    weights = {
        "num_bits": case.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": case.group,
        "observer": "memoryless_mse" if case.algorithm.endswith("mse") else "memoryless_minmax",
    }  # fmt: skip
    recipe = recipe_of(case.algorithm.startswith("gptq"), [*lines], [*words], weights)
    text = {}
    if case.algorithm.startswith("gptq"):
        tokens = windows(case)
        ones = torch.ones_like(tokens).tolist()
        text = {
            "dataset": Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones}),
            "num_calibration_samples": len(tokens), "max_seq_length": tokens.shape[1],
            "shuffle_calibration_samples": False,
        }  # fmt: skip
    with watch.running():
        oneshot(model=model, recipe=recipe, **text)
        values = {f"{name}.weight": rounded(model.get_submodule(name)) for name in (*lines, *words)}
    settings = {"weights": weights, "modifiers": [type(part).__name__ for part in recipe]}
    write(case, values, watch, package="llmcompressor", packed_nbytes=nbytes, settings=settings)


def rounded(module: torch.nn.Module) -> torch.Tensor:
    """The weight as the file would have it: `oneshot` finds scales, and rounds when it saves."""
    scheme = module.quantization_scheme.weights
    return fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme)


def recipe_of(compensates: bool, lines: list[str], words: list[str], weights: dict) -> list:
    """The modifiers: what GPTQ does not take is rounded beside it."""

    def groups(names: list[str]) -> dict:
        return {"config_groups": {"group_0": {"targets": names, "weights": weights}}}

    if not compensates:
        return [QuantizationModifier(**groups(lines + words))]
    return [GPTQModifier(**groups(lines)), *([QuantizationModifier(**groups(words))] if words else [])]


if __name__ == "__main__":
    sys.exit(main())
