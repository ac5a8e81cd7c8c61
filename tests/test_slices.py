"""Reading parts of tensors out of safetensors files, against the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperscale.engine import slices
from hyperscale.engine.slices import StoredTensor, index_tensors, slice_reader
from hyperscale.errors import BackboneError


def save(folder: Path) -> list[Path]:
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    first = {
        "single": tensor(37, 11, dtype=torch.float32),
        "double": tensor(5, dtype=torch.float64),
        "scalar": tensor(dtype=torch.float32),
    }
    second = {
        "half": tensor(3, 5, 7, dtype=torch.float16),
        "brain": tensor(64, 9, dtype=torch.bfloat16),
        "empty": tensor(0, 4, dtype=torch.float32),
    }
    save_file(first, folder / "1.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "2.safetensors")
    return [folder / "1.safetensors", folder / "2.safetensors"]


def test_the_index_is_the_librarys(tmp_path: Path):
    files = save(tmp_path)
    stored = index_tensors(files)
    for file in files:
        for name, tensor in load_file(file).items():
            assert (stored[name].file, stored[name].dtype, stored[name].shape) == (file, tensor.dtype, tensor.shape)
    assert len(stored) == 6


@pytest.mark.parametrize("chunk_bytes", [24, 1000, slices._CHUNK_BYTES])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_hold_the_librarys_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, chunk_bytes: int
):
    """Shards as ZeRO-3 cuts them: equal, the last one padded; whatever the size of one read."""
    monkeypatch.setattr(slices, "_CHUNK_BYTES", chunk_bytes)
    files = save(tmp_path)
    stored = index_tensors(files)
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    with slice_reader() as reader:
        for name, whole in expected.items():
            for dtype in (whole.dtype, torch.float32, torch.bfloat16):
                length = -(-whole.numel() // world_size)
                shards = [torch.full((length,), 7.0, dtype=dtype) for _ in range(world_size)]
                for rank, shard in enumerate(shards):
                    reader.read_into(shard, stored[name], rank * length)
                flat = torch.cat(shards)
                assert torch.equal(flat[: whole.numel()], whole.flatten().to(dtype))
                assert (flat[whole.numel() :] == 7).all()  # padding is not touched


def test_any_range_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slices, "_CHUNK_BYTES", 16)
    (file, _) = save(tmp_path)
    stored, flat = index_tensors([file])["single"], load_file(file)["single"].flatten()
    with slice_reader() as reader:
        for start in range(21):
            for length in range(21):
                target = torch.empty(length)
                reader.read_into(target, stored, start)
                assert torch.equal(target, flat[start : start + length])
        beyond = torch.ones(3)
        reader.read_into(beyond, stored, flat.numel() + 5)
        assert torch.equal(beyond, torch.ones(3))


def test_files_are_closed(tmp_path: Path):
    (file, _) = save(tmp_path)
    before = open_files(file)
    with slice_reader() as reader:
        reader.read_into(torch.empty(4), index_tensors([file])["single"], 0)
        assert open_files(file) == before + 1
    assert open_files(file) == before


def open_files(file: Path) -> int:
    return sum(link.exists() and link.resolve() == file.resolve() for link in Path("/proc/self/fd").iterdir())


def write(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_the_error_for_a_damaged_file_names_it(tmp_path: Path):
    def indexing_error(file: Path) -> str:
        with pytest.raises(BackboneError) as caught:
            index_tensors([file])
        assert str(file) in str(caught.value)
        return str(caught.value)

    (file, _) = save(tmp_path)
    whole = file.read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(whole[:-1])
    assert "is cut short: tensor '" in indexing_error(broken)
    assert f"of {len(whole) - 1}; fetch the file again" in indexing_error(broken)
    for start in (b"", whole[:5], whole[:60], b"pytorch's pickled weights" * 10):
        broken.write_bytes(start)
        assert "is not a safetensors file" in indexing_error(broken)
    broken.write_bytes((20).to_bytes(8, "little") + b"x" * 30)
    assert "its header is invalid" in indexing_error(broken)
    for header in ([1], {"w": 3}, {"w": {"dtype": "F32", "shape": [1]}}):
        assert "is not a safetensors file" in indexing_error(write(broken, header, b""))
    quantised = {"w": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}
    assert "tensor 'w' is I8; a backbone's weights are F32, BF16, F16, F64" in indexing_error(
        write(broken, quantised, b"1234")
    )
    # a table that disagrees with itself would make one tensor's bytes another's
    wrong = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    assert "tensor 'w' has 4 bytes for shape [2]" in indexing_error(write(broken, wrong, b"1234"))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path):
    (file, _) = save(tmp_path)
    stored = index_tensors([file])["single"]
    file.write_bytes(file.read_bytes()[: stored.offset + 10])
    with slice_reader() as reader, pytest.raises(BackboneError, match="became shorter while it was read"):
        reader.read_into(torch.empty(37 * 11), stored, 0)
    with slice_reader() as reader, pytest.raises(FileNotFoundError):
        reader.read_into(torch.empty(1), StoredTensor(tmp_path / "gone", torch.float32, (1,), 0), 0)
