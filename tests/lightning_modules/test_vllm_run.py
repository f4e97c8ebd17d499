"""The served engine in one run of a Trainer: what servers are asked for at its start, and what is left at its end."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_modules import grpo
from tests.lightning_modules.conftest import letters, served
from tests.vllm_stub import error


class Fail(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer, module, *_):
        raise self.error


@pytest.mark.parametrize(
    ("end", "raised"), [(ValueError("of training"), ValueError), (KeyboardInterrupt(), SystemExit)]
)
def test_a_run_that_ends_with_an_error_takes_its_adapter_away(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, tmp_path, end, raised
) -> None:
    monkeypatch.setattr(grpo, "reward", letters)
    with pytest.raises(raised):
        fit(served(tiny_model_dir, lora, stub.url), make_items([1, 2]), max_steps=3, callbacks=[Fail(end)])
    assert stub.loads and not stub.adapters and not list((tmp_path / "adapters").iterdir())


def test_an_adapter_that_cannot_be_unloaded_hides_no_error(
    stub, tiny_model_dir, lora, make_items, fit, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(grpo, "reward", letters)

    class FailAfterwards(Fail):
        def on_train_batch_end(self, *arguments):
            stub.wrap = lambda path, answer: (403, error("not you")) if path == "unload_lora_adapter" else answer()
            super().on_train_batch_end(*arguments)

    failing = FailAfterwards(ValueError("of training"))
    with pytest.raises(ValueError, match="of training"):
        fit(served(tiny_model_dir, lora, stub.url), make_items([1, 2]), max_steps=3, callbacks=[failing])
    assert "may still have this run's adapter" in caplog.text and "not you" in caplog.text
    assert stub.adapters
