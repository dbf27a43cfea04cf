import dataclasses
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import Config, ModelConfig, ObjectiveConfig, with_values
from engine.data.order import DataOrder, add_hashes, ids_hash
from engine.data.packing import Bins, Blocks, Mix, Packing, best_fit, pack, split_documents
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.build import transformers_config
from engine.models.document_mask import check_document_mask
from engine.objectives.contract import Objective, check_data, objective_class
from tests.engine.data.test_shards import write

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing, one item at a time."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
        bins[best].append(item)
        room[best] -= lengths[item]
    return bins


@pytest.mark.parametrize(("count", "capacity"), [(1, 8), (40, 8), (300, 33), (500, 100), (200, 1000)])
def test_best_fit_equals_the_simple_algorithm(count: int, capacity: int) -> None:
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, capacity + 1, count)
        order, first = best_fit(lengths, capacity)
        assert np.array_equal(np.sort(order), np.arange(count))
        filled = np.add.reduceat(lengths[order], first[:-1])
        expected = [sum(lengths[i] for i in one) for one in one_by_one(lengths.tolist(), capacity)]
        assert filled.max() <= capacity
        assert Counter(filled.tolist()) == Counter(expected)


def test_best_fit_of_a_million_documents_takes_seconds() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(np.int64) + 2, 2049)
    began = time.process_time()
    _, first = best_fit(lengths, 2049)
    assert time.process_time() - began < 20
    assert 1 - lengths.sum() / ((len(first) - 1) * 2049) < 0.001


def test_split_documents_keeps_every_target() -> None:
    lengths = np.array([1, 2, 9, 10, 17, 18, 30])
    documents, offsets, sizes = split_documents(lengths, capacity=9, overlap=1)
    assert documents.tolist() == [1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6]
    targets = Counter((d, o + k) for d, o, s in zip(documents, offsets, sizes) for k in range(1, s))
    assert targets == {(d, k): 1 for d, length in enumerate(lengths) for k in range(1, length)}
    documents, offsets, sizes = split_documents(lengths, capacity=9, overlap=0)
    assert np.bincount(documents, weights=sizes).tolist() == lengths.tolist()
    assert sizes.max() == 9


def test_blocks_overlap_by_one_target(tmp_path: Path, rows: list[np.ndarray]) -> None:
    split, whole = Split.open(write(tmp_path, rows), "train"), np.concatenate(rows)
    blocks = Blocks(split, 64)
    assert len(blocks) == 687 // 64 == 10
    assert blocks[9]["tokens"].dtype == np.int64
    assert np.array_equal(np.concatenate([blocks[i]["tokens"][:-1] for i in range(10)]), whole[:640])
    assert all(blocks[i]["tokens"][-1] == whole[64 * (i + 1)] for i in range(10))
    assert len(Blocks(split, 687)) == 1
    with pytest.raises(IndexError):
        blocks[10]
    with pytest.raises(UserError, match=r"688 tokens, fewer than one block of 688 .*data\.sequence_length=687"):
        Blocks(split, 688)


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 100, size) for size in [3, 40, 57, 1, 99, 2, 250, 12, 7, 88, 31]]


def test_bins_hold_every_document_once(tmp_path: Path, documents: list[np.ndarray]) -> None:
    bins = Bins(Split.open(write(tmp_path, documents), "train"), 65, overlap=1)
    pieces = [piece.tolist() for i in range(len(bins)) for piece in np.split(bins[i]["tokens"], bins[i]["starts"][1:])]
    expected = [d[k : k + 65].tolist() for d in documents for k in range(0, len(d), 64) if len(d) - k > 1]
    assert sorted(pieces) == sorted(expected)
    assert bins.padding == pytest.approx(1 - sum(map(len, pieces)) / (65 * len(bins)))
    assert bins.padding < 0.1
    assert bins[0]["tokens"].dtype == np.int64
    with pytest.raises(IndexError):
        bins[len(bins)]
    with pytest.raises(UserError, match="has two tokens"):
        Bins(Split.open(write(tmp_path, [np.array([5])] * 3), "train"), 65, overlap=1)


