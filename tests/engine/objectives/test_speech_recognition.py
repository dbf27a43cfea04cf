"""Whisper: parity with transformers, a bundle with its processor, the word error rate, languages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.audio import FULL_SCALE, decode_audio, encode_wav
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.evaluate import evaluate_bundle
from engine.models.size import parameter_count
from engine.objectives.contract import objective_for_architecture
from engine.objectives.speech_recognition import word_errors
from engine.plan.plan import plan
from tests.engine.data.audio_samples import file_of, hum
from tests.engine.objectives.conftest import (
    Curves,
    build_task,
    gradients,
    relative_error,
)  # fmt: skip

TASK = "speech_recognition"


def test_loss_and_gradients_equal_transformers(family: Callable[..., Config]) -> None:
    objective, model, data = build_task(family(TASK))
    samples = objective.samples(Split.open(data, "train"))
    chosen = [samples[i] for i in range(5)]
    batch = objective.collate(chosen)
    loss = objective.loss(model, batch)
    assert batch.inputs["input_features"].shape == (5, 80, 100)
    assert loss.count == sum(len(sample["tokens"]) for sample in chosen)  # the transcript and its end token
    assert batch.tokens == 5 * 50 + loss.count
    ours = gradients(model, loss.sum / loss.count)
    floats = [sample["sound"].astype(np.float32) / FULL_SCALE for sample in chosen]
    features = objective.feature_extractor(floats, sampling_rate=16000, return_tensors="pt")["input_features"]
    labels = torch.full(batch.targets.shape, -100)
    for row, sample in zip(labels, chosen, strict=True):
        row[: len(sample["tokens"])] = torch.as_tensor(sample["tokens"])
    theirs = model(input_features=features, labels=labels).loss  # shifts by itself, from the decoder's start token
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert relative_error(ours, gradients(model, theirs)) < 1e-6


def test_faulty_rows_are_counted_and_audio_equals_the_files(family: Callable[..., Config], hummed: Path) -> None:
    objective, _, data = build_task(family(TASK))
    manifest = verify(data)
    assert (manifest.kind, manifest.sampling_rate, manifest.labels) == ("speech", 16000, [])
    assert manifest.skipped == {"longer than 1 s": 1, "not audio": 1, "without audio": 2, "without text": 1}
    assert sum(split["documents"] for split in manifest.splits.values()) == 91
    rows = {row["words"]: row["audio"]["bytes"] for row in pq.read_table(hummed).slice(8).to_pylist()}
    splits = [objective.samples(Split.open(data, name)) for name in manifest.splits]
    sounds = [samples[i] for samples in splits for i in range(len(samples))]
    for words, content in rows.items():
        sample = objective.prepare({"audio": content, "text": words})
        assert np.array_equal(sample["sound"], decode_audio(content, 16000, 1))
        same = [other for other in sounds if np.array_equal(other["sound"], sample["sound"])]
        assert [other["tokens"].tolist() for other in same] == [sample["tokens"].tolist()]
        assert objective.tokenizer.decode(sample["tokens"], skip_special_tokens=True) == words


def test_long_transcript_is_truncated_without_an_end_token(family: Callable[..., Config]) -> None:
    objective, _, data = build_task(family(TASK, data__sequence_length=2))
    samples = objective.samples(Split.open(data, "train"))
    rows = [samples[i]["tokens"].tolist() for i in range(len(samples))]
    end = objective.tokenizer.eos_token_id
    assert max(map(len, rows)) == 2
    assert {row[-1] == end for row in rows} == {True, False}


def test_greedy_transcripts_equal_generate(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family(TASK))
    model = model.eval()
    files = [file_of(hum(words, 8000), 8000) for words in ("one", "two three", "three one two")]
    together = objective.predict(model, [{"audio": content} for content in files])
    for content, answer in zip(files, together, strict=True):
        sound = decode_audio(content, 16000, 1).astype(np.float32) / FULL_SCALE
        features = objective.feature_extractor(sound, sampling_rate=16000, return_tensors="pt")["input_features"]
        expected = model.generate(features, max_new_tokens=6, do_sample=False)[0].tolist()  # type: ignore[operator]
        assert answer["tokens"] == [token for token in expected if token != objective.tokenizer.eos_token_id]
        assert answer["text"] == objective.tokenizer.decode(answer["tokens"], skip_special_tokens=True).strip()
        assert objective.predict(model, [{"audio": content}]) == [answer]


def test_temperature_samples_and_does_not_change_greedy_requests(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family(TASK))
    content = file_of(hum("one two", 8000), 8000)
    torch.manual_seed(0)
    answers = objective.predict(model.eval(), [{"audio": content, "temperature": 1.0}, {"audio": content}] * 8)
    assert len({tuple(answer["tokens"]) for answer in answers[1::2]}) == 1
    assert len({tuple(answer["tokens"]) for answer in answers[::2]}) > 4


def test_bundle_loads_with_plain_transformers(curves: Curves, runs_dir: Path) -> None:
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

    bundle = Bundle.open(runs_dir / f"{TASK}-two" / "bundle")
    processor = AutoProcessor.from_pretrained(bundle.folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(bundle.folder)
    assert type(processor).__name__ == "WhisperProcessor"
    content = file_of(hum("two one", 16000), 16000)
    sound = decode_audio(content, 16000, 1).astype(np.float32) / FULL_SCALE
    (ours,) = bundle.objective().predict(bundle.model(), [{"audio": content}])
    inputs = processor(audio=sound, sampling_rate=16000, return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert processor.batch_decode(theirs, skip_special_tokens=True)[0].strip() == ours["text"]
    recognizer = pipeline("automatic-speech-recognition", model=str(bundle.folder))
    output = recognizer({"raw": sound, "sampling_rate": 16000}, generate_kwargs={"max_new_tokens": 6, "num_beams": 1})
    assert output["text"].strip() == ours["text"]
    request = bundle.manifest.golden[0]["request"]  # type: ignore[union-attr]
    (scored,) = bundle.objective().predict(bundle.model(), [request])
    sample = bundle.objective().prepare(request)
    labels = torch.as_tensor(sample["tokens"])[None]
    features = processor(
        audio=sample["sound"].astype(np.float32) / FULL_SCALE, sampling_rate=16000, return_tensors="pt"
    )
    loss = model(**features, labels=labels).loss
    assert -float(np.mean(scored["logprobs"])) == pytest.approx(float(loss.detach()), rel=1e-5)
    plain = Bundle(bundle.folder, None)
    assert plain.objective().predict(plain.model(), [{"audio": content}])[0]["text"].startswith(ours["text"])


def test_bundle_is_evaluated_by_word_error_rate(curves: Curves, family: Callable[..., Config], runs_dir: Path) -> None:
    folder = runs_dir / f"{TASK}-two" / "bundle"
    evaluation = evaluate_bundle(folder, family(TASK, evaluate__resamples=100))
    bundle, split = Bundle.open(folder), Split.open(evaluation.data, "test")
    objective, model = bundle.objective(), bundle.model()
    references = [objective.tokenizer.decode(split.document(i).tolist(), skip_special_tokens=True) for i in range(split.num_rows)]  # fmt: skip
    sounds = [encode_wav(split.sound(i), 16000) for i in range(split.num_rows)]
    hypotheses = [objective.predict(model, [{"audio": content}])[0]["text"] for content in sounds]
    wer = evaluation.metrics["wer"]
    assert wer.value == pytest.approx(jiwer.wer(references, hypotheses))
    assert wer.low <= wer.value <= wer.high
    assert curves[TASK, "two"][-1]["validation_wer"] > 0
    with pytest.raises(UserError, match="which reads speech with transcripts, and the data are text"):
        evaluate_bundle(folder, with_values(family(TASK), {"data.audio_column": None}))


def test_word_errors_by_hand() -> None:
    errors, words = word_errors(["a b c", "a", "a b"], ["a x c d", "", "a b"])
    assert errors.tolist() == [2, 1, 0]
    assert words.tolist() == [3, 1, 2]


def test_flops_by_hand(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family(TASK))
    encoder_tokens, decoder_tokens = (stack.tokens for stack in objective.transformer_stacks(model.config))
    assert (encoder_tokens, decoder_tokens) == (50, 6)
    width, conv = 32, 32 * 80 * 3 + 32
    embeddings = model.config.vocab_size * width + (50 + 16) * width
    cross_attention = 2 * (2 * width * width + width)  # in each of two layers a key without a bias and a value with one
    encoder = parameter_count(model.get_encoder()) - 50 * width  # type: ignore[operator]
    decoder = parameter_count(model) - encoder - embeddings
    assert objective.flops(model) == (
        encoder_tokens * (6 * (encoder + conv) + 12 * 2 * width * encoder_tokens)
        + encoder_tokens * 6 * cross_attention
        + decoder_tokens
        * (
            6 * (decoder - cross_attention + model.config.vocab_size * width)
            + 12 * 2 * width * (decoder_tokens + encoder_tokens)
        )
    )


def test_plan_has_the_parameter_count_and_stacks(family: Callable[..., Config]) -> None:
    config = family(TASK)
    _, model, _ = build_task(config)
    size_plan = plan(with_values(config, {"model.vocab_size": model.config.vocab_size}))
    assert size_plan.sizes.parameters == parameter_count(model)
    assert [stack.tokens for stack in size_plan.sizes.stacks] == [50, 6]


def test_architecture_maps_to_the_most_specific_task() -> None:
    assert objective_for_architecture("WhisperForConditionalGeneration") == TASK
    assert objective_for_architecture("T5ForConditionalGeneration") == "span_corruption"


def test_prepared_folder_depends_on_the_feature_extractor(family: Callable[..., Config]) -> None:
    config = family(TASK)
    longer = with_values(config, {"data.audio_seconds": 2})
    assert prepare(config) == prepare(with_values(config, {"data.sequence_length": 5}))
    assert Manifest.load(prepare(longer)).skipped.get("longer than 1 s") is None
    other_extractor = with_values(config, {"data.feature_extractor": str(prepare(longer) / "processor")})
    assert prepare(other_extractor).name == prepare(longer).name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.type": "llama", "model.options": {}}, "model.type=llama has no feature extractor"),
        ({"data.sequence_length": 17}, "are over the model's 16 positions: use data.sequence_length=16"),
        ({"data.audio_column": "sound"}, r"no column 'sound' \(data.audio_column\)"),
        ({"data.text_column": "spoken"}, r"no column 'spoken' \(data.text_column\)"),
        ({"data.label_column": "words"}, "leave it out, and set the transcripts' column"),
        ({"data.image_column": "audio"}, "select different kinds of data"),
        ({"data.mask": ["emails"]}, "leave them out with data.audio_column"),
        ({"data.source": "python_stdlib"}, "use data.source=files"),
        ({"model.options": {"decoder_attention_heads": 4, "max_source_positions": 60}}, "the model reads 120 frames of 80 mel bins"),
    ],
)  # fmt: skip
def test_invalid_config_raises_a_one_line_error(
    family: Callable[..., Config], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_task(with_values(family(TASK), changes))
    assert "\n" not in str(error.value)


def write_multilingual_tokenizer(tokenizer: Path, folder: Path) -> Path:
    """Write a tokenizer with Whisper's tokens for languages and tasks, and return its folder."""
    from transformers import AutoTokenizer

    multilingual = AutoTokenizer.from_pretrained(tokenizer)
    multilingual.add_special_tokens(
        {"additional_special_tokens": ["<|en|>", "<|de|>", "<|transcribe|>", "<|nospeech|>"]}
    )
    multilingual.save_pretrained(folder)
    return folder


