"""A CLIP tower with fewer tokens an image: importing this tells transformers of it."""

import torch
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel


class PooledCLIPConfig(CLIPVisionConfig):
    """``patch_size`` is that of a pooled token, ``pool`` by ``pool`` patches of the tower."""

    model_type = "clip_vision_pooled"
    pool: int = 2


class PooledCLIP(CLIPVisionModel):
    """A CLIP tower whose patch tokens are averaged over squares of ``pool`` x ``pool`` of them, at every layer."""

    config_class = PooledCLIPConfig

    def __init__(self, config):
        fine = CLIPVisionConfig(**config.to_dict() | {"patch_size": config.patch_size // config.pool})
        super().__init__(fine)
        self.config = config

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = self._pooled(out.last_hidden_state)
        if out.hidden_states:  # None stands for one that is not asked for
            out.hidden_states = tuple(one if one is None else self._pooled(one) for one in out.hidden_states)
        return out

    def _pooled(self, tokens):
        side = round((tokens.shape[1] - 1) ** 0.5)
        grid = tokens[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)
        return torch.cat([tokens[:, :1], torch.nn.functional.avg_pool2d(grid, self.config.pool).flatten(2).mT], 1)


AutoConfig.register("clip_vision_pooled", PooledCLIPConfig)
AutoModel.register(PooledCLIPConfig, PooledCLIP)
