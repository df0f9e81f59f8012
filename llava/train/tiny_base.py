"""Make a tiny LLaVA from training data alone, so that stages 2 and 3 can be run and learn on two CPU cores.

Its vision tower is the one that the tiny stage-1 detector shares; beside a detector that shares none it is a small
CLIP tower with random weights. Its tokeniser and its small Llama are trained on the training conversations, with the
word `real` or `fake` standing where the evidence will stand, beside it the region that was edited, by what trace, and
the kind of fake where the data say one, and another record's picture before it: like LLaVA-1.5, the base understands
what it is told and cannot find it out itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from llava.core.config import setting, to_dict
from llava.core.runtime import atomic_path, write_json, write_run
from llava.core.types import LABEL_NAMES, Record
from llava.core.weights import read_config
from llava.data.answer_texts import KIND_TAG
from llava.data.conversations import ConversationSource, open_conversations
from llava.detectors.base import Detector, SharedTower
from llava.detectors.base import load as load_detector
from llava.detectors.m2f2det_parts import ClipVisionSizes
from llava.detectors.published import ready_detector
from llava.explainer.modeling import ForgeryLlavaConfig
from llava.explainer.processing import ExplainerProcessor
from llava.explainer.prompts import lay_out, plain_text, strip_tags
from llava.train.engine import usable_precision

log = logging.getLogger(__name__)
TOLD_TAGS = ("region", "artefact", KIND_TAG)
OWN_TOWER = ClipVisionSizes(
    image_size=64, patch_size=16, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<deepfake>")


@dataclass(frozen=True, kw_only=True)
class TinyBaseConfig:
    """Settings of `m2f2 tiny-base`."""

    data: list[str] = setting(help="training conversation files (never the test ones)")
    image_folder: str = setting(help="folder or zip that image names start from")
    detector: str = setting(help="stage-1 folder; the vision tower that it shares, if any, becomes the base's")
    vision: ClipVisionSizes | None = setting(
        None, "sizes of the base's own vision tower, beside a detector that shares none (default: 64 px, 16 patches)"
    )
    out: str = setting("checkpoints/llava_tiny", "where the base is written")
    vocab_size: int = setting(1500, "tokens of the tokeniser")
    hidden_size: int = setting(192, "width of the language model")
    layers: int = setting(4, "layers of the language model")
    heads: int = setting(6, "attention heads of the language model")
    steps: int = setting(600, "training steps, whatever the size of the data")
    batch_size: int = setting(16, "conversations per step")
    lr: float = setting(1e-3, "highest learning rate")
    seed: int = setting(0, "seed of initial weights and order")


def make_tiny_base(config: TinyBaseConfig) -> dict[str, float]:
    """Train tokeniser and language model and write a LLaVA folder; gives the training metrics."""
    sources = [_open_training(path, config.image_folder) for path in config.data]
    detector_folder = ready_detector(config.detector)
    write_run(config.out, to_dict(config), config.seed)
    set_seed(config.seed)
    tokenizer = train_tokenizer(_texts(sources), config.vocab_size)
    detector = load_detector(detector_folder)
    model = make_llava(config, detector, len(tokenizer))
    metrics = _train(model, _processor(tokenizer, model.config), sources, config)
    with atomic_path(Path(config.out) / "model") as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        settings = read_config(staged) | {
            "deepfake_model_name": detector.name,
            "deepfake_model_path": str(detector_folder),
            "deepfake_model_sha256": detector.fingerprint(),
            "mm_vision_select_feature": "cls_patch",
            "image_aspect_ratio": "square",
        }
        write_json(staged / "config.json", settings)
    log.info("wrote a tiny LLaVA to %s", Path(config.out) / "model")
    return metrics


def make_llava(config: TinyBaseConfig, detector: Detector, vocab_size: int) -> LlavaForConditionalGeneration:
    """Build the LLaVA with random words and a frozen vision tower: the one that the detector shares, or its own.

    Raises ValueError for a detector that was saved without the tower that it needs, and for sizes that are not used.
    """
    shared = detector.shared_tower()
    if shared is None:
        sizes = asdict(config.vision or OWN_TOWER)
        shared = SharedTower(prefix="", select_layer=sizes.pop("select_layer"), config=CLIPVisionConfig(**sizes))
        model = LlavaForConditionalGeneration(llava_config(config, shared, vocab_size))
    elif detector.shares_vision:
        raise ValueError(
            f"{config.detector!r} was saved without the vision tower that it reads, so no base can be made for it; "
            "merge it into the base that it was trained with."
        )
    elif config.vision is not None:
        raise ValueError(f"vision: {config.detector!r} shares its own tower with the base; leave the sizes out.")
    else:
        model = LlavaForConditionalGeneration(llava_config(config, shared, vocab_size))
        model.model.vision_tower.load_state_dict(detector.tower_tensors())
    model.model.vision_tower.requires_grad_(False)
    return model


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokeniser with LLaVA's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


class _ToldConversations(Dataset[dict[str, Any]]):
    """Conversations in which the verdict is told as a word; every text token is learned."""

    def __init__(self, sources: Sequence[ConversationSource], processor: ExplainerProcessor) -> None:
        self.items = [(source, record) for source in sources for record in source.records]
        self.processor = processor
        self.pixels: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, record = self.items[index]
        if record.where not in self.pixels:
            self.pixels[record.where] = self.processor.pixels(source.load(record).image)["pixel_values"]
        ids, _ = self.processor.encode(source.turns(record), evidence_words=_words(record))
        image = self.processor.config.image_token_id
        labels = [-100 if token == image else token for token in ids]
        return {"input_ids": ids, "labels": labels, "pixel_values": self.pixels[record.where], "detector_inputs": {}}


def _words(record: Record) -> str:
    """Give what the evidence will say: the label, and edited region, artefact, kind of fake (or `none`) if known."""
    if record.label is None:
        raise ValueError(f"Record {record.id!r} has no label; make the files with `m2f2 data ddvqa`, which keeps it.")
    return " ".join([LABEL_NAMES[record.label], *(record.tags[n] or "none" for n in TOLD_TAGS if n in record.tags)])


def _train(
    model: LlavaForConditionalGeneration,
    processor: ExplainerProcessor,
    sources: Sequence[ConversationSource],
    config: TinyBaseConfig,
) -> dict[str, float]:
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = {k: v for k, v in processor.collate(items).items() if k != "detector_inputs"}
        # Everybody gets a neighbour's picture: the base must not learn a verdict from pixels.
        return batch | {"pixel_values": batch["pixel_values"].roll(1, dims=0)}

    arguments = TrainingArguments(
        output_dir=str(Path(config.out) / "training"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        logging_steps=20,
        seed=config.seed,
        dataloader_drop_last=True,  # a batch of one would keep its own picture
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=usable_precision("auto") == "bf16",  # a third faster on a CPU that multiplies in bf16
    )
    dataset = _ToldConversations(sources, processor)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    result = trainer.train()
    write_json(Path(config.out) / "history.json", trainer.state.log_history)
    return result.metrics


def llava_config(config: TinyBaseConfig, tower: SharedTower, vocab_size: int) -> LlavaConfig:
    """Describe a LLaVA with a small Llama and a tower like that one."""
    vision = tower.config
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 8 // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        vision_feature_layer=tower.select_layer,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )


def _processor(tokenizer: PreTrainedTokenizerFast, config: LlavaConfig) -> ExplainerProcessor:
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    return ExplainerProcessor(tokenizer, ForgeryLlavaConfig(**values, detector={}), {})


def _texts(sources: Sequence[ConversationSource]) -> Iterator[str]:
    for source in sources:
        for record in source.records:
            turns = [replace(turn, text=strip_tags(turn.text)) for turn in source.turns(record)]
            yield plain_text(lay_out(turns))


def _open_training(path: str, image_folder: str) -> ConversationSource:
    source = open_conversations(path, image_folder)
    if Path(path).parent.name == "test" or any(record.split == "test" for record in source.records):
        raise ValueError(f"{path!r} holds test conversations, which the base must not see; give the training files.")
    return source
