"""Conversations as texts: fields, templates, which tokens are answers, and where they are cut."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sama_jax.arrays import Rendered
from sama_jax.errors import DataError, ModelError, UsageError
from sama_jax.programs.run_identity import form_of
from sama_jax.texts import spans
from sama_jax.texts.conversations import NAMED, Form, Turn, named_template
from sama_jax.texts.folder_template import folder_template
from sama_jax.texts.read import read_split, read_texts
from sama_jax.texts.tokenizer import TextTokenizer

PAIRS = [("ka ro mi", "sun dal"), ("  Two\nlines ", "x"), ("ünï 😀", "日本 kaka\n\nro "), ("", "")]
MARKS = ("<|im_start|>", "<|im_end|>", "<|startoftext|>", "<|eot_id|>")


def form(name: str = "chatml", **options: Any) -> Form:
    return Form(named_template(name), **options)


def put(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_all_forms_of_the_same_pairs_are_the_same_texts(tmp_path: Path, name: str):
    forms = {
        "messages": lambda p, r: messages(("user", p), ("assistant", r)),
        "prompt, response": lambda p, r: {"prompt": p, "response": r},
        "prompt, completion": lambda p, r: {"prompt": p, "completion": r, "response": None},
        "Alpaca": lambda p, r: {"instruction": p, "input": "", "output": r, "text": "other"},
    }
    found = [
        read_texts(put(tmp_path / "t.jsonl", *(made(*pair) for pair in PAIRS[:3])), form=form(name))
        for made in forms.values()
    ]
    read = [[(t.id, t.text, t.rendered) for t in one.texts] for one in found]
    assert read[1:] == read[:1] * 3
    assert len({text for _, text, _ in read[0]}) == 3


def test_columns_and_parquet_and_csv_hold_conversations(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [messages(("user", p), ("assistant", r))["messages"] for p, r in PAIRS[:3]]
    labels = [1, 0, 1]
    pq.write_table(pa.table({"messages": rows, "label": labels}), tmp_path / "t.parquet")
    columns = {"prompt": [p for p, _ in PAIRS[:3]], "response": [r for _, r in PAIRS[:3]]}
    (tmp_path / "t.json").write_text(json.dumps({"data": columns | {"label": labels}}))
    pa_csv = pytest.importorskip("pyarrow.csv")
    pa_csv.write_csv(pa.table(columns | {"label": labels}), tmp_path / "t.csv")
    read = [
        [(t.text, t.label) for t in read_texts(tmp_path / f"t.{kind}", form=form("llama")).texts]
        for kind in ("parquet", "json", "csv")
    ]
    assert read[0] == read[1] == read[2]
    assert [label for _, label in read[0]] == labels


def test_alpacas_input_stands_behind_a_blank_line(tmp_path: Path):
    record = {"instruction": "Sum.", "input": "1, 2", "output": "3"}
    (text,) = read_texts(put(tmp_path / "t.jsonl", record), form=form("plain")).texts
    assert (text.text, text.scored, text.words) == ("Sum.\n\n1, 23", "3", "Sum.\n\n1, 2\n\n3")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "private"}, "holds no conversation (its fields: text)"),
        ({"prompt": "private"}, "holds no conversation (its fields: prompt)"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "has a response and a completion"),
        ({"prompt": ["private"], "response": "b"}, "prompt must be a string, found list"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be a string, found int"),
        ({"messages": "private"}, "messages is no list"),
        ({"messages": [{"role": "bot", "content": "private"}]}, "message 1 has none of the roles"),
        (messages(("user", "private")), "no message is of the role assistant"),
        ({"messages": [{"role": "assistant"}]}, "content of message 1 must be a string"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
            "message 1 calls tools",
        ),
    ],
)
def test_what_is_no_conversation_is_named_by_its_line_alone(tmp_path: Path, record, said: str):
    path = put(tmp_path / "t.jsonl", {"prompt": "a", "response": "b"}, record)
    with pytest.raises(DataError) as caught:
        read_texts(path, form=form())
    assert f"t.jsonl:2: {said}" in str(caught.value)
    assert "private" not in str(caught.value)


def test_without_a_template_the_message_names_the_flag(tmp_path: Path):
    path = put(tmp_path / "t.jsonl", messages(("user", "a"), ("assistant", "b")))
    with pytest.raises(DataError, match=r"no field 'text'.*--template NAME"):
        read_texts(path)


def test_flags_that_do_not_go_together_are_refused(tmp_path: Path):
    path = put(tmp_path / "t.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(UsageError, match="--text-field names plain texts"):
        read_texts(path, "prompt", form=form())
    with pytest.raises(UsageError, match="plain names no end-of-text token"):
        form("plain", end_tokens=1)
    with pytest.raises(UsageError, match="unknown template 'chatmi'; did you mean 'chatml'"):
        named_template("chatmi")


def test_one_id_for_two_ways_to_split_one_text_is_refused(tmp_path: Path):
    records = [
        {"id": 1, "prompt": "ab", "response": "c"},
        {"id": 1, "prompt": "a", "response": "bc"},
    ]
    with pytest.raises(DataError, match="id '1' stands for two different texts"):
        read_texts(put(tmp_path / "t.jsonl", *records), form=form("plain"))
    split = [put(tmp_path / f"{i}.jsonl", r | {"id": i}) for i, r in enumerate(records)]
    found = read_split(*split, form=form("plain"))
    assert found.texts[0].text == found.texts[1].text
    assert found.texts[0].content != found.texts[1].content


# --- templates -----------------------------------------------------------------------------------

TURNS = [
    Turn("system", "Be brief."),
    Turn("user", " hi\n"),
    Turn("assistant", "yo "),
    Turn("user", "and?"),
    Turn("assistant", "no"),
]
LLAMA = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>' + '\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def template_folder(path: Path, template: str, **settings: str) -> Path:
    path.mkdir()
    config = {"chat_template": template, "bos_token": "<|begin_of_text|>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def rendered(template: Any, turns: list[Turn]) -> Rendered:
    return Rendered(tuple(template.write(turns)), template.adds)


@pytest.mark.parametrize(("name", "source"), [("llama", LLAMA), ("chatml", CHATML)])
def test_a_named_template_writes_what_the_published_one_does(tmp_path: Path, name, source: str):
    """transformers renders the whole; our folder's template finds the answers in it."""
    library = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer(), bos_token="<|begin_of_text|>", chat_template=source
    )
    whole = library.apply_chat_template([t._asdict() for t in TURNS], tokenize=False)
    ours = rendered(named_template(name), TURNS)
    theirs = rendered(folder_template(template_folder(tmp_path / "f", source)), TURNS)
    assert str(ours) == str(theirs) == whole
    scored = [whole[start:end] for start, end in spans.joined(ours.spans)]
    end = "<|eot_id|>" if name == "llama" else "<|im_end|>"
    assert scored == [("yo" if name == "llama" else "yo ") + end, "no" + end]
    # ChatML's own template ends a turn by a line end, too, and knows no better.
    found = [whole[start:end] for start, end in spans.joined(theirs.spans)]
    assert found == [one + "\n" * (name == "chatml") for one in scored]
    assert [p.text for p in theirs.pieces if p.scored and p.words] in (["yo ", "no"], ["yo", "no"])


