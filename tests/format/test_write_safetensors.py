import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.errors import MemfitError
from memfit.format.packed import packed_specs
from memfit.format.safetensors import TensorSpec, Writer
from memfit.packed.scheme import Scheme
from memfit.source.safetensors import open_checkpoint


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "shape": torch.tensor([3, 5]),
        "bf16": torch.randn(3, 5).bfloat16(),  # 30 bytes: what follows is not aligned
        "fp32": torch.randn(4, 2),
        "words": torch.randint(-(2**31), 2**31 - 1, (7, 3), dtype=torch.int32),
        "int8": torch.randint(-128, 127, (5,), dtype=torch.int8),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "half ü": torch.randn(1, 1, 2).half(),
    }


def specs_of(found: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in found.items()]


def write(directory: Path, found: dict[str, torch.Tensor], **options: int) -> Writer:
    with Writer(directory, specs_of(found), **options) as writer:
        for name, tensor in found.items():
            writer.write(name, tensor)
    return writer


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    found = tensors()
    writer = write(tmp_path, found)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == found.keys()
    for name, tensor in found.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [shard.nbytes for shard in writer.shards] == [(tmp_path / "model.safetensors").stat().st_size]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        digests.append(write(tmp_path / name, tensors()).shards[0].sha256)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_tensors_written_in_parts_are_the_same_bytes_and_come_back_in_parts(tmp_path: Path, step: int) -> None:
    found = tensors()
    del found["nothing"]  # a reader refuses tensors without elements
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = write(tmp_path / "whole", found, shard_nbytes=100)
    with Writer(tmp_path / "parts", specs_of(found), shard_nbytes=100) as writer:
        for name, tensor in found.items():
            flat = tensor.reshape(-1)
            writer.write_parts(name, (flat[n : n + step] for n in range(0, flat.numel(), step)))
    assert [shard.sha256 for shard in writer.shards] == [shard.sha256 for shard in whole.shards]
    back = open_checkpoint(tmp_path / "parts")
    assert back is not None
    for name, tensor in found.items():
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), step):
            part = torch.empty_like(flat[start : start + step])
            back.read_part(name, start, part)
            assert torch.equal(part, flat[start : start + step])
    with pytest.raises(ValueError, match=r"fp32 is torch.float32 \(4, 2\); no torch.float32 5 from 4 on"):
        back.read_part("fp32", 4, torch.empty(5))


def test_parts_that_are_not_the_whole_are_refused(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="a: 6 entries were announced, 4 came"), Writer(tmp_path, specs) as writer:
        writer.write_parts("a", [torch.ones(2), torch.ones(2)])


def test_shards_hold_at_most_their_bytes_and_the_index_names_them(tmp_path: Path) -> None:
    found = {f"layer.{i}": torch.full((64,), float(i)) for i in range(10)} | {"large": torch.ones(200)}
    write(tmp_path, found, shard_nbytes=600)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    for name, tensor in found.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_tensor_that_was_not_announced_so_is_refused(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.ones(2, 3), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="next tensor announced is a"), Writer(tmp_path, specs) as writer:
        writer.write("b", torch.ones(2))
    with pytest.raises(ValueError, match=r"announced as torch.float32 \[2, 3\], got torch.float32 \[3, 2\]"):
        Writer(tmp_path, specs).write("a", torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got torch.bfloat16"):
        Writer(tmp_path, specs).write("a", torch.ones(2, 3).bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        Writer(tmp_path, specs).write("a", torch.ones(3, 2).t())
    with pytest.raises(ValueError, match="announced twice: a"):
        Writer(tmp_path, specs[:1] * 2)


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    specs = specs_of({"a": torch.ones(2), "b": torch.ones(2)})
    missing = pytest.raises(ValueError, match="1 of 2 tensors were written; b is missing")
    with missing, Writer(tmp_path, specs) as writer:
        writer.write("a", torch.ones(2))


def test_fake_tensors_are_checked_and_nothing_is_written(tmp_path: Path) -> None:
    with FakeTensorMode():
        write(tmp_path, {"a": torch.empty(2, 3), "b": torch.empty(4, dtype=torch.bfloat16)}, shard_nbytes=8)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(MemfitError, match=r"free, .* TiB needed"):
        Writer(tmp_path, [TensorSpec(name="a", dtype=torch.int8, shape=(2**50,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_specs_are_the_bytes_that_the_scheme_counts(bits: int) -> None:
    scheme = Scheme(bits=bits, group=32)
    specs = packed_specs("layer", (48, 96), scheme)
    assert sum(s.nbytes for s in specs if not s.name.endswith("shape")) == scheme.nbytes((48, 96))


def test_embeddings_and_zero_points_are_stored_as_int8() -> None:
    asymmetric = Scheme(bits=3, group=32, symmetric=False)
    specs = packed_specs("table", (48, 96), asymmetric, embedding=True, tied=["head"])
    assert [(s.name, s.dtype, s.shape) for s in specs] == [
        ("table.weight", torch.int8, (48, 96)),
        ("table.weight_scale", torch.bfloat16, (48, 3)),
        ("table.weight_zero_point", torch.int8, (48, 3)),
        ("head.weight_scale", torch.bfloat16, (48, 3)),
        ("head.weight_zero_point", torch.int8, (48, 3)),
    ]
    assert packed_specs("layer", (48, 96), asymmetric) == packed_specs(
        "layer", (48, 96), asymmetric, embedding=True
    )
