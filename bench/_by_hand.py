"""What a user would write without memfit: masks of `torch.nn.utils.prune`, or an SVD of each weight, stored dense.

    python bench/_by_hand.py prune|svd MODEL OUT FEWER THREADS
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

MASK_BITS = 1 / 16


@torch.no_grad()
def main() -> None:
    how, directory, out, fewer, threads = sys.argv[1:6]
    torch.set_num_threads(int(threads))
    causal = "CausalLM" in AutoConfig.from_pretrained(directory).architectures[0]
    kind = AutoModelForCausalLM if causal else AutoModel
    model = kind.from_pretrained(directory, dtype=torch.float32)
    share = int(fewer) / 100
    head = model.get_output_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if how == "prune":
            prune.l1_unstructured(module, "weight", amount=share + MASK_BITS)
            prune.remove(module, "weight")
        else:
            rows, inputs = module.weight.shape
            rank = int((1 - share) * rows * inputs / (rows + inputs))
            u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
            module.weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(directory).save_pretrained(Path(out))


if __name__ == "__main__":
    main()
