"""Write down what is said (Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356).

An encoder reads the spectrogram of a window of sound, filled up with silence; a decoder begins with the tokenizer's prompt
and writes the words. Shapes: B batch, M mel bins, F frames, L length, V vocabulary, N samples of a sound.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.shards import Split
from engine.data.speech import FULL_SCALE, Utterances, decode, from_base64, wav
from engine.errors import UserError
from engine.models.build import without_warnings
from engine.models.cross_entropy import IGNORED
from engine.models.size import Stack, attention_flops, elements, matmul_parameter_count
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Scores, pad_rows

START, TRANSCRIBE, NO_TIMES = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"
PROMPT_TOKENS = 4  # at most: these, and a language
GOLDEN_S = 2  # of a sound whose answer a bundle records


class SpeechRecognition(contract.OverVocabulary):
    """Sounds with their words: the cross-entropy of the words and of their end, and the word error rate of what is written."""

    data_kind = "speech"
    auto_class = "AutoModelForSpeechSeq2Seq"
    architectures = ("WhisperForConditionalGeneration",)
    metric = "wer"
    mode = "min"
    positions = 1  # of a window in the encoder, until the model is met

    @property
    def extractor(self) -> Any:
        """The processor's feature extractor."""
        return self.processor.feature_extractor

    @cached_property
    def prompt(self) -> list[int]:
        """What the decoder begins with: the language, where there are several, else what the tokenizer puts before a text."""
        tokenizer = self.tokenizer
        if self.options.language:
            return self.prompt_in(self.options.language)
        opening: list[int] = tokenizer("")["input_ids"]
        if tokenizer.eos_token_id in opening:
            opening = opening[: opening.index(tokenizer.eos_token_id)]
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return opening or [first]

    def prompt_in(self, language: str) -> list[int]:
        """Return what the decoder begins with for a language. Raises UserError where the tokenizer doesn't know it."""
        vocabulary = self.tokenizer.get_vocab()
        names = (START, f"<|{language}|>", TRANSCRIBE, NO_TIMES)
        if any(name not in vocabulary for name in names):
            raise UserError(f"this model's tokenizer knows no language '{language}': leave it out, or name one that it knows")  # fmt: skip
        return [vocabulary[name] for name in names]

    @property
    def of_any_language(self) -> bool:
        """Whether the tokenizer knows several languages, and none was named."""
        return not self.options.language and len(self.prompt) < PROMPT_TOKENS and TRANSCRIBE in self.tokenizer.get_vocab()  # fmt: skip

    def model_options(self) -> dict[str, Any]:
        """Let the decoder begin with the prompt, and leave no token out that transformers' default would."""
        if self.of_any_language:
            raise UserError("the tokenizer knows several languages: say which is spoken with objective.language=en, or the like")  # fmt: skip
        return {"decoder_start_token_id": self.prompt[0], "begin_suppress_tokens": None}

    def bind_model(self, config: Any) -> None:
        """Take note of the encoder's positions. Raises UserError for a model that doesn't hear such windows, or writes less."""
        positions, most = (getattr(config, f"max_{side}_positions", None) for side in ("source", "target"))
        if positions is None or most is None or not hasattr(config, "num_mel_bins"):
            raise UserError(f"model.type={config.model_type} hears no windows of speech: use model=whisper_1m, or another of its kind")  # fmt: skip
        if (self.extractor.nb_max_frames, self.extractor.feature_size) != (2 * positions, config.num_mel_bins):
            raise UserError(
                f"the model hears {2 * positions} frames of {config.num_mel_bins} mel bins, and the feature extractor makes "
                f"{self.extractor.nb_max_frames} of {self.extractor.feature_size}: leave data.feature_extractor out"
            )
        if self.sequence_length + len(self.prompt) - 1 > most:
            raise UserError(
                f"transcripts of up to data.sequence_length {self.sequence_length:,} tokens are over the model's {most:,} "
                f"positions: use data.sequence_length={most - len(self.prompt) + 1}"
            )
        self.positions = positions

    def stacks(self, config: Any) -> list[Stack]:
        """Return the encoder, which hears a window, and the decoder, which reads the words."""
        return [Stack(config, config.max_source_positions), Stack(config, self.sequence_length)]

    def flops(self, model: nn.Module) -> float:
        """Add up encoder, decoder and output; the keys and values of the cross-attention are made of the encoder's positions."""
        bases: Any = model
        config, encoder, decoder = bases.config, bases.get_encoder(), bases.get_decoder()
        heard, written = (stack.tokens for stack in self.stacks(config))
        crossed = [
            elements(p)
            for name, p in decoder.named_parameters()
            if "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        ]
        twice = sum(
            elements(p) for p in encoder.conv1.parameters()
        )  # it runs on the frames, two of which make a position
        of_decoder = matmul_parameter_count(decoder) - sum(crossed) + elements(bases.get_output_embeddings().weight)
        return (
            heard * (6 * (matmul_parameter_count(encoder) + twice) + attention_flops(config.encoder_layers, config.d_model, heard))
            + heard * 6 * sum(crossed)
            + written * (6 * of_decoder + attention_flops(config.decoder_layers, config.d_model, written + heard))
        )  # fmt: skip

    def samples(self, split: Split) -> Utterances:
        """Take the sounds with their words."""
        return Utterances(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Decode {"audio": a file's bytes, or the same in base64}, and tokenize the "text", if there is one.

        Raises UserError for what is no sound, and for one that is longer than the model hears at once.
        """
        rate, most_s, audio = self.extractor.sampling_rate, self.extractor.chunk_length, example["audio"]
        try:
            sound = from_base64(audio, rate, most_s) if isinstance(audio, str) else decode(audio, rate, most_s)
        except ValueError as error:
            raise UserError("the sound cannot be read: send a WAV, FLAC, OGG or MP3 file") from error
        if not len(sound):
            raise UserError("the sound is empty: send one that has samples")
        if len(sound) > self.extractor.n_samples:
            raise UserError(f"the sound is longer than the {most_s} s that this model hears at once: send it in parts")
        return {"sound": sound} | ({"tokens": self._tokens(example["text"])} if "text" in example else {})

    def _tokens(self, text: str) -> np.ndarray:
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return np.asarray(ids[: self.sequence_length], dtype=np.int64)

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Make the spectrograms; the decoder reads the prompt and the words, and each token is to give the next of the words."""
        rows = [np.concatenate([self.prompt, sample["tokens"]]) for sample in samples]
        ids_BL, _ = pad_rows([row[:-1] for row in rows], self.tokenizer.pad_token_id)
        targets_BL, _ = pad_rows([row[1:] for row in rows], IGNORED)
        targets_BL[:, : len(self.prompt) - 1] = IGNORED  # the prompt is given
        inputs = {"input_features": self.features([sample["sound"] for sample in samples]), "decoder_input_ids": ids_BL}
        count = int((targets_BL != IGNORED).sum())
        read = sum(len(row) - 1 for row in rows)
        return Batch(inputs, targets_BL, count, tokens=len(rows) * self.positions + read)

    def features(self, sounds: Sequence[np.ndarray]) -> Tensor:
        """Return the log-mel spectrograms of sounds, int16 [N] each, filled up with silence: float32 [B, M, F]."""
        floats = [np.asarray(sound, dtype=np.float32) / FULL_SCALE for sound in sounds]
        found = self.extractor(floats, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        spectrograms: Tensor = found["input_features"]
        return spectrograms

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross-entropy, in nats, over the words' tokens and their end."""
        return super().loss(model, fitting(model, batch))

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Give each example's likelihood, the words that were spoken, and the wrong ones among those that the model writes."""
        batch = fitting(model, batch)
        scores = super().score(model, batch)
        spoken = [self._text(row[row != IGNORED].tolist()) for row in batch.targets]
        written = [self._text(row) for row in self._write(model, batch.inputs["input_features"])]
        errors, words = word_errors(spoken, written)
        return scores | {"errors": errors, "words": words}

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Give the word error rate, wrong words to spoken ones, beside the loss a token and the perplexity."""
        return {"wer": float(scores["errors"].sum() / max(scores["words"].sum(), 1))} | super().summarize(scores)

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write down each {"audio", "temperature", "language"}, or {"sound"} in place of the first; or judge {"text"} of it.

        Greedily, unless there is a temperature; as `generate` of transformers does, those of like options together.
        """
        prepared = [request if "sound" in request else request | self.prepare(request) for request in requests]
        answers: dict[int, dict[str, Any]] = {}

        def options(i: int) -> tuple[float, str]:
            return float(prepared[i].get("temperature") or 0), str(prepared[i].get("language") or "")

        writing = sorted((i for i, request in enumerate(prepared) if "tokens" not in request), key=options)
        for (temperature, language), group in groupby(writing, key=options):
            chosen = list(group)
            features = self.features([prepared[i]["sound"] for i in chosen])
            parameter = next(model.parameters())
            features = features.to(parameter.device, parameter.dtype)
            for i, ids in zip(chosen, self._write(model, features, temperature, language), strict=True):
                answers[i] = {"text": self._text(ids), "tokens": ids}
        for i, request in enumerate(prepared):
            if "tokens" in request:
                answers[i] = self._judge(model, request)
        return [answers[i] for i in range(len(prepared))]

    def _write(self, model: nn.Module, features_BMF: Tensor, temperature: float = 0.0, language: str = "") -> list[list[int]]:  # fmt: skip
        """Return the tokens that the model writes of each sound, without prompt and end."""
        module: Any = getattr(model, "module", model)
        room = module.config.max_target_positions - max(len(self.prompt), PROMPT_TOKENS)
        sharded = any(hasattr(p, "ds_id") for p in module.parameters())  # by ZeRO-3: ranks take their steps together
        told: dict[str, Any] = {}  # `generate` finds out the language, unless it is told
        if language or not self.of_any_language:
            prompt = self.prompt_in(language) if language else self.prompt
            told["decoder_input_ids"] = torch.tensor([prompt] * len(features_BMF), device=features_BMF.device)
        with without_warnings():  # of options that transformers gives itself
            ids_BL = module.generate(
                features_BMF, max_new_tokens=min(self.sequence_length, room), do_sample=temperature > 0,
                temperature=temperature, num_beams=1, synced_gpus=sharded, **told,
            )  # fmt: skip
        ends = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return [[token for token in row if token not in ends] for row in ids_BL.tolist()]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _judge(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        """Give the log-probability, in nats, of each token of the words and of their end."""
        batch = fitting(model, self.collate([request]).to(next(model.parameters()).device))
        logits_LV = model(**batch.inputs, use_cache=False).logits[0].float()
        targets_L = batch.targets[0]
        chosen_L = targets_L != IGNORED
        found_L = logits_LV[chosen_L].log_softmax(1).gather(1, targets_L[chosen_L, None])[:, 0]
        return {"logprobs": found_L.tolist()}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the beginnings of three sounds, each with its words to be judged."""
        rate, requests = self.extractor.sampling_rate, []
        for i in range(min(3, split.rows)):
            audio = base64.b64encode(wav(split.sound(i)[: GOLDEN_S * rate], rate)).decode()
            requests.append({"audio": audio, "text": self._text(split.document(i).tolist())})
        return requests


def fitting(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with its spectrograms in the precision of the model's weights, which Whisper asks of its caller."""
    dtype = next(getattr(model, "module", model).parameters()).dtype
    features = batch.inputs["input_features"].to(dtype)
    return replace(batch, inputs=batch.inputs | {"input_features": features})


def word_errors(spoken: Sequence[str], written: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pair of texts the fewest words to be changed, left out or put in, and the words spoken: int64 [B] each."""
    try:
        from jiwer import process_words
    except ImportError as error:
        raise UserError("the word error rate needs the package jiwer: pip install 'manta-train[audio]'") from error
    found = [process_words(reference, hypothesis) for reference, hypothesis in zip(spoken, written, strict=True)]
    errors = [it.substitutions + it.deletions + it.insertions for it in found]
    words = [it.hits + it.substitutions + it.deletions for it in found]
    return np.array(errors, dtype=np.int64), np.array(words, dtype=np.int64)
