"""AutoRound, by its own recipes.

rtn: `auto-round-rtn`, no text. opt-rtn: `auto-round-opt-rtn`, scales weighted by the text's inputs. tuned: its default,
200 steps of signed gradients for each block, symmetric; at 2 bits with `enable_alg_ext`, as it recommends. tuned-asym:
the same, asymmetric. best: `auto-round-best`, 1000 steps.

It runs on the processor, or on AUTOROUND_DEVICE; its times are that device's then.

It rounds no tables outside of GGUF: a table of words goes through its function for weights, symmetric.
"""

import os
import sys
from typing import Any

import torch
from _peer import Watch, by_group, case_of, linears, load_model, packed_nbytes, tables, windows, write
from auto_round import AutoRound
from auto_round.data_type.int import quant_tensor_opt_rtn_sym as searched
from auto_round.data_type.int import quant_tensor_rtn_sym as rounded
from transformers import AutoTokenizer

ALGORITHMS = ("rtn", "opt-rtn", "tuned", "tuned-asym", "best")
STEPS = {"rtn": 0, "opt-rtn": 0, "tuned": 200, "tuned-asym": 200, "best": 1000}


def main() -> None:
    case = case_of(ALGORITHMS)
    watch = Watch()
    model = load_model(case)
    lines, words = linears(model, case), tables(model, case)
    steps, symmetric = STEPS[case.algorithm], case.algorithm != "tuned-asym"
    zero_bits = 0 if symmetric else case.bits
    nbytes = packed_nbytes(model, [*lines, *words], by_group(case.group, zero_bits=zero_bits), case.bits)
    tokens = windows(case)
    options: dict[str, Any] = {
        "bits": case.bits, "group_size": case.group, "sym": symmetric, "iters": steps, "seqlen": tokens.shape[1],
        "nsamples": len(tokens), "batch_size": 8, "device_map": os.environ.get("AUTOROUND_DEVICE", "cpu"),
    }  # fmt: skip
    if steps:
        options["enable_alg_ext"] = case.bits == 2 or case.algorithm == "best"
    else:
        options["disable_opt_rtn"] = case.algorithm == "rtn"
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    text = torch.utils.data.DataLoader(rows, batch_size=options["batch_size"])
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    with watch.running():
        model, _ = AutoRound(model, tokenizer, dataset=text, **options).quantize()
        table = rounded if case.algorithm == "rtn" else searched
        for module in words.values():
            module.weight.copy_(table(module.weight, bits=case.bits, group_size=case.group)[0])
    values = {f"{name}.weight": model.get_submodule(name).weight for name in (*lines, *words)}
    write(case, values, watch, package="auto-round", packed_nbytes=nbytes, settings=options)


if __name__ == "__main__":
    sys.exit(main())
