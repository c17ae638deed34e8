"""HQQ: half-quadratic quantization, without calibration. Scales and zero points have 16 bits.

hqq: groups along the inputs (axis 1, which its fast kernels take). hqq-axis0: along the outputs, which its authors
recommend for quality at few bits.
"""

import sys

import torch
from _peer import Watch, by_group, case_of, linears, load_model, packed_nbytes, tables, write
from hqq.core.quantize import Quantizer

ALGORITHMS = ("hqq", "hqq-axis0")


def main() -> None:
    case = case_of(ALGORITHMS)
    watch = Watch()
    model = load_model(case)
    chosen = {**linears(model, case), **tables(model, case)}
    nbytes = packed_nbytes(model, chosen, by_group(case.group, zero_bits=16), case.bits)
    settings = {
        "nbits": case.bits, "group_size": case.group, "axis": int(case.algorithm == "hqq"), "optimize": True,
        "round_zero": case.bits == 4, "channel_wise": True, "device": "cpu",
    }  # fmt: skip
    packed = {}
    with watch.running():
        for name, module in chosen.items():
            # Its packing puts 8 / bits rows into one, and fails where they are not so many. 3 bits are padded.
            rows = case.group if settings["axis"] == 0 else module.weight.numel() // case.group
            packs = case.bits == 3 or rows % (8 // case.bits) == 0
            found, meta = Quantizer.quantize(module.weight, bitpack=packs, **settings)
            # As HQQLinear keeps them. In bf16 a zero point near 128 would be a whole number.
            packed[f"{name}.weight"] = Quantizer.cpu(found, meta | {"compute_dtype": torch.float16})
    values = {name: Quantizer.dequantize(*pair) for name, pair in packed.items()}
    write(case, values, watch, package="hqq", packed_nbytes=nbytes, settings=settings)


if __name__ == "__main__":
    sys.exit(main())
