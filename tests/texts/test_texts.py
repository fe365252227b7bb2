"""Reading, tokenising and batching of texts."""

import csv
import gzip
import hashlib
import json
import sys
import zlib

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sama_jax.errors import DataError, ModelError, UsageError
from sama_jax.texts.buckets import bucket_lengths, plan_batches
from sama_jax.texts.read import Text, collect, group_numbers, read_split, read_texts
from sama_jax.texts.same_ids import require_same_ids
from sama_jax.texts.tokenizer import TextTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 4


def make_tokenizer(vocab_size=300, corpus=CORPUS, add_ends=False):
    """A byte-level BPE; with `add_ends` every text gets a begin and an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if add_ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(make_tokenizer(), "memory")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def of_folder(path):
    return TextTokenizer.from_folder(path, None)


def error_of(path, kind=DataError, read=read_texts):
    with pytest.raises(kind) as caught:
        read(path)
    assert caught.value.exit_code == kind.exit_code
    return str(caught.value)


# --- formats -------------------------------------------------------------------------------------

RECORDS = [
    {"id": "a", "text": 'first, with "quotes"\nand lines', "label": 1, "group": "d1"},
    {"id": "b", "text": "zweiter Text é 😀", "label": 0, "group": "d, 2"},
    {"id": "c", "text": "third", "label": None, "group": None},
]


def as_jsonl(path):
    return write(path / "t.jsonl", "\n" + lines(*RECORDS) + "  \n")


def as_jsonl_with_bom_and_crlf(path):
    return write(path / "t.jsonl", "\ufeff" + lines(*RECORDS).replace("\n", "\r\n"))


def as_gzip(path):
    return write(path / "t.jsonl.gz", gzip.compress(lines(*RECORDS).encode()))


def as_gzip_without_its_suffix(path):
    return write(path / "t.jsonl", gzip.compress(lines(*RECORDS).encode()))


def as_json_list(path):
    return write(path / "t.json", json.dumps(RECORDS, indent=1))


def as_json_list_named_jsonl(path):
    return write(path / "t.jsonl", json.dumps(RECORDS))


def as_jsonl_named_json(path):
    return write(path / "t.json", lines(*RECORDS))


def as_json_columns(path):
    columns = {n: [r[n] for r in RECORDS] for n in RECORDS[0]}
    return write(path / "t.json", json.dumps({"data": columns, "indices": [4, 5, 6]}))


def as_csv(path):
    with (path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["label", "text", "id", "group", "other"])
        writer.writeheader()
        writer.writerows(RECORDS)
    return path / "t.csv"


def as_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path / "t.parquet")
    return path / "t.parquet"


FORMATS = [
    as_jsonl,
    as_jsonl_with_bom_and_crlf,
    as_gzip,
    as_gzip_without_its_suffix,
    as_json_list,
    as_json_list_named_jsonl,
    as_jsonl_named_json,
    as_json_columns,
    as_csv,
    as_parquet,
]


@pytest.mark.parametrize("make", FORMATS)
def test_every_format_gives_the_same_texts(make, tmp_path):
    found = read_texts(make(tmp_path)).texts
    assert [(t.id, t.text, t.label, t.group) for t in found] == [
        (r["id"], r["text"], r["label"], r["group"]) for r in RECORDS
    ]


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (as_jsonl, "t.jsonl:4"),
        (as_json_list, "t.json[2]"),
        (as_csv, "t.csv:5"),
        (as_parquet, "t.parquet:row 3"),
    ],
)
def test_a_text_knows_where_it_stands(make, where, tmp_path):
    assert read_texts(make(tmp_path)).texts[2].where == where


def test_published_columns_without_ids(tmp_path):
    path = write(tmp_path / "train_subset.json", json.dumps({"data": {"text": ["x", "y"]}}))
    found = read_texts(path).texts
    assert [(t.text, t.label) for t in found] == [("x", None), ("y", None)]
    assert found[0].id == hashlib.sha256(b"x").hexdigest()[:16]


def test_mimir_rows_give_a_member_and_a_nonmember(tmp_path):
    path = write(tmp_path / "m.jsonl", lines({"member": "m", "nonmember": "n", "neighbors": ["q"]}))
    assert [(t.text, t.label) for t in read_texts(path).texts] == [("m", 1), ("n", 0)]


def test_mimir_columns_in_csv(tmp_path):
    path = write(tmp_path / "m.csv", "member,nonmember\nm,n\n")
    assert [(t.text, t.label) for t in read_texts(path).texts] == [("m", 1), ("n", 0)]


LABELLED = {"text": ["x", "y"], "label": [1, 0]}


@pytest.mark.parametrize("data", [["news", "blog"], [{"from": "a"}, {"from": "b"}], {"by": "z"}])
def test_a_column_called_data_takes_no_texts_away(data, tmp_path):
    path = write(tmp_path / "t.json", json.dumps(LABELLED | {"data": data}))
    assert [(t.text, t.label) for t in read_texts(path).texts] == [("x", 1), ("y", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LABELLED | {"data": {"text": ["v"]}}, r"top level \(text, label\) and under 'data'"),
        (LABELLED | {"data": [{"text": "v"}]}, r"top level \(text, label\) and under 'data'"),
        ({"data": ["x", "y"], "label": [1, 0]}, "has label beside 'data', where the texts are"),
        ({"data": ["x", "y"], "is_member": [1, 0]}, "has is_member beside 'data'"),
        ({"data": {"text": ["x"]}, "group": ["a"]}, "has group beside 'data'"),
        ({"data": {"text": ["x"]}, "train": {"text": ["y"]}}, r"in several parts \(data, train\)"),
        ({"data": ["x", "y"], "train": ["z"]}, r"in several parts \(data, train\)"),
        ({"data": [{"text": "x"}], "test": [{"text": "y"}]}, r"several parts \(data, test\)"),
        ({"train": [{"text": "x"}], "test": [{"text": "y"}]}, r"several parts \(train, test\)"),
    ],
)
def test_texts_or_labels_on_both_sides_of_data_are_refused(content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path / "t.json", json.dumps(content)))


@pytest.mark.parametrize("one", [(1, 0), ("True", "False"), (True, False), ("a text", "another")])
def test_member_and_nonmember_beside_a_text_are_no_labels_that_get_lost(one, tmp_path):
    record = {"text": "x", "member": one[0], "nonmember": one[1]}
    path = write(tmp_path / "t.jsonl", lines({"text": "w", "label": 1}, record))
    with pytest.raises(DataError, match=r"t\.jsonl:2: has a field 'nonmember' besides the text"):
        read_texts(path)
    found = read_texts(write(path, lines(record | {"label": 0}))).texts
    assert [(t.text, t.label) for t in found] == [("x", 0)]


def test_labels_in_two_numbers_beside_a_named_text_are_refused(tmp_path):
    path = write(tmp_path / "t.csv", "body,member,nonmember,label\nx,1,0,\n")
    with pytest.raises(DataError, match="has a field 'nonmember' besides the text"):
        read_texts(path, "body")
    pair = write(tmp_path / "p.jsonl", lines({"body": "x", "member": "m", "nonmember": "n"}))
    assert [t.text for t in read_texts(pair, "body").texts] == ["x"]


def test_mimirs_pair_with_a_label_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", lines({"member": "m", "nonmember": "n", "label": 0}))
    with pytest.raises(DataError, match=r"t\.jsonl:1: has 'member' and 'nonmember', which say"):
        read_texts(path)


def test_what_member_means_is_asked_of_every_record(tmp_path):
    rows = {"member": "m", "nonmember": "n"}, {"text": "x", "label": 1}, {"text": "y", "member": 0}
    with pytest.raises(DataError, match=r"t\.jsonl:3: has a field 'member'"):
        read_texts(write(tmp_path / "t.jsonl", lines(*rows)))


def test_an_empty_label_of_csv_hides_no_other_one(tmp_path):
    with pytest.raises(DataError, match="has a field 'is_member'"):
        read_texts(write(tmp_path / "t.csv", "text,label,is_member\nx,,1\n"))


def test_other_line_separators_stay_inside_a_text(tmp_path):
    texts = ["a\u2028b", "c\x85d"]
    content = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    found = read_texts(write(tmp_path / "t.jsonl", content)).texts
    assert [(t.text, t.where) for t in found] == list(zip(texts, ("t.jsonl:1", "t.jsonl:2")))


def test_a_long_csv_field_is_read_and_the_global_limit_restored(tmp_path):
    before = csv.field_size_limit()
    found = read_texts(write(tmp_path / "t.csv", "text\n" + "x" * 200_000 + "\n"))
    assert len(found.texts[0].text) == 200_000
    assert csv.field_size_limit() == before


def test_a_path_may_be_a_string_and_texts_of_ones_own_are_checked(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "x"}\n{"text": "y"}')
    known = read_texts(path)
    assert read_texts(str(path)) == known
    assert len(read_split(str(path), str(path)).texts) == 4
    first, second = known.texts
    with pytest.raises(DataError, match="is another text's, too"):
        collect([first, second._replace(id=first.id)])
    for label in (2, -1):
        with pytest.raises(DataError, match=f"is {label}; expected 1 "):
            collect([first._replace(label=label)])


def test_split_labels_come_from_the_files(tmp_path):
    members = write(tmp_path / "m.jsonl", lines({"text": "x", "label": 1}, {"text": "y"}))
    nonmembers = write(tmp_path / "n.jsonl", lines({"text": "z", "label": 0}, {"text": "y"}))
    found = read_split(members, nonmembers)
    assert [(t.text, t.label) for t in found.texts] == [("x", 1), ("z", 0), ("y", 1), ("y", 0)]
    assert found.in_both == [found.texts[2].id]


def test_split_refuses_a_label_that_disagrees(tmp_path):
    members = write(tmp_path / "m.jsonl", lines({"text": "x"}, {"text": "y", "label": 0}))
    with pytest.raises(DataError, match=r"m\.jsonl:2: label is 0, but this is the file of members"):
        read_split(members, members)


# --- ids -----------------------------------------------------------------------------------------


def ids_of(tmp_path, *records):
    found = read_texts(write(tmp_path / "t.jsonl", lines(*records)))
    return [t.id for t in found.texts], found


def test_repeated_texts_get_numbered_ids_and_are_counted(tmp_path):
    h = hashlib.sha256(b"x").hexdigest()[:16]
    ids, found = ids_of(tmp_path, *({"text": t} for t in "xyxxx"))
    assert (ids[0], *ids[2:]) == (h, h + "#2", h + "#3", h + "#4")
    assert found.repeated == 3
    assert found.in_both == []


def test_a_given_id_repeated_with_its_text_is_numbered(tmp_path):
    ids, found = ids_of(tmp_path, *[{"id": "a", "text": "x"}] * 2)
    assert ids == ["a", "a#2"]
    assert found.repeated == 1


def test_numbered_ids_never_take_an_id_that_was_given(tmp_path):
    ids, _ = ids_of(
        tmp_path, {"id": "a", "text": "x"}, {"id": "a", "text": "x"}, {"id": "a#2", "text": "y"}
    )
    assert ids == ["a", "a#3", "a#2"]


def test_texts_of_both_labels_are_reported(tmp_path):
    _, found = ids_of(
        tmp_path,
        {"id": "p", "text": "x", "label": 1},
        {"id": "q", "text": "y", "label": 1},
        {"id": "r", "text": "x", "label": 0},
    )
    assert found.in_both == ["p"]


def test_integer_ids_are_kept_as_strings(tmp_path):
    assert ids_of(tmp_path, {"id": 7, "text": "x"})[0] == ["7"]


def test_groups_are_names_or_numbers_and_numbered_as_they_appear(tmp_path):
    _, found = ids_of(
        tmp_path,
        {"text": "a", "group": "x"},
        {"text": "b", "group": 7},
        {"text": "c"},
        {"text": "d", "group": "7"},
        {"text": "e", "group": "x"},
        {"member": "f", "nonmember": "g", "group": "y"},
    )
    assert [t.group for t in found.texts] == ["x", "7", None, "7", "x", "y", "y"]
    assert group_numbers(found.texts) == [0, 1, None, 1, 0, 2, 2]


def test_one_id_on_two_texts_names_both_places(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        lines({"id": "a", "text": "x"}, {"text": "z"}, {"id": "a", "text": "y"}),
    )
    message = error_of(path)
    assert "id 'a' stands for two different texts, at t.jsonl:1 and at t.jsonl:3" in message


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (2, "another number"),
        (-1, "another number"),
        (0.5, "another number"),
        ("yes", "another string (3 characters)"),
        ("10", "another string (2 characters)"),
        ([1], "a list"),
        ({}, "an object"),
    ],
)
def test_labels_that_mean_nothing_are_refused_by_their_kind(label, kind, tmp_path):
    path = write(tmp_path / "t.jsonl", lines({"text": "x"}, {"text": "y", "label": label}))
    message = error_of(path)
    assert message.startswith(f"t.jsonl:2: label is {kind}; expected 1 (member), 0 (non-member)")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "x"', "t.jsonl:2: not valid JSON ("),
        ("[" * 100_000, "t.jsonl:2: not valid JSON ("),
        ('{"txt": "x", "n": 1}', "t.jsonl:2: has no field 'text' (its fields: txt, n)"),
        ('{"text": 3}', "t.jsonl:2: 'text' must be a string, found int"),
        ('{"text": null}', "t.jsonl:2: 'text' must be a string, found null"),
        ("3", "t.jsonl:2: expected a JSON object, found int"),
        ('{"text": "x", "id": ["a"]}', 't.jsonl:2: id is ["a"], expected a string'),
        ('{"text": "x", "id": ""}', "t.jsonl:2: id is empty"),
        ('{"text": "x", "group": 1.5}', "t.jsonl:2: group is 1.5, expected a string"),
        ('{"text": "x", "group": true}', "t.jsonl:2: group is true, expected a string"),
        ('{"text": "x", "group": ""}', "t.jsonl:2: group is empty"),
        ('{"text": "x", "Group": "a"}', "t.jsonl:2: has a field 'Group'; write it 'group'"),
        ('{"member": "x", "nonmember": 3}', "t.jsonl:2: 'nonmember' must be a string, found int"),
    ],
)
def test_a_bad_line_is_named(line, expected, tmp_path):
    message = error_of(write(tmp_path / "t.jsonl", '{"text": "ok"}\n' + line + "\n"))
    assert message.startswith(expected)


def test_up_to_ten_problems_come_in_one_message(tmp_path):
    bad = "".join("{\n" if i % 2 else lines({"text": i}) for i in range(13))
    rows = error_of(write(tmp_path / "t.jsonl", lines({"text": "ok"}) + bad)).split("\n")
    assert rows[0].startswith("t.jsonl: 13 problems, the first is t.jsonl:2: 'text' must be")
    assert len(rows) == 11
    assert rows[-2].strip().startswith("t.jsonl:11: not valid JSON")
    assert rows[-1].strip() == "... and 3 more"


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.txt"])
def test_an_empty_file_holds_no_texts(name, tmp_path):
    assert "holds no texts" in error_of(write(tmp_path / name, " \n" if name != "t.csv" else ""))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "nowhere.jsonl: no such file; expected" in error_of(tmp_path / "nowhere.jsonl")
    assert "is a folder; expected a file" in error_of(tmp_path)


def test_binary_and_latin1_files_are_refused(tmp_path):
    latin = lines({"text": "ok"}).encode() + b'{"text": "\xe9"}\n'
    assert "t.jsonl:2: not UTF-8 text (byte 0xe9)" in error_of(write(tmp_path / "t.jsonl", latin))
    assert "not UTF-8 text" in error_of(write(tmp_path / "t.bin", bytes(range(256))))


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    message = error_of(write(tmp_path / "t.txt", "just words"))
    assert "unknown kind of file; expected .jsonl" in message


def test_a_truncated_gzip_file_is_refused(tmp_path):
    content = gzip.compress(lines(*[{"text": str(i)} for i in range(1000)]).encode())
    message = error_of(write(tmp_path / "t.jsonl.gz", content[: len(content) // 2]))
    assert "gzip file is truncated or damaged" in message


def test_json_errors_are_named(tmp_path):
    assert "t.json:2: not valid JSON" in error_of(write(tmp_path / "t.json", '[{"text": "x"},\n{]'))
    assert "found a string" in error_of(write(tmp_path / "t.json", '"x"'))
    uneven = {"text": ["x", "y"], "label": [1]}
    assert "lists of one length" in error_of(write(tmp_path / "t.json", json.dumps(uneven)))
    assert "t.json[1]: expected a JSON object" in error_of(
        write(tmp_path / "t.json", '[{"text": "x"}, 3]')
    )


def test_tabs_separate_fields_in_tsv(tmp_path):
    rows = 'text\tlabel\nx, y\t1\n"a\ttab, a ""quote""\nand a line"\t0\n'
    for name in ("t.tsv", "T.TSV"):
        found = read_texts(write(tmp_path / name, rows)).texts
        assert [(t.text, t.label, t.where) for t in found] == [
            ("x, y", 1, f"{name}:2"),
            ('a\ttab, a "quote"\nand a line', 0, f"{name}:3"),
        ]
    path = tmp_path / "t.tsv"
    assert "t.tsv:2: more fields than the header" in error_of(write(path, "text\nx\ty\n"))
    assert "t.tsv:2: not valid TSV" in error_of(write(path, 'text\n"said" he\n'))


def test_csv_errors_are_named(tmp_path):
    path = tmp_path / "t.csv"
    assert "t.csv:1: has no column 'text' (its columns: a, b)" in error_of(
        write(path, "a,b\n1,2\n")
    )
    assert "t.csv:3: more fields than the header" in error_of(write(path, "text\nok\nx, y\n"))
    assert "t.csv:3: not valid CSV" in error_of(write(path, 'text\nok\n"x\n'))
    assert "t.csv:2: label is another string (1 characters)" in error_of(
        write(path, "text,label\nx,2\n")
    )


def test_parquet_errors_are_named(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    whole = as_parquet(tmp_path).read_bytes()
    message = error_of(write(tmp_path / "u.parquet", whole[: len(whole) // 2]))
    assert "u.parquet: not a complete parquet file" in message
    pyarrow.parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "v.parquet")
    assert "has no column 'text' (its columns: words)" in error_of(tmp_path / "v.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = error_of(tmp_path / "t.parquet", UsageError)
    assert "pip install 'sama-jax[parquet]'" in message


# --- tokenising ----------------------------------------------------------------------------------


def test_encoding_cuts_and_reports(tokenizer):
    text = "the quick brown fox"
    whole, cut = (tokenizer.encode([text], n)[0] for n in (100, 3))
    assert whole.ids.dtype == np.int32
    assert not whole.truncated
    assert whole.zlib_bytes == len(zlib.compress(text.encode()))
    assert cut.truncated
    np.testing.assert_array_equal(cut.ids, whole.ids[:3])
    covered = make_tokenizer().decode(cut.ids.tolist())
    assert text.startswith(covered)
    assert cut.zlib_bytes == len(zlib.compress(covered.encode()))
    assert not tokenizer.encode([text], len(whole.ids))[0].truncated


def test_cutting_keeps_the_tokens_that_the_tokenizer_adds():
    ends = TextTokenizer(make_tokenizer(add_ends=True), "memory")
    plain = TextTokenizer(make_tokenizer(), "memory")
    text = "the quick brown </s> fox"
    expected = plain.encode([text], 100)[0].ids
    whole, cut = ends.encode([text], 100)[0], ends.encode([text], 5)[0]
    np.testing.assert_array_equal(whole.ids, [0, *expected, 1])
    np.testing.assert_array_equal(np.flatnonzero(whole.special), [0, len(whole.ids) - 1])
    np.testing.assert_array_equal(cut.ids, [0, *expected[:3], 1])
    np.testing.assert_array_equal(cut.special, [True, False, False, False, True])
    covered = make_tokenizer().decode(cut.ids[1:4].tolist())
    assert cut.zlib_bytes == len(zlib.compress(covered.encode()))


def test_truncation_and_padding_stored_in_the_file_change_nothing(tmp_path, tokenizer):
    stored = make_tokenizer()
    stored.enable_truncation(2)
    stored.enable_padding(length=64, pad_id=0)
    stored.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.from_folder(tmp_path, None)
    for a, b in zip(loaded.encode(CORPUS[:2], 100), tokenizer.encode(CORPUS[:2], 100)):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert a[2:] == b[2:]


def test_lone_surrogates_and_empty_texts_do_not_crash(tokenizer, tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a\\ud800b"}\n{"text": ""}\n')
    texts = [t.text for t in read_texts(path).texts]
    odd, empty = tokenizer.encode(texts, 100)
    np.testing.assert_array_equal(odd.ids, tokenizer.encode(["a\ufffdb"], 100)[0].ids)
    assert len(empty.ids) == 0
    assert empty.special.shape == (0,)


def test_encode_reports_every_text_to_progress(tokenizer):
    done = []
    assert len(tokenizer.encode(["x"] * 600, 8, done.append)) == 600
    assert sum(done) == 600


def test_token_names_and_largest_id():
    raw = make_tokenizer()
    raw.add_special_tokens(["<|mdm_mask|>"])
    tokenizer = TextTokenizer(raw, "memory")
    assert tokenizer.token_id("<|mdm_mask|>") == tokenizer.max_id == raw.get_vocab_size() - 1
    assert tokenizer.token_id("<|none|>") is None
    TextTokenizer(raw, "memory", tokenizer.max_id + 1)
    with pytest.raises(ModelError, match=r"largest id is \d+, but the embedding has \d+ rows"):
        TextTokenizer(raw, "memory", tokenizer.max_id)


def test_a_folder_without_a_usable_tokenizer_is_a_model_error(tmp_path):
    message = error_of(tmp_path, ModelError, of_folder)
    assert "no usable tokenizer; expected tokenizer.json" in message
    write(tmp_path / "tokenizer.json", "{}")
    message = error_of(tmp_path, ModelError, of_folder)
    assert "tokenizer.json: not a usable tokenizer file" in message


def test_files_without_tokenizer_json_go_through_transformers(tmp_path, tokenizer):
    raw = json.loads(make_tokenizer().to_str())
    vocab = {"<|endoftext|>": 300, **raw["model"]["vocab"]}
    write(tmp_path / "vocab.json", json.dumps(vocab))
    merges = [" ".join(m) for m in raw["model"]["merges"]]
    write(tmp_path / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    write(tmp_path / "tokenizer_config.json", json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    loaded = TextTokenizer.from_folder(tmp_path, None)
    for a, b in zip(loaded.encode(CORPUS, 100), tokenizer.encode(CORPUS, 100)):
        np.testing.assert_array_equal(a.ids, b.ids)


def some_texts(*texts):
    return [Text(f"id{i}", t, None, f"t.jsonl:{i + 1}") for i, t in enumerate(texts)]


def test_other_bytes_with_the_same_ids_are_the_same_tokenizer(tmp_path):
    raw = json.loads(make_tokenizer().to_str())
    write(tmp_path / "a.json", json.dumps(raw))
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": "<|never|>"})
    write(tmp_path / "b.json", json.dumps(raw, indent=1))
    a, b = (TextTokenizer.from_file(tmp_path / n, None) for n in ("a.json", "b.json"))
    assert a.fingerprint != b.fingerprint
    require_same_ids(a, b, some_texts(*CORPUS))


def test_other_ids_are_refused_with_the_first_text_that_differs(tokenizer):
    other = TextTokenizer(make_tokenizer(vocab_size=280), "other")
    texts = some_texts("q", "the quick brown fox")
    assert len(other.encode(["q"], 9)[0].ids) == 1
    with pytest.raises(ModelError, match=r"at token \d+ of text 'id1' \(t\.jsonl:2\)") as caught:
        require_same_ids(tokenizer, other, texts)
    assert "at token 1 of text 'id1'" in str(caught.value)
    assert str(tokenizer.encode([texts[1].text], 6)[0].ids.tolist()) not in str(caught.value)


# --- batching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (512, (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)),
        (200, (32, 64, 96, 128, 160, 192, 200)),
        (1100, (*range(32, 257, 32), 320, 384, 448, 512, 640, 768, 896, 1024, 1100)),
        (32, (32,)),
        (7, (7,)),
        (33, (32, 33)),
    ],
)
def test_bucket_lengths(max_length, expected):
    assert bucket_lengths(max_length) == expected


def test_plan_puts_every_text_once_into_the_smallest_bucket_longest_first():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 129, 200)
    plans = plan_batches(lengths, (32, 64, 128), lambda length: 256 // length)
    assert [p.length for p in plans] == sorted((p.length for p in plans), reverse=True)
    assert all(p.rows.dtype == np.int32 and len(p.rows) == 256 // p.length for p in plans)
    rows = np.concatenate([p.rows for p in plans])
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.flatnonzero(lengths))
    for bucket, smaller in ((128, 64), (64, 32), (32, 0)):
        inside = np.concatenate([p.rows for p in plans if p.length == bucket])
        kept = inside[inside >= 0]
        assert (lengths[kept] <= bucket).all()
        assert (lengths[kept] > smaller).all()
        np.testing.assert_array_equal(kept, np.sort(kept))  # the given order
        assert (inside[len(kept) :] == -1).all()  # filling only at the end


def test_a_small_bucket_joins_the_next_larger_used_one():
    lengths = np.array([100, 5, 90, 60, 100, 100, 100])
    plans = plan_batches(lengths, (32, 64, 128), lambda length: 5)
    assert [p.length for p in plans] == [128, 128]
    rows = np.concatenate([p.rows for p in plans])
    np.testing.assert_array_equal(rows, [0, 1, 2, 3, 4, 5, 6, -1, -1, -1])


def test_a_half_full_bucket_stays_and_the_largest_used_one_always_does():
    plans = plan_batches(np.array([5, 6, 60]), (32, 64, 128), lambda length: 4)
    assert [(p.length, p.rows.tolist()) for p in plans] == [
        (64, [2, -1, -1, -1]),
        (32, [0, 1, -1, -1]),
    ]


def test_a_bucket_that_does_not_pay_joins_the_next_larger_used_one():
    """64 has nobody, so 32's texts would go to 96; with them it pays to keep 96 apart from 128."""
    lengths = np.array([20] * 2 + [90] * 6 + [128])
    asked = []

    def pays(count: int, length: int, larger: int) -> bool:
        asked.append((count, length, larger))
        return count * (larger - length) >= 200

    plans = plan_batches(lengths, (32, 64, 96, 128), lambda length: 4, pays)
    assert [(p.length, p.rows.tolist()) for p in plans] == [
        (128, [8, -1, -1, -1]),
        (96, [0, 1, 2, 3]),
        (96, [4, 5, 6, 7]),
    ]
    assert asked == [(2, 32, 96), (8, 96, 128)]
    plans = plan_batches(lengths, (32, 64, 96, 128), lambda length: 4, lambda *_: False)
    assert {p.length for p in plans} == {128}


def test_no_texts_no_batches_and_too_long_texts_are_refused():
    assert plan_batches(np.array([0, 0]), (32,), lambda length: 4) == []
    with pytest.raises(ValueError, match="33 tokens exceeds the bucket of 32"):
        plan_batches(np.array([33]), (32,), lambda length: 4)
