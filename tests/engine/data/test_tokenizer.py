import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data.python_stdlib import read_modules
from engine.data.tokenizer import copy_tokenizer, fast_encoder, load_tokenizer, read_special_tokens, train_bpe
from engine.errors import UserError


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [document.text for document in read_modules(DataConfig(source="python_stdlib"), 0, Counter())][::6]


@pytest.fixture(scope="module")
def folder(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(sources, 1024, folder)
    return folder


def test_bpe_round_trip(folder: Path, sources: list[str]) -> None:
    tokenizer = load_tokenizer(folder)
    for text in [*sources[:20], "naïve 東京 \U0001f600\t x\r\n\n   y", "It's  all\u3000right "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 1024
    assert len(tokenizer) == 1024
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_bpe_loads_the_same_beside_a_llama_config(folder: Path, sources: list[str], tmp_path: Path) -> None:
    copy_tokenizer(folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1024}))
    assert load_tokenizer(tmp_path).encode(sources[3]) == load_tokenizer(folder).encode(sources[3])


def test_tiktoken_ids_equal_those_of_tokenizers(folder: Path, sources: list[str]) -> None:
    from tokenizers import Tokenizer

    encode = fast_encoder(folder, sources[:4])
    assert encode.__name__ == "fast"
    exact = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(sources)
    assert all(np.array_equal(a, b.ids) for a, b in zip(encode(sources), exact))


def test_a_special_token_in_a_text_is_plain_text(folder: Path) -> None:
    ids = fast_encoder(folder)(["a<|endoftext|>b", " " * 3_000_000 + "<|pad|>x"])
    assert all(not {0, 1} & set(row.tolist()) for row in ids)


def test_other_tokenizers_fall_back_and_frame_rows(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "film"])}
    bert = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.enable_truncation(2)
    bert.enable_padding(length=8)
    bert.save(str(tmp_path / "tokenizer.json"))
    named = {
        "tokenizer_class": "BertTokenizerFast",
        "sep_token": "[SEP]",
        "cls_token": "[CLS]",
        "pad_token": {"content": "[PAD]"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    encode = fast_encoder(tmp_path)
    assert encode.__name__ == "exact"
    assert [row.tolist() for row in encode(["Good film good", "bad"])] == [[4, 5, 4], [1]]
    found = read_special_tokens(tmp_path)
    assert (found.opening, found.closing, found.eos_id, found.pad_id, found.vocab_size) == ([2], [3], 3, 0, 6)


def test_the_real_gpt2_tokenizer(shared: Callable[[str], Path], tmp_path: Path, sources: list[str]) -> None:
    copy_tokenizer(shared("tokenizer/gpt2"), tmp_path)
    encode = fast_encoder(tmp_path, sources[:2])
    assert encode.__name__ == "fast"
    assert encode(["Hello world"])[0].tolist() == [15496, 995]
    assert encode([sources[5]])[0].tolist() == load_tokenizer(tmp_path).encode(sources[5])
    assert (read_special_tokens(tmp_path).eos_id, read_special_tokens(tmp_path).vocab_size) == (50256, 50257)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"needs a tokenizer\.json"):
        load_tokenizer(tmp_path)
