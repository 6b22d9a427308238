"""mmsae: helpers behind the notebooks that study sparse autoencoders in multimodal models."""

__version__ = "0.1.0"
