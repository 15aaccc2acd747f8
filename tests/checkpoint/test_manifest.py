"""The manifest of a conversion."""

import json

from checkpoint_samples import megatron

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.checkpoint.manifest import MANIFEST, read_manifest


def test_manifest_says_what_was_read_and_its_hashes_know_no_layout(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "a", megatron(2, 2), fsync=False)
    convert(tmp_path / "a", tmp_path / "b", ConversionOptions("flagai", 4), fsync=False)
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")
    content = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert content["source"]["format"] == "Hugging Face safetensors"
    assert content["options"]["tensor_model_parallel_size"] == 2
    assert str(tmp_path) not in json.dumps(content)
