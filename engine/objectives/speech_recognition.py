"""Speech recognition (Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356).

An encoder reads the log-mel spectrogram of a window of audio, padded with silence; a decoder starts with the tokenizer's prompt
and generates the transcript. Shapes: B batch, M mel bins, F frames, L length, V vocabulary, N samples of audio.
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

from engine.data.audio import FULL_SCALE, decode_audio, encode_wav, from_base64
from engine.data.kinds.speech import SpeechSamples
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.build import quiet_transformers
from engine.models.cross_entropy import IGNORE_INDEX
from engine.models.size import TransformerStack, attention_flops, matmul_parameter_count, num_elements
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Scores, pad_rows

START, TRANSCRIBE, NO_TIMESTAMPS = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"
MAX_PROMPT_TOKENS = 4  # these and a language
GOLDEN_S = 2  # of audio in a golden request


class SpeechRecognition(contract.LMHeadObjective):
    """Audio with transcripts: the cross-entropy of the transcript and its end token, and the word error rate of greedy decoding."""

    data_kind = "speech"
    auto_class = "AutoModelForSpeechSeq2Seq"
    architectures = ("WhisperForConditionalGeneration",)
    metric = "wer"
    mode = "min"
    pipeline_tag = "automatic-speech-recognition"
    intended_use = "transcribing speech like its training data"
    endpoint_task = "transcription"
    encoder_positions = 1  # of a window; set by bind_model

    @property
    def feature_extractor(self) -> Any:
        """The processor's feature extractor."""
        return self.processor.feature_extractor

    @cached_property
    def decoder_prompt(self) -> list[int]:
        """The decoder's first tokens: those for the configured language, or what the tokenizer puts before a text."""
        tokenizer = self.tokenizer
        if self.options.language:
            return self.prompt_for_language(self.options.language)
        prefix: list[int] = tokenizer("")["input_ids"]
        if tokenizer.eos_token_id in prefix:
            prefix = prefix[: prefix.index(tokenizer.eos_token_id)]
        bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return prefix or [bos_id]

    def prompt_for_language(self, language: str) -> list[int]:
        """Return the decoder's first tokens for a language. Raises UserError if the tokenizer does not know it."""
        vocabulary = self.tokenizer.get_vocab()
        names = (START, f"<|{language}|>", TRANSCRIBE, NO_TIMESTAMPS)
        if any(name not in vocabulary for name in names):
            raise UserError(f"this model's tokenizer knows no language '{language}': leave it out, or name one that it knows")  # fmt: skip
        return [vocabulary[name] for name in names]

    @property
    def detects_language(self) -> bool:
        """Whether the tokenizer knows several languages, and none is configured."""
        if self.options.language or len(self.decoder_prompt) >= MAX_PROMPT_TOKENS:
            return False
        return TRANSCRIBE in self.tokenizer.get_vocab()

    def model_options(self) -> dict[str, Any]:
        """Let the decoder start with the prompt, and suppress no token, as transformers' default would."""
        if self.detects_language:
            raise UserError("the tokenizer knows several languages: say which is spoken with objective.language=en, or another")  # fmt: skip
        return {"decoder_start_token_id": self.decoder_prompt[0], "begin_suppress_tokens": None}

    def bind_model(self, config: Any) -> None:
        """Set the encoder's positions. Raises UserError for a model with other audio windows, or with too few decoder positions."""
        positions, max_target = (getattr(config, f"max_{side}_positions", None) for side in ("source", "target"))
        if positions is None or max_target is None or not hasattr(config, "num_mel_bins"):
            raise UserError(f"model.type={config.model_type} reads no audio windows: use model=whisper_1m, or another speech model")  # fmt: skip
        extractor = self.feature_extractor
        if (extractor.nb_max_frames, extractor.feature_size) != (2 * positions, config.num_mel_bins):
            raise UserError(
                f"the model reads {2 * positions} frames of {config.num_mel_bins} mel bins, and the feature extractor makes "
                f"{extractor.nb_max_frames} of {extractor.feature_size}: leave data.feature_extractor out"
            )
        if self.sequence_length + len(self.decoder_prompt) - 1 > max_target:
            raise UserError(
                f"transcripts of up to data.sequence_length {self.sequence_length:,} tokens are over the model's {max_target:,} "
                f"positions: use data.sequence_length={max_target - len(self.decoder_prompt) + 1}"
            )
        self.encoder_positions = positions

    def transformer_stacks(self, config: Any) -> list[TransformerStack]:
        """Return the encoder, which reads a window of audio, and the decoder, which reads the transcript."""
        return [TransformerStack(config, config.max_source_positions), TransformerStack(config, self.sequence_length)]

    def flops(self, model: nn.Module) -> float:
        """Sum encoder, decoder and output layer; the cross-attention's keys and values are computed once per encoder position."""
        seq2seq: Any = model
        config, encoder, decoder = seq2seq.config, seq2seq.get_encoder(), seq2seq.get_decoder()
        encoder_tokens, decoder_tokens = (stack.tokens for stack in self.transformer_stacks(config))
        cross_parameters = sum(
            num_elements(p)
            for name, p in decoder.named_parameters()
            if "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        )
        # The first convolution runs on the frames, two per position: its weights count twice.
        conv1_parameters = sum(num_elements(p) for p in encoder.conv1.parameters())
        encoder_parameters = matmul_parameter_count(encoder) + conv1_parameters
        decoder_parameters = (
            matmul_parameter_count(decoder) - cross_parameters + num_elements(seq2seq.get_output_embeddings().weight)
        )
        width, keys = config.d_model, decoder_tokens + encoder_tokens
        return (
            encoder_tokens * (6 * encoder_parameters + attention_flops(config.encoder_layers, width, encoder_tokens))
            + encoder_tokens * 6 * cross_parameters
            + decoder_tokens * (6 * decoder_parameters + attention_flops(config.decoder_layers, width, keys))
        )

    def samples(self, split: Split) -> SpeechSamples:
        """Return the utterances with their transcripts."""
        return SpeechSamples(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Decode {"audio": a file's bytes, or the same in base64}, and tokenize the "text", if there is one.

        Raises UserError for a file that is no audio, and for audio longer than the model's window.
        """
        extractor, audio = self.feature_extractor, example["audio"]
        rate, max_s = extractor.sampling_rate, extractor.chunk_length
        try:
            sound = from_base64(audio, rate, max_s) if isinstance(audio, str) else decode_audio(audio, rate, max_s)
        except ValueError as error:
            raise UserError("the sound cannot be read: send a WAV, FLAC, OGG or MP3 file") from error
        if not len(sound):
            raise UserError("the sound is empty: send one that has samples")
        if len(sound) > extractor.n_samples:
            raise UserError(f"the sound is longer than the {max_s} s that this model reads at once: send it in parts")
        return {"sound": sound} | ({"tokens": self._tokenize(example["text"])} if "text" in example else {})

    def _tokenize(self, text: str) -> np.ndarray:
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return np.asarray(ids[: self.sequence_length], dtype=np.int64)

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Compute the spectrograms; the decoder reads prompt and transcript, and the targets are the next transcript tokens."""
        rows = [np.concatenate([self.decoder_prompt, sample["tokens"]]) for sample in samples]
        ids_BL, _ = pad_rows([row[:-1] for row in rows], self.tokenizer.pad_token_id)
        targets_BL, _ = pad_rows([row[1:] for row in rows], IGNORE_INDEX)
        targets_BL[:, : len(self.decoder_prompt) - 1] = IGNORE_INDEX  # the prompt is not predicted
        inputs = {"input_features": self.features([sample["sound"] for sample in samples]), "decoder_input_ids": ids_BL}
        count = int((targets_BL != IGNORE_INDEX).sum())
        decoder_tokens = sum(len(row) - 1 for row in rows)
        return Batch(inputs, targets_BL, count, tokens=len(rows) * self.encoder_positions + decoder_tokens)

    def features(self, sounds: Sequence[np.ndarray]) -> Tensor:
        """Return the log-mel spectrograms of audio, int16 [N] each, padded with silence: float32 [B, M, F]."""
        floats = [np.asarray(sound, dtype=np.float32) / FULL_SCALE for sound in sounds]
        rate = self.feature_extractor.sampling_rate
        features = self.feature_extractor(floats, sampling_rate=rate, return_tensors="pt")
        spectrograms: Tensor = features["input_features"]
        return spectrograms

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross-entropy, in nats, over the transcripts' tokens and end tokens."""
        return super().loss(model, with_model_dtype(model, batch))

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return each example's likelihood, the words of its transcript, and the word errors of the generated transcript."""
        batch = with_model_dtype(model, batch)
        scores = super().score(model, batch)
        references = [self._decode(row[row != IGNORE_INDEX].tolist()) for row in batch.targets]
        hypotheses = [self._decode(ids) for ids in self._generate(model, batch.inputs["input_features"])]
        errors, words = word_errors(references, hypotheses)
        return scores | {"errors": errors, "words": words}

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return the word error rate (errors per reference word), the loss per token, and the perplexity."""
        return {"wer": float(scores["errors"].sum() / max(scores["words"].sum(), 1))} | super().summarize(scores)

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Transcribe each {"audio" or "sound", "temperature", "language"}, or return the logprobs of its "text", if it has one.

        Decoding is greedy unless there is a temperature, by transformers' `generate`; requests with equal options are batched.
        """
        prepared = [request if "sound" in request else request | self.prepare(request) for request in requests]
        answers: dict[int, dict[str, Any]] = {}

        def options(i: int) -> tuple[float, str]:
            return float(prepared[i].get("temperature") or 0), str(prepared[i].get("language") or "")

        without_text = sorted((i for i, request in enumerate(prepared) if "tokens" not in request), key=options)
        for (temperature, language), group in groupby(without_text, key=options):
            indices = list(group)
            features = self.features([prepared[i]["sound"] for i in indices])
            parameter = next(model.parameters())
            features = features.to(parameter.device, parameter.dtype)
            for i, ids in zip(indices, self._generate(model, features, temperature, language), strict=True):
                answers[i] = {"text": self._decode(ids), "tokens": ids}
        for i, request in enumerate(prepared):
            if "tokens" in request:
                answers[i] = self._transcript_logprobs(model, request)
        return [answers[i] for i in range(len(prepared))]

    def _generate(self, model: nn.Module, features_BMF: Tensor, temperature: float = 0.0, language: str = "") -> list[list[int]]:  # fmt: skip
        """Return the tokens that the model generates for each spectrogram, without prompt and end token."""
        module: Any = getattr(model, "module", model)
        max_new_tokens = module.config.max_target_positions - max(len(self.decoder_prompt), MAX_PROMPT_TOKENS)
        is_sharded = any(hasattr(p, "ds_id") for p in module.parameters())  # by ZeRO-3: all ranks must run each step
        prompt: dict[str, Any] = {}  # without a prompt, `generate` detects the language
        if language or not self.detects_language:
            prompt_ids = self.prompt_for_language(language) if language else self.decoder_prompt
            prompt["decoder_input_ids"] = torch.tensor([prompt_ids] * len(features_BMF), device=features_BMF.device)
        with quiet_transformers():  # it warns of options that it sets itself
            ids_BL = module.generate(
                features_BMF, max_new_tokens=min(self.sequence_length, max_new_tokens), do_sample=temperature > 0,
                temperature=temperature, num_beams=1, synced_gpus=is_sharded, **prompt,
            )  # fmt: skip
        end_ids = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return [[token for token in row if token not in end_ids] for row in ids_BL.tolist()]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _transcript_logprobs(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        """Return the log-probability, in nats, of each token of the transcript and of its end token."""
        batch = with_model_dtype(model, self.collate([request]).to(next(model.parameters()).device))
        logits_LV = model(**batch.inputs, use_cache=False).logits[0].float()
        targets_L = batch.targets[0]
        is_target_L = targets_L != IGNORE_INDEX
        logprobs_L = logits_LV[is_target_L].log_softmax(1).gather(1, targets_L[is_target_L, None])[:, 0]
        return {"logprobs": logprobs_L.tolist()}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the first seconds of three utterances, each with its transcript."""
        rate, requests = self.feature_extractor.sampling_rate, []
        for i in range(min(3, split.num_rows)):
            audio = base64.b64encode(encode_wav(split.sound(i)[: GOLDEN_S * rate], rate)).decode()
            requests.append({"audio": audio, "text": self._decode(split.document(i).tolist())})
        return requests


def with_model_dtype(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch with its spectrograms in the dtype of the model's weights: Whisper does not convert them itself."""
    dtype = next(getattr(model, "module", model).parameters()).dtype
    features = batch.inputs["input_features"].to(dtype)
    return replace(batch, inputs=batch.inputs | {"input_features": features})


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pair of texts the substituted, deleted and inserted words, and the words of the reference: int64 [B] each."""
    try:
        from jiwer import process_words
    except ImportError as error:
        raise UserError("the word error rate needs the package jiwer: pip install 'manta-train[audio]'") from error
    outputs = [
        process_words(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    errors = [output.substitutions + output.deletions + output.insertions for output in outputs]
    words = [output.hits + output.substitutions + output.deletions for output in outputs]
    return np.array(errors, dtype=np.int64), np.array(words, dtype=np.int64)
