"""The check of tests/deprecations.py fails where it should, and only there."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from deprecations import CATEGORIES, LIBRARIES, DeprecatedCall
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def test_an_argument_that_transformers_drops_is_an_error() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaModel(LlamaConfig(vocab_size=8, **sizes))
    model(input_ids=torch.zeros(1, 2, dtype=torch.long), cache=None)
    with pytest.raises(FutureWarning, match=r"`past_key_values` is deprecated"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=None)


def test_what_transformers_only_logs_is_an_error_each_time() -> None:
    for _ in range(2):  # `warning_once` forgets a call that has raised
        with pytest.raises(DeprecatedCall, match=r"transformers.*`past_key_values`.* deprecated"):
            BaseModelOutputWithPast(past_key_values=None)
    logging.getLogger("transformers.trainer").warning("Something else.")


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_is_listened_to(library: str) -> None:
    with pytest.raises(DeprecatedCall, match="will be removed in 9"):
        logging.getLogger(f"{library}.some.module").warning("`x` %s", "will be removed in 9")


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", [*LIBRARIES, "llava.train.engine", "torch.nn.modules.module", "test_cli", "servers"])
def test_a_deprecation_is_an_error_by_the_module_it_is_laid_to(module: str, category: str) -> None:
    kind = getattr(__import__("builtins"), category)
    with pytest.raises(kind, match="old"):
        warnings.warn_explicit("old", kind, "file.py", 1, module=module)


@pytest.mark.parametrize("module", ["pandas.core.frame", "gradio.queueing", "rayleigh", "torchmetrics"])
def test_what_others_say_to_themselves_is_none(module: str, recwarn: pytest.WarningsRecorder) -> None:
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)


def test_our_own_call_is_an_error() -> None:
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