def test_blocks_have_document_starts(tmp_path: Path, documents: list[np.ndarray]) -> None:
    split = Split.open(write(tmp_path, documents), "train")
    blocks, begins = Blocks(split, 20, boundaries=True), np.cumsum([0, *map(len, documents)])[:-1]
    for i in range(len(blocks)):
        inside = [b - 20 * i for b in begins if 20 * i < b <= 20 * i + 20]
        assert blocks[i]["starts"].tolist() == [0, *inside]
    assert split.document_starts(0, split.num_tokens).tolist() == begins.tolist()


def objective(name: str, packing: Packing) -> Objective:
    class Tokenizer:
        pad_token_id, eos_token_id, bos_token_id, mask_token_id = 0, 1, 1, 99
        all_special_ids = (0, 1, 99)

        def __len__(self) -> int:
            return 100

    return objective_class(name)(ObjectiveConfig(name), Tokenizer(), 40, packing=packing)


def model(kind: str, attention: str, causal: bool = True) -> torch.nn.Module:
    import transformers

    config = transformers_config(ModelConfig(type=kind, **SMALL), objective("causal_lm", Packing()).tokenizer, {})
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    return auto.from_config(config, attn_implementation=attention).train()


def gradients(made: torch.nn.Module) -> torch.Tensor:
    found = torch.cat([p.grad.flatten().double() for p in made.parameters() if p.grad is not None])
    made.zero_grad()
    return found


@pytest.mark.parametrize(("kind", "attention"), [(k, a) for k in ("llama", "gpt2") for a in ("sdpa", "eager")])
def test_gradients_of_packed_documents_equal_those_of_single_ones(kind: str, attention: str) -> None:
    made, rng = model(kind, attention).double(), np.random.default_rng(0)  # so that rounding does not hide a leak
    texts = [rng.integers(2, 99, size) for size in (7, 2, 12, 5, 3)]
    packed = [
        {"tokens": np.concatenate(t), "starts": np.cumsum([0, *map(len, t)])[:-1]} for t in (texts[:2], texts[2:])
    ]
    task = objective("causal_lm", Packing("best_fit", within_documents=True))
    together = task.collate(packed)
    assert together.count == sum(len(t) - 1 for t in texts)
    loss = task.loss(made, together).sum
    loss.backward()
    expected_gradients, alone = gradients(made), 0.0
    for text in texts:
        one = task.loss(made, task.collate([{"tokens": text, "starts": np.array([0])}])).sum
        one.backward()
        alone += float(one)
    difference = (gradients(made) - expected_gradients).norm() / expected_gradients.norm()
    assert float(loss) == pytest.approx(alone, rel=1e-6)
    assert difference < 1e-6
    score = task.score(made, together)
    assert score["nll"].sum() == pytest.approx(alone, rel=1e-6)
    assert score["tokens"].tolist() == [7, 17]


def test_gradients_of_masked_packed_documents_equal_those_of_single_ones() -> None:
    made, rng = model("bert", "sdpa", causal=False), np.random.default_rng(0)
    texts = [rng.integers(2, 99, size) for size in (9, 4, 12)]
    task = objective("masked_lm", Packing("best_fit", within_documents=True))
    packed = [
        {"tokens": np.concatenate(texts[:2]), "starts": np.array([0, 9])},
        {"tokens": texts[2], "starts": np.array([0])},
    ]
    batch = task.collate([sample | {"draw": 3} for sample in packed])
    assert batch.tokens == 25
    logits = made(**batch.inputs).logits
    for row, start, text in ((0, 0, texts[0]), (0, 9, texts[1]), (1, 0, texts[2])):
        ids = batch.inputs["input_ids"][row : row + 1, start : start + len(text)]
        alone = made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(alone[0], logits[row, start : start + len(text)], atol=1e-5)


def test_without_the_document_mask_no_target_is_of_another_document() -> None:
    task = objective("causal_lm", Packing("best_fit"))
    batch = task.collate([{"tokens": np.arange(2, 12), "starts": np.array([0, 4])}])
    assert set(batch.inputs) == {"input_ids"}
    assert batch.targets.shape == (1, 40)  # every batch has one shape
    assert batch.targets[0, :10].tolist() == [3, 4, 5, -100, 7, 8, 9, 10, 11, -100]
    assert (batch.count, batch.tokens) == (8, 9)


