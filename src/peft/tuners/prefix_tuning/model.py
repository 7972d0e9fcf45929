"""The prefix: trained keys and values in front of those of every layer (arXiv 2101.00190, section 4)."""

from torch import nn

from ..prompt_learning import BasePromptEncoder


class PrefixEncoder(BasePromptEncoder):
    """`embedding.weight` (T, layers x 2 x width of a key), or, with a projection, (T, D) and the network `transform`.

    An encoder-decoder has them in the self-attention of its decoder.
    """

    kind = "key_values"
    head_name = "transform"

    def __init__(self, config, word_embeddings=None):
        nn.Module.__init__(self)
        self.total_virtual_tokens = config.num_virtual_tokens
        size = 2 * config.num_layers * config.token_dim
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            hidden = config.encoder_hidden_size
            self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, size))
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, size)
        if config.init_weights == "zero":
            last = self.embedding if self.head is None else self.transform[2]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, prefix):
        vectors = self.embedding(prefix)
        return vectors if self.head is None else self.transform(vectors)
