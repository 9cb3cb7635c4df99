"""Published weights: what is read back is what was published, and nothing less than all of it."""

import json

import pytest
import torch

from rollout.weights import PublishedWeights, hash_tensors, publish, weights_folder


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 7, generator=generator),
        "b": torch.randn(3, 3, generator=generator).bfloat16(),
        "table": torch.arange(6),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6, generator=generator).T,
    }


def test_what_is_read_is_what_was_published_bit_for_bit(tensors, tmp_path):
    published = publish(tmp_path, 12, tensors.items())
    found = dict(PublishedWeights(published.folder).weights())
    assert published.folder == weights_folder(tmp_path, 12)
    assert published.policy_step == 12
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_weights_in_several_files_are_the_same_weights(tensors, tmp_path, monkeypatch):
    one = publish(tmp_path / "one", 0, tensors.items())
    monkeypatch.setattr("rollout.weights.SHARD_BYTES", 100)
    many = publish(tmp_path / "many", 0, tensors.items())
    assert len(many.manifest["files"]) > 2
    assert one.hash == many.hash
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in many.weights())


def test_a_folder_without_its_manifest_is_no_publication(tensors, tmp_path):
    published = publish(tmp_path, 0, tensors.items())
    (published.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        PublishedWeights(published.folder)


def test_a_publication_that_was_cut_off_is_not_seen(tensors, tmp_path):
    def cut_off():
        yield from list(tensors.items())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 3, cut_off())
    assert not weights_folder(tmp_path, 3).exists()
    publish(tmp_path, 3, tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]


def test_a_damaged_file_is_named(tensors, tmp_path):
    published = publish(tmp_path, 0, tensors.items())
    (name,) = published.manifest["files"]
    content = bytearray((published.folder / name).read_bytes())
    content[-1] ^= 1
    (published.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} are damaged"):
        dict(published.weights())


def test_another_schema_is_refused(tensors, tmp_path):
    published = publish(tmp_path, 0, tensors.items())
    (published.folder / "manifest.json").write_text(json.dumps(published.manifest | {"schema": 99}))
    with pytest.raises(ValueError, match="have schema 99; this version reads schema 1"):
        PublishedWeights(published.folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_the_hash_tells_any_single_bit_and_any_exchange_apart(dtype):
    tensor = torch.arange(1, 12).to(dtype)
    seen = {hash_tensors([("w", tensor)])}
    flat = tensor.view(torch.uint8)
    for byte in range(len(flat)):
        flat[byte] ^= 1
        seen.add(hash_tensors([("w", tensor)]))
        flat[byte] ^= 1
    for other in range(1, 11):
        exchanged = tensor.clone()
        exchanged[[0, other]] = tensor[[other, 0]]
        seen.add(hash_tensors([("w", exchanged)]))
    assert len(seen) == 1 + len(flat) + 10
    assert hash_tensors([("w", tensor)]) in seen


def test_the_hash_knows_names_shapes_and_dtypes_and_not_the_layout_in_memory():
    tensor = torch.arange(6.0)
    different = [("w", tensor), ("v", tensor), ("w", tensor.view(2, 3)), ("w", tensor.view(torch.int32))]
    assert len({hash_tensors([each]) for each in different}) == 4
    assert hash_tensors([("w", tensor.view(2, 3).T)]) == hash_tensors([("w", tensor.view(2, 3).T.contiguous())])


def test_the_hash_does_not_depend_on_how_many_words_are_summed_at_a_time(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = hash_tensors([("w", tensor)])
    monkeypatch.setattr("rollout.weights.WORDS_AT_A_TIME", 7)
    assert hash_tensors([("w", tensor)]) == whole