def test_a_folders_template_that_gives_answers_no_place_is_refused(tmp_path: Path):
    always = LLAMA.replace("{% if add_generation_prompt %}", "{% if true %}")
    made = folder_template(template_folder(tmp_path / "f", always))
    with pytest.raises(DataError, match=r"in another way once more follows.*choose one of llada"):
        made.write(TURNS[:3])


def test_a_folders_template_runs_in_a_sandbox_and_tells_nothing_of_a_text(tmp_path: Path):
    for number, source in enumerate(
        [
            "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
            "{{ 1/0 }}",
        ]
    ):
        made = folder_template(template_folder(tmp_path / str(number), source))
        with pytest.raises(DataError, match=r"chat template of .* fails \(\w+\)"):
            made.write(TURNS)
    with pytest.raises(ModelError, match="no chat template"):
        folder_template(tmp_path)


def test_the_template_of_an_adapter_counts_unless_its_base_has_another(tmp_path: Path):
    base, plain = template_folder(tmp_path / "base", CHATML), tmp_path / "plain"
    same = template_folder(tmp_path / "same", CHATML, pad_token="<pad>")  # CHATML names none
    other = template_folder(tmp_path / "other", LLAMA)
    plain.mkdir()
    assert folder_template(plain, other).source == LLAMA
    assert folder_template(base, same, plain).where == str(base)
    with pytest.raises(ModelError, match="have different chat templates") as found:
        folder_template(base, other)
    assert str(base) in str(found.value)
    assert str(other) in str(found.value)


def test_end_tokens_and_flattening(tmp_path: Path):
    path = put(tmp_path / "t.jsonl", messages(*TURNS))
    (text,) = read_texts(path, form=form("llada", end_tokens=2)).texts
    assert text.text.endswith("no<|eot_id|>" + "<|endoftext|>" * 2)
    assert text.text[slice(*spans.joined(text.rendered.spans)[-1])].startswith("no<|eot_id|><|end")
    (flat,) = read_texts(path, form=form("llada", loss_on="text", end_tokens=2)).texts
    assert flat.text == text.text == flat.scored
    assert flat.id == text.id


