"""The prompt of CPT: embeddings of in-context examples plus a bounded change of them (arXiv 2410.17222, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..prompt_learning import BasePromptEncoder

LABEL, INPUT = 0, 2  # `type % 4` of the tokens that the loss is of, and of those with a bound of their own


class CPTEmbedding(BasePromptEncoder):
    """`embedding` (T, D), those of the examples' tokens, and `delta_embedding` (T, D), which trains.

    Labels are not changed: their delta stays 0. The others' are projected onto a ball around 0 before they are used
    (section 4.3), also in memory, so that the optimizer goes on from there.
    """

    has_loss = True
    fixed = ("embedding.weight",)

    def __init__(self, config, word_embeddings):
        super().__init__(config)
        self.config = config
        self.delta_embedding = nn.Embedding(*self.embedding.weight.shape)
        if self.embedding.weight.is_meta:
            return
        nn.init.zeros_(self.delta_embedding.weight)
        ids = torch.tensor(config.cpt_token_ids)
        if ids.min() < 0 or ids.max() >= word_embeddings.num_embeddings:
            raise ValueError(f"cpt_token_ids must be tokens from 0 to {word_embeddings.num_embeddings - 1}")
        self.start_from(word_embeddings, ids)

    def _types(self) -> torch.Tensor:
        return torch.tensor(self.config.cpt_tokens_type_mask, device=self.embedding.weight.device)

    def mask(self):
        return torch.tensor(self.config.cpt_mask, device=self.embedding.weight.device)

    def projected(self, delta: torch.Tensor) -> torch.Tensor:
        """Every token's change (T, D) brought back to its bound in the 2-norm, which for labels is 0."""
        types, config = self._types(), self.config
        bound = torch.full(types.shape, config.opt_projection_format_epsilon, device=delta.device, dtype=delta.dtype)
        bound[types % 4 == INPUT] = config.opt_projection_epsilon
        bound *= (delta.shape[1] / 2048) ** 0.5  # epsilon is given for embeddings of this width
        bound[(types % 4 == LABEL) & (types > 0)] = 0
        norm = delta.norm(dim=1)
        factor = torch.where(norm > bound, bound / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1)
        return delta * factor.unsqueeze(1)

    def forward(self, indices):
        delta, types = self.delta_embedding, self._types()
        delta.weight.data.copy_(self.projected(delta.weight.data))
        trains = ~((types % 4 == LABEL) & (types > 0))[indices]
        return self.embedding(indices) + delta(indices) * trains.unsqueeze(-1)

    def loss(self, logits, labels, input_type_mask=None):
        """The loss of the labels of all examples and of the text (section 4.2).

        Args:
            logits: (B, T + L, vocabulary).
            labels: (B, L); -100 is left out.
            input_type_mask: (B, L), the types of the text's tokens, of which the labels count; None: all count.
        """
        rows, own = len(labels), self._types()
        types = torch.full_like(labels, 4) if input_type_mask is None else input_type_mask.to(labels)
        if types.shape != labels.shape:
            raise ValueError(f"input_type_mask must have the shape of labels, {tuple(labels.shape)}, got {types.shape}")
        shift = 4 * -(-own.max() // 4)  # the text is one more example, after the others
        types = torch.cat([own.expand(rows, -1), torch.where(types > 0, types + shift, types)], dim=1)[:, 1:]
        counts = torch.cat([labels.new_ones(rows, len(own)), labels != -100], dim=1)[:, 1:].bool()
        is_label = (types % 4 == LABEL) & (types > 0) & counts
        tokens = torch.tensor(self.config.cpt_token_ids, device=labels.device).expand(rows, -1)
        targets = torch.cat([tokens, labels], dim=1)[:, 1:].masked_fill(~is_label, -100)
        each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
        weights = self._weights(types, is_label).to(each)
        return (each.view(rows, -1) * weights).sum() / is_label.sum()

    def _weights(self, types: torch.Tensor, is_label: torch.Tensor) -> torch.Tensor:
        """factor^(number of examples after it), for each token; 1 without decay."""
        weights = torch.ones_like(types, dtype=torch.float32)
        if self.config.opt_weighted_loss_type == "decay":
            for row, labels in enumerate(is_label):
                examples = types[row][labels].unique(sorted=True)
                for after, example in enumerate(examples.flip(0).tolist()):
                    weights[row, types[row] == example] = self.config.opt_loss_decay_factor**after
        return weights

    # Files hold the finished prompt: the change is what it differs by from the tokens' embeddings.

    @torch.no_grad()
    def finished(self, own):
        return own["embedding.weight"] + self.projected(own["delta_embedding.weight"])

    def from_file(self, tensors):
        tensors = super().from_file(tensors)
        prompt = tensors.get("prompt_encoder.embedding.weight")
        if prompt is not None:
            delta, base = torch.zeros_like(prompt), self.embedding.weight
            if self.delta_embedding.weight.requires_grad and not base.is_meta and base.shape == prompt.shape:
                delta, tensors["prompt_encoder.embedding.weight"] = prompt.to(base) - base.detach(), base.detach()
            tensors["prompt_encoder.delta_embedding.weight"] = delta
        return tensors
