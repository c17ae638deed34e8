"""torchao: `quantize_` with `IntxWeightOnlyConfig`. It takes no calibration; it has no GPTQ on a CPU.

rtn: asymmetric, scales by the least and the largest weight. hqq: symmetric, scales by HQQ (`HQQ_SCALE_ONLY`).
"""

import sys

import torch
from _peer import Watch, by_group, case_of, linears, load_model, packed_nbytes, tables, write
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm as How

ALGORITHMS = ("rtn", "hqq")


def main() -> None:
    case = case_of(ALGORITHMS)
    watch = Watch()
    model = load_model(case)
    chosen: dict[str, nn.Module] = {**linears(model, case), **tables(model, case)}
    names = {id(module) for module in chosen.values()}
    asymmetric = case.algorithm == "rtn"
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{case.bits}"),
        granularity=PerGroup(case.group),
        mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        intx_choose_qparams_algorithm=How.AFFINE if asymmetric else How.HQQ_SCALE_ONLY,
    )
    overhead = by_group(case.group, zero_bits=8 if asymmetric else 0)
    nbytes = packed_nbytes(model, chosen, overhead, case.bits)
    with watch.running():
        quantize_(model, config, filter_fn=lambda module, _: id(module) in names)
    values = {f"{name}.weight": module.weight.dequantize() for name, module in chosen.items()}
    settings = {"config": str(config)}
    write(case, values, watch, package="torchao", packed_nbytes=nbytes, settings=settings)


if __name__ == "__main__":
    sys.exit(main())