# --- tokens --------------------------------------------------------------------------------------


def byte_level(*, trims: bool = False, ends: bool = False) -> TextTokenizer:
    made = tiny.tokenizer()
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in (*MARKS, "[B]", "[E]")])
    if ends:
        pairs = [(name, made.token_to_id(name)) for name in ("[B]", "[E]")]
        made.post_processor = processors.TemplateProcessing("[B] $A [E]", None, pairs)
    elif trims:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    return TextTokenizer(made, "here")


def bytes_of(tokenizer: TextTokenizer, ids: np.ndarray) -> list[int]:
    """Bytes of each token: a byte-level token has a character a byte, an added one its own."""
    made = tokenizer._tokenizer
    return [len(made.id_to_token(int(i))) for i in ids]


def words(draw: random.Random) -> str:
    return "".join(draw.choices(["ka", "ro", " ", "\n", "é", "😀", "x", "  mi", "te "], k=9))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("options", [{}, {"trims": True}, {"ends": True}])
def test_a_token_is_an_answers_if_all_its_bytes_are(name: str, options: dict[str, bool]):
    tokenizer, draw, seen = byte_level(**options), random.Random(3), 0
    for _ in range(60):
        turns = [Turn("user", words(draw)), Turn("assistant", words(draw))] * draw.choice([1, 2])
        made = rendered(named_template(name), turns)
        (found,) = tokenizer.encode([made], 10_000)
        assert found.prompt is not None
        # An oracle that knows no offsets: sums of bytes.
        answer = np.concatenate([[p.scored] * len(p.text.encode()) for p in made.pieces])
        own = found.ids[~found.special]
        ends = np.cumsum(bytes_of(tokenizer, own))
        assert ends[-1] == len(answer)
        expected = [answer[a:b].all() for a, b in zip([0, *ends], ends)]
        assert (~found.prompt[~found.special]).tolist() == expected
        assert found.prompt[found.special].all()
        mixed = [answer[a:b].any() and not answer[a:b].all() for a, b in zip([0, *ends], ends)]
        seen += sum(mixed)
        plain = tokenizer._tokenizer.encode(str(made), add_special_tokens=made.adds)
        assert found.ids.tolist() == plain.ids
    assert seen or name != "plain"  # tokens of both sides occur


def test_words_of_wordpiece_and_metaspace_are_answers(tmp_path: Path):
    vocab = {w: i for i, w in enumerate(["[UNK]", "say", ":", "hello", "world", "▁say", "▁hello"])}
    wordpiece = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    meta = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    meta.pre_tokenizer = pre_tokenizers.Metaspace()
    for made, expected in ((wordpiece, [1, 1, 0, 0]), (meta, [1, 1, 0])):
        turns = [Turn("user", "Say: "), Turn("assistant", "Hello WORLD")]
        if made is meta:
            turns = [Turn("user", "say say "), Turn("assistant", "hello")]
            expected = [1, 1, 1]  # ▁hello holds the space before it
        (found,) = TextTokenizer(made, "here").encode(
            [rendered(named_template("plain"), turns)], 99
        )
        assert found.prompt.astype(int).tolist() == expected


def test_a_flattened_text_has_the_same_tokens_and_all_may_be_masked(tmp_path: Path):
    tokenizer = byte_level()
    path = put(tmp_path / "t.jsonl", messages(*TURNS))
    one, flat = (
        tokenizer.encode([read_texts(path, form=form(loss_on=on)).texts[0].content], 999)[0]
        for on in ("response", "text")
    )
    assert one.ids.tolist() == flat.ids.tolist()
    assert flat.prompt is None
    assert flat.own_tokens == len(flat.ids) > one.own_tokens > 0
    assert one.characters == len("yo <|im_end|>no<|im_end|>")


# --- where they are cut --------------------------------------------------------------------------


def slow_fitting(answer: list[int], special: list[bool], length: int) -> list[int]:
    """Drops tokens one by one."""
    kept = list(range(len(answer)))
    last = max(answer, default=-1)
    while len(kept) > length:
        own = [i for i in kept if not special[i]]
        if not own:
            return kept[:length]
        first = own[0]
        if answer[first] < 0 and (last < 0 or first < answer.index(last)):
            kept.remove(first)
        elif answer[first] < last:  # an earlier answer goes whole
            kept = [i for i in kept if answer[i] != answer[first]]
        else:
            kept.remove(own[-1])
    return kept


