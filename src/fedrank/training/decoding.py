"""Decoding: what an adapter's model writes after prompts, greedily or drawn, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fedrank import together
from fedrank.adapter import Adapter
from fedrank.config import Generation
from fedrank.protocol import rng
from fedrank.training import fused, tasks
from fedrank.training.data import Rows, numbers
from fedrank.training.hooks import live
from fedrank.training.local import Trainer, drawn
from fedrank.training.models import ModelError, longest


@dataclass(frozen=True, eq=False)
class Prompts:
    """Different prompts, and the completions that the rows have for each. cut: of how many the start was too much.

    ids: of each its tokens, by their length.
    """

    text: list[str]
    ids: list[np.ndarray]
    references: list[list[str]]
    cut: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts for one adapter. first: the number of the first of them, by which draws are addressed."""

    adapter: Adapter
    ids: Sequence[np.ndarray]
    base_updates: tuple[Adapter, ...] = ()
    first: int = 0


@dataclass(frozen=True, eq=False)
class Decoder:
    """Writes with a trainer's frozen model. seed: of what is drawn. chats: prompts are written by the chat template."""

    trainer: Trainer
    settings: Generation
    seed: int
    chats: bool = False

    def prompts(self, rows: Rows) -> Prompts:
        """Of these rows, as many as are wanted; rows with one prompt are its references."""
        model, room, most = self.trainer.model, self.room, self.settings.prompts
        which = numbers(rows.text)
        first = np.unique(which, return_index=True)[1]
        assert rows.completion is not None
        references: list[list[str]] = [[] for _ in first]
        for at, completion in zip(which.tolist(), rows.completion, strict=True):
            references[at].append(completion)
        kept = np.arange(len(first))
        if most is not None and most < len(first):
            kept = np.sort(rng(self.seed, "prompts").permutation(len(first))[:most])
        heads = tasks.prompt_tokens(rows.take(first[kept]), model.tokenizer)
        order = sorted(range(len(kept)), key=lambda at: len(heads[at]))
        return Prompts(
            [rows.text[first[kept[at]]] for at in order], [np.array(heads[at][-room:]) for at in order],
            [references[kept[at]] for at in order], sum(len(head) > room for head in heads),
        )  # fmt: skip

    @cached_property
    def room(self) -> int:
        """The tokens that a prompt may have for as many as are written to fit behind it."""
        most = longest(self.trainer.model.base, self.trainer.model.tokenizer)
        if (room := most - self.settings.max_tokens) < 1:
            raise ModelError(f"generation.max_tokens={self.settings.max_tokens}: the model reads at most {most} tokens")
        return room

    def write(self, asked: Asked) -> list[str]:
        """What follows each prompt, without what ends it."""
        found: list[str] = together.ask(self.write_all, asked)
        return found

    def write_all(self, asked: list[Asked]) -> list[list[str] | Exception]:
        """Of several adapters, one after the other."""
        return [together.outcome(partial(self._write, one)) for one in asked]

    def _write(self, asked: Asked) -> list[str]:
        trainer, size = self.trainer, self.settings.batch_size
        on = live(asked.adapter, Adapter({}, asked.adapter.scale, {}), "", trainer.device)
        found = list[str]()
        with torch.inference_mode(), fused.mounted(trainer.frozen, [on], *trainer.updated(asked.base_updates)):
            for at in range(0, len(asked.ids), size):
                found += self._batch(asked.ids[at : at + size], asked.first + at)
        return found

    def _batch(self, ids: Sequence[np.ndarray], number: int) -> list[str]:
        """What follows each of these, padded on the left."""
        model, device = self.trainer.model, self.trainer.device
        width = max(map(len, ids))
        there = np.array([np.arange(width) >= width - len(one) for one in ids])
        tokens = np.full(there.shape, model.tokenizer.pad_token_id, np.int64)
        tokens[there] = np.concatenate(ids)
        base, config = self.trainer.frozen.base, self._config
        with drawn(device, rng(self.seed, "decoding", number)), _without_settings(base):
            written = base.generate(
                torch.from_numpy(tokens).to(device), attention_mask=torch.from_numpy(there.astype(np.int64)).to(device),
                generation_config=config,
            )  # fmt: skip
        texts: list[str] = model.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @cached_property
    def _config(self) -> GenerationConfig:
        settings, tokenizer = self.settings, self.trainer.model.tokenizer
        drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        return GenerationConfig(
            max_new_tokens=settings.max_tokens, do_sample=settings.temperature > 0, use_cache=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(self.ends), **(drawn if settings.temperature else {}),
        )  # fmt: skip

    @cached_property
    def ends(self) -> set[int]:
        """The tokens that end a text: the tokenizer's, those of the model's own generation, and of its chat template."""
        model = self.trainer.model
        own = model.base.generation_config.eos_token_id
        found = {model.tokenizer.eos_token_id, *(own if isinstance(own, Iterable) else [own])}
        if self.chats:
            found.add(tasks.turn_end(model.tokenizer))
        return {one for one in found if one is not None}


@contextmanager
def _without_settings(base: Any) -> Iterator[None]:
    """The model's own generation settings away: they would take the place of whatever a run leaves open."""
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
