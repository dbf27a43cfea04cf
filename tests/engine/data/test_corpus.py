from collections import Counter
from collections.abc import Callable

from engine.config import Config
from engine.data.python_stdlib import stdlib_folder
from tests.engine.data.conftest import documents


def test_corpus_depends_on_config_and_seed_alone(configured: Callable[..., Config]) -> None:
    config = configured(source="python_stdlib", max_documents=50).data
    first, again, other = (list(documents(config, seed, Counter())) for seed in (0, 0, 1))
    assert first == again
    assert [d.split for d in first] != [d.split for d in other] or [d.source for d in first] != [
        d.source for d in other
    ]
    assert all((stdlib_folder() / d.source).read_text(encoding="utf-8") == d.text for d in first)