def test_architectures_that_attend_across_documents_are_refused() -> None:
    for kind, causal in (("llama", True), ("gpt2", True), ("bert", False)):
        auto = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
        check_document_mask(model(kind, "sdpa", causal).config, auto, "sdpa", causal)  # type: ignore[arg-type]
    for kind in ("bloom", "opt"):
        with pytest.raises(UserError, match=f"within_documents is not for model.type={kind}"):
            check_document_mask(model(kind, "eager").config, "AutoModelForCausalLM", "eager", True)  # type: ignore[arg-type]


class Numbered:
    """Samples that hold their own number."""

    padding = 0.25

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[str, int]:
        assert 0 <= i < self.size
        return self.name, i


def test_weights_are_repetitions_per_epoch() -> None:
    mix = Mix([Numbered("a", 10), Numbered("b", 8), Numbered("c", 6)], [1.0, 2.0, 0.5])
    assert len(mix) == 10 + 16 + 3
    for epoch in range(4):
        seen = Counter(mix[i] for i in range(epoch * 29, (epoch + 1) * 29))
        assert all(seen["a", i] == 1 for i in range(10))
        assert all(seen["b", i] == 2 for i in range(8))
        assert sum(seen["c", i] for i in range(6)) == 3
    both = Counter(mix[i] for i in range(58))
    assert all(both["c", i] == 1 for i in range(6))  # two epochs show each once
    assert mix.padding == 0.25
    assert mix.locate(29 * 10**9 + 3) == (0, 3)


def test_a_mix_shows_each_virtual_sample_once() -> None:
    mix = Mix([Numbered("a", 10), Numbered("b", 7)], [1.0, 1.3])
    order = DataOrder(len(mix), 3, seed=5, endless=True)
    steps = [order.sample_ids(step) for step in range(4 * len(mix))]
    ids = np.concatenate(steps)[: 12 * len(mix)]
    assert np.array_equal(np.sort(ids), np.arange(12 * len(mix)))
    assert add_hashes(ids_hash(step) for step in steps) == ids_hash(np.arange(12 * len(mix)))
    assert np.array_equal(np.sort(ids[: len(mix)]), np.arange(len(mix)))
    shown = Counter(mix[i] for i in ids)
    assert {shown["a", i] for i in range(10)} == {12}
    assert sum(shown["b", i] for i in range(7)) == 12 * round(7 * 1.3)
    assert max(shown["b", i] for i in range(7)) - min(shown["b", i] for i in range(7)) <= 1
    assert np.array_equal(order.sample_ids(17), DataOrder(len(mix), 3, seed=5, endless=True).sample_ids(17))


def test_each_source_is_packed_by_itself(tmp_path: Path, documents: list[np.ndarray]) -> None:
    from engine.data.manifest import Manifest

    manifest = Manifest.load(write(tmp_path, documents))
    shards = manifest.splits["train"]["shards"]
    for i, shard in enumerate(shards):
        shard["source"] = "web" if i % 2 else "books"
    manifest = dataclasses.replace(manifest, origins={"books": {}, "web": {}}, hash="")
    manifest.save(tmp_path)
    split = Split.open(tmp_path, "train")
    mix = pack(split, 16, Packing(weights={"books": 1.0, "web": 3.0}), overlap=1)
    assert isinstance(mix, Mix)
    books, web = split.by_source().values()
    assert books.num_tokens + web.num_tokens == split.num_tokens
    assert len(mix) == (books.num_tokens - 1) // 16 + 3 * ((web.num_tokens - 1) // 16)
    assert np.array_equal(mix[0]["tokens"], books.token_range(0, 17))
    assert np.array_equal(mix[(books.num_tokens - 1) // 16]["tokens"], web.token_range(0, 17))
    with pytest.raises(UserError, match="the train split of books has"):
        pack(split, 2000, Packing(weights={"books": 1.0, "web": 3.0}), overlap=1)


def test_packing_is_refused_where_it_does_not_apply(tiny: Config, tiny_functions: Config) -> None:
    with pytest.raises(UserError, match="are for objective=causal_lm and masked_lm"):
        check_data("classification", with_values(tiny_functions, {"data.packing": "best_fit"}).data)
    for values, message in (
        ({"data.within_documents": True, "model.attention": "flash_attention_2"}, "use model.attention=sdpa"),
        (
            {"data.within_documents": True, "objective.name": "masked_lm", "model.attention": "eager"},
            "need model.attention=sdpa",
        ),
    ):
        with pytest.raises(UserError, match=message):
            with_values(tiny, values)
