"""An adapter whose folder brings another tokenizer is used neither in audits nor in conversions."""

from pathlib import Path

import pytest
import tiny
from fuzz.seeds import adapter
from tokenizers import Tokenizer
from wrong_inputs import Box, assert_one_line, run

from checkpoints_convert import convert
from sama_jax.errors import ModelError


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    place = tmp_path_factory.mktemp("adapters")
    tiny.folder(place / "reference")
    tiny.write_texts(place / "texts.jsonl", tiny.texts(12, (8, 28)))
    for name in ("plain", "same", "pad", "other"):
        adapter(place / name)
    tiny.tokenizer().save(str(place / "same" / "tokenizer.json"), pretty=True)
    with_pad = Tokenizer.from_file(str(place / "reference" / "tokenizer.json"))
    with_pad.add_special_tokens(["[PAD]"])
    with_pad.save(str(place / "pad" / "tokenizer.json"))
    tiny.tokenizer(seed=7).save(str(place / "other" / "tokenizer.json"))
    texts = place / "texts.jsonl"
    return Box(place, place / "reference", place / "reference", texts, place / "out")


@pytest.mark.parametrize("name", ["plain", "same", "pad", "other"])
def test_an_adapters_tokenizer_must_give_the_ids_of_the_texts(box: Box, name: str, capsys):
    command = box.command(target=None, adapter=box.path / name, dry_run=True, attacks="loss")
    found = run(capsys, command)
    if name == "other":
        assert_one_line(found, 4, "brings a tokenizer that gives other ids", str(box.path / name))
        assert str(box.reference) in found.err
    else:
        assert found.code == 0, found.err


@pytest.mark.parametrize("name", ["plain", "same", "pad", "other"])
def test_a_merged_folder_would_have_the_bases_tokenizer(box: Box, name: str, tmp_path: Path):
    given = box.reference, tmp_path / "out"
    if name in ("plain", "same"):
        convert.to_hf(*given, adapter=box.path / name, quiet=True)
    else:
        what = r"added token '\[PAD\]'" if name == "pad" else "has .* tokens by the one"
        with pytest.raises(ModelError, match=what):
            convert.to_hf(*given, adapter=box.path / name, quiet=True)
        assert not given[1].exists()
