"""The prompt of prompt tuning: a table of vectors (arXiv 2104.08691, section 2)."""

from __future__ import annotations

import torch

from ..prompt_learning import BasePromptEncoder


class PromptEmbedding(BasePromptEncoder):
    """One trained vector per virtual token, `embedding.weight` (S T, D)."""

    def __init__(self, config, word_embeddings):
        super().__init__(config)
        if config.inference_mode or self.embedding.weight.is_meta:
            return  # its numbers come from a file
        if config.prompt_tuning_init == "TEXT":
            self.start_from(word_embeddings, self._text_ids(config))
        elif config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(word_embeddings.num_embeddings, (self.total_virtual_tokens,))
            self.start_from(word_embeddings, ids)

    def _text_ids(self, config) -> torch.Tensor:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
        ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise ValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens")
        return torch.tensor(ids * -(-self.total_virtual_tokens // len(ids)))[: self.total_virtual_tokens]
