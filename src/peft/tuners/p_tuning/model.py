"""The prompt of P-tuning: `MLP(h)` or `MLP(BiLSTM(h))` of trained vectors h (arXiv 2103.10385, section 3.2)."""

from torch import nn

from ...utils.warning import warn
from ..prompt_learning import BasePromptEncoder


class PromptEncoder(BasePromptEncoder):
    """Trained vectors `embedding.weight` (S T, D) and the network `mlp_head`, with `lstm_head` before it."""

    head_name = "mlp_head"

    def __init__(self, config, word_embeddings=None):
        super().__init__(config)
        if config.inference_mode:
            return  # the finished prompt
        width, hidden = self.width(config), config.encoder_hidden_size
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                width, hidden, config.encoder_num_layers, batch_first=True, bidirectional=True,
                dropout=config.encoder_dropout if config.encoder_num_layers > 1 else 0.0,
            )  # fmt: skip
            sizes = (2 * hidden, 2 * hidden, width)
        else:
            if (config.encoder_num_layers, config.encoder_dropout) != (2, 0.0):
                warn(
                    f"encoder_num_layers={config.encoder_num_layers} and encoder_dropout={config.encoder_dropout} are "
                    "for the LSTM; the MLP has always two inner layers, without dropout"
                )
            sizes = (width, hidden, hidden, width)
        layers = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.ReLU())]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self, indices):
        vectors = self.embedding(indices)
        if self.head is None:
            return vectors
        if hasattr(self, "lstm_head"):
            vectors = self.lstm_head(vectors)[0]
        return self.mlp_head(vectors)

    def _drop_head(self):
        super()._drop_head()
        if hasattr(self, "lstm_head"):
            del self.lstm_head