def test_where_a_conversation_is_cut_against_a_loop():
    draw = random.Random(5)
    for _ in range(400):
        parts = [[i] * draw.randint(1, 4) for i in range(draw.randint(0, 3))]
        answer = [a for part in parts for a in [-1] * draw.randint(0, 4) + part]
        answer += [-1] * draw.randint(0, 2)
        ends = draw.choice([0, 1])
        special = [True] * ends + [False] * len(answer) + [True] * ends
        answer = [-1] * ends + answer + [-1] * ends
        for length in range(1, len(answer) + 2):
            found = spans.fitting(np.array(answer, int), np.array(special, bool), length)
            assert len(found) <= length
            assert found.tolist() == slow_fitting(answer, special, length), (answer, length)


def test_what_is_cut_is_counted():
    tokenizer = byte_level()
    made = rendered(
        named_template("plain"), [Turn("user", "a b c d "), Turn("assistant", "\nx\ny")]
    )
    (whole,) = tokenizer.encode([made], 99)
    n = len(whole.ids)
    for length, cut, truncated in ((n, 0, False), (n - 2, 2, False), (4, n - 4, False)):
        (found,) = tokenizer.encode([made], length)
        assert (found.prompt_cut, found.truncated) == (cut, truncated)
        assert found.ids.tolist() == whole.ids[cut:].tolist()
        assert found.characters == 4
    (found,) = tokenizer.encode([made], 3)
    assert found.truncated
    assert found.ids.tolist() == whole.ids[n - 4 : n - 1].tolist()  # the answer's beginning
    assert (found.characters, found.prompt_cut) == (3, n - 4)


def test_one_too_long_to_be_tokenised_is_refused():
    made = rendered(named_template("plain"), [Turn("user", "a" * 2**21), Turn("assistant", "x")])
    with pytest.raises(DataError, match="text 1 of 1 is too long"):
        byte_level().encode([made], 99)


@pytest.mark.parametrize("length", [6, 12, 500])
def test_pieces_of_the_tokens_that_are_read_join_to_a_part_of_the_text(length: int):
    tokenizer = byte_level(ends=True)
    plain = "über die Maßen 😀 gut, sagte sie"
    turns = [Turn("user", "wie geht's? wie geht's?"), Turn("assistant", "über die Maßen")]
    whole = rendered(named_template("chatml"), turns)
    for given in (plain, whole):
        (encoded,) = tokenizer.encode([given], length)
        pieces = tokenizer.pieces(given, encoded)
        assert len(pieces) == len(encoded.ids)
        joined = "".join(pieces)
        assert joined
        assert joined in str(given)
        if length == 500:
            assert joined == str(given)
        assert all(piece == "" for piece, added in zip(pieces, encoded.special) if added)
    (other,) = tokenizer.encode(["another text"], length)
    with pytest.raises(DataError, match="not those of the text"):
        tokenizer.pieces(plain, other)


def test_lower_case_changes_answers_alone():
    made = rendered(named_template("chatml"), [Turn("user", "HI"), Turn("assistant", "YO İ")])
    marked = made._replace(
        pieces=tuple(p._replace(text=p.text.replace("im_", "IM_")) for p in made.pieces)
    )
    assert str(marked.lower()) == (
        "<|IM_start|>user\nHI<|IM_end|>\n<|IM_start|>assistant\nyo i̇<|IM_end|>\n"
    )


def test_a_form_is_named_by_all_that_its_texts_depend_on(tmp_path: Path):
    """So a run in one form is never taken for one in another."""
    for name, source in (("one", "{{ messages }}"), ("other", "{{ messages }}!")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(source)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    folders = {name: folder_template(tmp_path / name) for name in ("one", "other", "moved")}
    forms = [form(), form("llama"), form(loss_on="text"), form(end_tokens=1)]
    forms += [Form(folders["one"]), Form(folders["other"])]
    assert len({one.name for one in forms}) == len(forms)
    assert Form(folders["moved"]).name == Form(folders["one"]).name
    made = read_texts(put(tmp_path / "t.jsonl", messages(("assistant", "ka"))), form=form())
    assert form_of(made.texts) == form().name
    plain = read_texts(put(tmp_path / "p.jsonl", {"text": "ka"}))
    assert form_of([*plain.texts, *made.texts]) == f"{form().name} and plain texts"


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", "['a', 'b'] | random", "lipsum()"])
def test_a_folders_template_that_changes_from_day_to_day_is_refused(tmp_path: Path, call: str):
    source = f"Today: {{{{ {call} }}}} {LLAMA}"
    with pytest.raises(ModelError, match=r"reads the clock or draws at random"):
        folder_template(template_folder(tmp_path / "f", source))
