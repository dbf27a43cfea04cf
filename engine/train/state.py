"""All that resume needs beside the weights and the optimizer: what isn't here must not matter."""

from __future__ import annotations

from dataclasses import dataclass

from engine.data.order import add_hashes


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # samples seen
    tokens: int = 0  # tokens seen, padding left out
    samples_hash: int = 0  # sum modulo 2**64 of the hashes of all sample ids seen, whatever rank saw them

    def after(self, samples: int, tokens: int, ids_hash: int) -> TrainState:
        """Return the state one step on."""
        return TrainState(
            self.step + 1, self.samples + samples, self.tokens + tokens, add_hashes([self.samples_hash, ids_hash])
        )