def test_language_is_part_of_the_decoder_prompt(family: Callable[..., Config], tmp_path: Path) -> None:
    multilingual = write_multilingual_tokenizer(prepare(family(TASK)) / "processor", tmp_path / "several")
    with pytest.raises(UserError, match=r"knows several languages: say which is spoken with objective\.language=en"):
        build_task(family(TASK, data__tokenizer=str(multilingual)))
    with pytest.raises(UserError, match="knows no language 'fr'"):
        build_task(family(TASK, data__tokenizer=str(multilingual), objective__language="fr"))
    objective, model, data = build_task(family(TASK, data__tokenizer=str(multilingual), objective__language="de"))
    samples = objective.samples(Split.open(data, "train"))
    batch = objective.collate([samples[0], samples[1]])
    prompt_tokens = objective.tokenizer.convert_ids_to_tokens(batch.inputs["decoder_input_ids"][0, :4].tolist())
    assert prompt_tokens == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert (batch.targets[:, :3] == -100).all()  # the prompt is not predicted
    assert (batch.targets[:, 3] != -100).all()
    content = file_of(hum("one", 8000), 8000)
    (ours, other) = objective.predict(model.eval(), [{"audio": content}, {"audio": content, "language": "en"}])
    for answer, language in ((ours, "de"), (other, "en")):
        features = objective.features([decode_audio(content, 16000, 1)])
        prompt = torch.tensor([objective.prompt_for_language(language)])
        ids = model.generate(features, decoder_input_ids=prompt, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        assert answer["tokens"] == [token for token in ids[0].tolist() if token != objective.tokenizer.eos_token_id]
