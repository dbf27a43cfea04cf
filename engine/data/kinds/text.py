"""Text without labels, which is packed into blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import DataConfig
from engine.data.document import is_encodable
from engine.data.file_formats import check_text_column
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, Row


@dataclass(frozen=True)
class Text(DataKind):
    """Documents, each followed by an end token. Samples: `engine.data.packing.pack`."""

    name = "text"
    description = "text without labels"
    hint = "leave out data.label_column and data.image_column, or use data=python_stdlib"
    uses_tokenizer_template = False

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Match where no column but the text is named."""
        columns = (config.label_column, config.image_column, config.audio_column)
        return not any(columns) and config.source != "python_functions"

    @property
    def columns(self) -> dict[str, str]:
        """The text."""
        return {self.config.text_column: "data.text_column"}

    def check_schema(self, address: str, schema: Any) -> None:
        """Raise UserError where the column holds no text."""
        check_text_column(address, self.config.text_column, schema)

    def read(self, rows: Iterable[dict[str, Any]], file: InputFile, counts: Counter[str]) -> Iterator[Row]:
        """Yield the text of each row that has one."""
        for row in rows:
            text = row.get(self.config.text_column)
            if isinstance(text, str) and is_encodable(text):
                yield Row(text)
            else:
                counts["without text"] += 1
